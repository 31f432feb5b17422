"""Where a real series of another scanner stands, before and after each remedy, and at what cost.

One series is evidence, never a target: nothing is chosen by it. It stands at a percentile of the
negatives out of fold; a remedy that moves it is worth something only if positives keep their
distance, which the AUCs out of fold tell.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import nn

from db.result import Urgency
from inference.bundle import Bundle
from inference.gates import measures
from inference.manifest import Manifest
from inference.model import load_model, logits
from inference.predict import aggregate, in_context
from inference.volume import Volume, volume_from_pictures
from inference.window import as_channels, cropped
from weights.recipe.calibrate import apply
from weights.recipe.candidates.candidate import Candidate, servable
from weights.recipe.candidates.evidence import Evidence
from weights.recipe.candidates.tuned import Tuned
from weights.recipe.data import LABELS, PICTURE_RANGE_HU, Cohort
from weights.recipe.examples import Split
from weights.recipe.figures import auc
from weights.recipe.nested import Chosen, Recipe
from weights.recipe.progress import Progress, silent
from weights.recipe.series import NotJudged, read_volume, series_logits

Floats = NDArray[np.float64]
Remedy = Callable[[Volume], Volume]

_NOISE = "gate:noise"
_BATCH = 32
_BLURS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # sigma, in pixels of the source


@dataclass(frozen=True, slots=True)
class Way:
    """A way to judge the same studies: other fits, or other pixels."""

    words: str
    candidate: Candidate | None = None  # None: the one that each fold chose
    remedy: Remedy | None = None


def scanner_shift(
    cohort: Cohort,
    recipe: Recipe,
    series: Path,
    manifest: Manifest,
    *,
    remedies: bool = True,
    progress: Progress = silent,
) -> dict[str, Any] | None:
    """One entry a way, all else as each fold chose it; None: no series, or it is refused."""
    if not series.is_dir():
        return None
    try:
        volume = read_volume(series, manifest)
    except NotJudged:
        return None
    chosen = [recipe.choose(Split({fold})) for fold in range(recipe.examples.n_folds)]
    usual = float(np.median([noise(one, manifest) for one in _volumes(cohort)]))
    ways = [Way("as served: one crop a volume")]
    ways += _remedies(chosen, usual, manifest) if remedies else []
    entries = []
    for done, way in enumerate(ways):
        progress("scanner shift", done, len(ways))
        entries.append(_entry(cohort, recipe, chosen, volume, way, manifest))
    progress("scanner shift", len(ways), len(ways))
    return {
        "series": series.name,
        "noise_hu": round(noise(volume, manifest), 2),
        "usual_noise_hu": round(usual, 2),
        "ways": entries,
    }


def _remedies(chosen: Sequence[Chosen], usual_noise: float, manifest: Manifest) -> list[Way]:
    ways = [
        Way("one crop a slice", remedy=_without_order),
        Way("blurred to the usual noise", remedy=lambda v: quieted(v, usual_noise, manifest)),
    ]
    first = chosen[0].candidate
    if isinstance(first, Tuned):
        first = first.base
    if isinstance(first, Evidence):
        # Nor drawn bleeds: their views are altered, and looking so would speak for a bleed.
        plain = replace(first, altered=0, copied=0, bleeds=0)
        grey = replace(plain, grey=1)
        ways.append(Way("fitted without altered views", candidate=plain))
        ways.append(Way("fitted with views of other grey alone", candidate=grey))
        if first.bleeds:
            ways.append(Way("fitted without drawn bleeds", candidate=replace(first, bleeds=0)))
    return ways


def _entry(
    cohort: Cohort,
    recipe: Recipe,
    chosen: Sequence[Chosen],
    volume: Volume,
    way: Way,
    manifest: Manifest,
) -> dict[str, Any]:
    """Each fold's fit judges its own patients and the series."""
    examples = recipe.examples
    slices, study = np.empty(len(examples.labels)), np.empty(len(examples.groups))
    of_series = []
    for fold, one in enumerate(chosen):
        candidate = servable(way.candidate or one.candidate)
        fit = recipe.fits.get(candidate, Split({fold}))
        mix = one.smoothing.mix(examples.labels.shape[1])
        network = candidate.network(fit.weights, mix).to(memory_format=torch.channels_last)
        # Where pixels stay as they are, what the fit said of them is known.
        known = one.smoothing.apply(fit.logits[:, :1], examples.groups)[:, 0]
        for place in examples.patients(Split({fold}), inside=True):
            rows = examples.groups[place]
            slices[rows] = known[rows]
            if way.remedy:
                own = volume_from_pictures(cohort.grey(rows), PICTURE_RANGE_HU)
                slices[rows] = _logits(network, own, one, way, manifest)
            study[place] = _chance(slices[rows], one)
        of_series.append(_chance(_logits(network, volume, one, way, manifest), one))
    negatives = study[~examples.truth]
    percentiles = [100 * float((negatives < z).mean()) for z in of_series]
    return {
        "way": way.words,
        "percentile_of_negatives": round(float(np.mean(percentiles)), 1),
        "lowest": round(min(percentiles), 1),
        "highest": round(max(percentiles), 1),
        "slice_auc": round(auc(slices, examples.labels[:, 0]), 4),
        "patient_auc": round(auc(study, examples.truth), 4),
    }


