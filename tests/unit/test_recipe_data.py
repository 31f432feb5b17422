"""What is wrong with a training folder is told in one line, before anything slow begins."""

import numpy as np
import pytest
from PIL import Image

from inference.bundle import load_bundle
from tests.bundles.make import make_bundle
from tests.cohorts import SIDE, change, cohort_folder, read, write
from weights.recipe.cases import WrongBundle, from_cohort
from weights.recipe.checks import LEFT, check_pictures, check_training
from weights.recipe.data import (
    LABELS,
    BadBoxes,
    BadData,
    BadPictures,
    TooFewPatients,
    read_boxes,
    read_cohort,
)
from weights.recipe.judge import of_cohort
from weights.recipe.pictures import BadPicture

FOLDS = 4


@pytest.fixture
def folder(tmp_path):
    return cohort_folder(tmp_path)


def add_folds(folder, folds):
    """folds : patient -> fold"""
    path = folder / "manifest.csv"
    write(path, [line | {"fold": folds(int(line["patient"]))} for line in read(path)])


def test_a_good_folder_passes(folder):
    check_training(folder, FOLDS)

    cohort = read_cohort(folder)
    assert cohort.labels.shape == (28, len(LABELS))
    assert cohort.folds is None
    assert cohort.is_female[:2].all()
    assert not cohort.is_female[2:4].any()
    assert cohort.grey(np.array([0, 1])).shape == (2, SIDE, SIDE)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"any": None}, "no column 'any'"),
        ({"subdural": None}, "no column 'subdural'"),
        ({"age_years": None}, "no column 'age_years'"),
        ({"any": "2"}, "line 5: any '2' is neither 0 nor 1"),
        ({"fracture": ""}, "line 5: fracture '' is neither 0 nor 1"),
        ({"age_years": "old"}, "line 5: age_years 'old' is no number"),
        ({"age_years": "nan"}, "line 5: age_years 'nan' is no number"),
        ({"age_years": "-3"}, "line 5: age_years and fold must not be negative"),
        ({"patient": "A7"}, "line 5: patient 'A7' is no whole number"),
        ({"slice": "1.5"}, "line 5: slice '1.5' is no whole number"),
        ({"brain": ""}, "line 5: column brain names no picture"),
        ({"slice": "0", "patient": "0"}, "line 5: patient 0, slice 0 is there already, in line 2"),
    ],
)
def test_a_wrong_table_is_refused_with_line_or_column(folder, values, words):
    change(folder / "manifest.csv", 3, **values)

    with pytest.raises(BadData, match=words) as caught:
        read_cohort(folder)
    assert "manifest.csv" in str(caught.value)
    assert caught.value.code == "bad_data"


@pytest.mark.parametrize("content", [b"", b"patient,slice\n", b"\xff\xfe\x00\x01", b"\x00" * 50])
def test_what_is_no_table_is_refused(folder, content):
    (folder / "manifest.csv").write_bytes(content)

    with pytest.raises(BadData, match=r"manifest\.csv: "):
        read_cohort(folder)


def test_a_folder_without_its_tables_says_which(folder):
    (folder / "boxes.csv").unlink()
    with pytest.raises(BadBoxes, match=r"boxes\.csv: no such file"):
        check_training(folder, FOLDS)

    (folder / "manifest.csv").unlink()
    with pytest.raises(BadData, match=r"manifest\.csv: no such file"):
        check_training(folder, FOLDS)


def test_spreadsheets_write_tables_that_are_read_all_the_same(folder):
    path = folder / "manifest.csv"
    plain = read_cohort(folder)
    path.write_text("\ufeff" + path.read_text().replace(",", ";"), encoding="utf-8")

    again = read_cohort(folder)

    assert np.array_equal(again.labels, plain.labels)
    assert again.pictures == plain.pictures


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cx": None}, "no column 'cx'"),
        ({"cx": "middle"}, "line 2: cx 'middle' is no number"),
        ({"w": "0"}, "line 2: cx, cy, w and h must be fractions"),
        ({"cy": "40"}, "line 2: cx, cy, w and h must be fractions"),
        ({"PatientNumber": "x"}, "line 2: patientnumber 'x' is no whole number"),
    ],
)
def test_a_wrong_table_of_boxes_is_refused(folder, values, words):
    change(folder / "boxes.csv", 0, **values)

    with pytest.raises(BadBoxes, match=words):
        read_boxes(folder)


def test_boxes_must_lie_on_slices_of_the_table_and_one_on_a_bleed(folder):
    change(folder / "boxes.csv", 0, PatientNumber="99")
    with pytest.raises(BadBoxes, match="patient 99, slice 0 is not in"):
        check_training(folder, FOLDS)

    write(folder / "boxes.csv", [read(folder / "boxes.csv")[1] | {"PatientNumber": 1}])
    with pytest.raises(BadBoxes, match="no box lies on a slice"):
        check_training(folder, FOLDS)


def test_missing_pictures_are_counted_and_the_first_named(folder):
    for name in ("3-0.png", "5-1.png"):
        (folder / name).unlink()

    with pytest.raises(BadPictures, match=r"2 of 28 pictures are not there, first .*3-0\.png"):
        read_cohort(folder)


