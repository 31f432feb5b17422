"""The pointing game: does the peak of a heat map lie on the lesion more often than simpler guesses?

J. Zhang et al., Top-down neural attention by excitation backprop, 2016. A hit is a peak inside any
of the slice's lesion boxes, without tolerance. Out of fold: each map is made by a head that never
saw its patient.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import nn

from db.outline import body_mask
from inference.heatmap import grad_cam, to_source
from inference.manifest import Manifest
from inference.predict import neighbourhood, own_say
from inference.window import ModelInput
from weights.recipe.data import PICTURE_RANGE_HU, Cohort, LesionBox, read_boxes
from weights.recipe.features import Progress, seen_by_model, silent
from weights.recipe.figures import share, with_interval
from weights.recipe.head import Head
from weights.recipe.network import with_head

_BONE_HU = 90.0
_COARSE = (
    2  # every second pixel of the 650-pixel pictures, about 0.8 mm, is enough for both controls
)
_SMOOTH_PIXELS = 1.5  # about one millimetre, so that noise is no peak
_UNTRAINED_SEED = 1


def pointing_game(
    cohort: Cohort,
    data: Path,
    heads: Sequence[Head],
    folds: NDArray[np.int64],
    backbone: nn.Module,
    manifest: Manifest,
    *,
    seed: int,
    progress: Progress = silent,
) -> dict[str, object]:
    """Share of hits with 95 % intervals over patients, for the model and its two controls.

    heads : one a fold; folds : (patients,) the fold of each
    """
    boxes = read_boxes(data)
    networks = [with_head(backbone, head, manifest.architecture) for head in heads]
    guess = _untrained(heads[0])
    untrained = with_head(backbone, guess, manifest.architecture)
    hits: dict[str, list[bool]] = {"model": [], "untrained": [], "brightest": []}
    groups: list[NDArray[np.int64]] = []
    chance: list[float] = []
    for place, (patient, rows) in enumerate(cohort.by_patient()):
        progress("pointing game", place, len(folds))
        # One box (patient 86, slice 17) lies on a slice that the radiologists call clear: left out.
        marked = [
            i
            for i, row in enumerate(rows)
            if cohort.labels[row, 0] and (patient, cohort.slice_numbers[row]) in boxes
        ]
        if not marked:
            continue
        seen, fold = seen_by_model(cohort, rows, manifest), folds[place]
        grey = cohort.grey(rows)
        groups.append(np.arange(len(chance), len(chance) + len(marked)))
        for i in marked:
            lesions = boxes[patient, int(cohort.slice_numbers[rows[i]])]
            layer = manifest.explain.layer
            hits["model"].append(_hit(_peak(networks[fold], heads[fold], layer, seen, i), lesions))
            hits["untrained"].append(_hit(_peak(untrained, guess, layer, seen, i), lesions))
            hits["brightest"].append(_hit(_brightest(grey[i]), lesions))
            chance.append(_area(grey[i], lesions))
    return _summary({k: np.array(v) for k, v in hits.items()}, groups, chance, seed)


def _summary(
    hits: Mapping[str, NDArray[np.bool_]],
    groups: Sequence[NDArray[np.int64]],
    chance: Sequence[float],
    seed: int,
) -> dict[str, object]:
    def rate(flags: NDArray[np.bool_]) -> dict[str, float]:
        return with_interval(lambda rows: share(flags[rows]), groups, seed=seed)

    return {
        "slices": len(chance),
        "patients": len(groups),
        **{name: rate(flags) for name, flags in hits.items()},
        "box_share_of_head": round(float(np.mean(chance)), 4),
    }


def _untrained(like: Head) -> Head:
    rng = np.random.default_rng(_UNTRAINED_SEED)
    return Head(rng.normal(size=like.weight.shape), np.zeros_like(like.bias), like.context)


def _peak(
    network: nn.Module, head: Head, layer: str, seen: ModelInput, index: int
) -> tuple[float, float] | None:
    """Where the first label's map is strongest, in fractions of the picture; None: empty."""
    beside = len(neighbourhood(index, len(seen.inputs), head.context))
    n_labels = len(head.bias) // (2 if head.context else 1)
    say = own_say(0, n_labels, beside, head.context)
    cam = grad_cam(network, layer, seen.inputs[index : index + 1], [say])[0]
    mapped = to_source(cam, seen, index)
    return _place(mapped) if mapped.max() > 0 else None


def _brightest(grey: NDArray[np.uint8]) -> tuple[float, float] | None:
    """The brightest place inside the skull, after a little smoothing."""
    hu = _coarse_hu(grey)
    smooth = ndimage.gaussian_filter(hu, _SMOOTH_PIXELS)
    inside = ndimage.binary_erosion(body_mask(hu, 0.0), iterations=6) & ~ndimage.binary_dilation(
        hu > _BONE_HU, iterations=3
    )
    return _place(np.where(inside, smooth, -np.inf)) if inside.any() else None


def _place(values: NDArray[np.float32]) -> tuple[float, float]:
    row, column = np.unravel_index(int(np.argmax(values)), values.shape)
    return (float(row) + 0.5) / values.shape[0], (float(column) + 0.5) / values.shape[1]


def _hit(place: tuple[float, float] | None, lesions: Sequence[LesionBox]) -> bool:
    """An empty map points nowhere: a miss."""
    if place is None:
        return False
    y, x = place
    return any(box.left <= x <= box.right and box.top <= y <= box.bottom for box in lesions)


def _area(grey: NDArray[np.uint8], lesions: Sequence[LesionBox]) -> float:
    """The share of the head that its boxes cover: what a blind guess would hit."""
    head = body_mask(_coarse_hu(grey), 0.0)
    rows, columns = head.shape
    inside = np.zeros_like(head)
    for box in lesions:
        top, bottom = int(box.top * rows), int(np.ceil(box.bottom * rows))
        left, right = int(box.left * columns), int(np.ceil(box.right * columns))
        inside[max(top, 0) : bottom, max(left, 0) : right] = True
    return float((inside & head).sum() / max(int(head.sum()), 1))


def _coarse_hu(grey: NDArray[np.uint8]) -> NDArray[np.float32]:
    low, high = PICTURE_RANGE_HU
    hu: NDArray[np.float32] = (
        grey[::_COARSE, ::_COARSE].astype(np.float32) * ((high - low) / 255) + low
    )
    return hu
