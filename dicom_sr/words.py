"""Words that only DICOM objects have; what they share with the dashboard is in `db.wording`."""

from db import wording
from db.result import ImageRef, LabelResult


def comment(label: LabelResult) -> str:
    """A label in one line of a report."""
    if label.probability is None:
        return f"{label.code.meaning}: not validated (uncalibrated output {label.raw.output:.4f})"
    return (
        f"{label.code.meaning}: {wording.presence(label)} "
        f"({wording.threshold_words(label)}; probability {wording.prevalence_words(label)})"
    )


def banner(qualification: str, what: str = "AI RESULT") -> str:
    """The head of every page."""
    if qualification == "RESEARCH":
        return "RESEARCH USE ONLY - NOT FOR PRIMARY DIAGNOSIS"
    return f"{what} - NOT FOR PRIMARY DIAGNOSIS"


def image_name(image: ImageRef, index: int, word: str) -> str:
    """What a reader calls the image: `slice 12`, or `frame 3` of a multi-frame instance."""
    if image.frame is not None:
        return f"frame {image.frame}"
    return f"{word} {index + 1 if image.instance_number is None else image.instance_number}"
