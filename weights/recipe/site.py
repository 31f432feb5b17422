"""A site's own calibration: the same weights, another map from scores to probabilities."""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from db.errors import PermanentError
from inference.bundle import Bundle, load_bundle
from inference.calibration import LabelCalibration
from weights.recipe import bundle_files, calibrate
from weights.recipe.figures import (
    brier,
    calibration_in_the_large,
    calibration_slope,
    reliability,
    share,
    with_interval,
)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]

#: Fewer patients of either kind, and the map would follow their noise.
LEAST = 50

_FOLDS = 5
_SLOW_BOOTSTRAPS = 300  # each draw is a fit
_FARTHEST, _CLOSE = (-50.0, 50.0), 1e-6  # raw scores

#: What the command says before it is believed.
SAMPLING = (
    "negatives must be consecutive or randomly sampled studies of this site; hand-picked ones give "
    "probabilities that mean nothing"
)


class BadScores(PermanentError):
    """A table of scores that cannot be used, with the line and the reason."""

    code: ClassVar[str] = "bad_scores"


@dataclass(frozen=True, slots=True, eq=False)
class SiteScores:
    """One entry a study."""

    logits: Floats  # raw study scores, as the reports state them
    truth: Bools
    patients: Rows  # numbers; studies of one patient share theirs

    def rows_by_patient(self) -> list[Rows]:
        return [np.flatnonzero(self.patients == one) for one in np.unique(self.patients)]

    def count(self, kind: bool) -> int:
        """Patients with a study of that kind."""
        return len(np.unique(self.patients[self.truth == kind]))


