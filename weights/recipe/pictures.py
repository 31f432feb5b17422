"""8-bit pictures of unknown origin: their window guessed, what is written round the head removed.

For evaluation only. The node itself reads DICOM, where the window is no guess.
"""

import math
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from scipy import ndimage

from db.errors import PermanentError
from db.outline import body_mask
from inference.window import resize

Grey = NDArray[np.uint8]  # (rows, cols)

MIN_SIDE = 64  # pixels; less shows no lesion

_HEAD_ABOVE = 8  # grey; air and its noise lie below
_BONE_FROM = 250
_LOOK = 256  # pixels a side: noise, which widens the peak, is averaged alike in all pictures
_DEEP = 5  # of those: so far from skull and air is brain
_FEW = 500  # pixels that make a histogram
_WHITE_FROM = 245  # grey; compression leaves no page quite white

# Of what is written round a head; lengths as shares of the picture's sides.
_INK = 150  # grey; darker spots are what compression leaves
_NEAR = 0.05  # so near the head it is skin behind fat
_LETTER = 0.12  # the longest that a letter is
_SCALE = 0.03  # as narrow is a scale, however long
_FRAME = 0.6  # of an edge is a frame's
_FRINGE = 3  # pixels

#: Of the training pictures (level 40, width 120 HU): where the brain's peak lies, and how wide the
#: peak is at half its height. Medians over pictures; measured on every sixth of them.
_PEAK_HU = 39.3
_PEAK_WIDTH_HU = 16.1

# Of what cannot well be a head CT on black.
_BLANK, _BLANK_PERCENT = 10, 0.5  # grey, between so many percent at either end
_BRIGHT = 64  # grey; the border's median
# So much of a picture is white, paper apart: 0.04 to 0.26 in training pictures shown in windows
# 40/120 to 40/40; inverted 0 to 0.09, and with a black rim round them over 0.38.
_SKULL = (0.03, 0.35)
_BRAIN, _BRAIN_SHARE = (40, 220), 0.02  # grey; of the picture

# What Pillow's decoders raise on files that are cut off or damaged, each in its own way.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)

#: What viewers call a brain window.
_WIDTHS = (80.0, 100.0, 120.0)
_LEVEL_STEP = 5.0
_LEVELS = (30.0, 50.0)


class BadPicture(PermanentError):
    """A file that is no 8-bit picture large enough to show a head."""

    code: ClassVar[str] = "bad_picture"

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class GreyWindow:
    """What grey 0 and 255 stand for: centre -/+ half the width, in HU."""

    centre: float
    width: float

    @property
    def range_hu(self) -> tuple[float, float]:
        return self.centre - self.width / 2, self.centre + self.width / 2

    def __str__(self) -> str:
        return f"{self.centre:g}/{self.width:g}"


TRAINING_WINDOW = GreyWindow(40.0, 120.0)


def read_picture(path: Path) -> Grey:
    """One picture in grey; what is transparent is black.

    Raises
    ------
    BadPicture
        If the file is missing, no picture, cut off, has more than 8 bits a sample, or is too small.
    """
    with _opened(path) as image:
        try:
            grey = np.asarray(_on_black(image).convert("L"))
        except _DAMAGED as error:
            raise BadPicture(path, f"cut off or damaged ({type(error).__name__})") from None
    return grey


def picture_size(path: Path) -> tuple[int, int]:
    """Rows and columns by the file's header, without decoding.

    Raises
    ------
    BadPicture
        As `read_picture`, but for what only decoding tells.
    """
    with _opened(path) as image:
        return image.height, image.width