def test_pictures_of_one_patient_must_have_one_size(folder):
    Image.new("L", (80, SIDE)).save(folder / "3-1.png")

    with pytest.raises(BadPictures, match=r"3-1\.png: 80 x 72 pixels, but patient 3"):
        read_cohort(folder)


def test_what_is_no_picture_is_told_before_it_is_decoded(folder):
    (folder / "3-1.png").write_text("no picture")

    with pytest.raises(BadPicture, match=r"3-1\.png: no picture of a known kind"):
        read_cohort(folder)


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "webp"])
def test_a_picture_that_is_cut_off_is_named(folder, kind):
    rng, path = np.random.default_rng(0), folder / f"cut.{kind}"
    Image.fromarray(rng.integers(0, 255, (SIDE, SIDE), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    change(folder / "manifest.csv", 6, brain=path.name)

    with pytest.raises(BadPicture, match=rf"cut\.{kind}: "):
        check_pictures(read_cohort(folder))


@pytest.mark.parametrize(("label", "kind"), [("0", "positive"), ("1", "negative")])
def test_both_kinds_of_patient_are_needed(folder, label, kind):
    path = folder / "manifest.csv"
    write(path, [line | {"any": label} for line in read(path)])
    write(folder / "boxes.csv", read(folder / "boxes.csv")[:1])

    with pytest.raises(BadData, match=f"no {kind} patient|no box lies"):
        check_training(folder, FOLDS)


def test_folds_need_patients_of_each_kind(folder):
    with pytest.raises(TooFewPatients, match="7 positive patients are too few for 8 folds"):
        check_training(folder, 8)

    path = folder / "manifest.csv"
    write(path, [line for line in read(path) if int(line["patient"]) < 2 * LEFT])
    write(folder / "boxes.csv", read(folder / "boxes.csv")[:1])
    with pytest.raises(TooFewPatients, match=f"and {LEFT} must be left"):
        check_training(folder, FOLDS)


def test_a_sites_own_folds_are_read_one_a_slice(folder):
    add_folds(folder, lambda patient: patient // 2 % 4)

    check_training(folder, FOLDS)

    assert read_cohort(folder).folds.tolist() == [p // 2 % 4 for p in range(14) for _ in range(2)]


@pytest.mark.parametrize(
    ("folds", "error", "words"),
    [
        (lambda _: 0, TooFewPatients, "1 folds; 3 are needed"),
        (lambda p: p // 2 % 2, TooFewPatients, "2 folds; 3 are needed"),
        (lambda p: 2 * (p % 2), BadData, "no patient is in fold 1"),
        (lambda _: -1, BadData, "line 2: age_years and fold must not be negative"),
        (lambda _: "a", BadData, "line 2: fold 'a' is no whole number"),
        (lambda p: p % 2 + p // 13, TooFewPatients, "positive patients are too few for these"),
    ],
)
def test_folds_that_cannot_be_used_are_refused(folder, folds, error, words):
    add_folds(folder, folds)

    with pytest.raises(error, match=words):
        check_training(folder, FOLDS)


def test_a_patient_in_two_folds_is_named_by_its_number(folder):
    add_folds(folder, lambda patient: patient // 2 % 3)
    change(folder / "manifest.csv", 9, fold="1")

    with pytest.raises(BadData, match="line 11: patient 4 is in folds 2 and 1"):
        read_cohort(folder)


def test_a_bundle_of_shown_grey_cannot_be_judged_on_pictures(folder, tmp_path_factory):
    chest = load_bundle(make_bundle(tmp_path_factory.mktemp("b") / "chest", "chest"))

    with pytest.raises(WrongBundle, match="use --dicom"):
        from_cohort(read_cohort(folder), chest.manifest)


def test_another_picture_under_the_same_name_is_another_cohort(tmp_path):
    folder = cohort_folder(tmp_path)
    before = read_cohort(folder).digest()
    assert read_cohort(folder).digest() == before

    Image.fromarray(np.full((72, 72), 7, np.uint8)).save(folder / "3-1.png")

    assert read_cohort(folder).digest() != before


def test_sex_and_age_alone_are_scored_without_a_model(tmp_path):
    """Worked by hand: patients 0, 2, ... bleed; every third is a woman; the older bleed."""
    folder = cohort_folder(tmp_path)
    for line in range(28):
        change(folder / "manifest.csv", line, age_years=60 if line // 2 % 4 == 0 else 20)

    made = of_cohort(read_cohort(folder), seed=0)

    # Bleeding: 4 men, 3 women; not: 5 men, 2 women. (4 * 2 + (4 * 5 + 3 * 2) / 2) / 49
    assert made["patient_auc_of_sex_alone"]["value"] == round(21 / 49, 4)
    # Bleeding: 4 of 60 years, 3 of 20; not: 7 of 20. (4 * 7 + 3 * 7 / 2) / 49
    assert made["patient_auc_of_age_alone"]["value"] == round(38.5 / 49, 4)
    for figure in made.values():
        assert figure["low"] < figure["value"] < figure["high"]
