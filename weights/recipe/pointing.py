"""Do the heat maps point at lesions, and more often than simpler guesses?

Two figures on the slices that somebody marked. Pointing game: is the map's peak inside one of the
slice's lesion boxes, without tolerance (J. Zhang et al., Top-down neural attention by excitation
backprop, 2016). Energy: how much of the map lies inside them (H. Wang et al., Score-CAM, 2020).
Both are averaged over a patient's slices, then over patients. Out of fold: each map is made by a
fit that never saw its patient, by the method and layer that its training patients liked best.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from db.outline import body_mask
from inference.window import resize
from weights.recipe.bank import Pictures
from weights.recipe.candidates.candidate import Candidate, Explanation, servable
from weights.recipe.data import LesionBox
from weights.recipe.examples import ALL, Examples, Split
from weights.recipe.figures import with_interval
from weights.recipe.fits import Fits
from weights.recipe.nested import OutOfFold
from weights.recipe.progress import Progress, silent

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]
Maps = NDArray[np.float32]

_BONE_HU = 90.0
_SMOOTH_PIXELS = 1.5  # about one millimetre, so that noise is no peak
_UNTRAINED_SEED = 1
_FIGURES = ("hit", "energy")


@dataclass(frozen=True, slots=True)
class Pointing:
    """How one map fares on its slice."""

    hit: float  # 1: the peak lies in a box
    energy: float  # 0..1, the share of the map that lies in boxes

    @classmethod
    def of(cls, image: Maps, lesions: Sequence[LesionBox]) -> "Pointing":
        """image : (rows, cols), never negative; an empty one points nowhere: a miss"""
        if not image.max() > 0:
            return cls(0.0, 0.0)
        rows, columns = image.shape
        row, column = np.unravel_index(int(np.argmax(image)), image.shape)
        y, x = (float(row) + 0.5) / rows, (float(column) + 0.5) / columns
        hit = any(b.left <= x <= b.right and b.top <= y <= b.bottom for b in lesions)
        inside = np.zeros(image.shape, np.bool_)
        for box in lesions:
            top, left = max(round(box.top * rows), 0), max(round(box.left * columns), 0)
            inside[top : round(box.bottom * rows), left : round(box.right * columns)] = True
        return cls(float(hit), float(image[inside].sum() / image.sum()))


def best_explanation(fits: Fits, candidate: Candidate, held: Split = ALL) -> Explanation:
    """By peak and energy together, on patients that neither fit nor judgement has for its own.

    By peaks alone Grad-CAM++ is a match for Grad-CAM, and paints half of the air round the head.
    """
    examples = fits.examples
    offered = servable(candidate).explanations
    found: dict[Explanation, list[tuple[int, Pointing]]] = {how: [] for how in offered}
    for fold in sorted(set(range(examples.n_folds)) - held):
        rows = _marked(examples, np.flatnonzero(examples.folds == fold))
        if len(rows) and len(offered) > 1:
            weights = fits.get(candidate, held | {fold}).weights
            for how in offered:
                maps = servable(candidate).maps(weights, rows, how)
                found[how] += _points(examples, rows, maps, _side(maps))
    return max(offered, key=lambda how: sum(_patient_mean(found[how], x) for x in _FIGURES))


def _side(maps: Maps) -> int:
    """Pixels a side that a map is drawn at to find its peak: as fine as a served overlay needs."""
    return max(8 * int(maps.shape[1]), 160)


def pointing_game(
    fits: Fits,
    found: OutOfFold,
    pictures: Pictures,
    *,
    active: str,
    seed: int,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Model and controls, all marked slices and those of patients that were detected.

    active : the operating point by which a patient counts as detected
    """
    examples, patient_of = fits.examples, fits.examples.patient_of
    points: dict[str, list[tuple[int, Pointing]]] = {
        name: [] for name in ("model", "untrained", "brightest")
    }
    blind: list[tuple[int, Pointing]] = []
    explanations = []
    for fold, chosen in enumerate(found.chosen):
        progress("pointing game", fold, len(found.chosen))
        how = best_explanation(fits, chosen.candidate, Split({fold}))
        explanations.append(str(how))
        rows = _marked(examples, np.flatnonzero(examples.folds == fold))
        if not len(rows):
            continue
        candidate = servable(chosen.candidate)
        guess = candidate.untrained(chosen.fit.weights, _UNTRAINED_SEED)
        for name, weights in (("model", chosen.fit.weights), ("untrained", guess)):
            maps = candidate.maps(weights, rows, how)
            points[name] += _points(examples, rows, maps, _side(maps))
        images = [pictures.images[row] for row in rows]
        bright = np.stack([_bright(image) for image in images])
        points["brightest"] += _points(examples, rows, bright, bright.shape[1])
        evenly = np.stack([_inside(image) for image in images]).astype(np.float32)
        blind += _points(examples, rows, evenly, evenly.shape[1])
    progress("pointing game", len(found.chosen), len(found.chosen))
    detected = {i for i in range(len(examples.folds)) if found.present[active][i]}
    parts = {"all": set(patient_of.tolist()), "detected": detected}
    return {
        "explanations_by_fold": explanations,
        "box_share": round(_patient_mean(blind, "energy"), 4) if blind else None,
        **{part: _summary(points, among, seed) for part, among in parts.items()},
    }


