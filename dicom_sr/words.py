"""The words and numbers that pages and reports share, so that they never disagree."""

import math

from db.result import LabelResult, percent, percent_exact
from dicom_sr.plan import Plan

_PRESENCE = {True: "PRESENT", False: "absent", None: "not validated"}


def presence(label: LabelResult) -> str:
    """From the unrounded value on the reference scale; never from what is printed."""
    return _PRESENCE[label.is_present]


def shown_threshold(label: LabelResult) -> float | None:
    """The threshold on the scale of the shown probability, 0..1; None for exploratory labels.

    A site's prevalence shifts the log-odds of what is shown; the threshold moves by the same
    shift, or a value could stand on the wrong side of the mark it was judged by.
    """
    shown = label.probability
    if shown is None or label.threshold is None:
        return None
    ends = (shown.value, shown.reference, label.threshold)
    if shown.value == shown.reference or any(end <= 0.0 or end >= 1.0 for end in ends):
        return label.threshold
    shift = _logit(shown.value) - _logit(shown.reference)
    return 1.0 / (1.0 + math.exp(-(_logit(label.threshold) + shift)))


def _logit(share: float) -> float:
    return math.log(share / (1.0 - share))


def plain(number: float) -> str:
    """At most two decimals, none that say nothing: 35, 8.5, 0.25."""
    return f"{number:.2f}".rstrip("0").rstrip(".")


def threshold_words(label: LabelResult) -> str:
    """`threshold 35 %`; empty for exploratory labels."""
    threshold = shown_threshold(label)
    return "" if threshold is None else f"threshold {plain(percent_exact(threshold))} %"


def prevalence_words(label: LabelResult) -> str:
    """`at 8 % prevalence`; empty for exploratory labels."""
    if label.probability is None:
        return ""
    return f"at {plain(percent_exact(label.probability.prevalence))} % prevalence"


def comment(label: LabelResult) -> str:
    """A label in one line of a report."""
    if label.probability is None:
        return f"{label.code.meaning}: not validated (uncalibrated output {label.raw.output:.4f})"
    return (
        f"{label.code.meaning}: {presence(label)} "
        f"({threshold_words(label)}; probability {prevalence_words(label)})"
    )


def value_words(label: LabelResult) -> str:
    """The number a page shows: a percent, or a raw score that cannot be taken for one."""
    if label.probability is None:
        return f"raw {label.raw.output:.2f}"
    return percent(label.probability)


def banner(plan: Plan) -> str:
    if plan.variant.content_qualification == "RESEARCH":
        return "RESEARCH USE ONLY - NOT FOR PRIMARY DIAGNOSIS"
    return "AI RESULT - NOT FOR PRIMARY DIAGNOSIS"


def conclusion_sentence(plan: Plan) -> str:
    output = plan.finding.output
    return output.conclusion_present if plan.finding.is_positive else output.conclusion_absent


def conclusion(plan: Plan) -> str:
    """The report's one sentence; over an incomplete series it says so."""
    sentence = conclusion_sentence(plan)
    if plan.partial_words:
        return f"{sentence} {plan.partial_words}: the series was incomplete."
    return sentence
