"""The candidates of a run: what may ship, and what is only compared with it."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from inference.manifest import EvidenceSpec
from weights.recipe.backbone import Backbone, stored_backbone
from weights.recipe.bank import Bank, Pictures
from weights.recipe.candidates.candidate import Candidate, Mean
from weights.recipe.candidates.evidence import Evidence
from weights.recipe.candidates.linear import Balance, Linear
from weights.recipe.candidates.sequence import Kind, Sequence
from weights.recipe.candidates.tuned import Tuned
from weights.recipe.families import check_families
from weights.recipe.fitting import Schedule
from weights.recipe.grown import grown_b4
from weights.recipe.network import Pooled, feature_maps

#: Strides 8, 16 and 32; cells of 16 pixels, about 7 mm of a head, are judged.
EVIDENCE = EvidenceSpec(stages=(2, 3, 4), grid=3, width=64, members=1, cells=8)

_CS = (3e-4, 1e-3, 3e-3)
_BALANCES: tuple[Balance, ...] = ("none", "balanced")
_ALTERED, _BLEEDS = 2, 2


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
        check_families(families, *self.families())
        return LineUp(
            tuple(one for one in self.shipping if one.family in families),
            tuple(one for one in self.compared if one.family in families),
        )

    def families(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """By name, each once: those that may ship, and those only compared."""
        shipping, compared = (
            tuple(dict.fromkeys(one.family for one in some))
            for some in (self.shipping, self.compared)
        )
        return shipping, compared


def line_up(pictures: Pictures, *, seed: int, samples: int, device: str) -> LineUp:
    """All candidates for `ich`; nothing is made yet.

    samples : slices drawn for each fit of an evidence head
    """

    def banks(backbone: Backbone) -> tuple[Bank, Bank]:
        at = _folder(pictures, backbone, seed) / "pooled"
        return (
            Bank(pictures, Pooled(backbone), at, seed=seed, device=device),
            _maps(pictures, backbone, seed=seed, device=device),
        )

    lite0, lite2 = map(stored_backbone, ("tf_efficientnet_lite0", "tf_efficientnet_lite2"))
    (pooled0, maps0), (pooled2, maps2) = banks(lite0), banks(lite2)
    cell0 = _evidence(maps0, lite0, samples, copied=1)
    # Fewer views: features of Lite2 take twice as long. One altered at least: views with drawn
    # bleeds are altered, and looking so must not speak for a bleed.
    cell2 = _evidence(maps2, lite2, samples, altered=1, bleeds=1)
    linear2 = tuple(Linear(pooled2, lite2, c, balance) for c in _CS for balance in _BALANCES)
    return LineUp(
        shipping=(
            *(Linear(pooled0, lite0, c, balance) for c in _CS for balance in _BALANCES),
            *linear2,
            cell0,
            cell2,
            Tuned(cell0),
        ),
        compared=(
            *(Sequence(pooled0, lite0.architecture, kind) for kind in get_args(Kind)),
            Mean((cell0, linear2[0])),
            Mean((cell0, cell2)),
            Tuned(cell2),  # ten times the fitting of `cell2`, and no gain was seen
        ),
    )


def line_up_b4(
    pictures: Pictures, teachers: Pictures, *, seed: int, samples: int, device: str
) -> LineUp:
    """EfficientNet-B4 beside its teacher.

    teachers : the pictures at the teacher's size
    """
    lite0 = stored_backbone("tf_efficientnet_lite0")
    maps = _maps(teachers, lite0, seed=seed, device=device)
    teacher = _evidence(maps, lite0, samples)
    b4 = grown_b4(pictures.folder / "grown.safetensors", pictures.manifest, lite0)
    own = _maps(pictures, b4, seed=seed, device=device)
    return LineUp(
        shipping=(_evidence(own, b4, samples, teacher=teacher), _evidence(own, b4, samples)),
        compared=(teacher,),
    )


def _maps(pictures: Pictures, backbone: Backbone, *, seed: int, device: str) -> Bank:
    """Feature maps for evidence heads."""
    name = f"maps-{'-'.join(map(str, EVIDENCE.stages))}-on-{EVIDENCE.grid}"
    at = _folder(pictures, backbone, seed) / name
    return Bank(pictures, feature_maps(backbone, EVIDENCE), at, seed=seed, device=device)


def _folder(pictures: Pictures, backbone: Backbone, seed: int) -> Path:
    return pictures.folder / backbone.architecture / f"seed-{seed}"


def _evidence(
    maps: Bank,
    backbone: Backbone,
    samples: int,
    *,
    altered: int = _ALTERED,
    bleeds: int = _BLEEDS,
    copied: int = 0,
    teacher: Evidence | None = None,
) -> Evidence:
    return Evidence(
        maps,
        backbone,
        EVIDENCE,
        altered,
        schedule=Schedule(samples=samples),
        bleeds=bleeds,
        copied=copied,
        teacher=teacher,
    )
