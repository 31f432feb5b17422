"""The pixels of a stored instance as rescaled values, decoded in a sandboxed child (`db.sandbox`).

Every codec is untrusted code on untrusted bytes: nothing here runs in a process of ours.
"""

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.pixels.processing import apply_modality_lut
from pydicom.pixels.utils import as_pixel_options, iter_pixels
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, RLELossless

from db.codestream import described, is_lossy
from db.errors import NotDicom, PermanentError
from db.faults import point
from db.files import storage_errors

MAX_PIXELS = 2_000_000_000  # Rows x Columns x Frames of one instance
_PIXEL_DATA_HEAD = 12  # bytes before the value: tag, VR, reserved, length (PS3.5 7.1.2)
_GREY = frozenset({"MONOCHROME1", "MONOCHROME2"})
# What pydicom raises for a value that is not what its VR says.
_BAD_VALUE = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError)
# And its decoders, for a codestream that no plug-in can read.
_BAD_STREAM = (*_BAD_VALUE, EOFError, OSError)


class TooManyPixels(PermanentError):
    """Rows x Columns x Frames is over the cap: refused before anything is decoded."""

    code: ClassVar[str] = "too_many_pixels"


class NoPixels(PermanentError):
    """The instance has no pixel data, or does not say of what size."""

    code: ClassVar[str] = "no_pixels"


class ColourImage(PermanentError):
    """More than one sample a pixel, or a palette: nothing that has a modality's values."""

    code: ClassVar[str] = "colour_image"


class RescaleMissing(PermanentError):
    """A CT image without Rescale Slope or Intercept: its values have no meaning."""

    code: ClassVar[str] = "rescale_missing"


class RescaleZero(PermanentError):
    """A Rescale Slope of zero: every pixel would have one value."""

    code: ClassVar[str] = "rescale_zero"


class PixelsDiffer(PermanentError):
    """The compressed image is of another size or depth than its data set says."""

    code: ClassVar[str] = "pixels_differ"


class Undecodable(PermanentError):
    """No decoder reads the pixel data."""

    code: ClassVar[str] = "undecodable"


