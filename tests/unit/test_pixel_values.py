"""What can be wrong with an image's values: handled with the same Hounsfield units, or refused with
rule, value and limit (H29, H30). From header to volume, as readiness and loader do it."""

from dataclasses import replace

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from db.result import Eligibility
from dicom_sr.source import parsed, read_header
from inference.bundle import load_bundle
from inference.eligibility import check_pixels, judge
from inference.loader import oversized
from node import predict
from tests import encodings
from tests.bundles.make import make_bundle
from tests.bundles.sources import AXIAL, ct_slice, head, headers_of, image, volume_of
from tests.encodings import READABLE, written_in

N, STEP_MM = 8, 9.0
HU = head(N)
AIR = -1000


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("b") / "head")


@pytest.fixture(scope="module")
def manifest(bundle):
    return load_bundle(bundle).manifest


def series(stored=HU, per_slice=lambda i: {}, **attributes):
    """Axial slices of these stored values, which are Hounsfield units unless told otherwise."""
    return [
        ct_slice(pixels, z=STEP_MM * i, **{"SliceThickness": STEP_MM, **attributes, **per_slice(i)})
        for i, pixels in enumerate(stored)
    ]


def outcome(datasets, manifest, folder):
    """The volume that the model would see, or (rule, value, limit) of the refusal."""
    found = judge(headers_of(datasets), manifest)
    if not isinstance(found, Eligibility):
        chosen = {ds.SOPInstanceUID: ds for ds in datasets}
        volume = volume_of([chosen[key] for key in found.instance_ids], manifest, folder)
        found = check_pixels(volume, manifest)
        if found is None:
            return volume
    return found.rule, found.value, found.limit


def rescaled(slope, intercept):
    """Stored values that mean the same under another rescale; exact for powers of two."""
    return ((HU.astype(np.float64) - intercept) / slope).round().astype(np.int16)


def unsigned(bits):
    return (HU + 1024).clip(0, 2**bits - 1).astype(np.uint16)


def padded(stored, value):
    """A ring outside the field of view, as scanners fill it."""
    twin = stored.copy()
    twin[:, :4], twin[:, -4:] = value, value
    return twin


PADDED_HU = padded(HU, AIR)
HANDLED = {
    "as they are": lambda: (series(), HU),
    "unsigned": lambda: (series(unsigned(16), RescaleIntercept=-1024), HU),
    "unsigned, 12 bits": lambda: (
        series(unsigned(12), RescaleIntercept=-1024, BitsStored=12, HighBit=11), HU,
    ),
    "signed, 12 bits": lambda: (series(BitsStored=12, HighBit=11), HU),
    "slope of a half": lambda: (
        series(rescaled(0.5, -1024), RescaleSlope=0.5, RescaleIntercept=-1024), HU,
    ),
    "rescale different per slice": lambda: (
        series(
            np.stack([rescaled(1, -1000 - 8 * i)[i] for i in range(N)]),
            lambda i: {"RescaleIntercept": -1000 - 8 * i},
        ),
        HU,
    ),
    "slope different per slice": lambda: (
        series(
            np.stack([rescaled(0.5 if i % 2 else 1, 0)[i] for i in range(N)]),
            lambda i: {"RescaleSlope": 0.5 if i % 2 else 1},
        ),
        HU,
    ),
    "padding of -2000, stated": lambda: (
        series(padded(HU, -2000), PixelPaddingValue=-2000), PADDED_HU,
    ),
    "padding of -2000 beside 12 unsigned bits, stated": lambda: (
        series(
            padded(unsigned(12), 65536 - 2000), BitsStored=12, HighBit=11,
            RescaleIntercept=-1024, PixelPaddingValue=65536 - 2000,
        ),
        PADDED_HU,
    ),
    "a range of padding": lambda: (
        series(padded(HU, -1999), PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1990),
        PADDED_HU,
    ),
    "padding that no pixel has": lambda: (series(PixelPaddingValue=-3000), HU),
    "an overlay in the unused bits": lambda: (
        series(unsigned(12) | 0x1000, RescaleIntercept=-1024, BitsStored=12, HighBit=11), HU,
    ),
    **{
        f"{128 * n} x {128 * n}": lambda n=n: (
            series(HU.repeat(n, 1).repeat(n, 2), PixelSpacing=[2.0 / n, 2.0 / n]),
            HU.repeat(n, 1).repeat(n, 2),
        )
        for n in (2, 6, 8)
    },
}  # fmt: skip