def _opened(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
    except FileNotFoundError:
        raise BadPicture(path, "no such file") from None
    except Image.DecompressionBombError:
        raise BadPicture(path, "too many pixels") from None
    except UnidentifiedImageError:
        raise BadPicture(path, "no picture of a known kind") from None
    except _DAMAGED as error:
        raise BadPicture(path, f"cannot be read ({type(error).__name__})") from None
    if flaw := _flaw(image):
        image.close()
        raise BadPicture(path, flaw)
    return image


def _flaw(image: Image.Image) -> str:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return "more than 8 bits a sample; export a brain window as 8-bit"
    if min(image.size) < MIN_SIDE:
        return f"{image.width} x {image.height}, under {MIN_SIDE} pixels"
    return ""


def _on_black(image: Image.Image) -> Image.Image:
    """In colour; the colour under transparent places, often white, is not what was seen."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, (0, 0, 0, 255)), seen).convert("RGB")


def without_writing(grey: Grey) -> Grey:
    """The picture with letters, scales, frames and white paper round the head turned to air.

    Only those: skin that fat parts from the skull, the head's holder and hands stay, as they do in
    DICOM, on which the model must say the same.
    """
    grey = _off_paper(grey)
    head = body_mask(grey.astype(np.float32), _HEAD_ABOVE)
    if not head.any():
        return grey
    side = min(grey.shape)
    near = ndimage.distance_transform_edt(~head) <= _NEAR * side
    named, count = ndimage.label(grey > _HEAD_ABOVE, structure=np.ones((3, 3)))
    strength = ndimage.maximum(grey, named, np.arange(count + 1))
    of_head = np.unique(named[near])
    written = [
        number
        for number, place in enumerate(ndimage.find_objects(named), start=1)
        if number not in of_head
        and strength[number] >= _INK
        and _is_written(named[place] == number, place, grey.shape)
    ]
    if not written:
        return grey
    # Compression leaves a dark fringe round letters.
    gone = ndimage.binary_dilation(np.isin(named, written), iterations=_FRINGE) & ~near
    return np.where(gone, 0, grey).astype(np.uint8)


def _is_written(mark: NDArray[np.bool_], place: tuple[slice, ...], shape: tuple[int, ...]) -> bool:
    """Along an edge as a frame; or clear of all edges, and small as a letter or narrow as a scale.

    A head's holder is cut by the edge, however little of it is seen. In pictures with a black rim
    that little passes for a letter.
    """
    top, left = (part.start == 0 for part in place)
    bottom, right = (part.stop == whole for part, whole in zip(place, shape, strict=True))
    edges = (
        (top, mark[0], shape[1]), (bottom, mark[-1], shape[1]),
        (left, mark[:, 0], shape[0]), (right, mark[:, -1], shape[0]),
    )  # fmt: skip
    if top or bottom or left or right:
        return any(touches and int(line.sum()) >= _FRAME * n for touches, line, n in edges)
    shares = sorted(length / whole for length, whole in zip(mark.shape, shape, strict=True))
    return bool(shares[1] <= _LETTER or shares[0] <= _SCALE)


def _off_paper(grey: Grey) -> Grey:
    """White that reaches the edge is paper where most of the edge is white; else as it was.

    A skull that touches the edge is as white, but takes a small part of it.
    """
    white = grey >= _WHITE_FROM
    edge = np.concatenate([white[0], white[-1], white[:, 0], white[:, -1]])
    if edge.mean() <= 0.5:
        return grey
    named, _ = ndimage.label(white)
    reaching = np.unique(np.concatenate([named[0], named[-1], named[:, 0], named[:, -1]]))
    paper = np.isin(named, reaching[reaching > 0])
    return np.where(paper, 0, grey).astype(np.uint8)


def doubt_about(grey: Grey) -> str:
    """What speaks against a head CT on black, by its greys alone; empty if nothing."""
    low, high = np.percentile(grey, (_BLANK_PERCENT, 100 - _BLANK_PERCENT))
    if high - low < _BLANK:
        return "blank"
    edge = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    rest = _off_paper(grey)
    border, white = np.median(edge), (rest >= _WHITE_FROM).mean()
    # On white paper a skull is left; an inverted one is black, and its air white.
    if border >= _BRIGHT and (border < _WHITE_FROM or white < _SKULL[0]):
        return "a bright border: inverted, or not on black"
    if white > _SKULL[1]:
        return "mostly white: inverted, or no brain window"
    head = body_mask(rest.astype(np.float32), _HEAD_ABOVE)
    values = rest[head]
    is_brain = (values >= _BRAIN[0]) & (values <= _BRAIN[1])
    if is_brain.sum() < _BRAIN_SHARE * grey.size:
        return "hardly any grey such as brain has"
    return ""


def guess_window(pictures: Iterable[Grey]) -> GreyWindow:
    """The window that a set of pictures was most likely exported with.

    Brain is the commonest thing inside a head: the wider the window, the narrower its peak in grey;
    then the peak's place gives the level. Medians over the set, so a few odd pictures do not count;
    one picture alone may well be guessed wrong (neighbouring widths overlap).
    """
    peaks = [peak for grey in pictures if (peak := _brain_peak(grey)) is not None]
    if not peaks:
        return TRAINING_WINDOW
    place, wide = np.median(np.array(peaks), axis=0)
    width = min(_WIDTHS, key=lambda w: abs(np.log(w * wide / 255 / _PEAK_WIDTH_HU)))
    level = _PEAK_HU - (place / 255 - 0.5) * width
    level = float(np.clip(_LEVEL_STEP * round(level / _LEVEL_STEP), *_LEVELS))
    return GreyWindow(level, width)


def _brain_peak(grey: Grey) -> tuple[float, float] | None:
    """Place and width at half height of the brain's peak, in grey; None where there is none."""
    small = resize(grey.astype(np.float32), (_LOOK, _LOOK))
    head = body_mask(small, _HEAD_ABOVE) & (small < _BONE_FROM)
    values = small[ndimage.binary_erosion(head, iterations=_DEEP)]
    counts = np.bincount(values.astype(np.int64), minlength=256)[_HEAD_ABOVE : _BONE_FROM - 5]
    if counts.sum() < _FEW:
        return None
    smooth = ndimage.gaussian_filter1d(counts.astype(np.float64), 2.0)
    top = int(smooth.argmax())
    below = np.flatnonzero(smooth < smooth[top] / 2)
    left = below[below < top].max(initial=-1)
    right = below[below > top].min(initial=len(smooth))
    return float(top + _HEAD_ABOVE), float(right - left)


def parse_window(text: str) -> GreyWindow | None:
    """`CENTRE/WIDTH` in HU; None for `auto`.

    Raises
    ------
    ValueError
        If it is neither.
    """
    if text == "auto":
        return None
    numbers = [float(part) for part in text.split("/")]
    if len(numbers) != 2 or not all(map(math.isfinite, numbers)) or numbers[1] <= 0:
        raise ValueError(f"{text!r} is neither auto nor CENTRE/WIDTH")
    return GreyWindow(*numbers)
