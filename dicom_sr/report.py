"""The structured report: TID 1500, one measurement group a label; legal in three SR classes."""

from collections.abc import Callable, Mapping, Sequence

import highdicom as hd
from highdicom.sr import RelationshipTypeValues as Relationship
from pydicom import Dataset
from pydicom.sr.codedict import codes

from db import wording
from db.result import Code, KeyImage, LabelResult, Urgency
from dicom_sr import evidence, items, references, words
from dicom_sr.evidence import coded
from dicom_sr.plan import (
    MANUFACTURER,
    MODEL_NAME,
    REPORT,
    SR_CLASSES,
    Issue,
    Plan,
)

ENGLISH = Code("en-US", "RFC5646", "English (United States)")
ARTIFICIAL_INTELLIGENCE = Code("123110", "DCM", "Artificial Intelligence")
IMAGE_LIBRARY = Code("111028", "DCM", "Image Library")
IMAGE_LIBRARY_GROUP = Code("126200", "DCM", "Image Library Group")
QUALITATIVE_EVALUATIONS = Code("C0034375", "UMLS", "Qualitative Evaluations")
OVERALL = Code("111017", "DCM", "CAD Processing and Findings Summary")
OVERALL_VALUES = {
    True: Code("111242", "DCM", "All algorithms succeeded; with findings"),
    False: Code("111241", "DCM", "All algorithms succeeded; without findings"),
}
PRIORITY = Code("260870009", "SCT", "Priority")
HIGH_PRIORITY = Code("394849002", "SCT", "High priority")
NORMAL_PRIORITY = Code("394848005", "SCT", "Normal priority")
CONCLUSION = Code("121077", "DCM", "Conclusion")

_CONSTRUCTORS: Mapping[str, Callable[..., Dataset]] = {
    SR_CLASSES["3d"]: hd.sr.Comprehensive3DSR,
    SR_CLASSES["comprehensive"]: hd.sr.ComprehensiveSR,
    SR_CLASSES["enhanced"]: hd.sr.EnhancedSR,
}


def reports(plan: Plan, headers: Mapping[int, Dataset]) -> list[Dataset]:
    """The report in each SR class that is wanted; `headers`, by image index, as `needed_images`.

    The tree is legal in all of them, so it is built once.
    """
    first, *others = plan.variant.sr_classes
    built = _report(plan, headers, first)
    return [built, *(_in_class(plan, built, other) for other in others)]


def _report(plan: Plan, headers: Mapping[int, Dataset], sop_class_uid: str) -> Dataset:
    whole = references.whole_evidence(plan)
    built = _CONSTRUCTORS[sop_class_uid](
        evidence=[evidence.carrier(headers[0]), *whole],  # the first gives its study
        content=content(plan, headers)[0],
        sop_instance_uid=plan.uid(f"sr/{sop_class_uid}"),
        instance_number=1,  # one report a series: OHIF opens only the last instance
        is_complete=not plan.finding.is_partial,
        is_final=False,  # a person's word, never ours
        is_verified=False,
        requested_procedures=[references.request(headers[0])],
        coding_schemes=[references.private_scheme()],
        **evidence.series_values(plan, REPORT, plan.finding.output.report_series),
    )
    evidence.keep_evidence(built, whole)
    if plan.variant.predecessors:
        built.PredecessorDocumentsSequence = [
            references.predecessor(old) for old in plan.variant.predecessors
        ]
    evidence.stamp(built, plan, headers[0])
    return built


def _in_class(plan: Plan, report: Dataset, sop_class_uid: str) -> Dataset:
    other = Dataset()
    other.update(report)
    del other.SOPClassUID, other.SOPInstanceUID  # elements are shared: assigning would change both
    other.SOPClassUID = sop_class_uid
    other.SOPInstanceUID = plan.uid(f"sr/{sop_class_uid}")
    other.file_meta = report.file_meta
    other.file_meta = evidence.file_meta(other)
    return other


def content(plan: Plan, headers: Mapping[int, Dataset]) -> hd.sr.MeasurementReport:
    """The content tree; every container SEPARATE: text viewers drop labels of CONTINUOUS ones."""
    tree = hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(observer_device_context=observer(plan)),
        procedure_reported=coded(plan.finding.output.procedure),
        imaging_measurements=[*_regions(plan), *_label_groups(plan)],
        language_of_content_item_and_descendants=hd.sr.LanguageOfContentItemAndDescendants(
            coded(ENGLISH)
        ),
    )
    root = tree[0]
    measurements = root.ContentSequence[-1]
    measurements.ContentSequence = hd.sr.ContentSequence(
        [*_algorithm(plan), *measurements.ContentSequence]
    )
    root.ContentSequence = hd.sr.ContentSequence(
        [*root.ContentSequence[:-1], _library(plan, headers), measurements, _overall(plan)]
    )
    separate(root)
    return tree


def observer(plan: Issue) -> hd.sr.ObserverContext:
    """TID 1004: exactly this model made the observations."""
    return hd.sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=hd.sr.DeviceObserverIdentifyingAttributes(
            uid=plan.device_uid,
            name=plan.output.algorithm,
            manufacturer_name=MANUFACTURER,
            model_name=MODEL_NAME,
            serial_number=plan.context.node_serial,
        ),
    )


