"""The file meta group of a spooled file, where its provenance stands (PS3.10 7.1)."""

import json
import struct
from dataclasses import asdict, dataclass, fields
from typing import Any, BinaryIO, Self

from db.errors import PermanentError

IMPLEMENTATION_CLASS_UID = "2.25.146283568222166524397493664430263465537"
IMPLEMENTATION_VERSION_NAME = "VIGIL_0_1"  # at most 16 characters
PRIVATE_CREATOR_UID = "2.25.176270313832009852866588946909545015136"

_LONG = frozenset({b"OB", b"UR"})  # VRs with a 32-bit length (PS3.5 7.1.2)
_MAX_META_BYTES = 65536


class SpoolCorrupt(PermanentError):
    """A spooled file's own meta group cannot be read: the disk lost it."""

    code = "spool_corrupt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where an instance came from: what its rows are made of, if the database is lost."""

    tenant: str
    origin: str = "dicom"  # or user:<id>
    calling_ae: str = ""
    called_ae: str = ""
    address: str = ""  # of the peer
    local_address: str = ""  # host:port it was sent to
    user: str = ""
    tls_subject: str = ""
    association: str = ""
    received_at: str = ""  # ISO 8601 with offset
    sop_class_uid: str = ""  # of the command; may be empty or malformed
    sop_instance_uid: str = ""
    transfer_syntax_uid: str = ""  # of the presentation context

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """From `to_json`'s values; what a newer node added is passed over."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: str(item) for name, item in value.items() if name in known})


def encode_head(source: Provenance) -> bytes:
    """The preamble, zeroed (it may carry a program), the prefix, and our meta group."""
    items = [
        _element(0x0001, b"OB", b"\x00\x01"),
        _element(0x0002, b"UI", _uid(source.sop_class_uid)),
        _element(0x0003, b"UI", _uid(source.sop_instance_uid)),
        _element(0x0010, b"UI", _uid(source.transfer_syntax_uid)),
        _element(0x0012, b"UI", _uid(IMPLEMENTATION_CLASS_UID)),
        _element(0x0013, b"SH", IMPLEMENTATION_VERSION_NAME.encode()),
        _element(0x0016, b"AE", _text(source.calling_ae)[:16]),
        _element(0x0017, b"AE", _text(source.calling_ae)[:16]),
        _element(0x0018, b"AE", _text(source.called_ae)[:16]),
        _element(0x0026, b"UR", _text(source.address)),
        _element(0x0028, b"UR", _text(source.local_address)),
        _element(0x0100, b"UI", _uid(PRIVATE_CREATOR_UID)),
        _element(0x0102, b"OB", json.dumps(source.to_json()).encode()),
    ]
    body = b"".join(items)
    return bytes(128) + b"DICM" + _element(0x0000, b"UL", struct.pack("<I", len(body))) + body


def decode_head(file: BinaryIO) -> Provenance:
    """Read what `encode_head` wrote; leaves `file` at the first byte of the data set.

    Raises
    ------
    SpoolCorrupt
    """
    try:
        return Provenance.from_json(json.loads(_group(file)[0x0102]))
    except (KeyError, TypeError, ValueError, struct.error) as error:
        raise SpoolCorrupt(
            f"no provenance in the file meta group ({type(error).__name__})"
        ) from None


def transfer_syntax(file: BinaryIO) -> str:
    """As `decode_head`, of any DICOM file of ours: results have no provenance of a sender.

    Raises
    ------
    SpoolCorrupt
    """
    try:
        return _group(file)[0x0010].decode("ascii")
    except (KeyError, ValueError, struct.error) as error:
        raise SpoolCorrupt(f"no transfer syntax in the file ({type(error).__name__})") from None


def _group(file: BinaryIO) -> dict[int, bytes]:
    head = file.read(144)
    if len(head) < 144 or head[128:140] != b"DICM\x02\x00\x00\x00UL\x04\x00":
        raise SpoolCorrupt("no file meta group")
    (length,) = struct.unpack("<I", head[140:144])
    body = file.read(length) if length <= _MAX_META_BYTES else b""
    if len(body) != length:
        raise SpoolCorrupt("the file meta group is cut off")
    return _elements(body)


def _element(element: int, vr: bytes, value: bytes) -> bytes:
    pad = b"\0" if vr in (b"UI", b"OB") else b" "
    value += pad * (len(value) % 2)
    head = struct.pack("<HH", 0x0002, element) + vr
    size = struct.pack("<HI", 0, len(value)) if vr in _LONG else struct.pack("<H", len(value))
    return head + size + value


def _elements(body: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    while at < len(body):
        _, element, vr = struct.unpack_from("<HH2s", body, at)
        if vr in _LONG:
            (length,) = struct.unpack_from("<I", body, at + 8)
            at += 12
        else:
            (length,) = struct.unpack_from("<H", body, at + 6)
            at += 8
        found[element] = body[at : at + length].rstrip(b"\0 ")
        at += length
    return found


def _uid(value: str) -> bytes:
    return _text(value)[:64]


def _text(value: str) -> bytes:
    return value.encode("ascii", "replace")
