"""From a raw score to a probability: stored numbers applied, nothing fitted here.

Four steps, each on its own scale: the map (identity, temperature, Platt, temperature + isotonic)
gives a probability at the prevalence of the data it was fitted on; that is clipped to what the data
can support; shifted to the label's reference prevalence, where thresholds live; and shifted on to
the site's.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from db.result import CalibratedProbability, RawScore
from inference.manifest import STRICT

_TINY = 1e-12  # keeps log-odds finite; far below any clip


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelCalibration:
    """One label's map, as calibration.toml stores it.

    method                  probability of a logit z
    identity                sigmoid(z)
    temperature             sigmoid(z / temperature)
    platt                   sigmoid(slope * z + intercept)
    temperature+isotonic    isotonic_y at z / temperature, linear between isotonic_x, flat beyond
    """

    method: Literal["identity", "temperature", "platt", "temperature+isotonic"]
    prevalence: float  # of the data it was fitted on, 0..1
    n_positive: int  # patients, in the data it was fitted on
    n_negative: int
    temperature: float | None = None
    slope: float | None = None
    intercept: float | None = None
    isotonic_x: tuple[float, ...] = ()  # ascending
    isotonic_y: tuple[float, ...] = ()  # 0..1, never descending
    note: str = ""  # e.g. "isotonic not warranted: 36 positive patients"

    def __post_init__(self) -> None:
        if not (0 < self.prevalence < 1 and self.n_positive >= 1 and self.n_negative >= 1):
            raise ValueError("prevalence must be in 0..1, n_positive and n_negative at least 1")
        wanted = {
            "identity": (),
            "temperature": ("temperature",),
            "platt": ("slope", "intercept"),
            "temperature+isotonic": ("temperature", "isotonic_x", "isotonic_y"),
        }[self.method]
        for name in ("temperature", "slope", "intercept", "isotonic_x", "isotonic_y"):
            if (getattr(self, name) not in (None, ())) != (name in wanted):
                raise ValueError(f"{self.method} takes exactly: {', '.join(wanted) or 'nothing'}")
        self._check_numbers()

    def _check_numbers(self) -> None:
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError("temperature must be positive")
        if self.slope is not None and not 0 < self.slope < math.inf:
            raise ValueError("slope must be positive: calibration never turns the order round")
        if self.intercept is not None and not math.isfinite(self.intercept):
            raise ValueError("intercept must be finite")
        x, y = self.isotonic_x, self.isotonic_y
        if len(x) != len(y) or not all(map(math.isfinite, x)) or not all(0 <= p <= 1 for p in y):
            raise ValueError("isotonic_x and isotonic_y must pair finite logits with 0..1")
        if list(x) != sorted(set(x)) or list(y) != sorted(y):
            raise ValueError("isotonic_x must ascend and isotonic_y not descend")

    def clips(self, prevalence: float) -> tuple[float, float]:
        """[1/(n- + 2), 1 - 1/(n+ + 2)] of the fitted data, shifted to `prevalence`."""
        lower, upper = 1 / (self.n_negative + 2), 1 - 1 / (self.n_positive + 2)
        return (
            shift(lower, self.prevalence, prevalence),
            shift(upper, self.prevalence, prevalence),
        )

    def probability(self, logit: float) -> float:
        """0..1, unclipped, at the prevalence of the fitted data; never falls as `logit` rises."""
        if self.method == "platt":
            return RawScore((self.slope or 1.0) * logit + (self.intercept or 0.0)).output
        scaled = logit / (self.temperature or 1.0)
        if self.method == "temperature+isotonic":
            return interpolate(scaled, self.isotonic_x, self.isotonic_y)
        return RawScore(scaled).output


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationFile:
    """The whole of calibration.toml."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    labels: dict[str, LabelCalibration]  # by label id; at least every validated one
    fitted_on: str  # the data, in words
    fitted_at: str = ""  # date, ISO 8601


def shift(probability: float, prevalence: float, to: float) -> float:
    """Move a probability from one prevalence to another by the difference of their log-odds."""
    if prevalence == to:
        return probability
    return RawScore(log_odds(probability) + log_odds(to) - log_odds(prevalence)).output


def log_odds(probability: float) -> float:
    bounded = min(max(probability, _TINY), 1 - _TINY)
    return math.log(bounded) - math.log1p(-bounded)


def interpolate(x: float, xs: tuple[float, ...], ys: tuple[float, ...]) -> float:
    """Linear between the points, flat beyond them."""
    right = bisect_right(xs, x)
    if right == 0 or right == len(xs):
        return ys[0] if right == 0 else ys[-1]
    part = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + part * (ys[right] - ys[right - 1])


def calibrate(
    raw: RawScore,
    calibration: LabelCalibration,
    *,
    reference_prevalence: float,
    site_prevalence: float | None = None,
) -> CalibratedProbability:
    """A raw study score as a probability at the site's prevalence (the reference where unset)."""
    prevalence = site_prevalence if site_prevalence is not None else reference_prevalence
    lower, upper = calibration.clips(reference_prevalence)
    fitted = calibration.probability(raw.logit)
    reference = shift(fitted, calibration.prevalence, reference_prevalence)
    reference = min(max(reference, lower), upper)
    shown_lower, shown_upper = calibration.clips(prevalence)
    value = min(max(shift(reference, reference_prevalence, prevalence), shown_lower), shown_upper)
    return CalibratedProbability(value, prevalence, reference, shown_lower, shown_upper)


def implied(
    chances: Mapping[str, CalibratedProbability],
    implies: Mapping[str, Sequence[str]],
    reference_prevalence: Mapping[str, float],
) -> dict[str, CalibratedProbability]:
    """Raise what is implied to at least what implies it, through chains.

    On the reference scale, which labels share; the value shown follows from it at the label's own
    prevalence, as for any other.
    """
    raised = dict(chances)
    for _ in implies:  # a chain is no longer than there are labels
        for name, wholes in implies.items():
            for whole in wholes:
                if name in raised and whole in raised:
                    least = raised[name].reference
                    raised[whole] = _at_least(raised[whole], least, reference_prevalence[whole])
    return raised


def _at_least(
    chance: CalibratedProbability, least: float, reference_prevalence: float
) -> CalibratedProbability:
    if chance.reference >= least:
        return chance
    value = shift(least, reference_prevalence, chance.prevalence)
    shown = min(max(value, chance.lower_clip), chance.upper_clip)
    return replace(chance, reference=least, value=shown)
