"""The words and numbers that pages and DICOM objects share, so that they never disagree.

Standard library only. What is compared is never what is printed: PRESENT and absent follow from
the unrounded value on the reference scale.
"""

import math

from db.result import Finding, LabelResult, percent, percent_exact

_PRESENCE = {True: "PRESENT", False: "absent", None: "not validated"}


def presence(label: LabelResult) -> str:
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
    return "" if label.probability is None else at_prevalence(label.probability.prevalence)


def at_prevalence(share: float) -> str:
    """What a percent assumes; it never stands without it."""
    return f"at {plain(percent_exact(share))} % prevalence"


def value_words(label: LabelResult) -> str:
    """The number a page shows: a percent, or a raw score that cannot be taken for one."""
    if label.probability is None:
        return f"raw {label.raw.output:.2f}"
    return percent(label.probability)


def verdict(*, is_positive: bool, is_partial: bool) -> str:
    """SUSPECTED or NOT DETECTED; half a series must not look like a negative."""
    if is_positive:
        return "SUSPECTED"
    return "NOT DETECTED - INCOMPLETE" if is_partial else "NOT DETECTED"


def priority_words(finding: Finding) -> str:
    """A negative never lowers what the department has ordered."""
    return finding.urgency.value if finding.is_positive else "unchanged by AI"


def partial_words(finding: Finding) -> str:
    """`PARTIAL - 12 slices`; empty over a whole series."""
    if not finding.is_partial:
        return ""
    return f"PARTIAL - {counted(len(finding.images), finding.output.image_word)}"


def counted(n: int, word: str) -> str:
    """`1 slice`, `12 slices`."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def conclusion_sentence(finding: Finding) -> str:
    output = finding.output
    return output.conclusion_present if finding.is_positive else output.conclusion_absent


def conclusion(finding: Finding) -> str:
    """The report's one sentence; over an incomplete series it says so."""
    sentence = conclusion_sentence(finding)
    if finding.is_partial:
        return f"{sentence} {partial_words(finding)}: the series was incomplete."
    return sentence
