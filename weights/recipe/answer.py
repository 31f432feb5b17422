"""Does a head answer to blood itself, without what comes with it in the injured?

Bleeds are drawn into slices of patients that a fit has not seen and who do not bleed; the same
slices, altered alike but without a bleed, are the negatives. They are drawn as those that a head
may have learnt from (`bleeds.py`), so of such a head the figure flatters; of another it does not.
"""

from collections.abc import Sequence

import numpy as np

from weights.recipe.augment import View, views_with_bleeds
from weights.recipe.candidates.candidate import Candidate
from weights.recipe.candidates.evidence import Evidence
from weights.recipe.examples import Split
from weights.recipe.figures import auc
from weights.recipe.fits import Fits

_WITH, _WITHOUT = views_with_bleeds(1)[0], View("altered-0")


def answers_to_bleeds(fits: Fits, candidates: Sequence[Candidate]) -> dict[str, dict[str, float]]:
    """By family of those that judge cells: slices, AUC, and how many rise above their own self."""
    made = {}
    for candidate in candidates:
        # Without altered views there are no slices to compare with.
        if isinstance(candidate, Evidence) and candidate.altered:
            drawn, plain = _pairs(fits, candidate)
            truth = np.arange(2 * len(drawn)) < len(drawn)
            made[candidate.family] = {
                "slices": len(drawn),
                "auc": round(auc(np.concatenate([drawn, plain]), truth), 4),
                "rise": round(float((drawn > plain).mean()), 4),
            }
    return made


def _pairs(fits: Fits, candidate: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """Logits of each slice with and without, each by the fit without its fold."""
    examples = fits.examples
    bleeds = candidate.bank.bleeds(_WITH).max(axis=(1, 2)) > 0.5
    drawn, plain = [], []
    for fold in range(examples.n_folds):
        patients = examples.patients(Split({fold}), inside=True)
        rows = examples.rows(patients[~examples.truth[patients]])
        rows = rows[bleeds[rows]]
        weights = fits.get(candidate, Split({fold})).weights
        drawn.append(candidate.logits(weights, _WITH, rows)[:, 0])
        plain.append(candidate.logits(weights, _WITHOUT, rows)[:, 0])
    return np.concatenate(drawn), np.concatenate(plain)
