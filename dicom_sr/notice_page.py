"""Draws the page that says why there is no AI result, of words only, none of them a patient's."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from dicom_sr import words
from dicom_sr.heat import Colour
from dicom_sr.pages import AMBER, FAINT, INK, MARGIN, PAPER, SIDE, SOFT, font, line

ADVICE = "Read this study without AI."
NOTHING_SAID = "The AI has neither found nor excluded anything here."
#: Refused here, given up, overtaken, or not for this destination: the page cannot say which.
UNSENT = (
    "An AI result exists that was not sent here; see the Vigil dashboard or ask its administrator."
)


@dataclass(frozen=True, slots=True)
class Said:
    """Everything that stands on the page, in words."""

    qualification: str  # RESEARCH or PRODUCT
    title: str
    verdict: str
    reason: str
    revision: str  # empty on a first page
    earlier_result: str  # when an AI result was made that is in the study; empty: there is none
    unsent_result: str  # that there is a newer one elsewhere; empty: there is none
    made_by: str
    ended: str
    disclaimer: str


def draw(said: Said) -> Colour:
    """Shape (SIDE, SIDE, 3)."""
    canvas = Image.new("RGB", (SIDE, SIDE), PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((0, 0, SIDE, 44), fill=AMBER)
    banner = words.banner(said.qualification, "AI NOTICE")
    pen.text((SIDE / 2, 22), banner, font=font(21), fill=PAPER, anchor="mm")
    line(pen, 84, said.title, 26, SOFT)
    pen.rectangle((MARGIN, 116, MARGIN + 8, 176), fill=AMBER)
    pen.text((MARGIN + 26, 146), said.verdict, font=font(56), fill=AMBER, anchor="lm")
    line(pen, 216, said.revision, 18, AMBER)
    y = _block(pen, 300, "Why", [said.reason])
    _block(pen, y + 40, "What to do", [ADVICE, *_standing(said)])
    _foot(pen, said)
    return np.asarray(canvas)


def _standing(said: Said) -> list[str]:
    """What holds now: a new attempt that failed does not undo what an older one found."""
    sentences = [said.unsent_result] if said.unsent_result else []
    if said.earlier_result:
        sentences.append(
            f"This page neither confirms nor withdraws the AI result of {said.earlier_result}:"
            " that one holds for the images it names, and for no others."
        )
    return sentences or [NOTHING_SAID]


def _block(pen: ImageDraw.ImageDraw, y: int, head: str, sentences: Sequence[str]) -> int:
    """A heading and its sentences, wrapped; returns where it ends."""
    pen.text((MARGIN, y), head, font=font(20), fill=SOFT, anchor="lm")
    y += 48
    for sentence in sentences:
        for part in _wrapped(pen, sentence, 32, SIDE - 2 * MARGIN):
            line(pen, y, part, 32, INK)
            y += 44
        y += 12
    return y


def _wrapped(pen: ImageDraw.ImageDraw, text: str, size: int, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and pen.textlength(longer, font=font(size)) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _foot(pen: ImageDraw.ImageDraw, said: Said) -> None:
    pen.line((MARGIN, 936, SIDE - MARGIN, 936), fill=FAINT, width=1)
    rows = ((said.made_by, SOFT), (f"Ended {said.ended}", SOFT), (said.disclaimer, INK))
    for row, (text, colour) in enumerate(rows):
        line(pen, 954 + 22 * row, text, 16, colour)
