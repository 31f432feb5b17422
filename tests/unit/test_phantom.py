"""Phantoms say what they are, are valid, and are the same every time."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from node.phantom import Kind, Phantom, study, write
from tests.builders import compressed, ct_image, ct_series, ctich_study, other_pixels

DCIODVFY = shutil.which("dciodvfy") or shutil.which(
    "dciodvfy", path=str(Path(sys.executable).parent)
)


def hu(dataset: Dataset) -> np.ndarray:
    return dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)


def test_the_same_specification_makes_the_same_bytes():
    first, second = (study(Phantom(seed=7, matrix=64, slices=2)) for _ in range(2))

    assert [d.to_json() for d in first] == [d.to_json() for d in second]


def test_a_salt_changes_the_uids_and_nothing_else():
    first, second = ct_image(), ct_image(salt="again")

    assert first.StudyInstanceUID != second.StudyInstanceUID
    assert first.PixelData == second.PixelData


def test_a_lesion_is_dense_where_it_was_put_and_a_plain_head_is_not():
    plain, lesion = (
        hu(ct_series(kind, slices=31, matrix=128)[20]) for kind in (Kind.PLAIN, Kind.LESION)
    )
    spot = (slice(58, 68), slice(33, 37))  # under the skull on the right

    assert 60 < lesion[spot].mean() < 75
    assert 25 < plain[spot].mean() < 42


def test_a_head_has_air_brain_and_bone_in_their_places():
    image = hu(ct_image(matrix=256))

    assert image[5, 5] < -900
    assert 20 < np.median(image[100:156, 100:156]) < 42
    assert (image > 600).mean() > 0.02


def test_tilted_slices_travel_along_the_table_and_not_along_their_normal():
    first, second = ct_series(tilt_deg=18.5, slices=2, step_mm=7.0)

    travel = np.subtract(second.ImagePositionPatient, first.ImagePositionPatient).astype(float)
    row, column = np.reshape(np.asarray(first.ImageOrientationPatient, float), (2, 3))

    assert travel == pytest.approx([0, 0, 7], abs=1e-3)
    assert np.cross(row, column) @ travel == pytest.approx(7 * np.cos(np.deg2rad(18.5)), abs=1e-3)


def test_skipped_slices_leave_a_hole_and_keep_the_other_numbers():
    series = ct_series(slices=5, skip=frozenset({2}))

    assert [d.InstanceNumber for d in series] == [1, 2, 4, 5]


@pytest.mark.parametrize(("option", "series"), [("bone", 3), ("thin", 4)])
def test_a_second_series_shares_the_study(option, series):
    datasets = ct_series(slices=2, step_mm=5.0, **{option: True})

    assert {d.SeriesNumber for d in datasets} == {2, series}
    assert len({d.StudyInstanceUID for d in datasets}) == 1


def test_only_the_contrast_study_names_an_agent():
    agents = {
        kind: study(Phantom(kind=kind, matrix=32, slices=1))[-1].get("ContrastBolusAgent")
        for kind in Kind
    }

    assert [kind for kind, agent in agents.items() if agent] == [Kind.CONTRAST]


def test_the_localiser_study_has_nothing_else():
    (only,) = study(Phantom(kind=Kind.LOCALISER))

    assert only.ImageType[2] == "LOCALIZER"


@pytest.mark.skipif(DCIODVFY is None, reason="dciodvfy is not installed")
@pytest.mark.parametrize("kind", Kind)
def test_dciodvfy_finds_no_error(kind, tmp_path):
    paths = write(study(Phantom(kind=kind, matrix=64, slices=1, tilt_deg=12)), tmp_path)

    for path in paths:
        said = subprocess.run([DCIODVFY, str(path)], capture_output=True, text=True, check=False)
        assert "Error" not in said.stdout + said.stderr


def test_other_pixels_keep_the_uid():
    image = ct_image()

    twin = other_pixels(image)

    assert twin.SOPInstanceUID == image.SOPInstanceUID
    assert twin.PixelData != image.PixelData


def test_compression_keeps_pixels_and_uid(tmp_path):
    image = ct_image()
    (path,) = write([compressed(image)], tmp_path)

    back = pydicom.dcmread(path)

    assert back.file_meta.TransferSyntaxUID.is_compressed
    assert back.SOPInstanceUID == image.SOPInstanceUID
    assert np.array_equal(back.pixel_array, image.pixel_array)


def test_a_ct_ich_patient_comes_back_to_its_grey_values():
    datasets = ctich_study(105)

    values = hu(datasets[15])

    assert len(datasets) == 30
    assert values.min() == -20
    assert values.max() == pytest.approx(100)
    assert 20 < np.median(values[250:350, 200:400]) < 45
