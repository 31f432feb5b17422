"""Whose turn it is: tenants share by weight, and what has aged shares with what is fresh.

Start-time fair queueing, a kind of stride scheduling: each turn puts its owner 1 / weight further
along; whoever is furthest behind is next, and who had nothing to do has saved nothing up. Each
process keeps its own account, so that a claim reads no history and writes none.
"""

from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

from sqlalchemy import ColumnElement, and_, case
from sqlalchemy.orm import InstrumentedAttribute

from config.tenants import Tenant
from db.job import Lane

#: Of a tenant's turns in a lane, where what was less urgent has aged into it.
LANE_WEIGHTS: Mapping[int, int] = {Lane.STAT: 4, Lane.URGENT: 4, Lane.ROUTINE: 1}
_Owner = TypeVar("_Owner", bound=Hashable)


class Turns(Generic[_Owner]):
    """How far along each owner is."""

    def __init__(self, weights: Mapping[_Owner, int]) -> None:
        self._weights = dict(weights)  # those that are not named weigh 1
        self._ends: dict[_Owner, float] = {}
        self.now = 0.0  # where the last turn began

    def begins(self, owner: _Owner) -> float:
        """Where its next turn begins; the lowest is next."""
        return max(self._ends.get(owner, 0.0), self.now)

    def took(self, owner: _Owner) -> None:
        self.now = self.begins(owner)
        self._ends[owner] = self.now + 1 / self._weights.get(owner, 1)
        self._ends = {one: end for one, end in self._ends.items() if end > self.now}

    def ahead(self) -> dict[_Owner, float]:
        """Owners whose next turn begins later than now."""
        return dict(self._ends)


class Shares:
    """Turns of tenants, and inside each those of its lanes. For one thread."""

    def __init__(self, tenants: Iterable[Tenant]) -> None:
        self._tenants = Turns({tenant.id: tenant.weight for tenant in tenants})
        self._lanes: dict[str, Turns[int]] = {}

    def took(self, tenant: str, lane: int) -> None:
        """The tenant had a turn with something of this lane."""
        self._tenants.took(tenant)
        self._lanes.setdefault(tenant, Turns(LANE_WEIGHTS)).took(lane)

    def order(
        self, tenant: InstrumentedAttribute[str], lane: InstrumentedAttribute[int]
    ) -> list[ColumnElement[float]]:
        """What a query sorts by, among what is equally urgent."""
        tenants = [(tenant == one, at) for one, at in self._tenants.ahead().items()]
        lanes = [
            (and_(tenant == one, lane == number), at - turns.now)
            for one, turns in self._lanes.items()
            for number, at in turns.ahead().items()
        ]
        terms = ((tenants, self._tenants.now), (lanes, 0.0))
        return [case(*whens, else_=otherwise) for whens, otherwise in terms if whens]
