"""What a document refers to: its evidence, the request behind it, the report it replaces."""

from highdicom.coding_schemes import CodingSchemeIdentificationItem
from pydicom import Dataset
from pydicom.uid import SecondaryCaptureImageStorage

from dicom_sr import evidence
from dicom_sr.evidence import coded
from dicom_sr.plan import MANUFACTURER, OVERLAY, SUMMARY, Plan, ReportReference


def whole_evidence(plan: Plan) -> list[Dataset]:
    """Everything analysed, and the pictures made from it."""
    study = plan.study_instance_uid
    return [
        *(evidence.instance(image, study) for image in plan.finding.images),
        *captures(plan, overlays=True, page=True),
    ]


def captures(plan: Plan, *, overlays: bool, page: bool) -> list[Dataset]:
    """The four UIDs of each Secondary Capture this destination gets; a frame counts as one."""
    study, found = plan.study_instance_uid, list[Dataset]()
    sop_class = str(SecondaryCaptureImageStorage)
    if overlays:
        series = plan.series_uid(OVERLAY)
        found += [
            evidence.identified(study, series, one.sop_class_uid, one.sop_instance_uid)
            for one in plan.pictures
        ]
    if page and SUMMARY in plan.roles:
        found.append(
            evidence.identified(study, plan.series_uid(SUMMARY), sop_class, plan.uid(SUMMARY))
        )
    return found


def request(header: Dataset) -> Dataset:
    """What was asked for, as far as the source says: an item of Referenced Request Sequence."""
    item = Dataset()
    item.StudyInstanceUID = header.StudyInstanceUID
    item.ReferencedStudySequence = []
    item.RequestedProcedureCodeSequence = []
    empty = ("PlacerOrderNumberImagingServiceRequest", "FillerOrderNumberImagingServiceRequest")
    for keyword in (
        *empty,
        "RequestedProcedureID",
        "RequestedProcedureDescription",
        "AccessionNumber",
    ):
        element = header.get_item(keyword)
        if element is None:
            setattr(item, keyword, "")
        else:
            item[element.tag] = element
    return item


def private_scheme() -> CodingSchemeIdentificationItem:
    return CodingSchemeIdentificationItem(
        designator=evidence.PRIVATE_SCHEME,
        name="Vigil private codes",
        version="1",
        responsible_organization=MANUFACTURER,
    )


def predecessor(old: ReportReference) -> Dataset:
    """An item of the Predecessor Documents Sequence, saying that the old report is replaced."""
    reference = Dataset()
    reference.ReferencedSOPClassUID = old.sop_class_uid
    reference.ReferencedSOPInstanceUID = old.sop_instance_uid
    reference.PurposeOfReferenceCodeSequence = [coded(evidence.REPLACED_REPORT)]
    series = Dataset()
    series.SeriesInstanceUID = old.series_instance_uid
    series.ReferencedSOPSequence = [reference]
    study = Dataset()
    study.StudyInstanceUID = old.study_instance_uid
    study.ReferencedSeriesSequence = [series]
    return study
