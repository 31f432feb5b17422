"""From a raw heat map and a slice to pixels: window, colour, opacity; no words, no patient."""

import numpy as np
from numpy.typing import NDArray

from db.paint import Grey, colours

Colour = NDArray[np.uint8]  # (rows, columns, 3)


def blend(grey: Grey, cam: NDArray[np.float32], scale: float, alpha: float) -> Colour:
    """The map painted over the slice.

    Parameters
    ----------
    grey, cam : shape (rows, columns); `cam` holds raw ReLU values
    scale : the strongest value of the whole study: one scale, so that a weak slice looks weak
    alpha : 0..1, where the map is strongest
    """
    if cam.shape != grey.shape:
        raise ValueError(f"heat map {cam.shape} does not fit the image {grey.shape}")
    base = np.repeat(grey[..., None].astype(np.float64), 3, axis=2)
    if scale <= 0.0:
        return base.astype(np.uint8)
    painted, shown = colours(cam, scale)
    weight = alpha * shown[..., None]
    colour: Colour = np.rint(base * (1.0 - weight) + painted * weight).astype(np.uint8)
    return colour