def separate(item: Dataset) -> None:
    if item.get("ValueType") == "CONTAINER":
        item.ContinuityOfContent = "SEPARATE"
    for child in item.get("ContentSequence", ()):
        separate(child)


def _algorithm(plan: Plan) -> hd.sr.AlgorithmIdentification:
    """TID 4019, once for all groups."""
    finding, model = plan.finding, plan.finding.model
    judged = [label for label in finding.labels if label.probability is not None]
    parameters = [
        f"weights_sha256={model.weights_sha256}",
        f"calibration={model.calibration_id}",
        *(f"threshold[{label.label}]={label.threshold:g}" for label in judged),
        *(
            f"prevalence[{label.label}]={label.probability.prevalence:g}"
            for label in judged
            if label.probability
        ),
        f"aggregation={model.aggregation}",
        f"node_software={plan.context.node_version}",
        f"preprocessing={model.preprocessing}",
        f"architecture={model.architecture}",
        f"numerics={model.numerics}",
    ]
    return hd.sr.AlgorithmIdentification(
        name=finding.output.algorithm,
        version=model.version,
        parameters=parameters,
        family=coded(ARTIFICIAL_INTELLIGENCE),
        manufacturer=MANUFACTURER,
    )


def _regions(plan: Plan) -> Sequence[hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations]:
    """TID 1410, only where the model has shown that its regions mean something.

    They come first, since OHIF opens a report at its first measurement.
    """
    if not plan.finding.shows_regions:
        return []
    shown = [key for key in plan.key_images if key.region is not None]
    return [_region(plan, key, number) for number, key in enumerate(shown, 1)]


def _region(
    plan: Plan, key: KeyImage, number: int
) -> hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations:
    image = plan.image(key)
    assert key.region is not None
    return hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(
            uid=plan.track_region(image),
            identifier=f"{plan.finding.output.short_name} region {number}",
        ),
        referenced_region=hd.sr.ImageRegion(
            graphic_type="POLYLINE",
            graphic_data=items.rectangle(key.region, image),
            source_image=items.selected_from(image),
        ),
        finding_type=coded(plan.label(key).code),
        measurements=[
            hd.sr.Measurement(
                name=coded(items.RAW_SCORE),
                value=round(key.raw.output, 4),
                unit=coded(items.NO_UNITS),
            )
        ],
    )


def _label_groups(plan: Plan) -> Sequence[hd.sr.MeasurementsAndQualitativeEvaluations]:
    return [_label_group(plan, label) for label in plan.finding.labels]


def _label_group(plan: Plan, label: LabelResult) -> hd.sr.MeasurementsAndQualitativeEvaluations:
    """TID 1501: one label over the whole study."""
    top = plan.finding.images[label.top_image]
    group = hd.sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(
            uid=plan.track(label.label),
            identifier=f"{plan.finding.output.short_name} {label.label}",
        ),
        finding_type=coded(label.code),
        measurements=[items.measurement(label, top, is_anchored=plan.variant.anchors_groups)],
    )
    inside = group[0].ContentSequence
    inside.append(items.presence(label))
    inside.append(items.text(items.COMMENT, words.comment(label)))
    if label is plan.finding.primary:
        inside.extend(_evidence_images(plan))
    return group


def _evidence_images(plan: Plan) -> Sequence[hd.sr.ImageContentItem]:
    """Where the primary label was seen, and the pictures that show it."""
    images = [plan.image(key) for key in plan.key_images]
    return [
        *(items.source_image(image) for image in images),
        *(
            items.image(
                items.VISUAL_EXPLANATION, one.sop_class_uid, one.sop_instance_uid, one.frame
            )
            for one in plan.pictures
        ),
    ]


def _library(plan: Plan, headers: Mapping[int, Dataset]) -> hd.sr.ContainerContentItem:
    """TID 1600 over what the report refers to: every slice would make it megabytes."""
    tops = (label.top_image for label in plan.finding.labels)
    listed = sorted({*tops, *(key.image for key in plan.key_images)})
    group = _container(IMAGE_LIBRARY_GROUP)
    group.ContentSequence = hd.sr.ContentSequence(
        [items.library_entry(plan.finding.images[index], headers[index]) for index in listed]
    )
    library = _container(IMAGE_LIBRARY)
    library.ContentSequence = hd.sr.ContentSequence([group])
    return library


def _container(name: Code) -> hd.sr.ContainerContentItem:
    return hd.sr.ContainerContentItem(name=coded(name), relationship_type=Relationship.CONTAINS)


def _overall(plan: Plan) -> hd.sr.ContainerContentItem:
    finding = plan.finding
    is_urgent = finding.urgency in (Urgency.STAT, Urgency.URGENT)
    partial = wording.partial_words(finding)
    remarks = [finding.output.disclaimer, partial, plan.revision_words, *finding.notes]
    overall = _container(QUALITATIVE_EVALUATIONS)
    overall.ContentSequence = hd.sr.ContentSequence(
        [
            items.code(OVERALL, OVERALL_VALUES[finding.is_positive]),
            items.code(PRIORITY, HIGH_PRIORITY if is_urgent else NORMAL_PRIORITY),
            items.text(CONCLUSION, wording.conclusion(finding)),
            *(items.text(items.COMMENT, remark) for remark in remarks if remark),
        ]
    )
    return overall
