"""The result in words, as the structured report says it, for people who read rather than look."""

import math

from db.result import Finding, LabelResult, RawScore, percent

_PRESENCE = {True: "PRESENT", False: "absent", None: "undetermined, not validated"}


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


def plain_percent(share: float) -> str:
    """At most two decimals, none that say nothing: 35 %, 8.5 %."""
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + " %"


def prevalence(finding: Finding) -> str:
    """What the probabilities assume; empty where there are none."""
    shares = {
        plain_percent(label.probability.prevalence)
        for label in finding.labels
        if label.probability is not None
    }
    return ", ".join(sorted(shares))


def conclusion(finding: Finding) -> str:
    output = finding.output
    return output.conclusion_present if finding.is_positive else output.conclusion_absent


def partial_words(finding: Finding) -> str:
    """`PARTIAL - 12 slices` over an incomplete series; else empty."""
    if not finding.is_partial:
        return ""
    n = len(finding.images)
    return f"PARTIAL - {n} {finding.output.image_word}{'' if n == 1 else 's'}"


def lines(finding: Finding, result_no: int) -> list[tuple[int, str]]:
    """The report as lines of text with their depth."""
    output, model = finding.output, finding.model
    found = [
        (0, "Imaging Measurement Report"),
        (1, f"Procedure reported: {output.procedure.meaning}"),
        (1, f"Revision: {result_no}"),
        (1, "Preliminary, unverified" + (", partial" if finding.is_partial else "")),
        (0, "Algorithm"),
        (1, f"{output.algorithm} {model.version} ({model.architecture}), artificial intelligence"),
        (1, f"Weights SHA-256: {model.weights_sha256}"),
        (1, f"Calibration: {model.calibration_id}"),
        (1, f"Aggregation: {model.aggregation}; numerics: {model.numerics}"),
        (0, "Imaging Measurements"),
    ]
    for label in finding.labels:
        found += _label_lines(finding, label)
    found.append((0, "Qualitative Evaluations"))
    outcome = "with findings" if finding.is_positive else "without findings"
    found.append((1, f"All algorithms succeeded; {outcome}"))
    found.append((1, f"Urgency: {finding.urgency}"))
    found.append((1, f"Conclusion: {conclusion(finding)}"))
    found += [(1, f"Note: {note}") for note in finding.notes]
    found.append((1, output.disclaimer))
    return found


def _label_lines(finding: Finding, label: LabelResult) -> list[tuple[int, str]]:
    image = finding.images[label.top_image]
    number = image.instance_number if image.instance_number is not None else label.top_image + 1
    place = f"highest on {finding.output.image_word} {number}"
    found = [(1, f"{label.code.meaning}: {presence(label)}")]
    threshold = shown_threshold(label)
    if label.probability is not None and threshold is not None:
        found.append((2, f"Probability: {percent(label.probability)} ({place})"))
        found.append((2, f"Decision threshold: {plain_percent(threshold)}"))
        found.append((2, f"At a prevalence of {plain_percent(label.probability.prevalence)}"))
    found.append((2, f"Uncalibrated classifier output: {label.raw.output:.4f}"))
    return found


def profile(finding: Finding) -> list[float]:
    """The primary label's uncalibrated output of each image, as bar heights 0.3..10."""
    logits = finding.image_logits.get(finding.primary.label, ())
    return [round(max(0.3, 10 * RawScore(logit).output), 2) for logit in logits]
