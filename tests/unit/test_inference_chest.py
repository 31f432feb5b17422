"""A bundle of quite another kind, through the same code: nothing in it knows of heads."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.bundle import load_bundle
from inference.eligibility import check_pixels, judge
from inference.model import load_model
from inference.predict import predict
from inference.voi import by_window
from tests.bundles.make import make_bundle
from tests.bundles.sources import head_series, headers_of, radiograph, volume_of

WHEN = {"started_at": "2026-01-01T00:00:00Z", "result_uuid": "u"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return load_bundle(make_bundle(tmp_path_factory.mktemp("b") / "chest", "chest"))


@pytest.fixture(scope="module")
def model(bundle):
    return load_model(bundle)


def film(rows=120, columns=100, seed=1):
    rng = np.random.default_rng(seed)
    smooth = rng.normal(size=(rows // 20, columns // 20)).repeat(20, 0).repeat(20, 1)
    return np.clip(2048 + 600 * smooth, 0, 4095).astype(np.uint16)


def test_frontal_views_are_chosen_and_laterals_are_not(bundle):
    frontal, lateral = radiograph(film()), radiograph(film(), ViewPosition="LL")
    supine = radiograph(film(), ViewPosition="AP", SOPClassUID="1.2.840.10008.5.1.4.1.1.1")
    supine.Modality = "CR"

    chosen = judge(headers_of([supine, lateral, frontal]), bundle.manifest)
    refused = judge(headers_of([lateral]), bundle.manifest)

    assert chosen.instance_ids == (frontal.SOPInstanceUID, supine.SOPInstanceUID)
    assert chosen.is_complete
    assert (refused.rule, refused.value) == ("view_position", "LL")


def test_a_head_ct_and_a_hand_do_not_concern_it(bundle):
    hand = radiograph(film(), BodyPartExamined="HAND")
    unstated = radiograph(film(), BodyPartExamined="")

    assert judge(headers_of(head_series(4)), bundle.manifest).rule == "modality"
    for ds in (hand, unstated):
        refused = judge(headers_of([ds]), bundle.manifest)
        assert (refused.rule, refused.is_applicable) == ("body_part", False)


def test_a_radiograph_becomes_a_finding_with_a_map_in_its_own_matrix(bundle, model, tmp_path):
    wide, tall = radiograph(film(80, 120, seed=2)), radiograph(film(140, 100, seed=3))
    volume = volume_of([wide, tall], bundle.manifest, tmp_path)
    assert check_pixels(volume, bundle.manifest) is None

    finding, maps = predict(volume, bundle, model, thresholds={"chest.air": 0.02}, **WHEN)

    assert [(ref.rows, ref.columns) for ref in finding.images] == [(80, 120), (140, 100)]
    assert finding.images[0].position_mm is None
    assert finding.is_positive
    key = finding.key_images[0]
    assert maps[0].shape == (finding.images[key.image].rows, finding.images[key.image].columns)
    assert finding.output.image_word == "image"
    assert not finding.is_partial


def test_an_image_does_not_see_its_neighbour(bundle, model, tmp_path):
    one, other = radiograph(film(80, 120, seed=2)), radiograph(film(140, 100, seed=3))

    alone, _ = predict(volume_of([one], bundle.manifest, tmp_path), bundle, model, **WHEN)
    both, _ = predict(volume_of([one, other], bundle.manifest, tmp_path), bundle, model, **WHEN)

    assert both.image_logits["air"][0] == pytest.approx(alone.image_logits["air"][0], abs=1e-4)


def test_monochrome1_is_the_same_image_turned_round(bundle, model, tmp_path):
    bright = radiograph(film(), VOILUTFunction="LINEAR_EXACT")
    dark = radiograph(
        4096 - film(), VOILUTFunction="LINEAR_EXACT", PhotometricInterpretation="MONOCHROME1",
        BitsStored=16, HighBit=15,
    )  # fmt: skip

    findings = [
        predict(volume_of([ds], bundle.manifest, tmp_path), bundle, model, **WHEN)[0]
        for ds in (bright, dark)
    ]

    one, other = (finding.image_logits["air"][0] for finding in findings)
    assert one == pytest.approx(other, abs=1e-3)


def test_a_voi_table_comes_before_a_window(bundle, tmp_path):
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    table = Dataset()
    table.add_new("LUTDescriptor", "US", [4, 100, 8])
    table.add_new("LUTData", "US", [0, 51, 102, 255])
    steps = np.arange(96, 112, dtype=np.uint16).repeat(8)[:, None].repeat(128, 1)
    ds = radiograph(steps)
    ds.VOILUTSequence = Sequence([table])

    volume = volume_of([ds], bundle.manifest, tmp_path)

    rows = volume.pixels[0, ::8, 0]
    np.testing.assert_allclose(rows[:4], 0)
    np.testing.assert_allclose(rows[4:8], [0, 0.2, 0.4, 1.0])
    np.testing.assert_allclose(rows[8:], 1.0)


@given(
    st.floats(-1e4, 1e4),
    st.floats(1, 1e4),
    st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    st.floats(-1e5, 1e5),
)
def test_a_window_stays_in_unit_range(centre, width, function, value):
    grey = by_window(np.float32([[value, value + 1]]), centre, width, function)

    assert 0.0 <= grey[0, 0] <= grey[0, 1] <= 1.0


def test_windows_are_the_standards(tmp_path):
    values = np.float32([[-50.5, -0.5, 0.0, 49.5, 50.0]])

    linear = by_window(values, 0.0, 100.0, "LINEAR")[0]
    exact = by_window(values, 0.0, 100.0, "LINEAR_EXACT")[0]

    np.testing.assert_allclose(linear, [0, 0.5, 0.505051, 1, 1], atol=1e-5)
    np.testing.assert_allclose(exact, [0, 0.495, 0.5, 0.995, 1], atol=1e-5)


def test_no_code_of_inference_or_db_pixels_knows_a_disease_or_an_organ():
    root = Path(__file__).parents[2]
    words = ("hemorrh", "haemorrh", "ich", "brain", "skull", "chest", "pneumo", "intracran")
    for path in [*root.glob("inference/*.py"), root / "db" / "pixels.py"]:
        strings = (
            node.value.lower()
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        )
        said = set(re.findall(r"[a-z]+", " ".join(strings)))
        assert not [word for word in said if word.startswith(words)], path.name
