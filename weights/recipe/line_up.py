"""The candidates of a run: what may ship, and what is only compared with it."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from db.errors import PermanentError
from inference.manifest import EvidenceSpec
from weights.recipe.bank import Bank, Pictures, folder_for
from weights.recipe.candidates.candidate import Candidate, Mean
from weights.recipe.candidates.evidence import Evidence
from weights.recipe.candidates.linear import Balance, Linear
from weights.recipe.candidates.sequence import Kind, Sequence
from weights.recipe.fitting import Schedule
from weights.recipe.network import Pooled, feature_maps, stored_backbone

#: Strides 8, 16 and 32; cells of 16 pixels, about 7 mm of a head, are judged.
EVIDENCE = EvidenceSpec(stages=(2, 3, 4), grid=3, width=64, members=1, cells=8)

_CS = (3e-4, 1e-3, 3e-3)
_BALANCES: tuple[Balance, ...] = ("none", "balanced")
_ALTERED = 2


class NoSuchFamily(PermanentError):
    """A family of candidates that the recipe does not have."""

    code = "no_such_family"


@dataclass(frozen=True, slots=True)
class LineUp:
    """The first family that may ship does, unless another beats it."""

    shipping: tuple[Candidate, ...]  # a bundle can hold these
    compared: tuple[Candidate, ...]  # and not these

    def only(self, families: tuple[str, ...]) -> "LineUp":
        """Some families; none named: all.

        Raises
        ------
        NoSuchFamily
            If one is asked for that there is not, or if none is left that may ship.
        """
        if not families:
            return self
        known = list(dict.fromkeys(one.family for one in (*self.shipping, *self.compared)))
        if strange := sorted(set(families) - set(known)):
            raise NoSuchFamily(f"no family {', '.join(strange)}; there are: {', '.join(known)}")
        shipping = tuple(one for one in self.shipping if one.family in families)
        if not shipping:
            raise NoSuchFamily(f"no bundle can hold {', '.join(families)} alone")
        return LineUp(shipping, tuple(one for one in self.compared if one.family in families))


def line_up(pictures: Pictures, cache: Path, *, seed: int, samples: int, device: str) -> LineUp:
    """All candidates; nothing is made yet.

    samples : slices drawn for each fit of an evidence head
    """

    def banks(architecture: str) -> tuple[Bank, Bank]:
        folder = folder_for(pictures.manifest, cache) / architecture / f"seed-{seed}"
        pooled = Pooled(stored_backbone(architecture))
        maps = feature_maps(architecture, EVIDENCE)
        return (
            Bank(pictures, pooled, folder / "pooled", seed=seed, device=device),
            Bank(pictures, maps, folder / "maps", seed=seed, device=device),
        )

    def evidence(maps: Bank, architecture: str, *, uses_boxes: bool = True) -> Evidence:
        schedule = Schedule(samples=samples)
        return Evidence(maps, architecture, EVIDENCE, _ALTERED, uses_boxes, schedule=schedule)

    lite0, lite2 = "tf_efficientnet_lite0", "tf_efficientnet_lite2"
    (pooled0, maps0), (pooled2, maps2) = banks(lite0), banks(lite2)
    cell0, cell2 = evidence(maps0, lite0), evidence(maps2, lite2)
    return LineUp(
        shipping=(
            *(Linear(pooled0, lite0, c, balance) for c in _CS for balance in _BALANCES),
            *(Linear(pooled2, lite2, c, balance) for c in _CS for balance in _BALANCES),
            cell0,
            cell2,
        ),
        compared=(
            evidence(maps0, lite0, uses_boxes=False),  # what the boxes are worth
            *(Sequence(pooled0, lite0, kind) for kind in get_args(Kind)),
            Mean((cell0, cell2)),
        ),
    )