def _marked(examples: Examples, patients: Rows) -> Rows:
    """The marked slices of these patients."""
    rows = np.array(sorted(examples.lesions), np.int64)
    chosen: Rows = rows[np.isin(examples.patient_of[rows], patients)]
    return chosen


def _points(examples: Examples, rows: Rows, maps: Maps, side: int) -> list[tuple[int, Pointing]]:
    """(patient, how its map fares) for each row."""
    drawn = (one if len(one) == side else resize(one, (side, side)) for one in maps)
    return [
        (int(examples.patient_of[row]), Pointing.of(image, examples.lesions[int(row)]))
        for row, image in zip(rows, drawn, strict=True)
    ]


def _patient_mean(points: Sequence[tuple[int, Pointing]], figure: str) -> float:
    by_patient: dict[int, list[float]] = {}
    for patient, one in points:
        by_patient.setdefault(patient, []).append(getattr(one, figure))
    return float(np.mean([np.mean(values) for values in by_patient.values()])) if points else 0.0


def _summary(
    points: Mapping[str, Sequence[tuple[int, Pointing]]], among: set[int], seed: int
) -> dict[str, Any]:
    """Each figure with its interval over patients."""
    kept = {name: [one for one in some if one[0] in among] for name, some in points.items()}
    patients = sorted({patient for patient, _ in kept["model"]})
    made: dict[str, Any] = {"slices": len(kept["model"]), "patients": len(patients)}
    for name, some in kept.items():
        for figure in _FIGURES:
            by_patient = [
                _patient_mean([one for one in some if one[0] == p], figure) for p in patients
            ]
            made[f"{name}_{figure}"] = _mean(np.array(by_patient), seed)
    return made


def _mean(values: Floats, seed: int) -> dict[str, float] | None:
    """Of one number a patient, with its interval; None of nobody."""
    if not len(values):
        return None
    each = [np.array([place]) for place in range(len(values))]
    return with_interval(lambda rows: float(values[rows].mean()), each, seed=seed)


def _bright(image: Maps) -> Maps:
    """The brightness inside the skull, after a little smoothing; 0 elsewhere. (rows, cols), HU."""
    smooth = ndimage.gaussian_filter(image, _SMOOTH_PIXELS)
    made: Maps = np.where(_inside(image), np.maximum(smooth, 0), 0).astype(np.float32)
    return made


def _inside(image: Maps) -> NDArray[np.bool_]:
    """What of the head is neither its rim nor bone."""
    made: NDArray[np.bool_] = ndimage.binary_erosion(
        body_mask(image, 0.0), iterations=6
    ) & ~ndimage.binary_dilation(image > _BONE_HU, iterations=3)
    return made