def _chance(slices: Floats, chosen: Chosen) -> float:
    """Calibrated, so that folds that chose another aggregation can stand in one row."""
    score = aggregate(slices, chosen.aggregation)
    return float(apply(chosen.calibration, np.array([score]))[0])


def noise(volume: Volume, manifest: Manifest) -> float:
    """As the manifest's noise gate measures it; 0 where it has none."""
    return next((one.value for one in measures(volume, manifest) if one.rule == _NOISE), 0.0)


def quieted(volume: Volume, usual: float, manifest: Manifest) -> Volume:
    """Blurred no more than it takes to be no noisier than usual."""
    made = volume
    for sigma in _BLURS:
        if noise(made, manifest) <= usual:
            break
        pixels = np.stack([gaussian_filter(one, sigma) for one in volume.pixels])
        made = replace(volume, pixels=pixels)
    return made


def _without_order(volume: Volume) -> Volume:
    """Images without an order in space are cut each by itself."""
    return replace(volume, positions_mm=None)


def _volumes(cohort: Cohort) -> Iterator[Volume]:
    for _, rows in cohort.by_patient():
        yield volume_from_pictures(cohort.grey(rows), PICTURE_RANGE_HU)


def _logits(
    network: nn.Module, volume: Volume, chosen: Chosen, way: Way, manifest: Manifest
) -> Floats:
    """(images,) of the first label."""
    seen = cropped(way.remedy(volume) if way.remedy else volume, manifest.pixels, manifest.input)
    inputs = as_channels(seen.images, manifest.input)
    starts = range(0, len(inputs), _BATCH)
    outputs = np.concatenate([logits(network, inputs[i : i + _BATCH]) for i in starts])
    made: Floats = in_context(outputs, chosen.smoothing.context)[:, 0].astype(np.float64)
    return made


def as_it_ships(bundle: Bundle, folder: Path, negatives: Floats) -> dict[str, Any] | None:
    """What a bundle says of the series, and where that is among the negatives; None: not there."""
    if not folder.is_dir():
        return None
    try:
        found = series_logits(folder, bundle, load_model(bundle))[:, 0].astype(np.float64)
    except NotJudged as refusal:
        return {"series": folder.name, "refused": str(refusal)}
    score = aggregate(found, bundle.manifest.study.aggregation)
    probability = float(apply(bundle.calibrations[LABELS[0]], np.array([score]))[0])
    threshold = bundle.manifest.labels[0].threshold
    return {
        "series": folder.name,
        "images": len(found),
        "study_logit": round(score, 3),
        "probability": round(probability, 4),
        "present": threshold is not None and probability >= threshold,
        "urgency": str(_urgency(bundle, probability)),
        "percentile_of_negatives": round(100 * float((negatives < score).mean()), 1),
    }


def _urgency(bundle: Bundle, probability: float) -> Urgency:
    """What the node would say of the primary label alone."""
    primary = bundle.manifest.labels[0]
    if primary.threshold is None or probability < primary.threshold:
        return Urgency.ROUTINE
    met = [
        rule.level
        for rule in bundle.manifest.study.urgency
        if rule.label == primary.id and (rule.at is None or probability >= rule.at)
    ]
    return next(
        (level for level in (Urgency.STAT, Urgency.URGENT) if level in met), Urgency.ROUTINE
    )
