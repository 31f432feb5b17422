"""Thresholds that another calibration moves: where each cuts, before and after an activation."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from config.tenants import Tenant
from db.errors import PermanentError
from inference.bundle import Bundle
from inference.cut import SAME_CUT, is_same, raw_cut, threshold_at
from inference.manifest import LabelSpec

SERVES = "serves"


class MovedThresholds(PermanentError):
    """What is called would change with the calibration, and nobody has said that it may."""

    code: ClassVar[str] = "thresholds_moved"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One threshold of a label under two calibrations of the same weights."""

    key: str  # "bundle.label"
    name: str  # "serves", an operating point's, or an urgency rule's as "STAT at 0.8"
    threshold: float  # reference scale
    before: float  # raw score (logit) from which it calls; infinite: nothing, or everything
    after: float
    keeps: float | None  # the threshold that cuts after as this did before; None: there is none
    is_moved: bool  # one that decides; operating points are only shown
    is_tenants: bool  # the tenant's own threshold

    @property
    def way(self) -> str:
        """What the move does."""
        if is_same(self.before, self.after):
            return "decides as before"
        if self.after > self.before:
            return "sensitivity falls, specificity rises"
        return "sensitivity rises, specificity falls"

    def __str__(self) -> str:
        return (
            f"{self.key} ({self.name}) at {self.threshold:.6g}: raw score {_raw(self.before)} "
            f"before, {_raw(self.after)} now; {self.way}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "name": self.name,
            "threshold": self.threshold,
            "raw_score_before": _known(self.before),
            "raw_score_after": _known(self.after),
            "way": self.way,
            "keeps": self.keeps,
            "words": str(self),
        }


def cuts(before: Bundle, after: Bundle, tenant: Tenant) -> tuple[Cut, ...]:
    """Every threshold that the tenant has or is shown; none where nothing can be compared.

    That is, where raw scores are others (other weights) or the calibration is the same.
    """
    if (
        before.manifest.weights_sha256 != after.manifest.weights_sha256
        or before.calibration_id == after.calibration_id
    ):
        return ()
    return tuple(cut for spec in after.manifest.labels for cut in _of(spec, before, after, tenant))


def _of(spec: LabelSpec, before: Bundle, after: Bundle, tenant: Tenant) -> Iterator[Cut]:
    old, new = before.calibrations.get(spec.id), after.calibrations.get(spec.id)
    if old is None or new is None or spec.threshold is None or spec.reference_prevalence is None:
        return  # exploratory: it has no threshold
    was = before.manifest.label(spec.id)
    key, reference = f"{after.name}.{spec.id}", spec.reference_prevalence
    old_reference = was.reference_prevalence or reference
    bundles_own = raw_cut(old, was.threshold or spec.threshold, old_reference)

    def cut(name: str, threshold: float, *, decides: bool) -> Cut:
        earlier = raw_cut(old, threshold, old_reference)
        later = raw_cut(new, threshold, reference)
        # A tenant that was given a threshold to keep the bundle's cut by has that cut.
        is_kept = name == SERVES and key in tenant.thresholds and is_same(later, bundles_own)
        return Cut(
            key=key,
            name=name,
            threshold=threshold,
            before=bundles_own if is_kept else earlier,
            after=later,
            keeps=threshold_at(new, earlier, reference),
            is_tenants=name == SERVES and key in tenant.thresholds,
            is_moved=decides and not is_kept and not is_same(earlier, later),
        )

    yield cut(SERVES, tenant.thresholds.get(key, spec.threshold), decides=True)
    for rule in after.manifest.study.urgency:
        if rule.label == spec.id and rule.at is not None:
            yield cut(f"{rule.level} at {rule.at:g}", rule.at, decides=True)
    for point in spec.operating_points:
        yield cut(point.name, point.threshold, decides=False)


def check_accepted(found: Mapping[str, Sequence[Cut]], *, is_accepted: bool) -> None:
    """found : by tenant

    Raises
    ------
    MovedThresholds
        If any cut that decides moves by `SAME_CUT` or more, and that is not accepted; it says how
        to keep each.
    """
    moved = [
        f"{tenant}: {cut}; {_how_to_keep(cut)}"
        for tenant, some in found.items()
        for cut in some
        if cut.is_moved
    ]
    if moved and not is_accepted:
        raise MovedThresholds(
            f"{'. '.join(moved)}. Nothing has changed; --accept-moved-thresholds takes what moves "
            f"by {SAME_CUT} or more"
        )


def _how_to_keep(cut: Cut) -> str:
    if cut.name != SERVES:
        return "a rule's own number is kept by another manifest alone"
    if cut.keeps is None:
        return "no threshold cuts there under this calibration"
    # Under a number of its own, what the tenant's cut was before it changed it is not known here.
    then = ", then accept it" if cut.is_tenants else ""
    return f'to keep it, set the tenant\'s thresholds = {{ "{cut.key}" = {cut.keeps:.6f} }}{then}'


def in_words(some: Sequence[Cut]) -> str:
    """One line, for the audit."""
    return ". ".join(map(str, some))


def _raw(cut: float) -> str:
    return f"{cut:+.3f}" if math.isfinite(cut) else "none"


def _known(cut: float) -> float | None:
    return round(cut, 4) if math.isfinite(cut) else None  # JSON has no infinity
