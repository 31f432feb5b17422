"""The page that says AI NOT PROCESSED: its words, its identity, its object."""

import inspect
import io
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import ImageDraw
from pydicom import Dataset

from config.tenants import Destination, SendFlags
from db.notices import Notice
from dicom_sr import notice_page
from dicom_sr.build import BuiltObject, build_objects
from dicom_sr.notice import build_notice
from dicom_sr.plan import Context, Variant
from tests.findings import (
    MODEL,
    OUTPUT,
    by_index,
    image_refs,
    make_finding,
    make_maps,
    make_pixels,
    synthetic_headers,
)
from tests.validators import dciodvfy

CONTEXT = Context("north", 1, "0.1.0", "vigil-1")
EARLIER = "2026-03-01T12:05:09+00:00"


@pytest.fixture(scope="module")
def header() -> Dataset:
    return synthetic_headers()[0]


def a_notice(**changes: object) -> Notice:
    fields_: dict[str, object] = {
        "notice_uuid": "0d1f7f8e-7b53-4d61-9d2e-6f6a6d1c7a11",
        "ended_at": "2026-03-01T13:05:09+00:00",
        "model": MODEL,
        "output": OUTPUT,
        "source": image_refs(synthetic_headers())[0],
        "is_failure": False,
        "code": "contrast",
        "reason": "Contrast agent was given.",
    }
    return Notice(**{**fields_, **changes})  # type: ignore[arg-type]


def build(header: Dataset, notice: Notice | None = None, *, result_no=1, **variant) -> BuiltObject:
    context = replace(CONTEXT, result_no=result_no)
    return build_notice(notice or a_notice(), header, context, Variant(**variant))


