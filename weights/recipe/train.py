"""From labelled slices to a bundle that can serve: the whole recipe, in one function."""

import json
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from db.spool import FolderLock
from inference.bundle import load_bundle
from inference.model import exact_floats, load_model
from inference.serving import pick_device
from weights.recipe.answer import answers_to_bleeds
from weights.recipe.bank import Pictures, read_pictures
from weights.recipe.calibrate import apply
from weights.recipe.candidates.candidate import Candidate, Explanation, servable
from weights.recipe.candidates.evidence import Evidence
from weights.recipe.card import write_card
from weights.recipe.compare import compared
from weights.recipe.data import LABELS, Cohort, read_boxes, read_cohort
from weights.recipe.drawn import drawn_heads
from weights.recipe.examples import Examples
from weights.recipe.figures import auc, brier, share
from weights.recipe.fits import Fits
from weights.recipe.judge import Judge
from weights.recipe.line_up import LineUp, line_up, line_up_b4
from weights.recipe.nested import Chosen, Recipe, study_logits
from weights.recipe.pointing import best_explanation, pointing_game
from weights.recipe.progress import Progress, silent
from weights.recipe.shift import as_it_ships, scanner_shift
from weights.recipe.ship import ACTIVE, VERSION, ship
from weights.recipe.template import ICH, Kind, draft

#: Of a plan, in the figures.
_TOLD = ("folds", "repeats", "families", "samples", "remedies")

#: A further head CT beside the training set: scored as a check of the whole path, if it is there.
_EXTERNAL = "head-ct-ge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is tried; the defaults make `weights/ich`."""

    kind: Kind = ICH
    seed: int = 0
    folds: int = 5
    repeats: int = 0  # so many times more with the patients parted in other ways
    families: tuple[str, ...] = ()  # only these; empty: all
    samples: int = 12_000  # slices drawn for each fit of an evidence head
    device: str = "auto"  # auto | cpu | cuda | cuda:1
    remedies: bool = True  # what each remedy against another scanner is worth: more fits


