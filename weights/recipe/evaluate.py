"""A bundle as it stands on disk, judged on labelled studies or pictures."""

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from torch import nn

from db.errors import PermanentError
from inference.bundle import Bundle
from inference.model import logits
from inference.predict import in_context, study_scores
from weights.recipe.cases import Case, LeftOut, Source
from weights.recipe.figures import auc, calibration_figures, known, with_interval
from weights.recipe.operating import PREVALENCES, operating_point, sensitivity
from weights.recipe.progress import Progress, silent

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]

_BATCH = 32
_CALIBRATION = (
    "brier",
    "log_loss",
    "calibration_slope",
    "calibration_intercept",
    "calibration_in_the_large",
    "ece",
)
_SHARES = ("sensitivity", "sensitivity_of_all", "specificity")

#: Names in a note.
_NAMED = 3

#: Kept for a report: so many of each kind, the clearest first.
_SAMPLES = 3


class NothingToJudge(PermanentError):
    """No case came through, so there is no figure to give."""

    code = "nothing_to_judge"


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A case to look at: its strongest image as the model saw it."""

    name: str
    probability: float
    image: int
    input: NDArray[np.float32]  # (channels, size, size)


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What the bundle says of each case, beside what is true; one entry a case."""

    names: tuple[str, ...]
    groups: tuple[str, ...]  # patient; cases of one are drawn together
    truth: Bools
    study_logit: Floats
    probability: Floats  # calibrated, on the reference scale
    image_logits: tuple[Floats, ...]  # (images,) of the primary label
    image_truth: tuple[Bools | None, ...]
    left_out: tuple[LeftOut, ...]
    doubts: tuple[tuple[str, str], ...] = ()  # name, and what speaks against a case that was judged
    samples: dict[str, list[Sample]] = field(default_factory=dict)  # by kind of answer

    def patients(self) -> list[Rows]:
        """The places of each patient's cases."""
        return _by_patient(self.groups, self.names)

    def with_missed(self, present: Bools) -> tuple[Bools, Bools, list[Rows]]:
        """Calls, truth and patients with positives that were left out, each as one not called."""
        missed = [one for one in self.left_out if one.truth]
        return (
            np.concatenate([present, np.zeros(len(missed), np.bool_)]),
            np.concatenate([self.truth, np.ones(len(missed), np.bool_)]),
            _by_patient(
                (*self.groups, *(one.group for one in missed)),
                (*self.names, *(one.name for one in missed)),
            ),
        )


def _by_patient(groups: Sequence[str], names: Sequence[str]) -> list[Rows]:
    places: dict[str, list[int]] = {}
    for place, (group, name) in enumerate(zip(groups, names, strict=True)):
        places.setdefault(f"patient {group}" if group else f"alone {name}", []).append(place)
    return [np.array(some) for some in places.values()]


def score(source: Source, bundle: Bundle, model: nn.Module, progress: Progress = silent) -> Scores:
    """Every case through the model; the same functions as a served study.

    Raises
    ------
    NothingToJudge
        If every case was left out.
    """
    scorer = _Scorer(bundle, model)
    for number, case in enumerate(source.cases):
        progress("evaluate", number, source.n)
        scorer.take(case)
    progress("evaluate", source.n, source.n)
    return scorer.scores(source.n)


