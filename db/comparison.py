"""A shadow bundle beside the one that serves: how often they agree, on studies both have judged."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import ColumnElement, Float, cast, func, select
from sqlalchemy.orm import Session, aliased

from db.tables import AnalysisRow, ResultRow


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two versions in one tenant; figures of different versions are never mixed."""

    tenant: str
    serving: str  # bundle
    serving_version: str  # version+calibration
    shadow: str
    shadow_version: str
    n: int  # studies of which both say PRESENT or absent, each of its own primary label
    n_both_present: int
    n_both_absent: int
    n_only_serving: int  # PRESENT by the one that serves alone
    n_only_shadow: int
    n_probabilities: int  # studies of which both give a probability
    mean_difference: float | None  # of the probabilities as shown, shadow less serving
    correlation: float | None  # Pearson's, of the same; None where it is not defined

    @property
    def agreement(self) -> float | None:
        """The share of `n` on which both say the same; None without studies."""
        return (self.n_both_present + self.n_both_absent) / self.n if self.n else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "agreement": self.agreement}


def compare(session: Session) -> list[Comparison]:
    """Every shadow against every bundle that serves beside it, by the newest result of each."""
    (one, served), (other, shadow) = (
        (aliased(AnalysisRow), aliased(ResultRow)) for _ in ("serving", "shadow")
    )
    says, shadow_says = _is_present(served), _is_present(shadow)
    versions = _version(served), _version(shadow)
    key = (one.tenant, one.bundle, versions[0], other.bundle, versions[1])
    query = (
        select(
            *key,
            func.count().filter(says.is_not(None), shadow_says.is_not(None)),
            func.count().filter(says, shadow_says),
            func.count().filter(~says, ~shadow_says),
            func.count().filter(says, ~shadow_says),
            func.count().filter(~says, shadow_says),
            func.count(shadow.probability - served.probability),
            func.avg(shadow.probability - served.probability),
            func.corr(shadow.probability, served.probability),
        )
        .select_from(other)
        .join(one, one.study_id == other.study_id)
        .join(served, (served.analysis_id == one.id) & (served.result_no == one.result_no))
        .join(shadow, (shadow.analysis_id == other.id) & (shadow.result_no == other.result_no))
        .where(other.is_shadow, one.is_shadow.is_(False))
        .group_by(*key)
        .order_by(*key)
    )
    rows: Sequence[Sequence[Any]] = session.execute(query).all()
    return [Comparison(*row) for row in rows]


def _is_present(result: type[ResultRow]) -> ColumnElement[bool]:
    """Of the primary label, which is the first; NULL where it is exploratory."""
    primary = result.finding["labels"][0]
    return cast(primary["probability"]["reference"].astext, Float) >= cast(
        primary["threshold"].astext, Float
    )


def _version(result: type[ResultRow]) -> ColumnElement[str]:
    model = result.finding["model"]
    return func.concat(model["version"].astext, "+", model["calibration_id"].astext)
