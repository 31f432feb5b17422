"""db.pixels: every encoding to the same values, or a refusal with its code."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from config.settings import InferenceSettings
from db.codestream import Stream, described
from db.errors import NotDicom
from db.pixels import (
    ColourImage,
    NoPixels,
    PixelsDiffer,
    RescaleMissing,
    RescaleZero,
    TooManyPixels,
    Undecodable,
    read_images,
)
from db.sandbox import Sandbox
from inference.loader import DecoderKilled, decode
from tests.bundles.sources import TWO, ct_slice, enhanced, header_of, radiograph
from tests.encodings import encapsulated, imagecodecs

STORED = np.arange(-32, 32, dtype=np.int16).reshape(8, 8) * 30
JP2 = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
LARGE = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)  # JPEG 2000 needs room


def lossless_jpeg(grey):
    return imagecodecs.jpeg8_encode(grey, lossless=True, predictor=1, bitspersample=16)


def saved(ds: Dataset, folder: Path) -> str:
    path = folder / "one.dcm"
    ds.save_as(path, enforce_file_format=True)
    return str(path)


def test_ct_values_are_rescaled_to_hounsfield_units(tmp_path):
    path = saved(ct_slice(STORED, RescaleSlope="2", RescaleIntercept="-1000"), tmp_path)

    meta, (pixels,) = read_images(path)

    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels[0], STORED * 2.0 - 1000)
    assert meta["frames"][0]["position"] == [-100.0, -100.0, 0.0]
    assert meta["frames"][0]["frame"] is None


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_a_lossless_encoding_gives_the_same_values(tmp_path, syntax):
    ds = ct_slice(LARGE)
    ds.compress(syntax, generate_instance_uid=False)

    _, (pixels,) = read_images(saved(ds, tmp_path))

    np.testing.assert_array_equal(pixels[0], LARGE)


@pytest.mark.parametrize(
    ("syntax", "order"),
    [
        (ImplicitVRLittleEndian, "<i2"),
        (DeflatedExplicitVRLittleEndian, "<i2"),
        (ExplicitVRBigEndian, ">i2"),
    ],
)
def test_a_native_encoding_gives_the_same_values(tmp_path, syntax, order):
    ds = ct_slice(STORED)
    ds.PixelData = STORED.astype(order).tobytes()
    ds.file_meta.TransferSyntaxUID = syntax

    _, (pixels,) = read_images(saved(ds, tmp_path))

    np.testing.assert_array_equal(pixels[0], STORED)


def test_padding_beside_unsigned_12_bit_pixels_is_no_bone(tmp_path):
    """-2000 in 16 bits, cut to 12, would read 2096: a ring of bone round the field of view."""
    stored = np.full((8, 8), 1050, np.uint16)
    stored[2:4] = 1000
    stored[0] = 65536 - 2000
    ds = ct_slice(stored, BitsStored=12, HighBit=11, RescaleIntercept=-1024)
    ds.PixelPaddingValue = 65536 - 2000

    meta, (pixels,) = read_images(saved(ds, tmp_path))

    assert pixels[0, 0].tolist() == [-24.0] * 8
    assert pixels[0, 1].tolist() == [26.0] * 8
    assert meta["frames"][0]["padding_value"] == -24.0


def test_padding_of_a_signed_image_is_masked_though_written_as_unsigned(tmp_path):
    stored = STORED.copy()
    stored[0] = -2000
    ds = ct_slice(stored)
    ds.add_new(0x00280120, "US", 65536 - 2000)

    _, (pixels,) = read_images(saved(ds, tmp_path))

    assert pixels.min() == stored[1:].min()


def test_rubbish_above_the_stored_bits_is_cut_off(tmp_path):
    stored = np.full((8, 8), 100, np.uint16) | 0xF000

    _, (pixels,) = read_images(saved(ct_slice(stored, BitsStored=12, HighBit=11), tmp_path))

    assert set(pixels.ravel()) == {100.0}


@pytest.mark.parametrize("name", ["RescaleSlope", "RescaleIntercept"])
def test_ct_without_rescale_is_refused(tmp_path, name):
    ds = ct_slice(STORED)
    del ds[name]

    with pytest.raises(RescaleMissing):
        read_images(saved(ds, tmp_path))


def test_a_slope_of_zero_is_refused(tmp_path):
    with pytest.raises(RescaleZero):
        read_images(saved(ct_slice(STORED, RescaleSlope=0), tmp_path))


def test_a_radiograph_needs_no_rescale(tmp_path):
    ds = radiograph(np.full((8, 8), 7, np.uint16), PhotometricInterpretation="MONOCHROME1")

    meta, (pixels,) = read_images(saved(ds, tmp_path))

    assert set(pixels.ravel()) == {7.0}
    assert meta["photometric"] == "MONOCHROME1"
    assert meta["frames"][0]["windows"] == [(2048.0, 4096.0)]


def test_colour_is_refused(tmp_path):
    ds = ct_slice(STORED)
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0

    with pytest.raises(ColourImage):
        read_images(saved(ds, tmp_path))


def test_a_huge_matrix_is_refused_before_it_is_decoded(tmp_path):
    ds = ct_slice(STORED)
    ds.Rows = ds.Columns = 65535
    ds.NumberOfFrames = 10_000

    with pytest.raises(TooManyPixels):
        read_images(saved(ds, tmp_path))


def test_a_cap_given_by_the_caller_holds(tmp_path):
    with pytest.raises(TooManyPixels):
        read_images(saved(ct_slice(STORED), tmp_path), None, 63)


def test_missing_and_short_pixel_data_are_refused(tmp_path):
    short, none, shapeless = ct_slice(STORED), ct_slice(STORED), ct_slice(STORED)
    short.PixelData = short.PixelData[:64]
    del none.PixelData
    shapeless.Rows = None

    with pytest.raises(Undecodable):
        read_images(saved(short, tmp_path))
    with pytest.raises(Undecodable):
        read_images(saved(none, tmp_path))
    with pytest.raises(NoPixels):
        read_images(saved(shapeless, tmp_path))


def test_a_damaged_codestream_is_undecodable(tmp_path):
    ds = ct_slice(LARGE)
    ds.compress(JPEG2000Lossless, generate_instance_uid=False)
    ds.PixelData = ds.PixelData[:8] + b"\0" * (len(ds.PixelData) - 8)

    with pytest.raises(Undecodable) as caught:
        read_images(saved(ds, tmp_path))

    assert str(JPEG2000Lossless) in str(caught.value)


GREY = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
J2K, JLS, SV1, BASELINE = (f"1.2.840.10008.1.2.4.{end}" for end in ("90", "80", "70", "50"))
LIES = {
    "JPEG 2000, another matrix": (J2K, imagecodecs.jpeg2k_encode, GREY.reshape(32, 128)),
    "JPEG 2000, twice the rows": (J2K, imagecodecs.jpeg2k_encode, np.vstack([GREY, GREY])),
    "JPEG 2000, 8 bits": (J2K, imagecodecs.jpeg2k_encode, (GREY >> 8).astype(np.uint8)),
    "JPEG 2000, colour": (J2K, imagecodecs.jpeg2k_encode, np.dstack([GREY, GREY, GREY])),
    "JPEG-LS, another matrix": (JLS, imagecodecs.jpegls_encode, GREY.reshape(128, 32)),
    "JPEG-LS, 8 bits": (JLS, imagecodecs.jpegls_encode, (GREY >> 8).astype(np.uint8)),
    "JPEG lossless, another matrix": (SV1, lossless_jpeg, GREY.reshape(128, 32)),
    "JPEG, twice the pixels of 8 bits": (
        BASELINE, imagecodecs.jpeg8_encode, np.vstack([GREY, GREY]).astype(np.uint8),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("syntax", "encode", "grey"), LIES.values(), ids=LIES)
def test_h20_a_stream_of_another_size_or_depth_than_its_header_says_is_refused(
    tmp_path, syntax, encode, grey
):
    ds, _ = encapsulated(ct_slice(GREY), syntax, encode(grey))

    with pytest.raises(
        PixelsDiffer, match=r"its pixel data is \d+ x \d+.*, its header says 64 x 64"
    ):
        read_images(saved(ds, tmp_path))


def test_each_frame_of_a_multi_frame_is_held_against_the_header(tmp_path):
    good, bad = (imagecodecs.jpegls_encode(g) for g in (GREY, GREY.reshape(32, 128)))
    ds, _ = encapsulated(ct_slice(np.stack([GREY, GREY])), JLS, good, bad)
    path = saved(ds, tmp_path)

    read_images(path, [0])
    with pytest.raises(PixelsDiffer):
        read_images(path, [1])
    with pytest.raises(PixelsDiffer):
        read_images(path)


@given(st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8", b"\xff\x4f\xff\x51", JP2]))
def test_h20_whatever_bytes_a_codestream_has_it_is_described_or_not(data, start):
    found = described(start + data)

    assert found is None or isinstance(found, Stream)


def test_bytes_that_are_no_dicom_are_refused(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\x7fELF" * 100)

    with pytest.raises(NotDicom):
        read_images(str(path))


def test_an_enhanced_object_is_read_frame_by_frame(tmp_path):
    meta, (pixels,) = read_images(saved(enhanced(), tmp_path))

    np.testing.assert_array_equal(pixels[0], TWO - 10.0)
    np.testing.assert_array_equal(pixels[1], (TWO + 1) * 2.0 - 5)
    assert [frame["frame"] for frame in meta["frames"]] == [1, 2]
    assert [frame["position"][2] for frame in meta["frames"]] == [10.0, 5.0]
    assert meta["frames"][1]["spacing"] == [0.5, 0.4]
    assert meta["frames"][1]["thickness"] == 5.0


def test_some_frames_can_be_read_alone(tmp_path):
    path = saved(enhanced(), tmp_path)

    meta, (pixels,) = read_images(path, [1])

    assert pixels.shape == (1, 8, 8)
    assert meta["frames"][0]["frame"] == 2
    with pytest.raises(NoPixels):
        read_images(path, [2])


def test_a_bare_multi_frame_has_no_geometry(tmp_path):
    ds = ct_slice(np.stack([STORED, STORED]))

    meta, _ = read_images(saved(ds, tmp_path))

    assert [frame["position"] for frame in meta["frames"]] == [None, None]


def test_values_that_are_no_numbers_are_as_if_absent(tmp_path):
    ds = ct_slice(STORED)
    path = saved(ds, tmp_path)
    data = Path(path).read_bytes().replace(b"5.0 ", b"five")
    Path(path).write_bytes(data)
    assert "five" in str(dcmread(path, stop_before_pixels=True).get_item("SliceThickness").value)

    meta, _ = read_images(path)

    assert meta["frames"][0]["thickness"] is None


def test_it_runs_in_a_sandboxed_child(tmp_path):
    path = saved(ct_slice(STORED), tmp_path)
    ds = ct_slice(STORED, RescaleSlope=0)
    ds.save_as(tmp_path / "zero.dcm", enforce_file_format=True)

    with Sandbox(1) as sandbox:
        meta, (pixels,) = sandbox.run(read_images, path, timeout_s=60)
        with pytest.raises(RescaleZero):
            sandbox.run(read_images, str(tmp_path / "zero.dcm"), timeout_s=60)

    np.testing.assert_array_equal(pixels[0], STORED)
    assert meta["rows"] == 8


def j2k_that_claims(rows, columns):
    """A stream of some hundred bytes whose header, like its data set's, says so many."""
    stream = bytearray(imagecodecs.jpeg2k_encode(GREY[:8, :8], codecformat="j2k"))
    struct.pack_into(">II", stream, 8, columns, rows)  # Xsiz, Ysiz
    struct.pack_into(">II", stream, 24, columns, rows)  # one tile
    return bytes(stream)


