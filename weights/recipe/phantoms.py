"""Inputs that belong to nobody: drawn heads and noise, by which serving checks itself."""

import numpy as np
from numpy.typing import NDArray

from inference.manifest import Manifest
from inference.volume import volume_from_pictures
from inference.window import model_input
from weights.recipe.data import PICTURE_RANGE_HU

_SIZE = 256  # pixels
_SEED = 20260131


def reference_inputs(manifest: Manifest) -> NDArray[np.float16]:
    """(n, channels, size, size): drawn heads without and with bright places, noise, and air."""
    rng = np.random.default_rng(_SEED)
    drawn = [
        drawn_head(),
        drawn_head([(0.42, 0.40, 0.10, 0.07)]),
        drawn_head([(0.45, 0.24, 0.20, 0.05)]),
    ]
    air = np.full((_SIZE, _SIZE), PICTURE_RANGE_HU[0])
    noise = rng.uniform(*PICTURE_RANGE_HU, (_SIZE, _SIZE))
    slices = np.stack([*(image + rng.normal(0, 4, image.shape) for image in drawn), noise, air])
    low, high = PICTURE_RANGE_HU
    grey = np.clip((slices - low) / (high - low) * 255, 0, 255).astype(np.uint8)
    seen = model_input(
        volume_from_pictures(grey, PICTURE_RANGE_HU), manifest.pixels, manifest.input
    )
    return seen.inputs.astype(np.float16)


def drawn_head(
    bright: list[tuple[float, float, float, float]] | None = None,
) -> NDArray[np.float64]:
    """One slice in HU: skull, brain of 32 HU, ventricles of 8, and bright ellipses of 68.

    bright : centre row, centre column, half height, half width; fractions of the matrix
    """
    hu = np.full((_SIZE, _SIZE), -1000.0)
    for shape, value in [
        ((0.5, 0.5, 0.44, 0.36), 30.0),  # scalp
        ((0.5, 0.5, 0.42, 0.34), 900.0),  # skull
        ((0.5, 0.5, 0.39, 0.31), 32.0),  # brain
        ((0.48, 0.46, 0.11, 0.025), 8.0),  # ventricles
        ((0.48, 0.54, 0.11, 0.025), 8.0),
        *((shape, 68.0) for shape in bright or []),
    ]:
        hu[_ellipse(*shape)] = value
    return hu


def _ellipse(row: float, column: float, half_rows: float, half_columns: float) -> NDArray[np.bool_]:
    at = (np.arange(_SIZE) + 0.5) / _SIZE
    rows, columns = at[:, None], at[None, :]
    inside: NDArray[np.bool_] = ((rows - row) / half_rows) ** 2 + (
        (columns - column) / half_columns
    ) ** 2 <= 1
    return inside
