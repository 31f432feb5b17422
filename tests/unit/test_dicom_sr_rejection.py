"""Rejection notes: what they name, as whom, and what other people's validators say of them."""

import io
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest

from db.result import SentObject
from db.study import WithdrawalReason
from db.withdrawals import Withdrawal
from dicom_sr.plan import SR_CLASSES, Context, Variant
from dicom_sr.rejection import build_rejections
from tests.findings import MODEL, OUTPUT, synthetic_headers
from tests.validators import dciodvfy, dsrdump, pixelmed

CONTEXT = Context("north", 2, "0.1.0", "vigil-1")
SC, KOS = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.88.59"
FIRST, SECOND = "0d1f7f8e-7b53-4d61-9d2e-6f6a6d1c7a10", "0d1f7f8e-7b53-4d61-9d2e-6f6a6d1c7a20"
ROLES = (("summary", SC), ("overlay", SC), ("sr", SR_CLASSES["3d"]), ("ko", KOS))


def sent(result_id: str = FIRST, start: int = 1, **changes: object) -> tuple[SentObject, ...]:
    return tuple(
        replace(
            SentObject(result_id, role, sop_class, f"2.25.{start}{i}", f"2.25.9{start}{i}", True),
            **changes,
        )
        for i, (role, sop_class) in enumerate(ROLES)
    )


def withdrawal(**changes: object) -> Withdrawal:
    fields: dict[str, object] = {
        "withdrawal_uuid": "0d1f7f8e-7b53-4d61-9d2e-6f6a6d1c7a99",
        "withdrawn_at": "2026-03-01T15:05:09+00:00",
        "reason": WithdrawalReason.PATIENT_SAFETY,
        "words": "",
        "model": MODEL,
        "output": OUTPUT,
    }
    return Withdrawal(**{**fields, **changes})  # type: ignore[arg-type]


def build(rejects=None, headers=None, **changes: object):
    rejects = sent() if rejects is None else rejects
    header = synthetic_headers()[0]
    headers = headers or dict.fromkeys((FIRST, SECOND), header)
    built = build_rejections(withdrawal(**changes), headers, CONTEXT, Variant(rejects=rejects))
    return built, [pydicom.dcmread(io.BytesIO(one.data)) for one in built]


def test_images_are_named_as_images_and_documents_as_composites():
    _, (note,) = build()

    named = [item for item in note.ContentSequence if item.RelationshipType == "CONTAINS"][1:]
    assert [item.ValueType for item in named] == ["IMAGE", "IMAGE", "COMPOSITE", "COMPOSITE"]
    assert all("ConceptNameCodeSequence" not in item for item in named)
    assert note.ContinuityOfContent == "SEPARATE"
    assert (note.Modality, note.SeriesNumber) == ("KO", 9914)
    assert note.SeriesDescription == "ICH AI results withdrawn"
    assert (note.ContentDate, note.ContentTime) == ("20260301", "150509")


def test_each_result_is_rejected_under_the_name_it_bore():
    one, other = synthetic_headers()[0], synthetic_headers(PatientID="T-0002")[0]

    _, notes = build((*sent(), *sent(SECOND, 2)), {FIRST: one, SECOND: other})

    assert [note.PatientID for note in notes] == ["T-0001", "T-0002"]
    assert len({note.SeriesInstanceUID for note in notes}) == 1
    assert [note.InstanceNumber for note in notes] == [1, 2]


def test_the_same_input_gives_the_same_bytes_and_another_list_another_uid():
    assert build()[0] == build()[0]

    (whole,), (part,) = build()[1], build(sent()[:2])[1]
    assert whole.SOPInstanceUID != part.SOPInstanceUID


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("notes")
    gaps = synthetic_headers(
        StudyID=None, AccessionNumber=None, PatientBirthDate=None, PatientSex=None,
        StudyTime=None, StudyDate=None, ReferringPhysicianName=None,
    )[0]  # fmt: skip
    kinds = {
        "safety": build(words="The images are of another patient."),
        "quality": build(reason=WithdrawalReason.QUALITY),
        "doubt": build(sent(is_certain=False)),
        "gaps": build(headers={FIRST: gaps}),
    }
    paths = {}
    for name, (built, _) in kinds.items():
        (one,) = built
        paths[name] = folder / f"{name}.dcm"
        paths[name].write_bytes(one.data)
    return paths


def test_dciodvfy_finds_no_error(documents):
    for name, path in documents.items():
        assert dciodvfy(path, iod="KeyObjectSelectionDocument") == [], name


def test_dcmtk_reads_them(documents):
    said = {name: dsrdump(path) for name, path in documents.items()}

    assert '"Rejected for Patient Safety Reasons")=SEPARATE' in said["safety"]
    assert '"Rejected for Quality Reasons")=SEPARATE' in said["quality"]


@pytest.mark.timeout(600)
def test_pixelmed_finds_the_template_and_no_error(documents):
    verdicts = pixelmed(
        [documents["safety"], documents["quality"]],
        iod="KeyObjectSelectionDocument",
        template="TID_2010 (KeyObjectSelection)",
    )

    assert {path.stem: lines for path, lines in verdicts.items() if lines} == {}
