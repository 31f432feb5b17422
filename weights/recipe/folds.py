"""Splits by patient: neighbouring slices are near duplicates and must never be parted."""

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold


def patient_folds(is_positive: NDArray[np.bool_], folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of each patient, 0..folds-1, with the same share of positives in each.

    is_positive : one entry a patient
    """
    made = np.empty(len(is_positive), np.int64)
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for number, (_, held_out) in enumerate(splitter.split(is_positive, is_positive)):
        made[held_out] = number
    return made
