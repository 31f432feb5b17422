"""Every transfer syntax through intake, loader, eligibility and model: the same values, or
a stated outcome (H12)."""

import numpy as np
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from db.files import store_path
from db.pixels import read_images
from db.result import Finding
from db.sandbox import Sandbox
from db.tables import AnalysisRow, InstanceRow, QuarantineRow, ResultRow
from tests import encodings
from tests.bundles.make import make_bundle
from tests.bundles.sources import head
from tests.encodings import (
    INTERCEPT,
    JPEG_XL,
    NOBODYS,
    READABLE,
    encapsulated,
    series,
    written_in,
)
from tests.stage import Stages

HU = head()


@pytest.fixture
def stages(engine, settings, tmp_path):
    stages = Stages(engine, settings, make_bundle(tmp_path / "head"))
    yield stages
    stages.close()


def analysed(stages):
    stages.judge()
    stages.infer()
    with Session(stages.engine) as session:
        return session.scalars(select(AnalysisRow)).one()


def finding_of(stages):
    with Session(stages.engine) as session:
        return Finding.from_json(session.scalars(select(ResultRow)).one().finding)


def stored_values(stages):
    """(images, rows, cols) in HU as a child decodes what is in the store, in order of number."""
    with Session(stages.engine) as session:
        rows = list(session.scalars(select(InstanceRow)))
    rows.sort(key=lambda row: row.header["instance_number"])
    with Sandbox(1) as sandbox:
        paths = [store_path(stages.settings.node.data_dir, "north", r.study_id, r.id) for r in rows]
        found = [sandbox.run(read_images, str(path.resolve()), timeout_s=120) for path in paths]
    return np.concatenate([values for _, (values,) in found]), [meta for meta, _ in found]


@pytest.mark.parametrize("encoding", READABLE.values(), ids=READABLE)
def test_h12_a_series_in_each_syntax_is_analysed_with_the_same_values(stages, encoding):
    stages.receive_bytes(written_in(encoding, image) for image in series())

    row = analysed(stages)

    assert (row.state, row.reason) == ("FOUND", "")
    finding = finding_of(stages)
    assert len(finding.images) == len(HU)
    assert not finding.is_partial
    values, metas = stored_values(stages)
    assert np.abs(values - HU).max() <= encoding.tolerance
    assert {meta["is_lossy"] for meta in metas} == {encoding.tolerance > 0}
    with Session(stages.engine) as session:
        headers = session.scalars(select(InstanceRow.header)).all()
    assert {header["is_lossy"] for header in headers} == {encoding.tolerance > 0}


def refused(stages, received):
    stages.receive_bytes(received)
    row = analysed(stages)
    with Session(stages.engine) as session:
        assert session.scalars(select(ResultRow)).all() == []
        assert session.scalars(select(QuarantineRow)).all() == []
    return row.state, row.reason_code, row.reason


@pytest.mark.parametrize("syntax", [JPEG_XL, NOBODYS], ids=["JPEG XL", "nobody's"])
def test_h12_a_syntax_that_nothing_decodes_is_stated(stages, syntax):
    stream = encodings.imagecodecs.jpegxl_encode

    outcome = refused(
        stages,
        (
            encapsulated(image, syntax, stream(pixels.astype(np.uint16), lossless=True))
            for image, pixels in zip(series(), HU - INTERCEPT, strict=True)
        ),
    )

    assert outcome[:2] == ("FAILED", "undecodable")
    assert outcome[2].startswith("Image 1 of 16 (series 2, instance 1): ")
    assert outcome[2].endswith(f"in {syntax}).")


def test_h12_h30_jpeg_baseline_has_too_few_bits(stages):
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    grey = ((HU + 1024) >> 4).clip(0, 255).astype(np.uint8)
    jpeg = encodings.imagecodecs.jpeg8_encode

    outcome = refused(
        stages,
        (
            encapsulated(image, encodings.JPEG_BASELINE, jpeg(pixels, 95))
            for image, pixels in zip(series(**eight), grey, strict=True)
        ),
    )

    assert outcome == ("NOT_ANALYSED", "bits_stored", "The pixel values are too coarse.")


def test_h12_a_stream_of_another_matrix_than_its_header_says_is_no_image(stages):
    """Of as many pixels, so that it fills the matrix without an error, row after wrong row."""
    encode = READABLE["JPEG 2000 lossless"].encode
    stored = (HU - INTERCEPT).clip(0, 4095).astype(np.uint16).reshape(-1, 64, 256)

    outcome = refused(
        stages,
        (
            encapsulated(image, READABLE["JPEG 2000 lossless"].syntax, encode(pixels))
            for image, pixels in zip(series(), stored, strict=True)
        ),
    )

    assert outcome == (
        "FAILED",
        "pixels_differ",
        "Image 1 of 16 (series 2, instance 1): "
        "its pixel data is 64 x 256 of 12 bits, its header says 128 x 128 of 12.",
    )


@pytest.mark.parametrize("is_same", [True, False])
def test_h12_a_file_header_inside_the_data_set_does_not_change_its_syntax(stages, is_same):
    """Bytes sent as RLE, and a file header before them that says Explicit VR."""
    encoding = READABLE["Explicit VR Little Endian" if is_same else "RLE"]
    images = [written_in(encoding, image) for image in series()]

    stages.receive_bytes((image, file_header(encodings.EXPLICIT) + body) for image, body in images)

    with Session(stages.engine) as session:
        codes = session.scalars(select(QuarantineRow.code)).all()
    assert codes == ([] if is_same else ["not_dicom"] * len(images))
    if is_same:
        assert analysed(stages).state == "FOUND"


def file_header(syntax):
    """A file meta group of one element (PS3.10 7.1)."""
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    return b"\x02\x00\x10\x00UI" + len(value).to_bytes(2, "little") + value
