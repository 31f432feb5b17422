"""What every object has in common: the source's patient and study, our equipment, our times."""

import datetime as dt
import re
from collections.abc import Mapping, Sequence
from typing import Any

import highdicom as hd
from pydicom import DataElement, Dataset
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileMetaDataset
from pydicom.sr.coding import Code as PydicomCode
from pydicom.uid import UID, SecondaryCaptureImageStorage

from db.meta import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from db.result import Code, ImageRef
from dicom_sr.attributes import COPIED
from dicom_sr.plan import MANUFACTURER, MODEL_NAME, Issue

#: Type 2 where they matter: present, empty where the source has none (H31).
TYPE_2 = (
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyID",
)
#: What a validator, or a receiver that trusts it, accepts; a value that does not fit is left out.
FORMS = {
    "StudyDate": re.compile(rb"\d{4}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])"),
    "PatientBirthDate": re.compile(rb"\d{4}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])"),
    "StudyTime": re.compile(rb"([01]\d|2[0-3])([0-5]\d([0-5]\d(\.\d{1,6})?)?)?"),
    "PatientSex": re.compile(rb"[MFO]"),
    "PatientAge": re.compile(rb"\d{3}[DWMY]"),
    "PatientSize": re.compile(rb"[-+]?\d*\.?\d+([eE][-+]?\d+)?"),
    "PatientWeight": re.compile(rb"[-+]?\d*\.?\d+([eE][-+]?\d+)?"),
    "TimezoneOffsetFromUTC": re.compile(rb"[-+](0\d|1[0-4])[0-5]\d"),
}
_TEXT = (
    "PatientName",
    "PatientID",
    "ReferringPhysicianName",
    "StudyDescription",
    "AccessionNumber",
)
#: Deprecated defaults would say Latin-1 bytes are ASCII; undeclared, they are most often that (H9).
UNDECLARED_CHARACTER_SET = "ISO_IR 100"

PROCESSING_EQUIPMENT = Code("109102", "DCM", "Processing Equipment")
REPLACED_REPORT = Code("121360", "DCM", "Replaced report")
PRIVATE_SCHEME = "99VIGIL"


def coded(code: Code) -> hd.sr.CodedConcept:
    return hd.sr.CodedConcept(code.value, code.scheme, code.meaning)


def raw_bytes(element: DataElement | RawDataElement | None) -> bytes:
    """The value as in the file, without padding; text that was decoded is encoded again."""
    if element is None:
        return b""
    value = element.value
    if isinstance(value, bytes):
        return value.strip(b" \0")
    return str(value if value is not None else "").encode("utf-8").strip(b" \0")


def copied_elements(header: Dataset) -> dict[str, DataElement | RawDataElement]:
    """Patient and study as every object carries them, by keyword; unfit values left out."""
    kept: dict[str, DataElement | RawDataElement] = {}
    for keyword in COPIED:
        element = header.get_item(keyword)
        if element is None:
            continue
        value, form = raw_bytes(element), FORMS.get(keyword)
        if form is not None and not form.fullmatch(value):
            continue
        kept[keyword] = element
    return kept


def unfit(header: Dataset) -> tuple[str, ...]:
    """Keywords whose value the source has, but in a form that cannot be passed on."""
    return tuple(
        keyword
        for keyword, form in FORMS.items()
        if (value := raw_bytes(header.get_item(keyword))) and not form.fullmatch(value)
    )


def zone_of(header: Dataset, fallback: dt.tzinfo) -> dt.tzinfo:
    """The zone of every date and time in the study: (0008,0201) governs all of an instance's."""
    text = raw_bytes(header.get_item("TimezoneOffsetFromUTC")).decode("ascii", "replace")
    if not FORMS["TimezoneOffsetFromUTC"].fullmatch(text.encode("ascii", "replace")):
        return fallback
    minutes = int(text[1:3]) * 60 + int(text[3:5])
    return dt.timezone(dt.timedelta(minutes=minutes if text[0] == "+" else -minutes))


def carrier(header: Dataset) -> Dataset:
    """What highdicom needs of a source to build from.

    It raises on a gap or on a value it does not know, and a result would be lost; so it gets
    blanks, and `stamp` writes the true values afterwards.
    """
    blank = Dataset()
    for keyword in TYPE_2:
        setattr(blank, keyword, "")
    blank.StudyInstanceUID = header.StudyInstanceUID
    blank.SeriesInstanceUID = header.SeriesInstanceUID
    blank.SOPInstanceUID = header.SOPInstanceUID
    # Only to look up which attributes belong to patient and study: the same for all of them.
    blank.SOPClassUID = SecondaryCaptureImageStorage
    return blank


def referenced(image: ImageRef) -> Dataset:
    """An item of a Referenced SOP Sequence (PS3.3 Table 10-3)."""
    item = Dataset()
    item.ReferencedSOPClassUID = image.sop_class_uid
    item.ReferencedSOPInstanceUID = image.sop_instance_uid
    if image.frame is not None:
        item.ReferencedFrameNumber = image.frame
    return item