@pytest.mark.parametrize("made", HANDLED.values(), ids=HANDLED)
def test_h29_values_written_in_another_way_are_the_same_hounsfield_units(tmp_path, manifest, made):
    datasets, expected = made()

    volume = outcome(datasets, manifest, tmp_path)

    np.testing.assert_array_equal(volume.pixels, expected)


def test_h29_padding_of_minus_2000_that_nobody_states_changes_nothing_in_the_head(
    tmp_path, manifest
):
    volume = outcome(series(padded(HU, -2000)), manifest, tmp_path)

    np.testing.assert_array_equal(volume.pixels[:, 4:-4], HU[:, 4:-4])


REFUSED = {
    "no slope": (lambda: series(RescaleSlope=None), ("rescale", "missing", "slope and intercept")),
    "no intercept": (
        lambda: series(RescaleIntercept=None), ("rescale", "missing", "slope and intercept"),
    ),
    "neither": (
        lambda: series(RescaleSlope=None, RescaleIntercept=None),
        ("rescale", "missing", "slope and intercept"),
    ),
    "an empty slope": (
        lambda: series(RescaleSlope=""), ("rescale", "missing", "slope and intercept"),
    ),
    "a slope of zero": (lambda: series(RescaleSlope=0), ("rescale", "slope 0", "not 0")),
    "another unit": (lambda: series(RescaleType="US"), ("rescale", "US", "HU")),
    "no spacing": (lambda: series(PixelSpacing=None), ("pixel_spacing", "not stated", "> 0 mm")),
    "spacing of zero": (
        lambda: series(PixelSpacing=[0, 0]), ("pixel_spacing", "not stated", "> 0 mm"),
    ),
    "32 x 32": (
        lambda: series(HU[:, ::4, ::4], PixelSpacing=[8.0, 8.0]),
        ("matrix", "32 x 32", "64..2048"),
    ),
    "65535 x 65535, 1000 frames": (
        lambda: series(Rows=65535, Columns=65535, NumberOfFrames=1000),
        ("matrix", "65535 x 65535", "64..2048"),
    ),
    "4096 x 16": (
        lambda: series(np.zeros((N, 4096, 16), np.int16)), ("matrix", "4096 x 16", "64..2048"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("made", "expected"), REFUSED.values(), ids=REFUSED)
def test_h29_what_has_no_values_is_refused_with_rule_value_and_limit(
    tmp_path, manifest, made, expected
):
    assert outcome(made(), manifest, tmp_path) == expected


def test_h29_an_intercept_left_at_zero_is_seen_in_the_pixels(tmp_path, manifest):
    rule, value, limit = outcome(series(unsigned(12), RescaleIntercept=0), manifest, tmp_path)

    assert (rule, limit) == ("body_area", "25..420 cm2")
    assert float(value.split()[0]) > 420


def enhanced_head():
    """All slices in one object, each with its own rescale; the frames upside down."""
    order = list(reversed(range(N)))
    stored = np.stack([rescaled(1, -1000 - 8 * i)[i] for i in order])
    ds = image(stored, SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1")
    ds.ImageType, ds.BodyPartExamined = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], "HEAD"
    ds.SeriesNumber = 2
    shared = item(
        PlaneOrientationSequence=item(ImageOrientationPatient=AXIAL),
        PixelMeasuresSequence=item(PixelSpacing=[2.0, 2.0], SliceThickness=STEP_MM),
    )
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    ds.PerFrameFunctionalGroupsSequence = Sequence(
        item(
            PlanePositionSequence=item(ImagePositionPatient=[-100, -100, STEP_MM * i]),
            PixelValueTransformationSequence=item(
                RescaleSlope=1, RescaleIntercept=-1000 - 8 * i, RescaleType="HU"
            ),
        )
        for i in order
    )
    return ds


def item(**values):
    made = Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, Sequence([value]) if isinstance(value, Dataset) else value)
    return made


def test_h30_an_enhanced_multi_frame_is_the_same_volume(tmp_path, manifest):
    volume = outcome([enhanced_head()], manifest, tmp_path)

    np.testing.assert_array_equal(volume.pixels, HU)
    assert np.diff(volume.positions_mm).tolist() == [STEP_MM] * (N - 1)
    assert [ref.frame for ref in volume.refs] == list(reversed(range(1, N + 1)))


def colour():
    datasets = series()
    for ds, pixels in zip(datasets, HU, strict=True):
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
        ds.PixelData = np.dstack([pixels.clip(0, 255).astype(np.uint8)] * 3).tobytes()
    return datasets


def eight_bits():
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelRepresentation": 0}
    datasets = series(RescaleSlope=8, RescaleIntercept=-1000, **eight)
    for ds, pixels in zip(datasets, HU, strict=True):
        ds.PixelData = ((pixels + 1000) // 8).astype(np.uint8).tobytes()
    return datasets


SC = "1.2.840.10008.5.1.4.1.1.7"
NO_CT = {
    "RGB": (colour, ("photometric", "RGB", "MONOCHROME")),
    "a palette": (
        lambda: series(PhotometricInterpretation="PALETTE COLOR"),
        ("photometric", "PALETTE COLOR", "MONOCHROME"),
    ),
    "a secondary capture labelled CT": (
        lambda: series(SOPClassUID=SC),
        ("sop_class", SC, "1.2.840.10008.5.1.4.1.1.2, 1.2.840.10008.5.1.4.1.1.2.1"),
    ),
    "8 bits": (eight_bits, ("bits_stored", "8", ">= 10")),
}


@pytest.mark.parametrize(("made", "expected"), NO_CT.values(), ids=NO_CT)
def test_h30_colour_captures_and_8_bits_are_refused_with_rule_value_and_limit(
    tmp_path, manifest, made, expected
):
    assert outcome(made(), manifest, tmp_path) == expected


def lossy_files(name, folder, **attributes):
    """A head of which nothing says that it is lossy but its syntax; and attributes besides."""
    folder.mkdir()
    paths = []
    for number, ds in enumerate(encodings.series(**attributes)):
        twin, _ = written_in(READABLE[name], ds)
        paths.append(folder / f"{number:02}.dcm")
        twin.save_as(paths[-1], enforce_file_format=True)
    return paths


@pytest.mark.parametrize(
    ("name", "attributes", "is_lossy"),
    [
        ("JPEG-LS near-lossless", {}, True),
        ("JPEG Extended", {"LossyImageCompression": "00"}, True),
        ("JPEG 2000", {"LossyImageCompression": "00"}, False),
        ("JPEG-LS", {}, False),
        ("JPEG-LS", {"LossyImageCompression": "01"}, True),
        ("Explicit VR Little Endian", {"LossyImageCompression": "01"}, True),
    ],
)
def test_h30_loss_is_carried_over_into_what_is_made_of_the_image(
    tmp_path, name, attributes, is_lossy
):
    path, *_ = lossy_files(name, tmp_path / "in", **attributes)

    _, (blob,) = read_header(str(path), None)

    assert (parsed(blob).get("LossyImageCompression") == "01") == is_lossy


def test_h30_the_pages_of_a_lossy_source_say_that_it_was_lossy(tmp_path, bundle, capsys):
    lossy_files("JPEG-LS near-lossless", tmp_path / "in")

    predict.run(tmp_path / "in", out=tmp_path / "out", model=str(bundle), as_json=True, config=None)

    assert '"outcome": "result"' in capsys.readouterr().out
    pages = [dcmread(path) for path in sorted((tmp_path / "out").glob("*.dcm"))]
    assert {page.LossyImageCompression for page in pages if page.Modality == "OT"} == {"01"}


def test_h30_a_bundle_may_refuse_lossy_images(tmp_path, manifest):
    strict = replace(manifest, applies=replace(manifest.applies, lossy="refuse"))

    assert outcome(series(LossyImageCompression="01"), strict, tmp_path) == ("lossy", "01", "00")


def test_h20_images_too_large_together_are_refused_before_one_is_decoded():
    headers = list(headers_of(series()).values())

    assert oversized(headers, N * 128 * 128) is None
    refused = oversized(headers, N * 128 * 128 - 1)
    assert (refused.rule, refused.value, refused.limit) == ("pixels", "131072", "<= 131071")