def read_images(
    path: str, frames: list[int] | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[dict[str, Any], list[NDArray[np.float32]]]:
    """Decode an instance, or some of its frames (from 0).

    Returns
    -------
    A description, and one array of shape (frames, rows, cols), float32: the values after the
    modality's rescale or LUT (Hounsfield units for CT), image by image. Padding is set to the
    lowest of the image's other values (the highest where MONOCHROME1), which the description
    states; MONOCHROME1 is not turned round.

    The description: `rows`, `columns`, `frames_total`, `photometric`, `is_lossy`, `bits_stored`,
    `modality`, `rescale_type`, `voi_lut` (None, or `first`, `bits`, `data`), and in `frames` for
    each array row: `frame` (from 1; None in a single-frame object), `position`, `orientation`,
    `spacing` (between rows, between columns), `thickness` (mm; None where absent), `slope`,
    `intercept`, `windows` (centre, width), `voi_function`, `padding_value` (None: no padding).

    Raises
    ------
    NotDicom, NoPixels, TooManyPixels, ColourImage, RescaleMissing, RescaleZero, PixelsDiffer,
    Undecodable
    """
    point("decode_begun")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with storage_errors(), open(path, "rb"):
            pass  # a file that cannot be opened says nothing of the image in it
        ds = _header(path)
        total = _check_size(ds, max_pixels)
        wanted = list(range(total)) if frames is None else frames
        if not wanted or not all(0 <= index < total for index in wanted):
            raise NoPixels(f"the instance has {total} frame(s)")
        frames_described = [_frame(ds, index, total) for index in wanted]
        try:
            _check_streams(path, ds, wanted, total)
            values = np.empty((len(wanted), int(ds.Rows), int(ds.Columns)), np.float32)
            # A path is read frame by frame; a deflated data set only as a whole.
            source = dcmread(path) if _syntax(ds) == DeflatedExplicitVRLittleEndian else path
            stored = iter_pixels(source, indices=wanted, raw=True, correct_unused_bits=False)
            _fill(values, stored, ds, frames_described)
        except _BAD_STREAM as error:
            raise Undecodable(
                f"its pixel data cannot be decoded ({type(error).__name__} in {_syntax(ds)})"
            ) from None
    return _description(ds, total, frames_described), [values]


def _header(path: str) -> Dataset:
    try:
        return dcmread(path, stop_before_pixels=True)
    except (InvalidDicomError, *_BAD_STREAM) as error:
        raise NotDicom(type(error).__name__) from None


def _check_size(ds: Dataset, max_pixels: int) -> int:
    """The number of frames; refuses what is too much or not grey."""
    rows, columns = (_number(ds, name) or 0 for name in ("Rows", "Columns"))
    total = int(_number(ds, "NumberOfFrames") or 1)
    if rows < 1 or columns < 1 or total < 1:
        raise NoPixels("Rows, Columns or NumberOfFrames is not positive")
    if rows * columns * total > max_pixels:
        raise TooManyPixels(f"{rows:.0f} x {columns:.0f} x {total} is over {max_pixels}")
    if (
        _number(ds, "SamplesPerPixel") not in (1, None)
        or _text(ds, "PhotometricInterpretation") not in _GREY
    ):
        raise ColourImage("not a single grey value a pixel")
    return total


def _check_streams(path: str, ds: Dataset, wanted: Iterable[int], total: int) -> None:
    """Refuse images whose codestream says otherwise than the data set, before a decoder runs.

    Of depth only what would make other values of it: a stream of 16 bits may hold 12, one of 8
    cannot.
    """
    syntax = UID(_syntax(ds))
    if not syntax.is_encapsulated or syntax == RLELossless or "PixelData" in ds:
        return  # read whole, as a deflated one: its stream is no codestream
    header = int(ds.Rows), int(ds.Columns), int(_number(ds, "SamplesPerPixel") or 1)
    stored, allocated = (int(_number(ds, name) or 0) for name in ("BitsStored", "BitsAllocated"))
    with open(path, "rb") as file:
        dcmread(file, stop_before_pixels=True)
        file.seek(_PIXEL_DATA_HEAD, 1)
        offsets = as_pixel_options(ds).get("extended_offsets")
        for index in wanted:
            frame = get_frame(file, index, extended_offsets=offsets, number_of_frames=total)
            stream = described(frame)
            if stream is None:
                raise ValueError("no codestream")
            found = stream.rows, stream.columns, stream.samples or 1
            if found != header or stream.bits > allocated or stream.bits <= 8 < stored:
                raise PixelsDiffer(
                    f"its pixel data is {_matrix(*found)} of {stream.bits} bits, "
                    f"its header says {_matrix(*header)} of {stored}"
                )


def _matrix(rows: int, columns: int, samples: int) -> str:
    return f"{rows} x {columns}" + (f" x {samples}" if samples != 1 else "")


def _fill(
    values: NDArray[np.float32],
    stored: Iterator[NDArray[Any]],
    ds: Dataset,
    described: list[dict[str, Any]],
) -> None:
    """Rescale image by image into `values`; notes in `described` what the padding became."""
    for into, image, frame in zip(values, stored, described, strict=True):
        if image.shape != into.shape:  # a codestream of another size than the header says
            raise ValueError("rows and columns differ")
        padded = _padding(image, ds)
        into[...] = _rescaled(_used_bits(image, ds), ds, frame)
        if padded is not None and padded.any() and not padded.all():
            others = into[~padded]
            lowest = _text(ds, "PhotometricInterpretation") != "MONOCHROME1"
            frame["padding_value"] = float(others.min() if lowest else others.max())
            into[padded] = frame["padding_value"]


def _rescaled(image: NDArray[Any], ds: Dataset, frame: dict[str, Any]) -> NDArray[np.float32]:
    if "ModalityLUTSequence" in ds:
        table: NDArray[np.float32] = apply_modality_lut(image, ds).astype(np.float32)
        return table
    slope, intercept = np.float32(frame["slope"]), np.float32(frame["intercept"])
    made: NDArray[np.float32] = image.astype(np.float32) * slope + intercept
    return made


def _padding(image: NDArray[Any], ds: Dataset) -> NDArray[np.bool_] | None:
    """Where the stored value, unused bits and all, is Pixel Padding Value or in its range."""
    first = _padding_number(ds, "PixelPaddingValue")
    if first is None or image.dtype.kind not in "iu":
        return None
    last = _padding_number(ds, "PixelPaddingRangeLimit")
    low, high = sorted((first, first if last is None else last))
    if (
        low == high and low < 0 and image.dtype.kind == "u"
    ):  # written as signed beside unsigned pixels
        low = high = low + 2 ** (8 * image.dtype.itemsize)
    masked: NDArray[np.bool_] = (image >= low) & (image <= high)
    return masked


def _padding_number(ds: Dataset, keyword: str) -> float | None:
    value = _number(ds, keyword)
    # Explicit VR US beside signed pixels: the same 16 bits, read as signed.
    if value is not None and _number(ds, "PixelRepresentation") == 1 and value >= 2**15:
        return value - 2**16
    return value


def _used_bits(image: NDArray[Any], ds: Dataset) -> NDArray[Any]:
    """The low Bits Stored bits alone, sign extended: the others may hold an overlay or rubbish."""
    bits, size = int(_number(ds, "BitsStored") or 0), 8 * image.dtype.itemsize
    if image.dtype.kind not in "iu" or not 0 < bits < size:
        return image
    if image.dtype.kind == "u":
        low: NDArray[Any] = image & image.dtype.type(2**bits - 1)
        return low
    extended: NDArray[Any] = (image << (size - bits)) >> (size - bits)
    return extended


def _frame(ds: Dataset, index: int, total: int) -> dict[str, Any]:
    """What is known of one frame: functional groups first; the top level tells of one frame."""
    groups = list(_groups(ds, index))
    levels = groups or [ds]
    slope, intercept = _rescale(ds, [*groups, ds])
    centres, widths = (_numbers(levels, name) or [] for name in ("WindowCenter", "WindowWidth"))
    is_placed = bool(groups) or total == 1
    places = levels if is_placed else []
    return {
        "frame": index + 1 if total > 1 or groups else None,
        "position": _numbers(places, "ImagePositionPatient", 3),
        "orientation": _numbers(places, "ImageOrientationPatient", 6),
        "spacing": _numbers(levels, "PixelSpacing", 2) or _numbers(levels, "ImagerPixelSpacing", 2),
        "thickness": _first(_numbers(places, "SliceThickness", 1)),
        "slope": slope,
        "intercept": intercept,
        "windows": [pair for pair in zip(centres, widths, strict=False) if pair[1] > 0],
        "voi_function": next((x for d in levels if (x := _text(d, "VOILUTFunction"))), "LINEAR"),
        "padding_value": None,
    }


def _groups(ds: Dataset, index: int) -> Iterator[Dataset]:
    """The macros of one frame: per-frame first, then shared (PS3.3 C.7.6.16)."""
    for name, place in (
        ("PerFrameFunctionalGroupsSequence", index),
        ("SharedFunctionalGroupsSequence", 0),
    ):
        with suppress(*_BAD_VALUE):
            for macro in ds[name].value[place]:
                if macro.VR == "SQ" and macro.value:
                    yield macro.value[0]


def _rescale(ds: Dataset, levels: Iterable[Dataset]) -> tuple[float, float]:
    """Slope and intercept of one frame. CT must have both; elsewhere none means stored values."""
    found = [_numbers(levels, name, 1) for name in ("RescaleSlope", "RescaleIntercept")]
    if found == [None, None] and (_text(ds, "Modality") != "CT" or "ModalityLUTSequence" in ds):
        return 1.0, 0.0
    if found[0] is None or found[1] is None:
        raise RescaleMissing("Rescale Slope or Rescale Intercept is missing")
    if found[0][0] == 0.0:
        raise RescaleZero("Rescale Slope is zero")
    return found[0][0], found[1][0]


def _description(ds: Dataset, total: int, described: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "rows": int(ds.Rows),
        "columns": int(ds.Columns),
        "frames_total": total,
        "modality": _text(ds, "Modality"),
        "photometric": _text(ds, "PhotometricInterpretation"),
        "bits_stored": int(_number(ds, "BitsStored") or 0),
        "is_lossy": is_lossy(_text(ds, "LossyImageCompression"), _syntax(ds)),
        "rescale_type": _text(ds, "RescaleType"),
        "voi_lut": _voi_lut(ds),
        "frames": described,
    }


def _voi_lut(ds: Dataset) -> dict[str, Any] | None:
    """The first VOI LUT: entries, first stored value mapped, bits an entry (PS3.3 C.11.2.1.1)."""
    with suppress(*_BAD_VALUE):
        table = ds.VOILUTSequence[0]
        count, first, bits = (int(x) for x in table.LUTDescriptor)
        data = table.LUTData
        if isinstance(data, bytes):  # OW: little endian, as the file is read
            data = np.frombuffer(data, "<u2")
        if len(data) == (count or 2**16) and 8 <= bits <= 16:
            return {"first": first, "bits": bits, "data": [int(x) for x in data]}
    return None


def _numbers(
    levels: Iterable[Dataset], keyword: str, count: int | None = None
) -> list[float] | None:
    """The first readable value of an attribute on any level, as finite numbers."""
    for ds in levels:
        with suppress(*_BAD_VALUE):
            value = ds[keyword].value
            many = [float(x) for x in (value if hasattr(value, "__iter__") else [value])]
            if many and all(map(math.isfinite, many)) and count in (None, len(many)):
                return many
    return None


def _number(ds: Dataset, keyword: str) -> float | None:
    return _first(_numbers([ds], keyword, 1))


def _first(found: list[float] | None) -> float | None:
    return found[0] if found else None


def _text(ds: Dataset, keyword: str) -> str:
    with suppress(*_BAD_VALUE):
        return str(ds[keyword].value or "").strip().upper()
    return ""


def _syntax(ds: Dataset) -> str:
    """The transfer syntax, for a message: it names no person."""
    return str(getattr(ds.file_meta, "TransferSyntaxUID", ""))[:64]
