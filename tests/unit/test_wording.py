"""Words, numbers and colours that pages and DICOM objects share."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from db import paint, wording
from db.result import CalibratedProbability, LabelResult, LabelStatus, RawScore
from tests.findings import CODES, label_result, make_finding, synthetic_headers

inner = st.floats(0.02, 0.98)


def logit(share: float) -> float:
    return float(np.log(share / (1 - share)))


@given(reference=inner, threshold=inner, shift=st.floats(-3, 3))
def test_a_bar_stands_on_the_side_of_its_mark_that_the_verdict_says(reference, threshold, shift):
    value = 1 / (1 + np.exp(-(logit(reference) + shift)))
    shown = CalibratedProbability(float(value), 0.08, reference, 0.0, 1.0)
    label = LabelResult(
        "any", "Any", CODES["any"], LabelStatus.VALIDATED, RawScore(0.0), shown, threshold, 0
    )

    mark = wording.shown_threshold(label)

    assert mark is not None
    if abs(reference - threshold) > 1e-9:
        assert (value > mark) == label.is_present


def test_an_exploratory_label_has_no_percent_and_no_mark():
    label = label_result("subdural", 0.7, top=0, exploratory=True)

    assert wording.presence(label) == "not validated"
    assert wording.value_words(label).startswith("raw ")
    assert (wording.threshold_words(label), wording.prevalence_words(label)) == ("", "")


@pytest.mark.parametrize(
    ("number", "words"), [(35.0, "35"), (8.5, "8.5"), (0.25, "0.25"), (43.902, "43.9"), (0, "0")]
)
def test_no_decimal_that_says_nothing(number, words):
    assert wording.plain(number) == words


@pytest.mark.parametrize(
    ("is_positive", "is_partial", "words"),
    [
        (True, False, "SUSPECTED"),
        (True, True, "SUSPECTED"),
        (False, False, "NOT DETECTED"),
        (False, True, "NOT DETECTED - INCOMPLETE"),
    ],
)
def test_half_a_series_never_reads_as_a_negative(is_positive, is_partial, words):
    assert wording.verdict(is_positive=is_positive, is_partial=is_partial) == words


def test_a_negative_changes_no_priority():
    headers = synthetic_headers()

    assert wording.priority_words(make_finding(headers)) == "STAT"
    assert wording.priority_words(make_finding(headers, positive=False)) == "unchanged by AI"


def test_a_partial_conclusion_says_so():
    finding = make_finding(synthetic_headers(), is_partial=True)

    assert wording.partial_words(finding) == "PARTIAL - 6 slices"
    assert wording.conclusion(finding).endswith("PARTIAL - 6 slices: the series was incomplete.")


@given(st.floats(0, 1), st.floats(0.1, 10))
def test_weak_attention_is_not_painted(share, scale):
    _, weight = paint.colours(np.full((2, 2), share * scale, np.float32), scale)

    assert ((weight == 0.0) == (share <= paint.CUT + 1e-6)).all() or share == pytest.approx(
        paint.CUT, abs=1e-6
    )
    assert 0.0 <= weight.min() <= weight.max() <= 1.0


def test_nothing_is_painted_on_the_air_round_a_body():
    body = np.full((32, 32), -1000.0, np.float32)
    body[8:24, 8:24] = 40.0
    body[14:18, 14:18] = -1000.0  # air within stays inside the outline
    cam = np.ones((32, 32), np.float32)

    kept = paint.inside(cam, body, "CT")

    assert kept[16, 16] == 1.0
    assert kept[10, 10] == 1.0
    assert not kept[:7].any()
    assert (paint.inside(cam, body, "CR") == 1.0).all()
