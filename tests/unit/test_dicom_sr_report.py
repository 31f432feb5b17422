"""The structured report, attribute by attribute (DICOM_OUTPUT 5, 6 and 8)."""

import io
from collections.abc import Iterator
from dataclasses import replace

import highdicom as hd
import pydicom
import pytest
from pydicom import Dataset

from db.result import Finding, RawScore, Urgency, percent_exact
from dicom_sr.build import BuiltObject, build_objects
from dicom_sr.plan import SR_CLASSES, Context, ReportReference, Variant
from tests.findings import (
    CODES,
    by_index,
    image_refs,
    label_result,
    make_finding,
    make_maps,
    make_pixels,
    synthetic_headers,
)

CONTEXT = Context("north", 1, "0.1.0", "vigil-1")
OLD = ReportReference(SR_CLASSES["3d"], "2.25.11", "2.25.12", "2.25.7000")


def build(
    finding: Finding, headers: list[Dataset], context: Context = CONTEXT, **variant: object
) -> list[BuiltObject]:
    return build_objects(
        finding,
        by_index(headers),
        make_pixels(finding),
        make_maps(finding),
        context,
        Variant(**variant),  # type: ignore[arg-type]
    )


def opened(built: BuiltObject) -> Dataset:
    return pydicom.dcmread(io.BytesIO(built.data))


def by_role(objects: list[BuiltObject], role: str) -> list[Dataset]:
    return [opened(built) for built in objects if built.role == role]


@pytest.fixture
def headers() -> list[Dataset]:
    return synthetic_headers()


def sr_of(finding: Finding, headers: list[Dataset], **variant: object) -> Dataset:
    (report,) = by_role(build(finding, headers, **{"roles": ("sr",), **variant}), "sr")
    return report


def walk(item: Dataset) -> Iterator[Dataset]:
    for child in item.get("ContentSequence", ()):
        yield child
        yield from walk(child)


def name(item: Dataset) -> str:
    return str(item.ConceptNameCodeSequence[0].CodeValue)


def triple(code: Dataset) -> tuple[str, str, str]:
    return (code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning)


def named(item: Dataset, code: str) -> list[Dataset]:
    return [child for child in item.get("ContentSequence", ()) if name(child) == code]


def groups(report: Dataset, template: str) -> list[Dataset]:
    (measurements,) = named(report, "126010")
    return [
        group
        for group in named(measurements, "125007")
        if group.ContentTemplateSequence[0].TemplateIdentifier == template
    ]


def test_the_tree_has_the_parts_of_tid_1500_in_order(headers):
    report = sr_of(make_finding(headers), headers)

    assert triple(report.ConceptNameCodeSequence[0]) == (
        "126000",
        "DCM",
        "Imaging Measurement Report",
    )
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    containers = [name(item) for item in report.ContentSequence if item.ValueType == "CONTAINER"]
    assert containers == ["111028", "126010", "C0034375"]


@pytest.mark.parametrize("positive", [True, False])
def test_every_container_is_separate(headers, positive):
    report = sr_of(make_finding(headers, positive=positive), headers)

    containers = [item for item in walk(report) if item.ValueType == "CONTAINER"]
    assert report.ContinuityOfContent == "SEPARATE"
    assert {item.ContinuityOfContent for item in containers} == {"SEPARATE"}


def test_labels_stand_in_order_with_their_codes_and_stored_values(headers):
    finding = make_finding(headers, exploratory=())

    found = groups(sr_of(finding, headers), "1501")

    codes = [triple(named(group, "121071")[0].ConceptCodeSequence[0]) for group in found]
    assert codes == [(code.value, code.scheme, code.meaning) for code in CODES.values()]
    for group, label in zip(found, finding.labels, strict=True):
        (number,) = named(group, "122157")
        measured = number.MeasuredValueSequence[0]
        assert measured.NumericValue == percent_exact(label.probability.value)
        assert triple(measured.MeasurementUnitsCodeSequence[0]) == ("%", "UCUM", "Percent")
        (raw,) = named(number, "RAWSCORE")
        assert raw.MeasuredValueSequence[0].NumericValue == round(label.raw.output, 4)


