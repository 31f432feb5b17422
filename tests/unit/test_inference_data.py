"""Real heads: a tilted GE series of 4 and 7 mm, and the ct-ich pictures."""

import csv
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from inference.bundle import load_bundle
from inference.eligibility import check_pixels, judge
from inference.model import load_model, logits
from inference.predict import predict, prepare
from inference.volume import volume_from_pictures
from tests.bundles.make import make_bundle
from tests.bundles.sources import ct_slice, headers_of, volume_of

DATA = Path(os.environ.get("VIGIL_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
WHEN = {"started_at": "2026-01-01T00:00:00Z", "result_uuid": "u"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return load_bundle(make_bundle(tmp_path_factory.mktemp("b") / "head", size=96))


@pytest.fixture(scope="module")
def model(bundle):
    return load_model(bundle)


@pytest.fixture(scope="module")
def ge():
    files = sorted((DATA / "head-ct-ge").glob("*.dcm"))
    if not files:
        pytest.skip("no ../shared/data/head-ct-ge")
    datasets = [dcmread(file) for file in files]
    random.Random(3).shuffle(datasets)
    return datasets


def pictures() -> dict[str, list[Path]]:
    manifest = DATA / "ct-ich" / "manifest.csv"
    if not manifest.exists():
        return {}
    found: dict[str, list[Path]] = {}
    with manifest.open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["patient"], []).append(DATA / "ct-ich" / row["brain"])
    return found


PICTURES = pictures()
needs_pictures = pytest.mark.skipif(not PICTURES, reason="no ../shared/data/ct-ich")


def grey_of(patient: str) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path).convert("L")) for path in PICTURES[patient]])


def test_h28_a_tilted_series_of_4_and_7_mm_is_one_whole_volume(ge, bundle, tmp_path):
    chosen = judge(headers_of(ge), bundle.manifest)

    assert chosen.is_complete
    assert len(chosen.instance_ids) == 28
    volume = volume_of(ge, bundle.manifest, tmp_path)
    assert volume.holes == volume.notes == ()
    assert volume.coverage_mm == pytest.approx(149.6, abs=0.1)
    assert check_pixels(volume, bundle.manifest) is None
    assert [ref.instance_number for ref in volume.refs] == list(range(1, 29))


@pytest.mark.parametrize("lost", [1, 7, 12, 15, 20, 26])
def test_h23_any_lost_slice_of_it_is_seen(ge, bundle, lost):
    kept = [ds for ds in ge if int(ds.InstanceNumber) != lost + 1]

    assert not judge(headers_of(kept), bundle.manifest).is_complete


def test_it_becomes_a_finding_with_maps_in_its_matrix(ge, bundle, model, tmp_path):
    volume = volume_of(ge, bundle.manifest, tmp_path)

    finding, maps = predict(volume, bundle, model, thresholds={"head.any": 0.02}, **WHEN)

    assert len(finding.images) == 28
    assert not finding.is_partial
    assert all(cam.shape == (512, 512) for cam in maps)
    places = [finding.images[key.image].position_mm for key in finding.key_images]
    assert places == sorted(places)


@needs_pictures
@pytest.mark.parametrize("patient", list(PICTURES))
def test_no_real_head_is_refused(patient, bundle):
    volume = volume_from_pictures(
        grey_of(patient), bundle.manifest.pixels.value_range, spacing_mm=(0.4, 0.4)
    )

    assert check_pixels(volume, bundle.manifest) is None


@needs_pictures
def test_pictures_and_dicom_made_of_them_give_the_same_logits(bundle, model, tmp_path):
    grey = grey_of(next(iter(PICTURES)))
    low, high = bundle.manifest.pixels.value_range
    dicom = [
        ct_slice(
            picture.astype(np.uint16),
            z=5.0 * i,
            RescaleSlope=f"{(high - low) / 255:.12f}",
            RescaleIntercept=str(low),
            PixelSpacing=[0.4, 0.4],
        )
        for i, picture in enumerate(grey)
    ]
    drawn = volume_from_pictures(grey, (low, high), spacing_mm=(0.4, 0.4))
    scanned = volume_of(dicom, bundle.manifest, tmp_path)

    one, other = (logits(model, prepare(volume, bundle).inputs) for volume in (drawn, scanned))

    assert np.ptp(one) > 0.5
    assert np.abs(one - other).max() < 1e-4
