"""How a slice and its heat map look on pages and in the PACS: one window, one ramp, one opacity."""

import numpy as np
from numpy.typing import NDArray

from db.outline import CT_AIR_BELOW, body_mask
from db.result import LabelResult

#: Under this share of the study's strongest value the map says nothing and stays transparent.
CUT = 0.25
#: The edge fades in over this much more: no outline where none is meant.
FADE = 0.30
OPACITY_AT_THRESHOLD, OPACITY_MOST = 0.15, 0.45

Grey = NDArray[np.uint8]  # (rows, columns)

# Red through orange to pale yellow: light rises all the way, so it also reads in grey, and no hue
# that the eye takes for an edge (as in a rainbow) lies between two equal steps.
_STOPS = np.array([0.0, 0.35, 0.7, 1.0])
_RED, _GREEN, _BLUE = (
    np.array([150, 225, 255, 255]),
    np.array([20, 70, 160, 245]),
    np.array([40, 30, 20, 150]),
)


def grey_levels(
    values: NDArray[np.float32], centre: float, width: float, *, is_inverted: bool = False
) -> Grey:
    """A rescaled image through its display window, 0..255 (LINEAR_EXACT, PS3.3 C.11.2.1.3.2).

    `is_inverted`: MONOCHROME1, where the lowest value is shown white.
    """
    if width <= 0:
        raise ValueError(f"window width {width} is not positive")
    share = np.clip((values - (centre - width / 2)) / width, 0.0, 1.0)
    share = np.nan_to_num(1.0 - share if is_inverted else share)
    grey: Grey = np.rint(255.0 * share).astype(np.uint8)
    return grey


def opacity(label: LabelResult) -> float:
    """How strongly a label's map is painted: its probability, from threshold to certainty."""
    if label.probability is None or label.threshold is None or label.threshold >= 1.0:
        return OPACITY_AT_THRESHOLD
    above = (label.probability.reference - label.threshold) / (1.0 - label.threshold)
    share = min(max(above, 0.0), 1.0)
    return OPACITY_AT_THRESHOLD + (OPACITY_MOST - OPACITY_AT_THRESHOLD) * share


def colours(
    cam: NDArray[np.float32], scale: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A raw heat map's colour and how much of it shows.

    Parameters
    ----------
    cam : shape (rows, columns), raw ReLU values; a value that is no number says nothing
    scale : positive, the strongest value of the whole study, so that a weak slice looks weak

    Returns
    -------
    shape (rows, columns, 3), 0..255; and shape (rows, columns), 0..1, 0 below CUT of the scale
    """
    share = np.clip(np.nan_to_num(cam.astype(np.float64)) / scale, 0.0, 1.0)
    place = (share - CUT) / (1.0 - CUT)
    painted = np.stack([np.interp(place, _STOPS, part) for part in (_RED, _GREEN, _BLUE)], axis=2)
    return painted, np.clip((share - CUT) / FADE, 0.0, 1.0)


def inside(
    cam: NDArray[np.float32], values: NDArray[np.float32], modality: str
) -> NDArray[np.float32]:
    """A heat map without what lies in the air round the patient: nothing can be seen there.

    Parameters
    ----------
    cam, values : shape (rows, columns); `values` are the image's rescaled ones
    modality : of the image; only CT values say what is air, any other map stays whole
    """
    if modality != "CT":
        return cam
    kept: NDArray[np.float32] = np.where(body_mask(values, CT_AIR_BELOW), cam, 0.0)
    return kept.astype(np.float32)