class _Scorer:
    """Case by case, so that only the samples' pixels stay in memory."""

    def __init__(self, bundle: Bundle, model: nn.Module) -> None:
        self._bundle, self._model = bundle, model
        self._primary = bundle.manifest.labels[0]
        self._done: list[tuple[str, str, bool, float, float, Floats, Bools | None]] = []
        self._left_out: list[LeftOut] = []
        self._doubts: list[tuple[str, str]] = []
        self._samples: dict[str, list[Sample]] = {}

    def take(self, case: Case | LeftOut) -> None:
        if isinstance(case, LeftOut):
            self._left_out.append(case)
            return
        starts = range(0, len(case.inputs), _BATCH)
        parts = [logits(self._model, case.inputs[i : i + _BATCH]) for i in starts]
        by_image = in_context(np.concatenate(parts), self._bundle.manifest.study.context)
        raws, chances = study_scores(by_image, self._bundle, {})
        z, p = by_image[:, 0].astype(np.float64), chances[self._primary.id].reference
        study = raws[0].logit
        self._done.append((case.name, case.group, case.truth, study, p, z, case.image_truth))
        if case.doubt:
            self._doubts.append((case.name, case.doubt))
        self._keep(case, p, z)

    def scores(self, n: int) -> Scores:
        if not self._done:
            reason = self._left_out[0].reason if self._left_out else "the table is empty"
            positives = sum(one.truth for one in self._left_out)
            raise NothingToJudge(
                f"none of {n} ({positives} positive) could be judged; the first: {reason}"
            )
        names, groups, truth, study, p, z, image_truth = zip(*self._done, strict=True)
        return Scores(
            names=names,
            groups=groups,
            truth=np.array(truth),
            study_logit=np.array(study),
            probability=np.array(p),
            image_logits=z,
            image_truth=image_truth,
            left_out=tuple(self._left_out),
            doubts=tuple(self._doubts),
            samples=self._samples,
        )

    def _keep(self, case: Case, probability: float, z: Floats) -> None:
        is_present = probability >= (self._primary.threshold or 0.5)
        right, answer = is_present == case.truth, "positive" if is_present else "negative"
        kind = f"{'true' if right else 'false'} {answer}"
        top = int(z.argmax())
        kept = self._samples.setdefault(kind, [])
        kept.append(Sample(case.name, probability, top, case.inputs[top].copy()))
        kept.sort(key=lambda one: one.probability, reverse=is_present)
        del kept[_SAMPLES:]