def instance(image: ImageRef, study_instance_uid: str) -> Dataset:
    """The four UIDs that highdicom's evidence wants of an instance."""
    return identified(
        study_instance_uid, image.series_instance_uid, image.sop_class_uid, image.sop_instance_uid
    )


def identified(study: str, series: str, sop_class: str, sop_instance: str) -> Dataset:
    item = Dataset()
    item.StudyInstanceUID = study
    item.SeriesInstanceUID = series
    item.SOPClassUID = sop_class
    item.SOPInstanceUID = sop_instance
    return item


def keep_evidence(built: Dataset, instances: Sequence[Dataset]) -> None:
    """State what a document rests on, grouped by study and series, each instance once.

    In place of what highdicom collected, which holds the carrier too.
    """
    studies: dict[str, dict[str, dict[str, str]]] = {}
    for item in instances:
        series = studies.setdefault(item.StudyInstanceUID, {}).setdefault(
            item.SeriesInstanceUID, {}
        )
        series[item.SOPInstanceUID] = item.SOPClassUID
    built.CurrentRequestedProcedureEvidenceSequence = [
        _study_item(uid, series) for uid, series in studies.items()
    ]


def _study_item(study_instance_uid: str, series: Mapping[str, Mapping[str, str]]) -> Dataset:
    study = Dataset()
    study.StudyInstanceUID = study_instance_uid
    study.ReferencedSeriesSequence = []
    for uid, held in series.items():
        item = Dataset()
        item.SeriesInstanceUID = uid
        item.ReferencedSOPSequence = []
        for sop_instance, sop_class in held.items():
            reference = Dataset()
            reference.ReferencedSOPClassUID = sop_class
            reference.ReferencedSOPInstanceUID = sop_instance
            item.ReferencedSOPSequence.append(reference)
        study.ReferencedSeriesSequence.append(item)
    return study


def equipment(plan: Issue) -> hd.ContributingEquipment:
    """The algorithm's item, with the UID that stands for exactly this model (IHE AIR)."""
    model, output = plan.model, plan.output
    item = hd.ContributingEquipment(
        manufacturer=MANUFACTURER,
        purpose_of_reference=PydicomCode(
            PROCESSING_EQUIPMENT.value, PROCESSING_EQUIPMENT.scheme, PROCESSING_EQUIPMENT.meaning
        ),
        manufacturer_model_name=output.algorithm,
        software_versions=[
            model.version,
            f"weights {model.weights_sha256[:12]}",
            f"calib {model.calibration_id}"[:64],
        ],
        contribution_description=plan.contribution,
    )
    item.DeviceUID = plan.device_uid
    return item


def software_versions(plan: Issue) -> list[str]:
    output, model = plan.output, plan.model
    # A tuple here makes pydicom warn.
    return [plan.context.node_version, f"{output.algorithm} {model.version}"[:64]]


def series_values(plan: Issue, role: str, description: str) -> dict[str, Any]:
    """Constructor arguments that all of highdicom's SOP classes share."""
    return {
        "series_instance_uid": plan.series_uid(role),
        "series_number": plan.series_number(role),
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": MODEL_NAME,
        "device_serial_number": plan.context.node_serial,
        "software_versions": software_versions(plan),
        "series_description": description[:64],
        "content_qualification": plan.variant.content_qualification,
        "contributing_equipment": [equipment(plan)],
    }


def stamp(built: Dataset, plan: Issue, header: Dataset) -> None:
    """Write what every object has in common over what highdicom put there: the source's patient and
    study, our times in place of the wall clock's, our file meta group."""
    for keyword in COPIED:
        if keyword in built:
            del built[keyword]
    for keyword in TYPE_2:
        setattr(built, keyword, "")
    kept = copied_elements(header)
    for element in kept.values():
        built[element.tag] = element
    if "SpecificCharacterSet" not in kept and _has_non_ascii(kept):
        built.SpecificCharacterSet = UNDECLARED_CHARACTER_SET
    _stamp_times(built, plan)
    built.file_meta = file_meta(built)
    built.preamble = b"\0" * 128


def _has_non_ascii(kept: Mapping[str, DataElement | RawDataElement]) -> bool:
    return any(not raw_bytes(kept.get(keyword)).isascii() for keyword in _TEXT)


def _stamp_times(built: Dataset, plan: Issue) -> None:
    date, time = f"{plan.started:%Y%m%d}", f"{plan.started:%H%M%S}"
    for name in ("InstanceCreation", "Content", "Series"):
        setattr(built, f"{name}Date", date)
        setattr(built, f"{name}Time", time)
    if "DateOfSecondaryCapture" in built:
        built.DateOfSecondaryCapture = date
        built.TimeOfSecondaryCapture = time
    for item in built.ContributingEquipmentSequence:
        item.ContributionDateTime = date + time


def file_meta(built: Dataset) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\0\1"
    meta.MediaStorageSOPClassUID = built.SOPClassUID
    meta.MediaStorageSOPInstanceUID = built.SOPInstanceUID
    meta.TransferSyntaxUID = built.file_meta.TransferSyntaxUID
    meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    return meta