def read_scores(path: Path) -> SiteScores:
    """Columns score,label; patient where one may come twice.

    Raises
    ------
    BadScores
        If a column is missing, a score is no number or a label neither 0 nor 1, or if there are
        fewer than `LEAST` patients of either kind.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except FileNotFoundError:
        raise BadScores(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadScores(f"{path}: not a CSV in UTF-8 ({type(error).__name__})") from None
    if not rows:
        raise BadScores(f"{path}: no lines")
    if missing := [name for name in ("score", "label") if name not in rows[0]]:
        raise BadScores(f"{path}: no column {missing[0]!r}; it needs score,label")
    numbers: dict[str, int] = {}
    read = [_read(path, line, row) for line, row in enumerate(rows, start=2)]
    patients = [
        numbers.setdefault(patient or f"line {line}", len(numbers))
        for line, (_, _, patient) in enumerate(read, start=2)
    ]
    logits, truth = np.array([z for z, _, _ in read]), np.array([y for _, y, _ in read])
    scores = SiteScores(logits, truth, np.array(patients))
    for kind, words in ((True, "positive"), (False, "negative")):
        if (n := scores.count(kind)) < LEAST:
            raise BadScores(f"{path}: {n} {words} patients, {LEAST} are needed; {SAMPLING}")
    return scores


def _read(path: Path, line: int, row: Mapping[str, str | None]) -> tuple[float, bool, str]:
    score, label = (row["score"] or "").strip(), (row["label"] or "").strip()
    try:
        logit = float(score)
    except ValueError:
        logit = math.nan
    if not math.isfinite(logit):
        raise BadScores(f"{path}, line {line}: score {score!r} is no number")
    if label not in ("0", "1"):
        raise BadScores(f"{path}, line {line}: label {label!r} is neither 0 nor 1")
    return logit, label == "1", (row.get("patient") or "").strip()


def recalibrate(
    bundle: Bundle,
    scores: SiteScores,
    out: Path,
    *,
    label: str,
    site: str,
    at: str,
    seed: int = 0,
) -> dict[str, Any]:
    """Write a calibration.toml with a new map for one label; the others keep theirs.

    Gives how the old map and the new one fare on these studies, the new one on patients it was not
    fitted on. Thresholds stay where they are, on the reference scale: `threshold` says what that
    now means, and where the old decision would lie.

    site : who it is for, in words
    at : date, ISO 8601

    Raises
    ------
    BundleError
        If the label has no calibration to replace, or its threshold is beyond the new one's reach.
    """
    old = bundle.calibrations[label]
    choice = calibrate.choose(scores.logits, scores.truth, scores.patients, seed=seed)
    new, reference = choice.calibration, bundle.manifest.label(label).reference_prevalence
    labels = {**bundle.calibrations, label: new}
    part = out.with_suffix(".part")
    bundle_files.write_calibration(
        part, labels, fitted_on=f"{site}: {len(scores.truth)} studies", fitted_at=at
    )
    made = load_bundle(bundle.folder, calibration=part)  # checked as the node will check it
    part.replace(out)
    unseen = _cross_fitted(new, scores, seed)
    assert reference is not None  # a label with a calibration is validated
    threshold = bundle.manifest.label(label).threshold
    assert threshold is not None
    return {
        "bundle": bundle.name,
        "version": bundle.manifest.version,
        "label": label,
        "n": len(scores.truth),
        "positives": int(scores.truth.sum()),
        "n_patients": len(scores.rows_by_patient()),
        "prevalence": round(new.prevalence, 4),
        "reference_prevalence": reference,
        "method": new.method,
        "note": new.note,
        "log_losses": {name: round(value, 4) for name, value in choice.log_losses.items()},
        "calibration_id": made.calibration_id,
        "replaces": bundle.calibration_id,
        "before": _figures(_at_site(old, scores.logits, new.prevalence), scores, seed),
        "after": _figures(unseen, scores, seed),
        "threshold": {
            "value": threshold,
            "before": _decisions(_logit_of(old, threshold, reference), scores),
            "after": _decisions(_logit_of(new, threshold, reference), scores),
        },
        "sampling": SAMPLING,
    }


def _cross_fitted(new: LabelCalibration, scores: SiteScores, seed: int) -> Floats:
    splitter = StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=seed)
    made = np.empty(len(scores.truth))
    for rest, held_out in splitter.split(scores.logits, scores.truth, scores.patients):
        fitted = calibrate.fit(
            new.method, scores.logits[rest], scores.truth[rest], scores.patients[rest]
        )
        made[held_out] = _at_site(fitted, scores.logits[held_out], new.prevalence)
    return made


def _at_site(calibration: LabelCalibration, logits: Floats, prevalence: float) -> Floats:
    """Probabilities as shown at this site: shifted to its prevalence."""
    return calibrate.apply(calibration, logits, prevalence=prevalence)


def _logit_of(calibration: LabelCalibration, threshold: float, reference: float) -> float:
    """The lowest raw score that the map calls present; infinite if none. The map never falls."""

    def is_present(logit: float) -> bool:
        return bool(
            calibrate.apply(calibration, np.array([logit]), reference=reference) >= threshold
        )

    low, high = _FARTHEST
    if is_present(low) or not is_present(high):
        return -math.inf if is_present(low) else math.inf
    while high - low > _CLOSE:
        middle = (low + high) / 2
        low, high = (low, middle) if is_present(middle) else (middle, high)
    return high


def _decisions(least: float, scores: SiteScores) -> dict[str, float | None]:
    present = scores.logits >= least
    return {
        "raw_score": round(least, 3) if math.isfinite(least) else None,  # JSON has no infinity
        "sensitivity": round(share(present[scores.truth]), 4),
        "specificity": round(share(~present[~scores.truth]), 4),
    }


def _figures(probability: Floats, scores: SiteScores, seed: int) -> dict[str, Any]:
    p, y, groups = probability, scores.truth, scores.rows_by_patient()
    slow = {"seed": seed, "bootstraps": _SLOW_BOOTSTRAPS}
    return {
        "brier": with_interval(lambda r: brier(p[r], y[r]), groups, seed=seed),
        "log_loss": with_interval(lambda r: calibrate.log_loss(p[r], y[r]), groups, seed=seed),
        "slope": with_interval(lambda r: calibration_slope(p[r], y[r]), groups, **slow),
        "in_the_large": with_interval(
            lambda r: calibration_in_the_large(p[r], y[r]), groups, **slow
        ),
        "reliability": reliability(p, y),
    }