def test_presence_follows_the_threshold(headers):
    finding = make_finding(headers, exploratory=("subdural",))

    values = [
        triple(named(group, "121052")[0].ConceptCodeSequence[0])
        for group in groups(sr_of(finding, headers), "1501")
    ]

    present = ("52101004", "SCT", "Present")
    absent = ("272519000", "SCT", "Absent")
    undetermined = ("373068000", "SCT", "Undetermined")
    assert values == [present, absent, present, absent, absent, undetermined]


def test_an_exploratory_label_has_a_raw_score_and_neither_percent_nor_threshold(headers):
    finding = make_finding(headers, exploratory=("epidural",))

    group = groups(sr_of(finding, headers), "1501")[1]

    assert named(group, "122157") == []
    (raw,) = named(group, "RAWSCORE")
    assert raw.MeasuredValueSequence[0].NumericValue == round(finding.labels[1].raw.output, 4)
    assert [item for item in walk(group) if name(item) == "DECTHR"] == []
    assert "not validated" in named(group, "121106")[0].TextValue


@pytest.mark.parametrize("positive", [True, False])
def test_every_group_has_coordinates_and_every_number_in_it_children(headers, positive):
    report = sr_of(make_finding(headers, positive=positive), headers)

    for group in groups(report, "1501") + groups(report, "1410"):
        assert [item for item in walk(group) if item.ValueType == "SCOORD"]
    for group in groups(report, "1501"):
        numbers = [item for item in group.ContentSequence if item.ValueType == "NUM"]
        assert numbers
        assert all("ContentSequence" in number for number in numbers)


def test_without_anchors_no_label_group_has_coordinates(headers):
    report = sr_of(make_finding(headers), headers, anchors_groups=False)

    for group in groups(report, "1501"):
        assert [item for item in walk(group) if item.ValueType == "SCOORD"] == []


def test_polygons_are_closed_and_inside_the_matrix(headers):
    report = sr_of(make_finding(headers), headers)

    polygons = [item.GraphicData for item in walk(report) if item.ValueType == "SCOORD"]

    assert len(polygons) == 9  # six labels, three regions
    for data in polygons:
        points = list(zip(data[::2], data[1::2], strict=True))
        assert points[0] == points[-1]
        assert all(0 <= x <= 256 and 0 <= y <= 256 for x, y in points)


def test_regions_come_first_and_only_where_the_model_may_show_them(headers):
    shown = sr_of(make_finding(headers), headers)
    kept_back = sr_of(make_finding(headers, shows_regions=False), headers)

    (measurements,) = named(shown, "126010")
    templates = [
        group.ContentTemplateSequence[0].TemplateIdentifier
        for group in named(measurements, "125007")
    ]
    assert templates == ["1410"] * 3 + ["1501"] * 6
    assert groups(kept_back, "1410") == []


def test_tracking_uids_are_unique_and_survive_a_revision(headers):
    finding = make_finding(headers)
    later = replace(finding, result_uuid="11111111-2222-4333-8444-555555555555")

    first = sr_of(finding, headers)
    (second,) = by_role(build(later, headers, replace(CONTEXT, result_no=2)), "sr")

    tracks = [item.UID for item in walk(first) if name(item) == "112040"]
    assert len(tracks) == len(set(tracks)) == 9
    assert tracks == [item.UID for item in walk(second) if name(item) == "112040"]
    assert first.SOPInstanceUID != second.SOPInstanceUID


def test_the_observer_is_this_model_exactly(headers):
    finding = make_finding(headers)
    other = replace(finding, model=replace(finding.model, calibration_id="platt-2026-09"))

    report, changed = sr_of(finding, headers), sr_of(other, headers)

    (observer,) = named(report, "121012")
    assert triple(named(report, "121005")[0].ConceptCodeSequence[0]) == ("121007", "DCM", "Device")
    ours = [i for i in report.ContributingEquipmentSequence if i.Manufacturer == "Vigil"]
    assert [item.DeviceUID for item in ours] == [observer.UID]
    assert named(changed, "121012")[0].UID != observer.UID
    assert "DeviceUID" not in report


