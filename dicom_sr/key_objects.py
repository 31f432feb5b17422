"""The key object selection: the images worth opening, in the viewer's own list (TID 2010)."""

from collections.abc import Mapping, Sequence

import highdicom as hd
from pydicom import Dataset
from pydicom.sr.codedict import codes

from dicom_sr import evidence, references, report
from dicom_sr.plan import KEYS, Plan


def key_objects(plan: Plan, headers: Mapping[int, Dataset]) -> Dataset:
    """Key images and the overlays made of them; `headers` hold image 0."""
    study, output = plan.study_instance_uid, plan.finding.output
    images = [plan.image(key) for key in plan.key_images]
    sources = [evidence.instance(image, study) for image in images]
    overlays = references.captures(plan, overlays=True, page=False)
    tree = hd.ko.KeyObjectSelection(
        document_title=codes.DCM.OfInterest,
        referenced_objects=[as_image(item) for item in (*sources, *overlays)],
        observer_device_context=report.observer(plan),
        description=f"{output.title}: key images chosen by {output.algorithm}",
    )
    built: Dataset = hd.ko.KeyObjectSelectionDocument(
        evidence=[evidence.carrier(headers[0]), *sources, *overlays],
        content=tree,
        sop_instance_uid=plan.uid(KEYS),
        instance_number=1,
        **evidence.series_values(plan, KEYS, plan.finding.output.key_series),
    )
    frames = [*(image.frame for image in images), *(one.frame for one in plan.pictures)]
    tidy(built)
    _name_frames(built, frames)
    evidence.keep_evidence(built, [*sources, *overlays])
    evidence.stamp(built, plan, headers[0])
    return built


def as_image(item: Dataset) -> Dataset:
    """highdicom takes an instance for an image where it has a matrix."""
    item.Rows = item.Columns = 1
    return item


def tidy(built: Dataset) -> None:
    """Mend what highdicom cannot say of a key object selection.

    It names the references `Source`, which rows 8 to 10 of TID 2010 forbid.
    """
    report.separate(built)
    for item in built.ContentSequence:
        if item.ValueType in ("IMAGE", "COMPOSITE"):
            del item.ConceptNameCodeSequence


def _name_frames(built: Dataset, frames: Sequence[int | None]) -> None:
    """The references are to these `frames`, in this order; highdicom knows none."""
    references = [item for item in built.ContentSequence if item.ValueType == "IMAGE"]
    for item, frame in zip(references, frames, strict=True):
        if frame is not None:
            item.ReferencedSOPSequence[0].ReferencedFrameNumber = frame
