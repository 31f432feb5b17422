"""One patient's slices as the served model would see them."""

import numpy as np
from numpy.typing import NDArray

from inference.manifest import Manifest
from inference.volume import volume_from_pictures
from inference.window import ModelInput, model_input
from weights.recipe.data import PICTURE_RANGE_HU, Cohort
from weights.recipe.progress import Progress, silent

__all__ = ["Progress", "seen_by_model", "silent"]


def seen_by_model(cohort: Cohort, rows: NDArray[np.int64], manifest: Manifest) -> ModelInput:
    """One patient's slices as the served model would see them."""
    volume = volume_from_pictures(cohort.grey(rows), PICTURE_RANGE_HU)
    return model_input(volume, manifest.pixels, manifest.input)