def test_the_evidence_is_all_that_was_analysed_and_all_pictures(headers):
    finding = make_finding(headers)
    objects = build(finding, headers)

    (report,) = by_role(objects, "sr")

    found = {
        (
            reference.ReferencedSOPClassUID,
            reference.ReferencedSOPInstanceUID,
            series.SeriesInstanceUID,
        )
        for study in report.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for reference in series.ReferencedSOPSequence
    }
    analysed = {
        (i.sop_class_uid, i.sop_instance_uid, i.series_instance_uid) for i in finding.images
    }
    pictures = {
        (o.sop_class_uid, o.sop_instance_uid, o.series_instance_uid)
        for o in objects
        if o.role in ("summary", "overlay")
    }
    assert len(pictures) == 4
    assert found == analysed | pictures


@pytest.mark.parametrize("roles", [("sr",), ("summary", "sr"), ("overlay", "sr", "ko")])
def test_every_image_referred_to_is_evidence_and_is_sent(headers, roles):
    finding = make_finding(headers)
    objects = build(finding, headers, roles=roles)

    (report,) = by_role(objects, "sr")

    evidence = {
        reference.ReferencedSOPInstanceUID
        for study in report.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for reference in series.ReferencedSOPSequence
    }
    images = {
        item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
        for item in walk(report)
        if item.ValueType == "IMAGE"
    }
    sent = {built.sop_instance_uid for built in objects}
    assert images <= evidence
    assert evidence <= sent | {image.sop_instance_uid for image in finding.images}


def test_the_primary_group_shows_where_and_by_which_picture(headers):
    finding = make_finding(headers)
    objects = build(finding, headers)

    (report,) = by_role(objects, "sr")
    group = groups(report, "1501")[0]

    def uids(code: str) -> list[str]:
        return [i.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for i in named(group, code)]

    keys = [finding.images[key.image].sop_instance_uid for key in finding.key_images]
    assert uids("121112") == keys
    assert uids("130401") == [o.sop_instance_uid for o in objects if o.role == "overlay"]


def test_the_library_lists_what_is_referred_to_and_nothing_more(headers):
    finding = make_finding(headers, keys=(1, 3))
    report = sr_of(finding, headers)

    (library,) = named(report, "111028")
    listed = {
        item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
        for item in walk(library)
        if item.ValueType == "IMAGE"
    }

    assert listed == {headers[1].SOPInstanceUID, headers[3].SOPInstanceUID}


@pytest.mark.parametrize(
    ("urgency", "priority"),
    [(Urgency.STAT, "394849002"), (Urgency.URGENT, "394849002"), (Urgency.ROUTINE, "394848005")],
)
def test_priority_follows_urgency(headers, urgency, priority):
    report = sr_of(make_finding(headers, urgency=urgency), headers)

    (overall,) = named(report, "C0034375")
    assert named(overall, "260870009")[0].ConceptCodeSequence[0].CodeValue == priority


@pytest.mark.parametrize(("positive", "code"), [(True, "111242"), (False, "111241")])
def test_the_overall_verdict(headers, positive, code):
    report = sr_of(make_finding(headers, positive=positive), headers)

    (overall,) = named(report, "C0034375")
    assert named(overall, "111017")[0].ConceptCodeSequence[0].CodeValue == code


def test_flags_never_claim_a_person_has_read_it(headers):
    whole = sr_of(make_finding(headers), headers)
    part = sr_of(make_finding(headers, is_partial=True), headers)

    assert (whole.CompletionFlag, part.CompletionFlag) == ("COMPLETE", "PARTIAL")
    for report in (whole, part):
        assert report.PreliminaryFlag == "PRELIMINARY"
        assert report.VerificationFlag == "UNVERIFIED"
        assert report.ContentQualification == "RESEARCH"
        assert "VerifyingObserverSequence" not in report
    conclusion = named(named(part, "C0034375")[0], "121077")[0].TextValue
    assert "PARTIAL - 6 slices" in conclusion


def test_the_algorithm_stands_once_with_thresholds_on_the_reference_scale(headers):
    report = sr_of(make_finding(headers, exploratory=("subdural",)), headers)

    (measurements,) = named(report, "126010")
    said = [item.TextValue for item in named(measurements, "111002")]
    assert name(measurements.ContentSequence[0]) == "111001"
    assert len(named(measurements, "111001")) == len(named(measurements, "111000")) == 1
    assert [text for text in said if text.startswith("threshold[")] == [
        f"threshold[{label}]=0.35" for label in CODES if label != "subdural"
    ]
    assert any(text.startswith("weights_sha256=3f3f") for text in said)


