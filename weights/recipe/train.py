"""From labelled slices to a bundle that can serve: the whole recipe, in one function."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from inference.bundle import CALIBRATION, load_bundle
from inference.manifest import Manifest
from inference.model import check_reference, load_model
from inference.predict import aggregate
from weights.recipe import bundle_files, template
from weights.recipe.calibrate import apply
from weights.recipe.card import write_card
from weights.recipe.data import LABELS, Cohort, read_cohort
from weights.recipe.features import Progress, extract, silent
from weights.recipe.figures import auc, brier, share
from weights.recipe.judge import Judge
from weights.recipe.nested import (
    Examples,
    Fitted,
    Floats,
    OutOfFold,
    fit_recipe,
    out_of_fold,
    study_logits,
)
from weights.recipe.network import stored_backbone, with_head
from weights.recipe.pointing import pointing_game
from weights.recipe.series import NotJudged, series_logits

VERSION = "1.0.0"

#: The operating point that serves.
ACTIVE = "balanced"

#: A further head CT beside the training set: scored as a check of the whole path, if it is there.
_EXTERNAL = "head-ct-ge"


def train(
    data: Path, out: Path, *, seed: int = 0, folds: int = 5, progress: Progress = silent
) -> dict[str, Any]:
    """Write a bundle into `out`, and return its figures (also in report/figures.json).

    Minutes on two cores. Features are kept in `out`/cache, so that a run that was stopped resumes;
    the folder can be deleted afterwards. The same features, seed and folds give the same bytes;
    features taken again may differ in their last digits, by how threads share the work.

    data : the folder of `ct-ich`: manifest.csv, boxes.csv, brain/
    """
    (out / "report").mkdir(parents=True, exist_ok=True)
    manifest, cohort = template.draft(), read_cohort(data)
    backbone = stored_backbone(manifest.architecture)
    features = extract(cohort, backbone, manifest, out / "cache", progress)
    examples = Examples.of(cohort, features)
    found = out_of_fold(examples, folds=folds, seed=seed, progress=progress)
    final = fit_recipe(examples, seed=seed)
    figures = _figures(cohort, examples, found, final, seed=seed)
    figures["other_splits"] = _other_splits(cohort, examples, folds, seed, progress)
    heads = [fitted.head for fitted in found.fitted]
    figures["pointing_game"] = pointing_game(
        cohort, data, heads, found.folds, backbone, manifest, seed=seed, progress=progress
    )
    network = with_head(backbone, final.head, manifest.architecture)
    _write(out, network, manifest, final, figures)
    negatives = final.study_logits[~examples.any_patient]
    figures["external"] = _external(out, data.parent / _EXTERNAL, negatives)
    (out / "report" / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    write_card(out / "MODEL_CARD.md", figures)
    return figures


def _figures(
    cohort: Cohort, examples: Examples, found: OutOfFold, final: Fitted, *, seed: int
) -> dict[str, Any]:
    judge = Judge(cohort, found, seed=seed)
    positive = cohort.per_patient(cohort.labels)
    return {
        "version": VERSION,
        "data": {
            "patients": len(positive),
            "slices": len(cohort.patients),
            "positive_patients": dict(zip(LABELS, positive.sum(axis=0).tolist(), strict=True)),
            "positive_slices": dict(zip(LABELS, cohort.labels.sum(axis=0).tolist(), strict=True)),
        },
        "seed": seed,
        "outer_folds": len(found.fitted),
        "headline": judge.headline(),
        "operating_points": judge.operating_points(),
        "active": ACTIVE,
        "subgroups": judge.subgroups(ACTIVE),
        "subtypes": judge.by_subtype(ACTIVE),
        "shortcuts": judge.shortcuts(),
        "per_fold": [_chosen(fitted) for fitted in found.fitted],
        "final": {**_chosen(final), **_refit(examples, final)},
        "study_logits": {  # of the final recipe, from folds that did not see the patient; sorted
            "negative": np.sort(final.study_logits[~judge.truth]).round(3).tolist(),
            "positive": np.sort(final.study_logits[judge.truth]).round(3).tolist(),
        },
    }


def _other_splits(
    cohort: Cohort, examples: Examples, folds: int, seed: int, progress: Progress
) -> list[dict[str, float]]:
    """The headline for other ways to part the same patients: how much is the luck of the draw."""
    made = []
    for other in (seed + 1, seed + 2):
        found = out_of_fold(examples, folds=folds, seed=other, progress=progress)
        truth = examples.any_patient
        made.append(
            {
                "seed": other,
                "patient_auc": round(auc(found.probability, truth), 4),
                "slice_auc": round(auc(found.logits[:, 0], cohort.labels[:, 0]), 4),
                "brier": round(brier(found.probability, truth), 4),
                "sensitivity": round(share(found.present[ACTIVE][truth]), 4),
                "specificity": round(share(~found.present[ACTIVE][~truth]), 4),
            }
        )
    return made


def _chosen(fitted: Fitted) -> dict[str, Any]:
    """What the recipe chose, with what it chose from."""
    calibration = {k: v for k, v in asdict(fitted.calibration).items() if v not in (None, (), "")}
    return {
        "c": fitted.options.c,
        "balance": fitted.options.balance,
        "context": fitted.options.context,
        "aggregation": str(fitted.aggregation),
        "calibration": calibration,
        "calibration_log_losses": {k: round(v, 4) for k, v in fitted.choice.log_losses.items()},
        "thresholds": {name: round(value, 4) for name, value in fitted.thresholds.items()},
    }


def _refit(examples: Examples, final: Fitted) -> dict[str, Any]:
    """How far the head that was fitted on all patients lies from the folds that calibrated it.

    On patients it has seen, so most of it is memory, not the size of the fit: an upper bound.
    """
    refit = final.head.logits(examples.features, examples.groups)[:, 0]
    by_study = study_logits(refit, examples.groups, final.aggregation)
    shift, truth = by_study - final.study_logits, examples.any_patient
    return {
        "refit_shift_positive": round(float(shift[truth].mean()), 3),
        "refit_shift_negative": round(float(shift[~truth].mean()), 3),
        "refit_patient_auc_on_training_patients": round(auc(by_study, truth), 4),
        "inner_patient_auc": round(auc(final.study_logits, truth), 4),
        "inner_slice_auc": round(auc(final.logits, examples.labels[:, 0]), 4),
    }


def _write(
    out: Path, network: nn.Module, manifest: Manifest, final: Fitted, figures: Mapping[str, Any]
) -> None:
    """The bundle's files; then loaded as the node loads them, it must give its own reference."""
    sha256 = bundle_files.write_weights(out, network)
    bundle_files.write_reference(out, network, manifest)
    bundle_files.write_calibration(
        out / CALIBRATION,
        {LABELS[0]: final.calibration},
        fitted_on=f"{figures['data']['patients']} patients of ct-ich, out of five folds by patient",
    )
    bundle_files.write_manifest(out, _measured(sha256, final, figures))
    bundle = load_bundle(out)
    check_reference(bundle, load_model(bundle))