def rle_that_grows(n_bytes):
    """Two segments (PS3.5 G.3), of runs of 128 zeros, two bytes each (G.3.1)."""
    segment = b"\x81\x00" * (n_bytes // 128)
    head = struct.pack("<16I", 2, 64, 64 + len(segment), *[0] * 13)
    return head + segment + segment


BOMBS = {
    "JPEG 2000 of 100 bytes": (J2K, 30_000, lambda: j2k_that_claims(30_000, 30_000)),
    "RLE": ("1.2.840.10008.1.2.5", 20_000, lambda: rle_that_grows(400_000_000)),
}


@pytest.mark.parametrize(("syntax", "side", "stream"), BOMBS.values(), ids=BOMBS)
def test_h20_a_bomb_for_the_decoder_ends_as_a_stated_outcome(tmp_path, syntax, side, stream):
    """Within the cap of pixels, beyond the memory or time of the child: only that is at risk."""
    ds, _ = encapsulated(ct_slice(GREY, Rows=side, Columns=side), syntax, stream())
    path = Path(saved(ds, tmp_path))
    limits = InferenceSettings(loader_timeout_s=120)

    with Sandbox(1, memory_mb=1024, cpu_s=60) as sandbox:
        with pytest.raises((DecoderKilled, Undecodable)):
            decode(sandbox, path, "x", header_of(ds), limits)

        meta, _ = sandbox.run(read_images, saved(ct_slice(STORED), tmp_path), timeout_s=120)
    assert meta["rows"] == 8  # the next one is read
