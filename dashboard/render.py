"""From numbers to pictures: a slice through a window, a heat map in colour; no disk, no clock."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

#: Under this share of the study's strongest value the map says nothing and stays transparent.
CUT = 0.25
#: Over this share more the edge fades in, so that no outline is drawn where none is meant.
FADE = 0.15
OPACITY_AT_THRESHOLD, OPACITY_MOST = 0.15, 0.45

# The same ramp as on the overlays that go to the PACS: light rises all the way.
_STOPS = np.array([0.0, 0.35, 0.7, 1.0])
_RAMP = (
    np.array([150, 225, 255, 255]),
    np.array([20, 70, 160, 245]),
    np.array([40, 30, 20, 150]),
)


def windowed(values: NDArray[np.float32], centre: float, width: float) -> NDArray[np.uint8]:
    """A rescaled image through a window, 0..255 (LINEAR_EXACT, PS3.3 C.11.2.1.3.2)."""
    if width <= 0:
        raise ValueError(f"window width {width} is not positive")
    share = np.nan_to_num(np.clip((values - (centre - width / 2)) / width, 0.0, 1.0))
    grey: NDArray[np.uint8] = np.rint(255.0 * share).astype(np.uint8)
    return grey


def full_range(values: NDArray[np.float32]) -> tuple[float, float]:
    """The window, as centre and width, that shows everything in an image."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return (low + high) / 2, max(high - low, 1.0)


def painted(cam: NDArray[np.float32], scale: float) -> NDArray[np.uint8]:
    """A raw heat map (rows, columns) as RGBA; `scale` is the study's strongest value.

    One scale for a whole study, so that a weak slice looks weak; transparent below CUT of it.
    """
    if scale <= 0.0:
        return np.zeros((*cam.shape, 4), np.uint8)
    share = np.clip(np.nan_to_num(cam.astype(np.float64)) / scale, 0.0, 1.0)
    place = (share - CUT) / (1.0 - CUT)
    layers = [np.interp(place, _STOPS, part) for part in _RAMP]
    layers.append(255.0 * np.clip((share - CUT) / FADE, 0.0, 1.0))
    colour: NDArray[np.uint8] = np.rint(np.stack(layers, axis=2)).astype(np.uint8)
    return colour


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG of grey (rows, columns) or RGBA (rows, columns, 4) pixels."""
    file = io.BytesIO()
    # Fast rather than small: it travels over a hospital's own network.
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()
