"""Where a threshold cuts: the raw score from which a label is called, and the way back."""

import math

from db.result import RawScore
from inference.calibration import LabelCalibration, calibrate

#: Raw scores (logits) between which no decision is likely to fall.
SAME_CUT = 0.01
_FARTHEST, _CLOSE = (-50.0, 50.0), 1e-6  # raw scores


def raw_cut(calibration: LabelCalibration, threshold: float, reference: float) -> float:
    """The lowest raw score that the map calls present; infinite if none. The map never falls.

    threshold : on the scale of `reference`, the label's reference prevalence
    """

    def is_present(logit: float) -> bool:
        return _probability(calibration, logit, reference) >= threshold

    low, high = _FARTHEST
    if is_present(low) or not is_present(high):
        return -math.inf if is_present(low) else math.inf
    while high - low > _CLOSE:
        middle = (low + high) / 2
        low, high = (low, middle) if is_present(middle) else (middle, high)
    return high


def threshold_at(calibration: LabelCalibration, cut: float, reference: float) -> float | None:
    """The threshold that cuts at a raw score; None where a clip or a flat part is in the way.

    Rounded down at the sixth digit, so that the cut itself stays on its side.
    """
    if not math.isfinite(cut):
        return None
    value = math.floor(_probability(calibration, cut, reference) * 1e6) / 1e6
    return value if is_same(raw_cut(calibration, value, reference), cut) else None


def is_same(one: float, other: float) -> bool:
    """Whether two cuts decide alike: within `SAME_CUT`, or beyond the same end."""
    return one == other or abs(one - other) < SAME_CUT


def _probability(calibration: LabelCalibration, logit: float, reference: float) -> float:
    return calibrate(RawScore(logit), calibration, reference_prevalence=reference).reference
