"""A site's table of raw scores and labels, checked before anything is fitted to it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit

from db.errors import PermanentError
from weights.recipe.figures import auc
from weights.recipe.tables import Line, read_table

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]

#: What a raw score is: the logit, as `vigil predict --json` gives it, or its sigmoid, as reports do
#: ("Uncalibrated classifier output").
Scale = Literal["auto", "logit", "output"]
SCALES: tuple[Scale, ...] = get_args(Scale)

#: Fewer patients of either kind, and the map would follow their noise.
LEAST = 50

#: What every answer says, since no table can show it.
SAMPLING = (
    "negatives must be consecutive or randomly sampled studies of this site; hand-picked ones give "
    "probabilities that mean nothing"
)

_TRUE, _FALSE = ("1", "1.0", "true", "yes", "positive"), ("0", "0.0", "false", "no", "negative")
_HALF_A_DIGIT = 0.00005  # reports state outputs to four digits: beyond, nothing is known


class BadScores(PermanentError):
    """A table of scores that cannot be used, with the line and the reason."""

    code: ClassVar[str] = "bad_scores"


@dataclass(frozen=True, slots=True, eq=False)
class SiteScores:
    """One entry a study."""

    logits: Floats
    truth: Bools
    patients: Rows  # numbers; studies of one patient share theirs

    def rows_by_patient(self) -> list[Rows]:
        return [np.flatnonzero(self.patients == one) for one in np.unique(self.patients)]

    def count(self, kind: bool) -> int:
        """Patients with a study of that kind."""
        return len(np.unique(self.patients[self.truth == kind]))


def read_scores(path: Path, scale: Scale = "auto") -> SiteScores:
    """Columns score,label; patient where one has several studies; study, to find doubles by.

    A study without a patient counts as a patient of its own. Other columns do no harm.

    Parameters
    ----------
    scale : "auto" takes logits, and asks where all scores lie within 0..1

    Raises
    ------
    BadScores
        If a column is missing, a score is no number or outside its scale, a label neither 0 nor 1,
        or a study there twice; if there are fewer than `LEAST` patients of either kind; or if
        scores are no higher in positives than in negatives.
    """
    lines = read_table(path, ("score", "label"), BadScores)
    _check_doubles(path, lines)
    read = [(_score(path, line, scale), _label(path, line)) for line in lines]
    numbers: dict[tuple[str, int], int] = {}
    patients = [numbers.setdefault(_patient(line), len(numbers)) for line in lines]
    score = np.array([score for score, _ in read])
    scores = SiteScores(
        _logits(path, score, scale), np.array([label for _, label in read]), np.array(patients)
    )
    for kind, words in ((True, "positive"), (False, "negative")):
        if (n := scores.count(kind)) < LEAST:
            raise BadScores(f"{path}: {n} {words} patients, {LEAST} are needed; {SAMPLING}")
    if (area := auc(scores.logits, scores.truth)) <= 0.5:
        raise BadScores(
            f"{path}: scores are no higher in positives than in negatives (AUC {area:.2f}); are "
            "labels the wrong way round, or scores those of another label?"
        )
    return scores


def _patient(line: Line) -> tuple[str, int]:
    """Who it is; the line's number where that is not said."""
    number, values = line
    patient = values.get("patient", "")
    return (patient, 0) if patient else ("", number)


def _check_doubles(path: Path, lines: list[Line]) -> None:
    """By `study`; where that is not said, one patient's lines that are alike in all we read."""
    seen: dict[tuple[str, ...], int] = {}
    for number, values in lines:
        study, patient = values.get("study", ""), values.get("patient", "")
        if not study and not patient:
            continue
        key = (study,) if study else (patient, values["score"], values["label"].lower())
        if (first := seen.setdefault(key, number)) != number:
            ask = "" if study else "; if they are two studies, name them in a column 'study'"
            raise BadScores(f"{path}, line {number}: the same study as in line {first}{ask}")


def _score(path: Path, line: Line, scale: Scale) -> float:
    number, values = line
    text = values["score"]
    try:
        # The decimal comma of half the world's spreadsheets, which then part columns otherwise.
        score = float(text.replace(",", "."))
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise BadScores(f"{path}, line {number}: score {text!r} is no number")
    if scale == "output" and not 0 <= score <= 1:
        raise BadScores(f"{path}, line {number}: score {text!r} is no output within 0..1")
    return score


def _label(path: Path, line: Line) -> bool:
    number, values = line
    label = values["label"].lower()
    if label not in (*_TRUE, *_FALSE):
        raise BadScores(f"{path}, line {number}: label {values['label']!r} is neither 0 nor 1")
    return label in _TRUE


def _logits(path: Path, score: Floats, scale: Scale) -> Floats:
    """Taken for the wrong one, outputs would be calibrated as a model that never leaves 0..1."""
    within = bool(((score >= 0) & (score <= 1)).all())
    if scale == "auto" and within:
        raise BadScores(
            f"{path}: all scores lie within 0..1. Say --scale output if they are the uncalibrated "
            "classifier outputs of reports, --scale logit if they are logits"
        )
    if scale != "output":
        return score
    bounded: Floats = np.clip(score, _HALF_A_DIGIT, 1 - _HALF_A_DIGIT)
    made: Floats = logit(bounded)
    return made
