"""The result in words, as the structured report says it, for people who read rather than look."""

from db.result import Finding, LabelResult, RawScore, percent_exact
from db.wording import (
    conclusion,
    conclusion_sentence,
    partial_words,
    plain,
    presence,
    prevalence_words,
    priority_words,
    shown_threshold,
    threshold_words,
    value_words,
)

__all__ = [
    "conclusion",
    "conclusion_sentence",
    "lines",
    "partial_words",
    "plain",
    "presence",
    "prevalence_words",
    "priority_words",
    "profile",
    "shown_threshold",
    "threshold_words",
    "value_words",
]


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
    found.append((1, f"Worklist priority: {priority_words(finding)}"))
    found.append((1, f"Conclusion: {conclusion(finding)}"))
    found += [(1, f"Note: {note}") for note in finding.notes]
    found.append((1, output.disclaimer))
    return found


def _label_lines(finding: Finding, label: LabelResult) -> list[tuple[int, str]]:
    image = finding.images[label.top_image]
    number = image.instance_number if image.instance_number is not None else label.top_image + 1
    place = f"highest on {finding.output.image_word} {number}"
    found = [(1, f"{label.code.meaning}: {presence(label)}")]
    if label.probability is not None:
        # Two decimals, as in the report itself; the bars above show whole percents.
        shown = f"{percent_exact(label.probability.value):.2f} % {prevalence_words(label)}"
        found.append((2, f"Probability: {shown} ({place})"))
        found.append((2, f"Decision {threshold_words(label)}"))
    found.append((2, f"Uncalibrated classifier output: {label.raw.output:.4f}"))
    return found


def profile(finding: Finding) -> list[float]:
    """The primary label's uncalibrated output of each image, as bar heights 0.3..10."""
    logits = finding.image_logits.get(finding.primary.label, ())
    return [round(max(0.3, 10 * RawScore(logit).output), 2) for logit in logits]
