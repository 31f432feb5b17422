"""The digest of encoded pixel data, read as a stream: its size is the sender's choice."""

import hashlib
import struct
from typing import BinaryIO

from db.errors import CutOff, NotDicom

PIXEL_TAGS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})  # float, double float, integer
_ITEM, _END = 0xFFFEE000, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_CHUNK_BYTES = 2**20
_NATIVE = frozenset(
    {
        "1.2.840.10008.1.2",
        "1.2.840.10008.1.2.1",
        "1.2.840.10008.1.2.1.98",  # encapsulated uncompressed: fragments of the same bytes
        "1.2.840.10008.1.2.1.99",
        "1.2.840.10008.1.2.2",
        "1.2.840.113619.5.2",  # GE private
    }
)
BIG_ENDIAN = "1.2.840.10008.1.2.2"


def encoding_of(transfer_syntax_uid: str) -> str:
    """What makes two pixel digests comparable: all uncompressed syntaxes hold the same bytes."""
    return "native" if transfer_syntax_uid in _NATIVE else transfer_syntax_uid


def pixel_sha256(file: BinaryIO, *, is_implicit: bool, is_big: bool, swap: int) -> str:
    """Digest the pixel data element that `file` stands at.

    Parameters
    ----------
    swap : bytes of one value that big endian turned round (1: none), so that the
        digest is that of the little-endian bytes

    Returns
    -------
    Empty where `file` is at its end: there is no pixel data.

    Raises
    ------
    CutOff
        If the element ends in the middle.
    NotDicom
        If its fragments are none.
    """
    order = ">" if is_big else "<"
    head = _exactly(file, 8) if _has_more(file) else b""
    if not head:
        return ""
    if is_implicit:
        (length,) = struct.unpack(order + "I", head[4:])
    elif head[4:6] in (b"OB", b"OW", b"OF", b"OD", b"OV", b"UN"):
        (length,) = struct.unpack(order + "I", _exactly(file, 4))
    else:
        (length,) = struct.unpack(order + "H", head[6:])
    digest = hashlib.sha256()
    if length != _UNDEFINED:
        _update(digest, file, length, swap if is_big else 1)
    else:
        _update_fragments(digest, file, order)
    return digest.hexdigest()


def _update_fragments(digest: "hashlib._Hash", file: BinaryIO, order: str) -> None:
    is_table = True  # the first item is the offset table, which may be empty or not
    while True:
        group, element, length = struct.unpack(order + "HHI", _exactly(file, 8))
        tag = group << 16 | element
        if tag == _END:
            return
        if tag != _ITEM or length == _UNDEFINED:
            raise NotDicom("the pixel data's fragments are broken")
        if is_table:
            _exactly(file, length)
        else:
            digest.update(struct.pack("<I", length))
            _update(digest, file, length, 1)
        is_table = False


def _update(digest: "hashlib._Hash", file: BinaryIO, length: int, swap: int) -> None:
    while length:
        chunk = _exactly(file, min(length, _CHUNK_BYTES))
        length -= len(chunk)
        digest.update(_swapped(chunk, swap) if swap > 1 else chunk)


def _swapped(chunk: bytes, size: int) -> bytes:
    turned = bytearray(chunk)
    for at in range(size):
        turned[at::size] = chunk[size - 1 - at :: size]
    return bytes(turned)


def _has_more(file: BinaryIO) -> bool:
    more = bool(file.read(1))
    if more:
        file.seek(-1, 1)
    return more


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise CutOff("the pixel data is cut off")
    return data