def test_a_site_prevalence_moves_probability_and_threshold_alike(headers):
    finding = make_finding(headers, exploratory=())
    label = label_result("any", 0.30, top=1, threshold=0.35, prevalence=0.03, reference=0.60)
    shifted = replace(finding, labels=(label, *finding.labels[1:]))

    group = groups(sr_of(shifted, headers), "1501")[0]

    threshold = next(item for item in walk(group) if name(item) == "DECTHR")
    shown = threshold.MeasuredValueSequence[0].NumericValue
    assert named(group, "121052")[0].ConceptCodeSequence[0].CodeMeaning == "Present"
    assert shown == pytest.approx(13.33, abs=0.01)  # odds 0.35/0.65 less the shift of 0.30 to 0.60
    assert "at 3 % prevalence" in named(group, "121106")[0].TextValue


def test_a_revision_names_the_report_it_replaces(headers):
    finding = make_finding(headers)
    context = replace(CONTEXT, result_no=2)

    (report,) = by_role(build(finding, headers, context, predecessors=(OLD,)), "sr")

    (study,) = report.PredecessorDocumentsSequence
    (series,) = study.ReferencedSeriesSequence
    (reference,) = series.ReferencedSOPSequence
    assert (study.StudyInstanceUID, series.SeriesInstanceUID) == ("2.25.7000", "2.25.12")
    assert reference.ReferencedSOPInstanceUID == "2.25.11"
    purpose = reference.PurposeOfReferenceCodeSequence[0]
    assert triple(purpose) == ("121360", "DCM", "Replaced report")
    assert report.SeriesNumber == 9913


def test_the_same_tree_stands_in_all_three_classes(headers):
    finding = make_finding(headers)

    reports = by_role(build(finding, headers, sr_classes=tuple(SR_CLASSES.values())), "sr")

    assert [report.SOPClassUID for report in reports] == list(SR_CLASSES.values())
    assert len({report.SOPInstanceUID for report in reports}) == 3
    trees = [report.ContentSequence.__repr__() for report in reports]
    assert trees[0] == trees[1] == trees[2]


def test_highdicom_reads_it_back(headers, tmp_path):
    finding = make_finding(headers)
    (built,) = [o for o in build(finding, headers) if o.role == "sr"]
    path = tmp_path / "report.dcm"
    path.write_bytes(built.data)

    report = hd.sr.srread(path)

    assert len(report.content.get_image_measurement_groups()) == 6
    assert len(report.content.get_planar_roi_measurement_groups()) == 3


def test_frames_of_a_multi_frame_instance_are_named(headers):
    images = tuple(
        replace(image, frame=i + 1, sop_instance_uid="2.25.900", instance_number=1)
        for i, image in enumerate(image_refs(headers))
    )
    finding = make_finding(headers, images=images)
    for header in headers:
        header.SOPInstanceUID = "2.25.900"

    objects = build(finding, headers)

    (report,) = by_role(objects, "sr")
    (keys,) = by_role(objects, "ko")
    sources = [i for i in walk(report) if i.ValueType == "IMAGE" and name(i) == "121112"]
    frames = [i.ReferencedSOPSequence[0].ReferencedFrameNumber for i in sources]
    assert frames == [2, 3, 4]
    assert len({o.sop_instance_uid for o in objects}) == len(objects)
    referred = [i.ReferencedSOPSequence[0] for i in keys.ContentSequence if i.ValueType == "IMAGE"]
    assert [item.get("ReferencedFrameNumber") for item in referred] == [2, 3, 4, None, None, None]


def test_the_raw_score_of_a_region_is_its_slice_score(headers):
    finding = make_finding(headers)

    found = groups(sr_of(finding, headers), "1410")

    scores = [named(group, "RAWSCORE")[0].MeasuredValueSequence[0].NumericValue for group in found]
    assert scores == [round(RawScore(x).output, 4) for x in (1.5, 2.0, 1.5)]
