"""A bundle as it stands on disk, judged on labelled slices."""

from pathlib import Path
from typing import Any

import numpy as np

from inference.bundle import load_bundle
from inference.model import load_model, logits
from weights.recipe.calibrate import apply, log_loss
from weights.recipe.data import read_cohort
from weights.recipe.features import Progress, seen_by_model, silent
from weights.recipe.figures import auc, brier, share, with_interval
from weights.recipe.nested import study_logits

_BATCH = 32


def evaluate(
    bundle: Path, data: Path, *, seed: int = 0, progress: Progress = silent
) -> dict[str, Any]:
    """Figures of the primary label, with 95 % intervals over patients.

    data : a folder laid out as `ct-ich`: manifest.csv and the pictures it names. On patients that
    the bundle was trained on the figures flatter; `trained_on` is in the answer, to tell.
    """
    served = load_bundle(bundle)
    model, manifest, cohort = load_model(served), served.manifest, read_cohort(data)
    primary = manifest.labels[0]
    assert primary.threshold is not None  # the manifest has seen to it
    groups, parts = [rows for _, rows in cohort.by_patient()], []
    for done, rows in enumerate(groups):
        progress("evaluate", done, len(groups))
        inputs = seen_by_model(cohort, rows, manifest).inputs
        parts += [logits(model, inputs[i : i + _BATCH]) for i in range(0, len(inputs), _BATCH)]
    progress("evaluate", len(groups), len(groups))
    slices = np.concatenate(parts)[:, 0].astype(np.float64)
    truth = cohort.per_patient(cohort.labels)[:, 0]
    p = apply(
        served.calibrations[primary.id], study_logits(slices, groups, manifest.study.aggregation)
    )
    present = p >= primary.threshold
    alone = [np.array([i]) for i in range(len(groups))]
    label = cohort.labels[:, 0]
    return {
        "bundle": manifest.name,
        "version": manifest.version,
        "weights_sha256": manifest.weights_sha256,
        "trained_on": list(manifest.trained_on),
        "label": primary.id,
        "n": len(groups),
        "positives": int(truth.sum()),
        "n_slices": len(slices),
        "threshold": primary.threshold,
        "slice_auc": with_interval(lambda r: auc(slices[r], label[r]), groups, seed=seed),
        "auc": with_interval(lambda r: auc(p[r], truth[r]), alone, seed=seed),
        "sensitivity": with_interval(lambda r: share(present[r][truth[r]]), alone, seed=seed),
        "specificity": with_interval(lambda r: share(~present[r][~truth[r]]), alone, seed=seed),
        "brier": with_interval(lambda r: brier(p[r], truth[r]), alone, seed=seed),
        "log_loss": with_interval(lambda r: log_loss(p[r], truth[r]), alone, seed=seed),
    }
