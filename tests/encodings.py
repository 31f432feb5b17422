"""Every transfer syntax that a scanner may send: the same 12-bit CT image in each of them.

Encoders are imagecodecs' and pydicom's own; the node decodes with neither, but for RLE.
"""

import copy
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRBigEndian

from tests.bundles.sources import ct_slice, head
from tests.stage import encoded

imagecodecs: Any = __import__("imagecodecs")  # ships no types

EXPLICIT = "1.2.840.10008.1.2.1"
DEFLATED = "1.2.840.10008.1.2.1.99"
RLE = "1.2.840.10008.1.2.5"
_JPEG = "1.2.840.10008.1.2.4."
JPEG_BASELINE, JPEG_XL, NOBODYS = _JPEG + "50", _JPEG + "110", "1.2.3.4.5"

INTERCEPT = -1024
Encoder = Callable[[NDArray[Any]], bytes]


@dataclass(frozen=True, slots=True)
class Encoding:
    """One way to write pixels: `encode` is None where they are not compressed."""

    syntax: str
    encode: Encoder | None = None
    tolerance: float = 0.0  # stored values; 0: not one pixel differs


def _jpeg_lossless(predictor: int) -> Encoder:
    return lambda grey: imagecodecs.jpeg8_encode(
        grey, lossless=True, predictor=predictor, bitspersample=12
    )


def _jpeg_2000(**how: Any) -> Encoder:
    return lambda grey: imagecodecs.jpeg2k_encode(
        grey, codecformat="j2k", bitspersample=12, numthreads=1, **how
    )


def _htj2k(*level: float, reversible: bool) -> Encoder:
    return lambda grey: imagecodecs.htj2k_encode(grey, *level, reversible=reversible)


#: What the node can decode, by a name for the test's report.
READABLE = {
    "Implicit VR Little Endian": Encoding("1.2.840.10008.1.2"),
    "Explicit VR Little Endian": Encoding(EXPLICIT),
    "Explicit VR Big Endian": Encoding("1.2.840.10008.1.2.2"),
    "Deflated": Encoding(DEFLATED),
    "RLE": Encoding(RLE),
    "JPEG Extended": Encoding(
        _JPEG + "51", lambda grey: imagecodecs.jpeg8_encode(grey, 97, bitspersample=12), 12.0
    ),
    "JPEG Lossless": Encoding(_JPEG + "57", _jpeg_lossless(6)),
    "JPEG Lossless SV1": Encoding(_JPEG + "70", _jpeg_lossless(1)),
    "JPEG-LS": Encoding(_JPEG + "80", lambda grey: imagecodecs.jpegls_encode(grey)),
    "JPEG-LS near-lossless": Encoding(
        _JPEG + "81", lambda grey: imagecodecs.jpegls_encode(grey, 2), 2.0
    ),
    "JPEG 2000 lossless": Encoding(_JPEG + "90", _jpeg_2000(reversible=True)),
    "JPEG 2000": Encoding(_JPEG + "91", _jpeg_2000(level=80, reversible=False), 6.0),
    "HTJ2K lossless": Encoding(_JPEG + "201", _htj2k(reversible=True)),
    "HTJ2K lossless RPCL": Encoding(_JPEG + "202", _htj2k(reversible=True)),
    "HTJ2K": Encoding(_JPEG + "203", _htj2k(0.00001, reversible=False), 6.0),
}


def series(**attributes: Any) -> list[Dataset]:
    """A head of 12 bits, unsigned, as most scanners write it; `attributes` as `ct_slice` takes."""
    stored = (head() - INTERCEPT).clip(0, 4095).astype(np.uint16)
    given = {"RescaleIntercept": INTERCEPT, "BitsStored": 12, "HighBit": 11, "PatientID": "P1"}
    return [
        ct_slice(pixels, z=5.0 * i, InstanceNumber=i + 1, **(given | attributes))
        for i, pixels in enumerate(stored)
    ]


def written_in(encoding: Encoding, dataset: Dataset) -> tuple[Dataset, bytes]:
    """The data set in another encoding, with its UID kept: file meta and attributes, and the bytes
    that travel in a C-STORE.

    dataset : Explicit VR Little Endian
    """
    twin = copy.deepcopy(dataset)
    twin.file_meta.TransferSyntaxUID = UID(encoding.syntax)
    if encoding.encode is not None:
        return _encapsulated(twin, encoding.encode(_grey(dataset)))
    if encoding.syntax == RLE:
        twin.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
        twin.compress(UID(RLE), generate_instance_uid=False)
    elif encoding.syntax == ExplicitVRBigEndian:
        twin.PixelData = _grey(dataset).byteswap().tobytes()
    elif encoding.syntax == DEFLATED:
        return twin, _deflated(encoded(dataset))
    return twin, encoded(twin)


def encapsulated(dataset: Dataset, syntax: str, *streams: bytes) -> tuple[Dataset, bytes]:
    """The data set with these codestreams, one a frame, in whatever syntax is claimed."""
    twin = copy.deepcopy(dataset)
    twin.file_meta.TransferSyntaxUID = UID(syntax)
    return _encapsulated(twin, *streams)


def _encapsulated(twin: Dataset, *streams: bytes) -> tuple[Dataset, bytes]:
    twin.PixelData = encapsulate(list(streams))
    twin["PixelData"].VR = "OB"
    twin["PixelData"].is_undefined_length = True
    return twin, encoded(twin)


def _grey(dataset: Dataset) -> NDArray[Any]:
    dtype = "<i2" if dataset.PixelRepresentation else "<u2"
    return np.frombuffer(dataset.PixelData, dtype).reshape(dataset.Rows, dataset.Columns)


def _deflated(body: bytes) -> bytes:
    squeeze = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    squeezed = squeeze.compress(body) + squeeze.flush()
    return squeezed + b"\0" * (len(squeezed) % 2)
