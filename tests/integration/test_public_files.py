"""Files of other people's scanners: those that pydicom and pydicom-data bring (H12, H20, H29, H30).

Each is received as if a modality had sent it, and must be handled or refused with a stated reason.
"""

import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import data_store
import numpy as np
import pydicom.data
import pytest
from pydicom import dcmread
from pydicom.pixels import apply_modality_lut
from sqlalchemy.orm import Session

from db.errors import NodeError
from db.pixels import read_images
from db.sandbox import Sandbox
from db.tables import EventRow, InstanceRow, QuarantineRow, ReturnedRow
from tests.reception import Reception

# What is wrong with these files is what they are here for.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ROOTS = (Path(pydicom.data.__file__).parent / "test_files", Path(data_store.__file__).parent)
MAX_BYTES = 8 * 2**20  # a handful are larger, and slow to decode
#: Refusals of pixels that these files are allowed to meet; a new one is to be looked at.
REFUSALS = {
    "colour_image", "no_pixels", "pixels_differ", "rescale_missing", "rescale_zero",
    "too_many_pixels", "undecodable",
}  # fmt: skip


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(size=2, memory_mb=4096, cpu_s=120) as pool:
        yield pool


@pytest.fixture
def node(settings, engine, sandbox) -> Iterator[Reception]:
    found = Reception(settings, engine, sandbox)
    yield found
    found.box.close()
    found.intake.close()


def read(path: Path, **how: bool) -> pydicom.FileDataset:
    """Also before any test runs, when warnings are errors already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dcmread(path, **how)


def files() -> list[Path]:
    """Those with a file meta group, which says in which syntax a modality would have sent them."""
    found = sorted(path for root in ROOTS for path in root.rglob("*.dcm"))
    return [path for path in found if path.stat().st_size <= MAX_BYTES and split(path)]


def split(path: Path) -> tuple[pydicom.FileDataset, bytes] | None:
    """File meta group and what follows it."""
    data = path.read_bytes()
    if data[128:140] != b"DICM\x02\x00\x00\x00UL\x04\x00":
        return None
    (length,) = struct.unpack("<I", data[140:144])
    head = read(path, stop_before_pixels=True, force=True)
    if "TransferSyntaxUID" not in head.file_meta or "SOPClassUID" not in head:
        return None
    return head, data[144 + length :]


def test_h12_h20_each_public_file_ends_in_one_stated_outcome(node):
    sent = {}
    for path in files():
        head, body = split(path)  # type: ignore[misc]  # `files` has those alone
        if body:
            sent[node.keep(head, body)] = path
    assert len(sent) > 120

    node.drain()

    accepted = {row.id: row for row in node.all(InstanceRow)}
    aside = {row.id: row for row in node.all(QuarantineRow)}
    returned = {row.id for row in node.all(ReturnedRow)}
    dropped = set(sent) - set(accepted) - set(aside) - returned
    assert set(accepted).isdisjoint(aside)
    assert all(row.code and row.reason for row in aside.values())
    # Some files are one instance in several encodings, or are there twice.
    with Session(node.engine) as session:
        variants = session.query(EventRow).filter(EventRow.kind == "variant_dropped").count()
    assert len(dropped) >= variants > 0
    uids = {row.sop_instance_uid for row in accepted.values()}
    assert {str(split(sent[key])[0].SOPInstanceUID) for key in dropped} <= uids
    kept = {path.stem: path for path in (*node.files("store"), *node.files("quarantine"))}
    assert set(kept) == {str(key) for key in (*accepted, *aside)}
    for key in (*accepted, *aside):
        assert kept[str(key)].read_bytes().endswith(split(sent[key])[1])
    syntaxes = {str(split(path)[0].file_meta.TransferSyntaxUID) for path in sent.values()}
    assert {
        "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.4.50",
        "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80",
        "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91",
        "1.2.840.10008.1.2.5",
    } <= syntaxes  # fmt: skip


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_h12_h29_h30_pixels_of_public_files_are_decoded_or_refused_with_a_reason(path, sandbox):
    described, arrays, refused = {}, [], None
    try:
        described, arrays = sandbox.run(read_images, str(path), timeout_s=120)
    except NodeError as error:
        refused = error
    if refused is not None:
        assert refused.code in REFUSALS, f"{refused.code}: {refused}"
        assert str(refused)
        return
    (values,) = arrays
    assert len(values) == len(described["frames"])
    expected = reference(path, described)
    if expected is None:
        return
    whole = [one["padding_value"] is None for one in described["frames"]]
    for index in np.flatnonzero(whole)[:2]:
        np.testing.assert_allclose(values[index], expected[index], rtol=1e-5, atol=1e-3)


def reference(path: Path, described: dict) -> np.ndarray | None:
    """pydicom's own values; None where it reads no pixel data: intake sets such a file aside."""
    ds = read(path)
    if "PixelData" not in ds:
        return None
    stored = ds.pixel_array
    found = stored[None] if stored.ndim == 2 else stored
    if "ModalityLUTSequence" in ds:
        return apply_modality_lut(found, ds).astype(np.float64)
    frames = described["frames"]
    slopes, intercepts = (
        np.array([one[name] for one in frames]) for name in ("slope", "intercept")
    )
    return found * slopes[:, None, None] + intercepts[:, None, None]