def train(
    data: Path, out: Path, *, plan: Plan | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Write a bundle into `out`, and return its figures (also in report/figures.json).

    Pictures, features and fits are kept in `out`/cache, so that a run that was stopped goes on
    where it was; the folder can be deleted afterwards. What is kept, seed and folds given, the
    result is the same to the byte; features taken again may differ in their last digits, by how
    threads share the work.

    data : the folder of `ct-ich`: manifest.csv, boxes.csv, brain/

    Raises
    ------
    SpoolBusy
        If another run works in `out`.
    """
    exact_floats()
    with closing(FolderLock(out / "cache", ".lock")):
        return _train(data, out, plan or Plan(), progress)


def _train(data: Path, out: Path, plan: Plan, progress: Progress) -> dict[str, Any]:
    cohort, boxes = read_cohort(data), read_boxes(data)
    (out / "report").mkdir(parents=True, exist_ok=True)
    cache = out / "cache"
    pictures = read_pictures(cohort, draft(plan.kind), cache, progress)
    candidates = _line_up(cohort, pictures, cache, plan, progress).only(plan.families)

    def recipe_of(seed: int) -> Recipe:
        examples = Examples.of(cohort, pictures, boxes, folds=plan.folds, seed=seed)
        # Beside the features they rest on: another window, or other draws of views, is another fit.
        folder = pictures.folder / f"fits-of-features-{plan.seed}"
        fits = Fits(folder, examples, seed=seed)
        fits.make(candidates.shipping, examples.splits(), progress)
        return Recipe(fits, candidates.shipping, seed=seed)

    recipe = recipe_of(plan.seed)
    figures, final, how = _judged(cohort, pictures, recipe, plan, progress)
    recipe.fits.make(candidates.compared, recipe.examples.splits(), progress)
    all_of_them = Recipe(recipe.fits, (*candidates.shipping, *candidates.compared), seed=plan.seed)
    figures["compared"] = compared(all_of_them, seed=plan.seed, progress=progress)
    figures["answers_to_bleeds"] = answers_to_bleeds(
        recipe.fits,
        (*candidates.shipping, *candidates.compared, *_never_shown_bleeds(final.candidate, plan)),
    )
    figures["other_splits"] = [
        _other_split(recipe_of(seed), seed, progress)
        for seed in range(plan.seed + 1, plan.seed + 1 + plan.repeats)
    ]
    ship(out, plan.kind, final, how, figures)
    elsewhere, negatives = data.parent / _EXTERNAL, final.study_logits[~recipe.examples.truth]
    figures["external"] = as_it_ships(load_bundle(out), elsewhere, negatives)
    figures["shift"] = scanner_shift(
        cohort, recipe, elsewhere, pictures.manifest, remedies=plan.remedies, progress=progress
    )
    bundle = load_bundle(out)
    figures["drawn"] = drawn_heads(bundle, load_model(bundle), out / "report", seed=plan.seed)
    (out / "report" / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    write_card(out / "MODEL_CARD.md", figures)
    return figures


def _never_shown_bleeds(candidate: Candidate, plan: Plan) -> list[Candidate]:
    """What ships, fitted without drawn bleeds: to tell what they are worth."""
    if plan.remedies and isinstance(candidate, Evidence) and candidate.bleeds:
        return [replace(candidate, bleeds=0)]
    return []


def _line_up(
    cohort: Cohort, pictures: Pictures, cache: Path, plan: Plan, progress: Progress
) -> LineUp:
    device = str(pick_device(plan.device))
    if plan.kind is ICH:
        return line_up(pictures, seed=plan.seed, samples=plan.samples, device=device)
    return line_up_b4(
        pictures,
        read_pictures(cohort, draft(ICH), cache, progress),
        seed=plan.seed,
        samples=plan.samples,
        device=device,
    )


def _judged(
    cohort: Cohort, pictures: Pictures, recipe: Recipe, plan: Plan, progress: Progress
) -> tuple[dict[str, Any], Chosen, Explanation]:
    """The figures of the outer folds, what ships, and how it is explained."""
    examples = recipe.examples
    found, final = recipe.out_of_fold(progress), recipe.choose()
    judge = Judge(cohort, found, seed=plan.seed)
    alone = recipe.only(final.candidate.family).out_of_fold(progress)
    of_family = Judge(cohort, alone, seed=plan.seed)
    how = best_explanation(recipe.fits, final.candidate)
    figures = {
        "bundle": plan.kind.name,
        "version": VERSION,
        "input_pixels": plan.kind.size,
        "network": servable(final.candidate).words,
        "pretrained": servable(final.candidate).pretrained,
        "data": _counts(examples),
        "plan": {name: getattr(plan, name) for name in _TOLD},
        "seed": plan.seed,
        "outer_folds": len(found.chosen),
        "headline": judge.headline(),
        "shipped_family": {
            "headline": of_family.headline(),
            "operating_points": of_family.operating_points(),
        },
        "operating_points": judge.operating_points(),
        "active": ACTIVE,
        "subgroups": of_family.subgroups(ACTIVE),
        "subtypes": of_family.by_subtype(ACTIVE),
        "shortcuts": of_family.shortcuts(),
        "per_fold": [_chosen(chosen) for chosen in found.chosen],
        "final": _final(examples, final, how),
        "pointing_game": pointing_game(
            recipe.fits, alone, pictures, active=ACTIVE, seed=plan.seed, progress=progress
        ),
        "study_logits": {  # of the final recipe, from folds that did not see the patient; sorted
            "negative": np.sort(final.study_logits[~judge.truth]).round(3).tolist(),
            "positive": np.sort(final.study_logits[judge.truth]).round(3).tolist(),
        },
    }
    return figures, final, how


def _final(examples: Examples, final: Chosen, how: Explanation) -> dict[str, Any]:
    """What ships."""
    return {
        **_chosen(final),
        "explanation": str(how),
        "at_own_thresholds": _at_own_thresholds(examples, final),
        **_refit(examples, final),
    }


def _counts(examples: Examples) -> dict[str, Any]:
    by_patient = np.array([examples.labels[rows].any(axis=0) for rows in examples.groups])
    return {
        "patients": len(by_patient),
        "slices": len(examples.labels),
        "positive_patients": dict(zip(LABELS, by_patient.sum(axis=0).tolist(), strict=True)),
        "positive_slices": dict(zip(LABELS, examples.labels.sum(axis=0).tolist(), strict=True)),
    }


def _other_split(recipe: Recipe, seed: int, progress: Progress) -> dict[str, float]:
    """The headline for another way to part the same patients: how much is the luck of the draw."""
    found, examples = recipe.out_of_fold(progress), recipe.examples
    truth = examples.truth
    return {
        "seed": seed,
        "patient_auc": round(auc(found.probability, truth), 4),
        "slice_auc": round(auc(found.logits[:, 0], examples.labels[:, 0]), 4),
        "brier": round(brier(found.probability, truth), 4),
        "sensitivity": round(share(found.present[ACTIVE][truth]), 4),
        "specificity": round(share(~found.present[ACTIVE][~truth]), 4),
    }


def _chosen(chosen: Chosen) -> dict[str, Any]:
    """What the recipe chose, with what it chose from."""
    calibration = {k: v for k, v in asdict(chosen.calibration).items() if v not in (None, (), "")}
    return {
        "candidate": chosen.candidate.name,
        "family": chosen.candidate.family,
        "inner_slice_aucs": chosen.slice_aucs,
        "smoothing": str(chosen.smoothing),
        "aggregation": str(chosen.aggregation),
        "aggregation_log_losses": chosen.aggregation_log_losses,
        "calibration": calibration,
        "calibration_log_losses": {k: round(v, 4) for k, v in chosen.choice.log_losses.items()},
        "thresholds": {name: round(value, 4) for name, value in chosen.thresholds.items()},
    }


def _at_own_thresholds(examples: Examples, final: Chosen) -> dict[str, dict[str, float]]:
    """The thresholds that ship, on the logits they were set by: optimistic."""
    probability, truth = apply(final.calibration, final.study_logits), examples.truth
    return {
        name: {
            "sensitivity": round(share(probability[truth] >= threshold), 4),
            "specificity": round(share(probability[~truth] < threshold), 4),
        }
        for name, threshold in final.thresholds.items()
    }


def _refit(examples: Examples, final: Chosen) -> dict[str, Any]:
    """How far the fit on all patients lies from the folds that calibrated it.

    On patients it has seen, so most of it is memory, not the size of the fit: an upper bound.
    """
    refit = final.smoothing.apply(final.fit.logits[:, :1], examples.groups)[:, 0]
    by_study = study_logits(refit, examples.groups, final.aggregation)
    shift, truth = by_study - final.study_logits, examples.truth
    return {
        "refit_shift_positive": round(float(shift[truth].mean()), 3),
        "refit_shift_negative": round(float(shift[~truth].mean()), 3),
        "refit_patient_auc_on_training_patients": round(auc(by_study, truth), 4),
        "inner_patient_auc": round(auc(final.study_logits, truth), 4),
        "inner_slice_auc": round(auc(final.logits, examples.labels[:, 0]), 4),
    }
