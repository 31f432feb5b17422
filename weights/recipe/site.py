"""A site's own calibration: the same weights, another map from scores to probabilities."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.bundle import Bundle, load_bundle
from inference.calibration import LabelCalibration
from inference.cut import raw_cut, threshold_at
from weights.recipe import bundle_files, calibrate
from weights.recipe.figures import calibration_figures, known
from weights.recipe.operating import operating_point
from weights.recipe.scores import SAMPLING, SiteScores


def recalibrate(
    bundle: Bundle,
    scores: SiteScores,
    out: Path,
    *,
    label: str,
    site: str,
    at: str,
    prevalence: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Write a calibration.toml with a new map for one label; the others keep theirs.

    Gives how the old map and the new one fare on these studies, the new one on patients it was not
    fitted on, both shifted to these studies' own share of positives. Thresholds stay where they
    are, on the reference scale: `threshold` and `operating_points` say what each now means.

    Parameters
    ----------
    site : who it is for, in words
    at : date, ISO 8601
    prevalence : the site's share of positive studies, where negatives are a random sample of more;
        None: these studies are consecutive, and their share is the site's. The map does not depend
        on it, since it is kept at the share that it was fitted at; predictive values do, and what
        the tenant's configuration should say

    Raises
    ------
    BundleError
        If a threshold is beyond the new map's reach; nothing is written then.
    """
    old, spec = bundle.calibrations[label], bundle.manifest.label(label)
    reference, threshold = spec.reference_prevalence, spec.threshold
    assert reference is not None  # a label with a calibration is validated
    assert threshold is not None
    choice = calibrate.choose(scores.logits, scores.truth, scores.patients, seed=seed)
    here = choice.calibration.prevalence if prevalence is None else prevalence
    note = _note(choice.calibration.note, here, is_given=prevalence is not None)
    new = replace(choice.calibration, note=note)
    made = _write(bundle, out, {**bundle.calibrations, label: new}, label, scores, site, at)
    compare = _Comparison(old, new, reference, scores, here, seed)
    return {
        "bundle": bundle.name,
        "version": bundle.manifest.version,
        "label": label,
        "n": len(scores.truth),
        "positives": int(scores.truth.sum()),
        "n_patients": len(scores.rows_by_patient()),
        "prevalence": round(new.prevalence, 4),
        "site_prevalence": round(here, 4),
        "site_prevalence_is_given": prevalence is not None,
        "reference_prevalence": reference,
        "method": new.method,
        "note": new.note,
        "log_losses": {name: round(value, 4) for name, value in choice.log_losses.items()},
        "calibration_id": made.calibration_id,
        "replaces": bundle.calibration_id,
        **compare.figures(),
        "threshold": compare.at(threshold),
        "operating_points": {
            point.name: compare.at(point.threshold) for point in spec.operating_points
        },
        "sampling": SAMPLING,
    }


def _note(reason: str, prevalence: float, *, is_given: bool) -> str:
    """What the file says of the data, since the numbers cannot."""
    how = "randomly sampled" if is_given else "consecutive"
    source = "as given" if is_given else "that of these studies"
    sampling = f"negatives taken to be {how}; prevalence at the site {prevalence:.4g}, {source}"
    return "; ".join(filter(None, (reason, sampling)))


def _write(
    bundle: Bundle,
    out: Path,
    labels: dict[str, LabelCalibration],
    label: str,
    scores: SiteScores,
    site: str,
    at: str,
) -> Bundle:
    """The file whole or not at all, checked as the node will check it; the bundle with it."""
    fitted_on = f"{site}: {len(scores.truth)} studies of {len(scores.rows_by_patient())} patients"
    if others := sorted(labels.keys() - {label}):
        fitted_on += f"; {', '.join(others)} as in calibration {bundle.calibration_id}"
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.part")
    try:
        bundle_files.write_calibration(part, labels, fitted_on=fitted_on, fitted_at=at)
        made = load_bundle(bundle.folder, calibration=part)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return made


class _Comparison:
    """The old map and the new one on the same studies."""

    def __init__(
        self,
        old: LabelCalibration,
        new: LabelCalibration,
        reference: float,
        scores: SiteScores,
        prevalence: float,
        seed: int,
    ) -> None:
        self._old, self._new = old, new
        self._reference, self._prevalence = reference, prevalence
        self._scores, self._seed = scores, seed
        self._groups: Sequence[NDArray[np.int64]] = scores.rows_by_patient()

    def figures(self) -> dict[str, dict[str, Any]]:
        """`before` and `after`, at the prevalence of these studies: there both can be judged."""
        z, truth, patients = self._scores.logits, self._scores.truth, self._scores.patients
        at = self._new.prevalence
        unseen = calibrate.cross_fitted(
            self._new.method, z, truth, patients, seed=self._seed, prevalence=at
        )
        shown = {"before": calibrate.apply(self._old, z, prevalence=at), "after": unseen}
        return {
            when: known(calibration_figures(p, truth, self._groups, seed=self._seed))
            for when, p in shown.items()
        }

    def at(self, threshold: float) -> dict[str, Any]:
        """What a threshold asks of the raw score, and how it fares; `keeps` decides as before."""
        before = raw_cut(self._old, threshold, self._reference)
        after = raw_cut(self._new, threshold, self._reference)
        return {
            "value": threshold,
            "keeps": threshold_at(self._new, before, self._reference),
            "before": self._decisions(before),
            "after": self._decisions(after),
        }

    def _decisions(self, least: float) -> dict[str, Any]:
        made = known(
            operating_point(
                self._scores.logits >= least,
                self._scores.truth,
                self._groups,
                prevalences=(self._prevalence,),
                seed=self._seed,
            )
        )
        (worth,) = made.pop("predictive_values")
        raw_score = round(least, 4) if math.isfinite(least) else None  # JSON has no infinity
        return {"raw_score": raw_score, **made, "ppv": worth["ppv"], "npv": worth["npv"]}
