"""Which study, which series, which pixels: each refusal with its rule (HAZARDS D)."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from db.header import InstanceHeader
from db.result import Eligibility
from inference.bundle import load_bundle
from inference.eligibility import Selection, check_pixels, judge
from inference.volume import volume_from_pictures
from inference.words import first_match
from tests.bundles.make import make_bundle
from tests.bundles.sources import CT, head, head_series, header_of, headers_of

PLAIN = header_of(head_series(1)[0])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return load_bundle(make_bundle(tmp_path_factory.mktemp("b") / "head")).manifest


def series(
    n: int = 16, step: float = 5.0, uid: str = "1.2.3.1", **fields: object
) -> dict[str, InstanceHeader]:
    """Headers of one axial head series, by instance id."""
    made = {}
    for i in range(n):
        given = {
            "series_instance_uid": uid,
            "sop_instance_uid": f"{uid}.{i}",
            "position": (0.0, 0.0, step * i),
            "slice_thickness": step,
            "instance_number": i,
        }
        made[f"{uid}-{i}"] = replace(PLAIN, **(given | fields))
    return made


def test_a_plain_head_is_selected_whole_and_in_order(manifest):
    chosen = judge(headers_of(reversed(head_series(16))), manifest)

    assert isinstance(chosen, Selection)
    assert chosen.is_complete
    assert len(chosen.instance_ids) == 16


@pytest.mark.parametrize(
    ("fields", "rule", "is_applicable"),
    [
        ({"modality": "MR"}, "modality", False),
        ({"sop_class_uid": "1.2.840.10008.5.1.4.1.1.7"}, "sop_class", False),
        ({"body_part": "CHEST"}, "body_part", False),
        ({"body_part": "", "study_description": "CT NECK"}, "body_part", False),
        ({"series_description": "C-Spine 2mm"}, "body_part", False),
        ({"study_description": "QA daily phantom"}, "phantom", True),
        ({"image_type": ("ORIGINAL", "PRIMARY", "LOCALIZER")}, "image_type", True),
        ({"image_type": ("DERIVED", "SECONDARY", "MPR")}, "image_type", True),
        ({"series_description": "CTA head"}, "series_description", True),
        ({"series_description": "Head Perfusion 10mm"}, "series_description", True),
        ({"photometric": "RGB", "samples_per_pixel": 3}, "photometric", True),
        ({"photometric": "MONOCHROME1"}, "photometric", True),
        ({"bits_stored": 8}, "bits_stored", True),
        ({"rows": 4096}, "matrix", True),
        ({"rows": None}, "matrix", True),
        ({"rescale_slope": None}, "rescale", True),
        ({"rescale_slope": 0.0}, "rescale", True),
        ({"rescale_type": "US"}, "rescale", True),
        ({"orientation": (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)}, "orientation", True),
        ({"orientation": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)}, "orientation", True),
        ({"orientation": None}, "orientation", True),
        ({"orientation": (1.0, 0.0, 0.0, 0.0, 0.78, 0.6257795)}, "tilt", True),
        ({"position": None}, "position", True),
        ({"pixel_spacing": None}, "pixel_spacing", True),
        ({"slice_thickness": 20.0}, "thickness", True),
        ({"kernel": "BONEPLUS"}, "kernel", True),
        ({"kernel": "H60s"}, "kernel", True),
        ({"contrast_agent": "Omnipaque 300"}, "contrast", True),
        ({"series_description": "Head C+ 5mm"}, "contrast", True),
    ],
)
def test_h26_what_cannot_be_judged_is_refused_by_the_right_rule(
    manifest, fields, rule, is_applicable
):
    refused = judge(series(**fields), manifest)

    assert isinstance(refused, Eligibility)
    assert refused.rule == rule
    assert refused.is_applicable is is_applicable
    assert refused.value
    assert refused.limit
    assert refused.reason.endswith(".")


@pytest.mark.parametrize(
    "fields",
    [
        {"body_part": "BRAIN"},
        {"body_part": "", "protocol_name": "Kopf nativ"},
        {"body_part": "NECK", "series_description": "HEAD 5.0 H31s"},  # polytrauma: the series says
        {"body_part": "", "series_description": "5.0 mm"},  # nothing says: pixels will
        {"image_type": ("DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE")},
        {"contrast_agent": "none"},
        {"contrast_agent": ""},
        {"orientation": (1.0, 0.0, 0.0, 0.0, 0.9483237, -0.3173047), "gantry_tilt": 18.5},
        {"orientation": (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0), "patient_position": "HFP"},
        {"instance_number": None},
        {"instance_number": 1},
        {"is_lossy": True},
        {"kernel": "H31s\\2"},
    ],
)
def test_h28_what_can_be_judged_is_selected(manifest, fields):
    chosen = judge(series(24, **fields), manifest)

    assert isinstance(chosen, Selection)
    assert chosen.is_complete


def test_a_contrast_agents_name_is_not_repeated(manifest):
    refused = judge(series(contrast_agent="Omnipaque 300"), manifest)

    assert "Omnipaque" not in f"{refused}"


def test_the_nearest_refusal_is_told_not_the_localisers(manifest):
    localiser = series(1, uid="9.1", image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"))
    bone = series(uid="9.2", kernel="BONE")
    dose = series(1, uid="9.3", modality="SR")

    refused = judge(localiser | bone | dose, manifest)

    assert refused.rule == "kernel"
    assert judge({}, manifest).is_applicable is False


def test_h27_one_of_several_series_is_chosen_by_kernel_then_thickness(manifest):
    thin = series(100, 0.8, uid="9.1", kernel="H31s")
    soft = series(16, 5.0, uid="9.2", kernel="H31s")
    other = series(16, 5.0, uid="9.3", kernel="H40s")
    bone = series(16, 5.0, uid="9.4", kernel="H70h")

    chosen = judge(thin | soft | other | bone, manifest)

    assert chosen.series_instance_uids == ("9.2",)
    assert chosen.description


def test_a_derived_reformat_is_taken_where_it_is_the_only_5_mm_series(manifest):
    thin = series(100, 0.8, uid="9.1")
    thick = series(16, 5.0, uid="9.2", image_type=("DERIVED", "SECONDARY", "AXIAL"))

    assert judge(thin | thick, manifest).series_instance_uids == ("9.2",)


def test_what_is_missing_is_said(manifest):
    whole = series(16)
    holed = {k: v for k, v in whole.items() if not k.endswith("-7")}

    assert judge(holed, manifest).missing == ("images between 30.0 and 40.0 mm",)
    assert judge(series(5), manifest).missing == ("25 of at least 60 mm",)
    assert "1 of at least 4 images" in judge(series(1), manifest).missing


def test_two_kernels_in_one_series_are_two_volumes(manifest):
    soft = series(16, kernel="H31s")
    bone = {f"b{k}": replace(v, kernel="H70h") for k, v in soft.items()}
    sharp = {f"s{k}": replace(v, kernel="H45s") for k, v in soft.items()}

    chosen = judge(soft | bone | sharp, manifest)

    assert chosen.is_complete
    assert set(chosen.instance_ids) == set(soft)


def test_a_kernel_that_changes_half_way_up_is_one_volume(manifest):
    whole = series(16)
    for i in range(8):
        whole[f"1.2.3.1-{i}"] = replace(whole[f"1.2.3.1-{i}"], kernel="FC21")

    assert len(judge(whole, manifest).instance_ids) == 16


def test_h26_many_passes_over_one_place_are_refused(manifest):
    passes = {}
    for time in range(6):
        for k, v in series(8).items():
            passes[f"{time}{k}"] = replace(v, sop_instance_uid=f"7.{time}.{v.sop_instance_uid}")

    refused = judge(passes, manifest)

    assert refused.rule == "repeated_positions"


def test_images_of_another_pixel_size_are_another_volume(manifest):
    whole = series(16)
    zoomed = {f"z{k}": replace(v, pixel_spacing=(0.5, 0.5)) for k, v in series(6).items()}

    assert set(judge(whole | zoomed, manifest).instance_ids) == set(whole)


def test_a_few_repeated_slices_are_not_many_passes(manifest):
    whole = series(16)
    whole["again"] = replace(whole["1.2.3.1-3"], sop_instance_uid="8.8")

    assert judge(whole, manifest).is_complete


def test_a_multi_frame_object_is_whole_by_itself(manifest):
    one = replace(PLAIN, sop_class_uid="1.2.840.10008.5.1.4.1.1.2.1", frames=30, position=None)

    assert judge({"a": one}, manifest).instance_ids == ("a",)
    assert judge({"a": one}, manifest).is_complete


MIXED = (
    series(8, 5.0, uid="9.1")
    | series(30, 1.0, uid="9.2")
    | series(8, 5.0, uid="9.3", kernel="H31s", instance_number=None)
    | series(2, uid="9.4", image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"))
    | series(8, 5.0, uid="9.5", kernel="BONE")
)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, len(MIXED)))
def test_h27_the_choice_does_not_depend_on_the_order_of_arrival(manifest, seed, keep):
    shuffled = list(MIXED.items())[:keep]
    random.Random(seed).shuffle(shuffled)

    assert judge(dict(shuffled), manifest) == judge(dict(list(MIXED.items())[:keep]), manifest)


def volume(hu):
    plain = volume_from_pictures(
        np.zeros(hu.shape, np.uint8), (-20.0, 100.0), spacing_mm=(2.0, 2.0)
    )
    return replace(plain, pixels=hu.astype(np.float32))


def test_a_head_passes_the_pixel_rules(manifest):
    assert check_pixels(volume(head()), manifest) is None


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda hu: hu[:2], "images"),
        (lambda hu: hu * 0 - 1000, "body"),
        (lambda hu: hu + 1024, "body_area"),  # the intercept was left out: air is bone
        (lambda hu: np.where(hu >= 900, 3, hu), "gate:bone"),  # a phantom in a plastic shell
        (lambda hu: np.where((hu > 0) & (hu < 200), -800, hu), "gate:soft tissue"),
        (lambda hu: np.pad(hu[:, ::4, ::4], ((0, 0), (0, 96), (0, 96)), constant_values=-1000),
         "body_area"),  # a tube, not a head
    ],
)  # fmt: skip
def test_pixels_that_are_no_head_are_refused(manifest, change, rule):
    refused = check_pixels(volume(change(head())), manifest)

    assert refused is not None
    assert refused.rule == rule
    assert refused.is_applicable


def test_a_newborn_and_a_massive_bleed_pass(manifest):
    small = np.full((16, 128, 128), -1000, np.int16)
    small[:, 32:96, 32:96] = head()[:, ::2, ::2]
    bleeding = head()
    bleeding[:, :, :64][(bleeding[:, :, :64] > 0) & (bleeding[:, :, :64] < 200)] = 75

    assert check_pixels(replace(volume(small), spacing_mm=(1.6, 1.6)), manifest) is None
    assert check_pixels(volume(bleeding), manifest) is None


def test_h29_a_volume_without_pixel_size_is_refused(manifest):
    refused = check_pixels(replace(volume(head()), spacing_mm=None), manifest)

    assert refused.rule == "pixel_spacing"


@pytest.mark.parametrize(
    ("text", "word", "is_there"),
    [
        ("HEAD_5MM", "HEAD", True),
        ("head/neck", "HEAD", True),
        ("FOREHEAD", "HEAD", False),
        ("HEADNECK", "HEAD", False),
        ("HEADNECK", "HEAD*", True),
        ("Schädel nativ", "SCHÄDEL", True),
        ("Schädelbasis", "SCHÄDEL", False),
        ("Head C+ 5mm", "C+", True),
        ("whole  body", "WHOLE BODY", True),
        ("", "HEAD", False),
    ],
)
def test_words_are_whole_words(text, word, is_there):
    assert (first_match(text, [word]) == word) is is_there


def test_the_plain_header_is_what_the_tests_think():
    assert PLAIN.sop_class_uid == CT
    assert PLAIN.body_part == "HEAD"