def evaluate(
    source: Source,
    bundle: Bundle,
    model: nn.Module,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[dict[str, Any], Scores]:
    """Figures of the primary label, each with a 95 % interval over patients, and what they rest on.

    On patients that the bundle was trained on the figures flatter; `trained_on` is in the answer.
    """
    scores = score(source, bundle, model, progress)
    return figures_of(scores, bundle, seed=seed) | {
        "unit": source.unit,
        "notes": [*source.notes, *_counted(scores.doubts)],
    }, scores


def write_scores(path: Path, scores: Scores, key: str) -> None:
    """A CSV of every case that was judged, as `vigil calibrate --scores` takes it.

    Columns: `key` (path, file or patient: the case's name), patient where the table has it, label,
    score (logit of the study), probability (calibrated, at the reference prevalence).

    Raises
    ------
    OSError
    """
    has_patients = key != "patient" and any(scores.groups)
    head = (key, *(["patient"] if has_patients else []), "label", "score", "probability")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        for i, name in enumerate(scores.names):
            patient = [scores.groups[i]] if has_patients else []
            numbers = (float(scores.study_logit[i]), float(scores.probability[i]))
            writer.writerow([name, *patient, int(scores.truth[i]), *numbers])


def _counted(doubts: Sequence[tuple[str, str]]) -> Iterator[str]:
    """One note a kind of doubt, with its number and the first few names."""
    for what in dict.fromkeys(what for _, what in doubts):
        names = [name for name, other in doubts if other == what]
        more = " and others" if len(names) > _NAMED else ""
        yield f"judged all the same, {len(names)} with {what}: {', '.join(names[:_NAMED])}{more}"


def figures_of(scores: Scores, bundle: Bundle, *, seed: int) -> dict[str, Any]:
    """Numbers at the top, their intervals under `intervals` by the same names.

    `sensitivity_of_all` counts positives that were left out as missed.
    What belongs to one threshold (sensitivity, specificity, confusion, PPV and NPV by prevalence)
    stands at the top for the one that serves, and under `operating_points` for each.
    """
    manifest, primary = bundle.manifest, bundle.manifest.labels[0]
    assert primary.threshold is not None  # the manifest has seen to it
    assert primary.reference_prevalence is not None
    found = _Figures(scores, primary.reference_prevalence, seed)
    made: dict[str, Any] = {
        "bundle": manifest.name,
        "version": manifest.version,
        "weights_sha256": manifest.weights_sha256,
        "calibration_id": bundle.calibration_id,
        "trained_on": list(manifest.trained_on),
        "label": primary.id,
        "n": len(scores.truth),
        "positives": int(scores.truth.sum()),
        "n_patients": len(found.patients),
        "n_images": sum(len(z) for z in scores.image_logits),
        "n_left_out": len(scores.left_out),
        "left_out_positives": sum(one.truth for one in scores.left_out),
        "left_out_reasons": dict(Counter(one.reason for one in scores.left_out)),
        "threshold": primary.threshold,
        "reference_prevalence": primary.reference_prevalence,
        **found.values(primary.threshold),
    }
    made["operating_points"] = {
        point.name: {"threshold": point.threshold, **found.at(point.threshold)}
        for point in primary.operating_points
    }
    made["intervals"] = found.intervals
    made["left_out"] = [
        {"name": one.name, "positive": one.truth, "reason": one.reason} for one in scores.left_out
    ]
    return known(made)


class _Figures:
    """Takes figures of some scores, and keeps each one's interval."""

    def __init__(self, scores: Scores, reference: float, seed: int) -> None:
        self._scores = scores
        self._reference = reference
        self._seed = seed
        self.patients = scores.patients()
        self.intervals: dict[str, list[float]] = {}

    def values(self, threshold: float) -> dict[str, Any]:
        p, y, z = self._scores.probability, self._scores.truth, self._scores.study_logit
        made: dict[str, Any] = {
            # By the raw score: the ends of the probability are clipped, and ties would cost.
            "auc": self._take("auc", self._interval(lambda r: auc(z[r], y[r]))),
            "average_precision": self._take(
                "average_precision", self._interval(lambda r: _precision(z[r], y[r]))
            ),
        }
        at = self.at(threshold)
        made |= {name: self._take(name, at.pop(name)) for name in _SHARES}
        calibration = calibration_figures(p, y, self.patients, seed=self._seed)
        made |= {name: self._take(name, calibration.pop(name)) for name in _CALIBRATION}
        return made | calibration | at | self._by_image()

    def at(self, threshold: float) -> dict[str, Any]:
        """One threshold's shares with their intervals, confusion and predictive values."""
        present = self._scores.probability >= threshold
        made = operating_point(
            present,
            self._scores.truth,
            self.patients,
            prevalences=(*PREVALENCES, self._reference),
            seed=self._seed,
        )
        of_all = sensitivity(*self._scores.with_missed(present), seed=self._seed)
        return {**made, "sensitivity_of_all": of_all}

    def _by_image(self) -> dict[str, float]:
        """The slices' AUC, where studies come with labels for each."""
        scores = self._scores
        labelled = [
            (z, t)
            for z, t in zip(scores.image_logits, scores.image_truth, strict=True)
            if t is not None and len(t) == len(z)
        ]
        if len(labelled) < len(scores.truth) or all(len(z) == 1 for z, _ in labelled):
            return {}
        z, y = (np.concatenate(part) for part in zip(*labelled, strict=True))
        ends = np.cumsum([len(part) for part, _ in labelled])
        starts = ends - [len(part) for part, _ in labelled]
        rows = [np.arange(a, b) for a, b in zip(starts, ends, strict=True)]
        groups = [np.concatenate([rows[i] for i in some]) for some in self.patients]
        figure = self._interval(lambda r: auc(z[r], y[r]), groups)
        return {"slice_auc": self._take("slice_auc", figure)}

    def _take(self, name: str, figure: dict[str, float]) -> float:
        self.intervals[name] = [figure["low"], figure["high"]]
        return figure["value"]

    def _interval(
        self, figure: Callable[[Rows], float], groups: Sequence[Rows] | None = None
    ) -> dict[str, float]:
        return with_interval(figure, self.patients if groups is None else groups, seed=self._seed)


def _precision(score: Floats, truth: Bools) -> float:
    """Average precision; NaN where one class is missing."""
    if not truth.any() or truth.all():
        return float("nan")
    return float(average_precision_score(truth, score))
