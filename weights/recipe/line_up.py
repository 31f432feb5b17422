"""The candidates of a run: what may ship, and what is only compared with it."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from db.errors import PermanentError
from inference.manifest import EvidenceSpec
from weights.recipe.bank import Bank, Pictures, folder_for
from weights.recipe.candidates.candidate import Candidate, Mean
from weights.recipe.candidates.distilled import Distilled
from weights.recipe.candidates.evidence import Evidence
from weights.recipe.candidates.linear import Balance, Linear
from weights.recipe.candidates.sequence import Kind, Sequence
from weights.recipe.fitting import Schedule
from weights.recipe.network import Pooled, feature_maps, stored_backbone

#: Strides 8, 16 and 32; cells of 16 pixels, about 7 mm of a head, are judged.
EVIDENCE = EvidenceSpec(stages=(2, 3, 4), grid=3, width=64, members=1, cells=8)

_CS = (3e-4, 1e-3, 3e-3)
_BALANCES: tuple[Balance, ...] = ("none", "balanced")
_ALTERED, _BLEEDS = 2, 2


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
    """All candidates for `ich`; nothing is made yet.

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

    def evidence(
        maps: Bank, architecture: str, *, uses_boxes: bool = True, bleeds: int = _BLEEDS
    ) -> Evidence:
        schedule = Schedule(samples=samples)
        return Evidence(
            maps, architecture, EVIDENCE, _ALTERED, uses_boxes, schedule=schedule, bleeds=bleeds
        )

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
            evidence(maps0, lite0, bleeds=0),  # what drawn bleeds are worth
            evidence(maps0, lite0, uses_boxes=False, bleeds=0),  # and boxes
            *(Sequence(pooled0, lite0, kind) for kind in get_args(Kind)),
            Mean((cell0, cell2)),
        ),
    )


def line_up_b4(
    pictures: Pictures,
    teachers: Pictures,
    cache: Path,
    *,
    seed: int,
    samples: int,
    lessons: int,
    device: str,
) -> LineUp:
    """EfficientNet-B4 and nobody beside it; nothing is made yet.

    teachers : the pictures at the teacher's size
    lessons : slices drawn for each fit of the student
    """
    lite0 = "tf_efficientnet_lite0"
    folder = folder_for(teachers.manifest, cache) / lite0 / f"seed-{seed}"
    maps = Bank(teachers, feature_maps(lite0, EVIDENCE), folder / "maps", seed=seed, device=device)
    teacher = Evidence(
        maps, lite0, EVIDENCE, _ALTERED, schedule=Schedule(samples=samples), bleeds=_BLEEDS
    )
    how = Schedule(samples=lessons, batch=32, rate=2e-3, decay=0.02)
    student = Distilled(pictures, teacher, "efficientnet_b4", EVIDENCE, device, how)
    return LineUp(shipping=(student,), compared=(teacher,))
