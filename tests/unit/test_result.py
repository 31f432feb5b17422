"""Results check themselves, travel as JSON and are rounded in one place."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from db.header import InstanceHeader
from db.result import CalibratedProbability, Code, LabelResult, LabelStatus, RawScore, percent
from tests.findings import make_finding, synthetic_headers


def probability(value: float) -> CalibratedProbability:
    return CalibratedProbability(
        value=value, prevalence=0.1, reference=value, lower_clip=0.021, upper_clip=0.974
    )


def label(status: LabelStatus, reference: float | None, threshold: float | None) -> LabelResult:
    return LabelResult(
        label="any", words="Any", code=Code("1", "99T", "t"), status=status, raw=RawScore(0.0),
        probability=None if reference is None else probability(reference),
        threshold=threshold, top_image=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "50 %"), (0.021, "< 3 %"), (0.01, "< 3 %"), (0.974, "> 97 %"), (0.344, "34 %")],
)
def test_pages_show_whole_percent_and_never_more_than_the_data_support(value, text):
    assert percent(probability(value)) == text


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_no_probability_outside_its_range(value):
    with pytest.raises(ValueError, match="not a calibrated probability"):
        probability(value)


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_raw_score_is_finite_and_its_output_a_fraction(logit):
    if not math.isfinite(logit):
        with pytest.raises(ValueError, match="not a raw score"):
            RawScore(logit)
    else:
        assert 0.0 <= RawScore(logit).output <= 1.0


def test_presence_is_decided_on_the_reference_scale():
    assert label(LabelStatus.VALIDATED, 0.35, 0.35).is_present is True
    assert label(LabelStatus.VALIDATED, 0.3499, 0.35).is_present is False
    assert label(LabelStatus.EXPLORATORY, None, None).is_present is None


def test_an_exploratory_label_has_no_probability():
    with pytest.raises(ValueError, match="exploratory"):
        label(LabelStatus.EXPLORATORY, 0.5, 0.5)


def test_a_finding_survives_its_journey_as_json():
    finding = make_finding(synthetic_headers())

    again = type(finding).from_json(json.loads(json.dumps(finding.to_json())))

    assert again == finding


def test_a_header_of_a_newer_node_can_be_read():
    header = InstanceHeader(
        sop_class_uid="1", sop_instance_uid="2", study_instance_uid="3", series_instance_uid="4",
        transfer_syntax_uid="5", image_type=("ORIGINAL", "PRIMARY"), position=(1.0, 2.0, 3.0),
    )  # fmt: skip

    stored = json.loads(json.dumps(header.to_json() | {"not_known_yet": 1}))

    assert InstanceHeader.from_json(stored) == header
