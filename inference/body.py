"""The body on an image, apart from table, holder and hands; and the box round it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from db.outline import body_mask

# The box holds the places that belong to the body on this share of the images on which it is large
# (this share of its largest area): a nose, a chin or a neck on a few of them must not pull it.
_LARGE = 0.5
_USUAL = 0.25


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels of a matrix, `bottom` and `right` exclusive; may pass the matrix."""

    top: float
    left: float
    bottom: float
    right: float

    @property
    def pixels(self) -> tuple[int, int, int, int]:
        """Rounded outwards to whole pixels: top, left, bottom, right."""
        low, high = np.floor, np.ceil
        return (
            int(low(self.top)),
            int(low(self.left)),
            int(high(self.bottom)),
            int(high(self.right)),
        )

    def grown(self, margin: float) -> "Box":
        """Wider on each side by a share of its longer side."""
        by = margin * max(self.bottom - self.top, self.right - self.left)
        return Box(self.top - by, self.left - by, self.bottom + by, self.right + by)

    def squared(self, aspect: float) -> "Box":
        """The smallest square in millimetres round it; aspect: row over column spacing."""
        side = max((self.bottom - self.top) * aspect, self.right - self.left)  # in columns
        row, column = (self.top + self.bottom) / 2, (self.left + self.right) / 2
        half_rows, half_columns = side / aspect / 2, side / 2
        return Box(row - half_rows, column - half_columns, row + half_rows, column + half_columns)


def body_masks(images: NDArray[np.float32], above: float) -> tuple[NDArray[np.bool_], int]:
    """`body_mask` of every k-th pixel of images of shape (n, rows, cols); gives the masks and k.

    About 256 pixels a side are enough for outlines.
    """
    step = max(1, round(min(images.shape[1:]) / 256))
    return np.stack([body_mask(image, above) for image in images[:, ::step, ::step]]), step


def body_box(images: NDArray[np.float32], above: float) -> Box | None:
    """One box round the body over all images, shape (n, rows, cols); None where there is none."""
    masks, step = body_masks(images, above)
    box = usual_box(masks)
    if box is None:
        return None
    bottom, right = min(box.bottom * step, images.shape[1]), min(box.right * step, images.shape[2])
    return Box(box.top * step, box.left * step, float(bottom), float(right))


def usual_box(masks: NDArray[np.bool_]) -> Box | None:
    """The box round where the body usually is, in the masks' own pixels.

    None for empty masks, and for those that have no place in common: of noise, say.
    """
    areas = masks.sum(axis=(1, 2))
    if areas.max(initial=0) == 0:
        return None
    usual = masks[areas >= _LARGE * areas.max()].mean(axis=0) >= _USUAL
    if not usual.any():
        return None
    rows, columns = np.flatnonzero(usual.any(axis=1)), np.flatnonzero(usual.any(axis=0))
    return Box(float(rows[0]), float(columns[0]), float(rows[-1] + 1), float(columns[-1] + 1))
