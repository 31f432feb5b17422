"""What a compressed image says of itself: its size and depth, read before any decoder sees it.

Decoders believe the codestream, pydicom the data set: where these differ, pixels come out scrambled
without an error (an image of 64 x 256 fills one of 128 x 128), or memory that nobody counted.
"""

import struct
from dataclasses import dataclass

_SOI, _SOS, _EOI = 0xFFD8, 0xFFDA, 0xFFD9
# Start of frame: JPEG (ISO/IEC 10918-1 Table B.1, without DHT, JPG, DAC), and JPEG-LS's own.
_SOF = frozenset({*range(0xFFC0, 0xFFD0), 0xFFF7} - {0xFFC4, 0xFFC8, 0xFFCC})
_ALONE = frozenset({0xFF01, *range(0xFFD0, 0xFFD8)})  # markers without a segment
_SOC_SIZ = b"\xff\x4f\xff\x51"  # ISO/IEC 15444-1 A.4.1, A.5.1; HTJ2K has the same
_JP2 = b"\x00\x00\x00\x0cjP  "
_MAX_SEGMENTS = 10_000
_JPEG = "1.2.840.10008.1.2.4."
# Baseline and extended JPEG, JPEG XL made of JPEG, and all video.
_ALWAYS_LOSSY = frozenset(_JPEG + end for end in ("50", "51", "111", *map(str, range(100, 109))))
# JPEG-LS near-lossless, JPEG 2000, HTJ2K, JPEG XL: the syntax allows loss, and the data set says.
_MAYBE_LOSSY = frozenset(_JPEG + end for end in ("81", "91", "93", "203", "112"))


@dataclass(frozen=True, slots=True)
class Stream:
    """One image of a codestream."""

    rows: int
    columns: int
    samples: int  # a pixel
    bits: int  # a sample


def described(stream: bytes) -> Stream | None:
    """What a JPEG, JPEG-LS or JPEG 2000 codestream says of itself; None where it says nothing."""
    try:
        if stream.startswith(_JP2):
            stream = stream[_contiguous(stream) :]
        if stream.startswith(_SOC_SIZ):
            return _jpeg_2000(stream)
        return _jpeg(stream)
    except (struct.error, IndexError):
        return None


def is_lossy(stated: str, transfer_syntax_uid: str) -> bool:
    """Whether an image has lost something (PS3.3 C.7.6.1.1.5).

    stated : Lossy Image Compression; what an encoder forgot to state follows from its syntax
    """
    if stated == "01" or transfer_syntax_uid in _ALWAYS_LOSSY:
        return True
    return transfer_syntax_uid in _MAYBE_LOSSY and stated != "00"


def _jpeg(stream: bytes) -> Stream | None:
    if struct.unpack_from(">H", stream)[0] != _SOI:
        return None
    at = 2
    for _ in range(_MAX_SEGMENTS):
        while stream[at + 1] == 0xFF:  # fill bytes
            at += 1
        marker, length = struct.unpack_from(">HH", stream, at)
        if marker in _SOF:
            bits, rows, columns, samples = struct.unpack_from(">BHHB", stream, at + 4)
            return Stream(rows, columns, samples, bits)
        if marker in (_SOS, _EOI):
            return None
        at += 2 if marker in _ALONE else 2 + length
    return None


def _jpeg_2000(stream: bytes) -> Stream:
    right, bottom, left, top = struct.unpack_from(">4I", stream, 8)
    samples, depth = struct.unpack_from(">HB", stream, 40)
    return Stream(bottom - top, right - left, samples, (depth & 0x7F) + 1)


def _contiguous(stream: bytes) -> int:
    """Where the codestream begins in a JP2 file, which DICOM does not allow and senders send."""
    at = 0
    for _ in range(_MAX_SEGMENTS):
        length, kind = struct.unpack_from(">I4s", stream, at)
        if kind == b"jp2c":
            return at + 8
        if length < 8:
            break
        at += length
    raise IndexError("no codestream")