def _measured(sha256: str, final: Fitted, figures: Mapping[str, Any]) -> dict[str, Any]:
    thresholds = {name: round(value, 4) for name, value in final.thresholds.items()}
    return {
        "version": VERSION,
        "weights_sha256": sha256,
        "prevalence": final.calibration.prevalence,
        "threshold": thresholds[ACTIVE],
        "active": ACTIVE,
        "stat_at": thresholds["high specificity"],
        "operating_points": "".join(
            "[[labels.operating_points]]\n"
            f'name = "{name}"\nthreshold = {threshold}\n'
            f"sensitivity = {figures['operating_points'][name]['sensitivity']['value']}\n"
            f"specificity = {figures['operating_points'][name]['specificity']['value']}\n"
            for name, threshold in thresholds.items()
        ),
        "aggregation_kind": final.aggregation.kind,
        "aggregation_k": final.aggregation.k,
        "context": final.options.context,
        "pointing_game": _pointing_lines(figures["pointing_game"]),
    }


def _pointing_lines(game: Mapping[str, Any]) -> str:
    return (
        f"pointing_game = {game['model']['value']}\n"
        f"pointing_game_untrained = {game['untrained']['value']}\n"
        f"pointing_game_brightest = {game['brightest']['value']}\n"
    )


def _external(out: Path, folder: Path, negatives: Floats) -> dict[str, Any] | None:
    """Where a real series of another scanner falls among the negatives; None: not there."""
    if not folder.is_dir():
        return None
    bundle = load_bundle(out)
    try:
        logits = series_logits(folder, bundle, load_model(bundle))[:, 0].astype(np.float64)
    except NotJudged as refusal:
        return {"series": _EXTERNAL, "refused": str(refusal)}
    score = aggregate(logits, bundle.manifest.study.aggregation)
    probability = float(apply(bundle.calibrations[LABELS[0]], np.array([score]))[0])
    threshold = bundle.manifest.labels[0].threshold
    return {
        "series": _EXTERNAL,
        "images": len(logits),
        "study_logit": round(score, 3),
        "probability": round(probability, 4),
        "present": threshold is not None and probability >= threshold,
        "percentile_of_negatives": round(100 * float((negatives < score).mean()), 1),
    }
