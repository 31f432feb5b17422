"""A storage commitment transaction: which instances somebody is to vouch for, and what he says.

PS3.4 Annex J. The request (N-ACTION) names instances; the report (N-EVENT-REPORT) names those that
are kept for good, and of the others says why not.
"""

import base64
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Self

from pydicom import Dataset
from pydicom.filereader import read_dataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    generate_uid,
)

from db.errors import NotDicom
from db.identity import is_uid
from db.lenient import BAD_VALUE, integer, text
from db.meta import transfer_syntax
from db.sandbox import Answer

SOP_CLASS = "1.2.840.10008.1.20.1"  # Storage Commitment Push Model
SOP_INSTANCE = "1.2.840.10008.1.20.1.1"  # well-known (PS3.4 J.3.5)
REQUEST = 1  # action type (PS3.4 Table J.3-1)
ALL_KEPT, SOME_FAILED = 1, 2  # event types (PS3.4 Table J.3-2)
SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)

# Failure reasons (PS3.3 C.14.1.1).
PROCESSING_FAILURE = 0x0110
NO_SUCH_INSTANCE = 0x0112
CLASS_INSTANCE_CONFLICT = 0x0119


@dataclass(frozen=True, slots=True)
class Item:
    """An instance of a transaction."""

    sop_class_uid: str
    sop_instance_uid: str
    failure: int | None = None  # why nobody vouches for it; None where none is stated


@dataclass(frozen=True, slots=True)
class Transaction:
    """What an N-ACTION asks for, or an N-EVENT-REPORT says."""

    uid: str
    items: tuple[Item, ...]

    @property
    def failed(self) -> dict[str, int]:
        """Why not, by SOP Instance UID."""
        return {one.sop_instance_uid: one.failure for one in self.items if one.failure is not None}

    @property
    def kept(self) -> frozenset[str]:
        """SOP Instance UIDs against which nothing speaks, not even a second mention."""
        named = frozenset(one.sop_instance_uid for one in self.items)
        return named - self.failed.keys()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(str(value["uid"]), tuple(Item(**item) for item in value["items"]))

    def dataset(self) -> Dataset:
        """Action or Event Information (PS3.4 Tables J.3-1 and J.3-2)."""
        built = Dataset()
        built.TransactionUID = self.uid
        kept = [_named(one) for one in self.items if one.failure is None]
        failed = [_named(one) for one in self.items if one.failure is not None]
        if kept:
            built.ReferencedSOPSequence = kept
        if failed:
            built.FailedSOPSequence = failed
        return built


def new_uid() -> str:
    return str(generate_uid(prefix=None))


def read(path: str) -> Answer:
    """A spooled `.request` or `.report` as JSON; for the sandbox.

    Raises
    ------
    NotDicom
        If it names no transaction or no instance, or cannot be read.
    """
    with Path(path).open("rb") as file:
        return _read(file, transfer_syntax(file))


def read_base64(encoded: str, syntax: str) -> Answer:
    """As `read`, of a data set that lies in no file."""
    return _read(BytesIO(base64.b64decode(encoded)), syntax)


def _read(file: BinaryIO, syntax: str) -> Answer:
    is_implicit, is_big = syntax == ImplicitVRLittleEndian, syntax == ExplicitVRBigEndian
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ds = read_dataset(file, is_implicit, not is_big)
            items = [*_items(ds, "ReferencedSOPSequence"), *_items(ds, "FailedSOPSequence")]
        except (RecursionError, *BAD_VALUE):
            raise NotDicom("it cannot be read") from None
        uid = text(ds, "TransactionUID")
    if not is_uid(uid):
        raise NotDicom("it names no transaction")
    if not items:
        raise NotDicom("it names no instance")
    return Transaction(uid, tuple(items)).to_json(), []


def _items(ds: Dataset, keyword: str) -> list[Item]:
    is_failed = keyword == "FailedSOPSequence"
    found = []
    for item in ds[keyword].value or () if keyword in ds else ():
        uids = text(item, "ReferencedSOPClassUID"), text(item, "ReferencedSOPInstanceUID")
        if not all(map(is_uid, uids)):
            raise NotDicom("it names what is no UID")
        # A failure without its reason is one still.
        reason = integer(item, "FailureReason") or PROCESSING_FAILURE
        found.append(Item(*uids, reason if is_failed else None))
    return found


def _named(item: Item) -> Dataset:
    built = Dataset()
    built.ReferencedSOPClassUID = item.sop_class_uid
    built.ReferencedSOPInstanceUID = item.sop_instance_uid
    if item.failure is not None:
        built.FailureReason = item.failure
    return built
