"""From numbers to pictures: a heat map in colour, pixels as a file; no disk, no clock."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from db import paint


def full_range(values: NDArray[np.float32]) -> tuple[float, float]:
    """The window, as centre and width, that shows everything in an image."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return (low + high) / 2, max(high - low, 1.0)


def painted(cam: NDArray[np.float32], scale: float) -> NDArray[np.uint8]:
    """A raw heat map (rows, columns) as RGBA; `scale` is the study's strongest value."""
    if scale <= 0.0:
        return np.zeros((*cam.shape, 4), np.uint8)
    colour, weight = paint.colours(cam, scale)
    layers = np.concatenate([colour, 255.0 * weight[..., None]], axis=2)
    rgba: NDArray[np.uint8] = np.rint(layers).astype(np.uint8)
    return rgba


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG of grey (rows, columns) or RGBA (rows, columns, 4) pixels."""
    file = io.BytesIO()
    # Fast rather than small: it travels over a hospital's own network.
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()