def opened(built: BuiltObject) -> Dataset:
    return pydicom.dcmread(io.BytesIO(built.data))


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """Every text that is drawn."""
    texts: list[str] = []
    draw = ImageDraw.ImageDraw.text

    def noted(self, xy, text, *args, **kwargs):
        texts.append(text)
        return draw(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    return texts


def test_the_page_says_what_why_and_what_to_do(header, written):
    build(header)

    page = " ".join(written)
    assert "RESEARCH USE ONLY - NOT FOR PRIMARY DIAGNOSIS" in page
    assert "AI NOT PROCESSED" in page
    assert "Contrast agent was given." in page
    assert "Read this study without AI." in page
    assert "neither found nor excluded anything" in page
    assert OUTPUT.title in page
    assert OUTPUT.disclaimer in page
    assert "Vigil ICH 1.0.0   weights 3f3f3f3f3f3f   node 0.1.0" in page
    assert "2026-03-01 13:05 UTC" in page
    assert "REVISION" not in page


def test_no_number_that_could_be_taken_for_a_finding_is_on_it(header, written):
    build(header)

    page = " ".join(written)
    for word in ("%", "SUSPECTED", "NOT DETECTED", "robability", "PRESENT", "absent", "threshold"):
        assert word not in page


def test_a_failure_is_told_by_its_code_not_in_the_words_of_a_program(header, written):
    notice = a_notice(is_failure=True, code="undecodable", reason="ValueError in 1.2.840.10008.1")

    build(header, notice)

    page = " ".join(written)
    assert "The analysis failed for a technical reason (undecodable)." in page
    assert "ValueError" not in page


def test_a_long_reason_is_wrapped_inside_the_page(header, written):
    reason = "The series' description names a kind of series that is not analysed here. " * 3

    page = opened(build(header, a_notice(reason=reason))).pixel_array

    assert "".join(reason.split()) in "".join("".join(written).split())
    assert (page[:, -40:] == page[300, -1]).all(axis=2)[60:930].all()  # nothing runs off the edge


def test_the_renderer_is_given_words_only_and_none_of_a_patient(header, written):
    build(header)

    assert {field.type for field in fields(notice_page.Said)} == {"str"} or {
        field.type for field in fields(notice_page.Said)
    } == {str}
    assert list(inspect.signature(notice_page.draw).parameters) == ["said"]
    page = " ".join(written)
    for keyword in ("PatientName", "PatientID", "AccessionNumber", "PatientBirthDate", "StudyDate"):
        assert str(header[keyword].value) not in page


def test_the_object_is_a_summary_page_without_sources(header):
    built = build(header)
    page = opened(built)

    assert (built.role, built.seq) == ("summary", 1)
    assert (page.SeriesNumber, page.InstanceNumber, page.Modality) == (9901, 1, "OT")
    assert page.SeriesDescription == "AI ICH Summary - NOT FOR DIAGNOSIS"
    assert (page.Rows, page.Columns, page.ConversionType) == (1024, 1024, "WSD")
    assert (page.StudyInstanceUID, page.PatientID) == (header.StudyInstanceUID, header.PatientID)
    assert (page.ContentDate, page.ContentTime) == ("20260301", "130509")
    assert (page.BurnedInAnnotation, page.RecognizableVisualFeatures) == ("NO", "NO")
    assert page.BodyPartExamined == "HEAD"
    contribution = page.ContributingEquipmentSequence[0]
    assert contribution.ContributionDescription == "None: the AI did not process the images"
    for keyword in ("SourceImageSequence", "ReferencedSeriesSequence", "DerivationCodeSequence"):
        assert keyword not in page


def test_building_twice_gives_the_same_bytes(header):
    assert build(header) == build(header)


def test_another_notice_is_another_object_and_no_result_shares_its_identifiers(header):
    page = build(header)
    other = build(header, a_notice(notice_uuid="11111111-7b53-4d61-9d2e-6f6a6d1c7a11"))
    headers = synthetic_headers()
    finding = make_finding(headers, positive=False)
    result = build_objects(
        finding, by_index(headers), make_pixels(finding), make_maps(finding), CONTEXT, Variant()
    )

    uids = [page.sop_instance_uid, other.sop_instance_uid, *(o.sop_instance_uid for o in result)]
    assert len(set(uids)) == len(uids)
    assert other.series_instance_uid != page.series_instance_uid


def test_a_second_notice_replaces_the_first(header, written):
    page = opened(build(header, result_no=2, replaced_notice=EARLIER))

    assert page.SeriesNumber == 9911
    assert "REVISION 2 - replaces AI NOT PROCESSED of 2026-03-01 12:05 UTC" in written


def test_a_notice_takes_nothing_back_that_a_result_said(header, written):
    build(header, result_no=2, earlier_result=EARLIER)

    page = " ".join(written)
    assert "REVISION 2" in written
    assert "replaces" not in page
    assert "neither confirms nor withdraws the AI result of 2026-03-01 12:05 UTC" in page
    assert "neither found nor excluded" not in page


def test_a_result_that_was_not_sent_is_neither_denied_nor_told(header, written):
    notice = a_notice(is_failure=True, code="maps_gone", has_numbers=True)

    page = opened(build(header, notice, result_no=2, has_unsent=True))

    words = " ".join(written)
    assert "AI RESULT NOT SENT" in written
    assert "The AI's result could not be prepared for sending (maps_gone)." in words
    assert "An AI result exists that was not sent here; see the Vigil dashboard" in words
    assert "Read this study without AI." in words
    for untrue in ("NOT PROCESSED", "neither found nor excluded", "REVISION"):
        assert untrue not in words
    assert page.DerivationDescription == "AI result not sent; not for primary diagnosis"
    contribution = page.ContributingEquipmentSequence[0]
    assert contribution.ContributionDescription.startswith("AI analysis of the source images")
    assert page.SeriesNumber == 9911


def test_beside_a_result_that_is_there_a_newer_one_may_be_missing(header, written):
    page = opened(build(header, result_no=3, earlier_result=EARLIER, has_unsent=True)).pixel_array

    words = " ".join(written)
    assert "An AI result exists that was not sent here" in words
    assert "neither confirms nor withdraws the AI result of 2026-03-01 12:05 UTC" in words
    assert (page[880:930] == page[300, -1]).all()  # nothing runs into the foot


def test_what_replaces_such_a_page_names_it_as_it_names_itself(header, written):
    build(header, result_no=2, replaced_notice=EARLIER, replaced_verdict="AI RESULT NOT SENT")

    assert "REVISION 2 - replaces AI RESULT NOT SENT of 2026-03-01 12:05 UTC" in written


def test_a_result_after_a_notice_says_what_it_replaces(written):
    headers = synthetic_headers()
    finding = make_finding(headers, positive=False)
    context = replace(CONTEXT, result_no=2)
    variant = Variant(replaced_notice=EARLIER)

    objects = build_objects(finding, by_index(headers), {}, {}, context, variant)

    said = "REVISION 2 - replaces AI NOT PROCESSED of 2026-03-01 12:05 UTC"
    assert any(said in text for text in written)
    (report,) = [opened(one) for one in objects if one.role == "sr"]
    assert "PredecessorDocumentsSequence" not in report


def test_it_survives_its_way_through_the_database():
    notice = a_notice()

    assert Notice.from_json(notice.to_json()) == notice


def test_a_destination_gets_notices_only_on_demand():
    assert not SendFlags().not_processed
    assert not Destination(name="p", ae_title="P", host="h", port=104).send.not_processed


@pytest.mark.parametrize("variant", [{}, {"is_rle": True}, {"content_qualification": "PRODUCT"}])
def test_dciodvfy_finds_no_error(tmp_path: Path, header, variant):
    (tmp_path / "page.dcm").write_bytes(build(header, **variant).data)

    assert dciodvfy(tmp_path / "page.dcm", iod="SCImage") == []


def test_the_page_is_dark_with_one_amber_word(header):
    page = opened(build(header)).pixel_array

    assert page.shape == (1024, 1024, 3)
    assert (page[300:900] < 60).all(axis=2).mean() > 0.9  # readable in a dark room
    amber = np.all(page[116:176, 60:70] == (255, 184, 77), axis=2)
    assert not amber.all()
    assert np.all(page[146, 60] == (255, 184, 77))
