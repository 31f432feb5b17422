"""8-bit pictures of unknown origin: their window guessed, what is written round the head removed.

For evaluation only. The node itself reads DICOM, where the window is no guess.
"""

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
_MARGIN = 0.02  # of the picture's side, kept round the head: skin blurs

#: Of the training pictures (level 40, width 120 HU): where the brain's peak lies, and how wide the
#: peak is at half its height. Medians over pictures; measured on every sixth of them.
_PEAK_HU = 39.3
_PEAK_WIDTH_HU = 16.1

#: What viewers call a brain window.
_WIDTHS = (80.0, 100.0, 120.0)
_LEVEL_STEP = 5.0
_LEVELS = (30.0, 50.0)


class BadPicture(PermanentError):
    """A file that is no 8-bit picture large enough to show a head."""

    code: ClassVar[str] = "bad_picture"


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
    """One picture in grey.

    Raises
    ------
    BadPicture
        If the file is missing, no picture, has more than 8 bits a sample, or is too small.
    """
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise BadPicture(f"{path.name}: more than 8 bits a sample; export a brain window")
            grey = np.asarray(image.convert("RGB").convert("L"))
    except FileNotFoundError:
        raise BadPicture(f"{path.name}: no such file") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise BadPicture(f"{path.name}: cannot be read ({type(error).__name__})") from None
    if min(grey.shape) < MIN_SIDE:
        raise BadPicture(f"{path.name}: {grey.shape[1]} x {grey.shape[0]}, under {MIN_SIDE} pixels")
    return grey


def head_alone(grey: Grey) -> Grey:
    """The picture with letters, scales and frames round the head turned to air."""
    head = body_mask(grey.astype(np.float32), _HEAD_ABOVE)
    if not head.any():
        return grey
    kept = ndimage.binary_dilation(head, iterations=max(1, round(_MARGIN * min(grey.shape))))
    return np.where(kept, grey, 0).astype(np.uint8)


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
    centre, slash, width = text.partition("/")
    if not slash or float(width) <= 0:
        raise ValueError(f"{text!r} is neither auto nor CENTRE/WIDTH")
    return GreyWindow(float(centre), float(width))
