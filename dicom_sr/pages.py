"""Draws the pages a radiologist looks at; it is given no header, so no patient can be drawn."""

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from db import wording
from db.result import LabelResult
from dicom_sr import words
from dicom_sr.heat import Colour
from dicom_sr.plan import Plan
from dicom_sr.times import minute

SIDE = 1024  # pixels, both ways
MARGIN = 56
ROWS_TOP = 300
ROWS_BOTTOM_ABOVE_PICTURES, ROWS_BOTTOM = 562, 860
PICTURES_BOTTOM = 892

INK, SOFT, FAINT = (236, 240, 245), (158, 170, 184), (52, 61, 72)
PAPER, PANEL = (13, 17, 23), (22, 28, 36)
AMBER, RED, BLUE = (255, 184, 77), (255, 107, 94), (110, 168, 254)
#: The head of the page says more with its colour than with its size.
VERDICT = {True: RED, False: BLUE}

EDGE_SHARE = 24 / 512  # of the rows, top and bottom: the only place for words on an overlay


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The typeface that comes with Pillow: nothing to install, the same on every machine."""
    loaded = ImageFont.load_default(size=size)
    if not isinstance(loaded, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType")
    return loaded


def overlay_page(plan: Plan, picture: Colour) -> Colour:
    """The painted slice with its words in the first and last rows; the matrix stays as it is."""
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    rows, columns = picture.shape[:2]
    edge = max(12, round(rows * EDGE_SHARE))
    output, model = plan.finding.output, plan.finding.model
    top, bottom = edge / 2, rows - edge / 2
    size = fitting(draw, output.attention_words, edge * 2 // 3, columns - 12)
    _outlined(draw, (6, top), output.attention_words, size, INK, "lm")
    named = f"{output.algorithm} {model.version}"
    partial = wording.partial_words(plan.finding)
    right = " - ".join(part for part in (partial, _short_revision(plan)) if part)
    whole = f"{named}   {right}"
    size = fitting(draw, whole, edge * 2 // 3, columns - 12)
    _outlined(draw, (6, bottom), named, size, SOFT, "lm")
    if right:
        _outlined(draw, (columns - 6, bottom), right, size, AMBER, "rm")
    return np.asarray(canvas)


def _short_revision(plan: Plan) -> str:
    return plan.revision_words.partition(" - ")[0]


def fitting(draw: ImageDraw.ImageDraw, text: str, size: int, width: float) -> int:
    """The largest type, at most `size`, in which `text` fits into `width` pixels."""
    while size > 7 and draw.textlength(text, font=font(size)) > width:
        size -= 1
    return size


def _outlined(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    colour: tuple[int, int, int],
    anchor: str,
) -> None:
    # Legible over bone and over air.
    draw.text(
        at, text, font=font(size), fill=colour, anchor=anchor, stroke_width=1, stroke_fill=(0, 0, 0)
    )


def summary_page(plan: Plan, thumbnails: Mapping[int, Colour]) -> Colour:
    """The result on one page.

    Parameters
    ----------
    thumbnails : painted slices without words, by index into `plan.key_images`; three at most
    """
    canvas = Image.new("RGB", (SIDE, SIDE), PAPER)
    draw = ImageDraw.Draw(canvas)
    _head(draw, plan)
    bottom = _labels(draw, plan)
    if thumbnails:
        _thumbnails(canvas, draw, plan, thumbnails, bottom)
    _foot(draw, plan)
    return np.asarray(canvas)


def _head(draw: ImageDraw.ImageDraw, plan: Plan) -> None:
    finding = plan.finding
    draw.rectangle((0, 0, SIDE, 44), fill=AMBER)
    banner = words.banner(plan.variant.content_qualification)
    draw.text((SIDE / 2, 22), banner, font=font(21), fill=PAPER, anchor="mm")
    line(draw, 84, finding.output.title, 26, SOFT)
    colour = VERDICT[finding.is_positive]
    draw.rectangle((MARGIN, 116, MARGIN + 8, 176), fill=colour)
    verdict = wording.verdict(is_positive=finding.is_positive, is_partial=finding.is_partial)
    size = fitting(draw, verdict, 56, 640)
    draw.text((MARGIN + 26, 146), verdict, font=font(size), fill=colour, anchor="lm")
    draw.text((SIDE - MARGIN, 132), "Worklist priority", font=font(18), fill=SOFT, anchor="rm")
    priority = wording.priority_words(finding)
    draw.text((SIDE - MARGIN, 160), priority, font=font(24), fill=INK, anchor="rm")
    partial = wording.partial_words(finding)
    notices = [text for text in (partial, plan.revision_words, *finding.notes) if text]
    line(draw, 202, wording.conclusion_sentence(finding), 19, INK)
    line(draw, 229, "   |   ".join(notices), 18, AMBER)


def line(
    draw: ImageDraw.ImageDraw, y: int, text: str, size: int, colour: tuple[int, int, int]
) -> None:
    """Text from margin to margin, smaller where it is long."""
    size = fitting(draw, text, size, SIDE - 2 * MARGIN)
    draw.text((MARGIN, y), text, font=font(size), fill=colour, anchor="lm")


def _labels(draw: ImageDraw.ImageDraw, plan: Plan) -> int:
    """One row a label; returns where the last one ends."""
    labels = plan.finding.labels
    top, bottom = ROWS_TOP, ROWS_BOTTOM_ABOVE_PICTURES if plan.key_images else ROWS_BOTTOM
    step = min(56, (bottom - top) // len(labels))
    right = SIDE - MARGIN
    for text, x, anchor in (
        ("Finding", MARGIN, "lm"),
        ("Probability", 730, "rm"),
        ("AI reading", right, "rm"),
    ):
        draw.text((x, ROWS_TOP - 26), text, font=font(17), fill=SOFT, anchor=anchor)
    draw.line((MARGIN, ROWS_TOP - 10, right, ROWS_TOP - 10), fill=FAINT, width=1)
    for row, label in enumerate(labels):
        _label_row(draw, label, top + row * step + step // 2, is_primary=row == 0)
    bottom = top + len(labels) * step
    _legend(draw, labels, bottom + 10)
    return bottom + 28


def _label_row(draw: ImageDraw.ImageDraw, label: LabelResult, y: int, *, is_primary: bool) -> None:
    ink = {True: RED, False: INK, None: SOFT}[label.is_present]
    size = fitting(draw, label.words, 24 if is_primary else 21, 330 - MARGIN)
    draw.text(
        (MARGIN, y), label.words, font=font(size), fill=INK if is_primary else ink, anchor="lm"
    )
    _bar(draw, label, (340, y - 7, 600, y + 7), ink)
    draw.text((730, y), wording.value_words(label), font=font(23), fill=ink, anchor="rm")
    draw.text((SIDE - MARGIN, y), wording.presence(label), font=font(21), fill=ink, anchor="rm")


def _bar(
    draw: ImageDraw.ImageDraw,
    label: LabelResult,
    box: tuple[int, int, int, int],
    colour: tuple[int, int, int],
) -> None:
    """Probability and threshold on one scale; an exploratory label gets none, since it has none."""
    left, top, right, bottom = box
    threshold = wording.shown_threshold(label)
    if label.probability is None or threshold is None:
        draw.line((left, (top + bottom) / 2, right, (top + bottom) / 2), fill=FAINT, width=1)
        return
    draw.rounded_rectangle(box, radius=4, fill=FAINT)
    end = left + round(label.probability.value * (right - left))
    if end > left:
        draw.rounded_rectangle((left, top, max(end, left + 2), bottom), radius=4, fill=colour)
    mark = left + round(threshold * (right - left))
    draw.line((mark, top - 6, mark, bottom + 6), fill=PAPER, width=5)
    draw.line((mark, top - 6, mark, bottom + 6), fill=INK, width=2)


def _legend(draw: ImageDraw.ImageDraw, labels: Sequence[LabelResult], y: int) -> None:
    shares = dict.fromkeys(wording.prevalence_words(label) for label in labels if label.probability)
    marks = dict.fromkeys(wording.threshold_words(label) for label in labels if label.probability)
    if not shares:
        return
    # One line says it for all; where labels differ the primary one's figures are named.
    of = "" if len(shares) == len(marks) == 1 else f" ({labels[0].words})"
    raw = (
        ""
        if all(label.probability for label in labels)
        else "; raw: uncalibrated output, not a probability"
    )
    line(
        draw,
        y,
        f"Probability {next(iter(shares))}; white mark: {next(iter(marks))}{of}{raw}",
        16,
        SOFT,
    )


def _thumbnails(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    plan: Plan,
    pictures: Mapping[int, Colour],
    top: int,
) -> None:
    gap = 20
    side = min((SIDE - 2 * MARGIN - 2 * gap) // 3, PICTURES_BOTTOM - top)
    word = plan.finding.output.image_word
    for column, index in enumerate(sorted(pictures)[:3]):
        key = plan.key_images[index]
        left = MARGIN + column * (side + gap)
        picture = Image.fromarray(pictures[index])
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        draw.rectangle((left, top, left + side - 1, top + side - 1), fill=(0, 0, 0))
        canvas.paste(
            picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2)
        )
        name = words.image_name(plan.image(key), key.image, word)
        caption = f"{name[0].upper()}{name[1:]} - {plan.label(key).words}"
        size = fitting(draw, caption, 17, side)
        draw.text((left, top + side + 15), caption, font=font(size), fill=INK, anchor="lm")


def _foot(draw: ImageDraw.ImageDraw, plan: Plan) -> None:
    finding, model = plan.finding, plan.finding.model
    draw.line((MARGIN, 936, SIDE - MARGIN, 936), fill=FAINT, width=1)
    made = (
        f"{finding.output.algorithm} {model.version}   weights {model.weights_sha256[:12]}   "
        f"calibration {model.calibration_id}"
    )
    images = f"{wording.counted(len(finding.images), finding.output.image_word)} analysed"
    run = f"Run {minute(plan.started)}   {images}   {model.numerics}"
    lines = ((made, SOFT), (run, SOFT), (finding.output.disclaimer, INK))
    for row, (text, colour) in enumerate(lines):
        line(draw, 954 + 22 * row, text, 16, colour)
