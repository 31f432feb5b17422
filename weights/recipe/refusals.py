"""What a bundle's pixel rules refuse: built volumes of many kinds, and the real heads.

    python -m weights.recipe.refusals --data ../shared/data/ct-ich --bundle weights/ich

Header rules are not asked: this is what stands between the model and a volume whose headers say
nothing, or the wrong thing. A kind that "cannot be told" has a head's grey values and sizes.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.random import Generator
from rich.console import Console
from rich.table import Table

from db.errors import NodeError
from inference.bundle import read_manifest
from inference.gates import body_refusal, measures
from inference.manifest import Manifest
from inference.volume import Volume, volume_from_pictures
from weights.recipe import built
from weights.recipe.built import Look, adult, head, newborn, noisy, torso, volume
from weights.recipe.cases import check_domain
from weights.recipe.data import PICTURE_RANGE_HU, TABLE, read_cohort
from weights.recipe.series import read_volume

Expected = Literal["refuse", "accept", "cannot be told"]
Draw = Callable[[Generator], Volume]

DRAWS = 8
SEED = 20260131

#: ct-ich does not state the size of a pixel; an estimate from adult skulls 150 mm wide.
PICTURE_PIXEL_MM = 0.4

#: A further head CT beside the training set: measured, if it is there.
EXTERNAL = "head-ct-ge"


@dataclass(frozen=True, slots=True)
class Row:
    """How the volumes of one kind fared."""

    kind: str
    expected: Expected
    n: int
    refused: int
    rules: dict[str, int]  # rule -> how many it refused, the first that was broken
    met: dict[str, tuple[float, float]]  # rule -> lowest and highest value, of all volumes
    limits: dict[str, tuple[float, float]]

    @property
    def is_as_expected(self) -> bool:
        if self.expected == "cannot be told":
            return True
        return self.refused == (self.n if self.expected == "refuse" else 0)


def measure(manifest: Manifest, data: Path | None = None, draws: int = DRAWS) -> Iterator[Row]:
    """A row a kind of built volume; then, with `data`, one for each set of real heads.

    data : a folder laid out as `ct-ich`, perhaps with `head-ct-ge` beside it

    Raises
    ------
    WrongBundle
        If the bundle does not judge Hounsfield units.
    BadData
        If `data` cannot be used.
    """
    check_domain(manifest)
    for number, (kind, (expected, draw)) in enumerate(KINDS.items()):
        rngs = (np.random.default_rng([SEED, number, i]) for i in range(draws))
        yield row(kind, expected, (draw(rng) for rng in rngs), manifest)
    if data is not None:
        yield row("real heads: ct-ich", "accept", _real(data), manifest)
        if (data.parent / EXTERNAL).is_dir():
            series = read_volume(data.parent / EXTERNAL, manifest)
            yield row(f"real head: {EXTERNAL}", "accept", [series], manifest)


def row(kind: str, expected: Expected, volumes: Iterable[Volume], manifest: Manifest) -> Row:
    """Every volume through the pixel rules."""
    n, rules, met = 0, Counter[str](), dict[str, tuple[float, float]]()
    limits: dict[str, tuple[float, float]] = {}
    for one in volumes:
        n += 1
        if refused := body_refusal(one, manifest):
            rules[refused.rule] += 1
        for found in measures(one, manifest):
            low, high = met.get(found.rule, (found.value, found.value))
            met[found.rule] = min(low, found.value), max(high, found.value)
            if found.limits is not None:
                limits[found.rule] = found.limits
    return Row(kind, expected, n, rules.total(), dict(rules), met, limits)


def _real(data: Path) -> Iterator[Volume]:
    """Clipped to what the pictures hold; the size of a pixel is an estimate."""
    cohort = read_cohort(data)
    spacing = PICTURE_PIXEL_MM, PICTURE_PIXEL_MM
    for _, rows in cohort.by_patient():
        yield volume_from_pictures(cohort.grey(rows), PICTURE_RANGE_HU, spacing_mm=spacing)


def _soft(rng: Generator, of: Volume) -> Volume:
    return noisy(rng, of, rng.uniform(*built.SOFT_NOISE))


def _plain(rng: Generator) -> Volume:
    return _soft(rng, head(rng, adult(rng)))


def _looking(**look: Any) -> Draw:
    """An adult's head with something to it, as a soft kernel shows it."""
    return lambda rng: _soft(rng, head(rng, adult(rng, Look(**look))))


def _huge(rng: Generator) -> Volume:
    half = rng.uniform(76, 82), rng.uniform(94, 100), rng.uniform(80, 88)
    return _soft(rng, head(rng, replace(adult(rng), half_mm=half)))


def _hydrocephalus(rng: Generator) -> Volume:
    return _soft(rng, head(rng, adult(rng, Look(ventricles=rng.uniform(2.0, 3.2)))))


def _bleeding(rng: Generator) -> Volume:
    return _soft(rng, head(rng, adult(rng, Look(blood=rng.uniform(0.5, 1.0)))))


def _thin(rng: Generator) -> Volume:
    """Of 1.25 mm: the noise of slices that saw a quarter of the photons."""
    made = head(rng, adult(rng))
    return noisy(rng, built.thinner(made, 5, step_mm=1.25), rng.uniform(9, 15))


def _sharp(rng: Generator) -> Volume:
    made = built.sharpened(head(rng, adult(rng)), rng.uniform(1.0, 2.5))
    return noisy(rng, made, rng.uniform(*built.SHARP_NOISE), built.SHARP_GRAIN)


def _water(rng: Generator) -> Volume:
    wall = rng.choice([0.0, rng.uniform(3, 10)]), 120.0
    hu = built.cylinder(rng.uniform(75, 120), rng.uniform(-4, 4), wall)
    return noisy(rng, volume(hu, 250 / built.MATRIX), rng.uniform(2, 7))


def _with_rods(*inside: tuple[float, float]) -> Draw:
    """A body of plastic, its HU in one of these ranges, in an acrylic wall."""

    def draw(rng: Generator) -> Volume:
        radius, density = rng.uniform(75, 110), rng.uniform(*inside[rng.integers(len(inside))])
        hu = built.cylinder(radius, density, (rng.uniform(0, 6), 120.0))
        made = volume(built.with_rods(rng, hu, radius), 250 / built.MATRIX)
        return noisy(rng, made, rng.uniform(2, 7))

    return draw


def _like_a_head(rng: Generator) -> Volume:
    """A phantom made to be like one: brain's density in a ring of bone's."""
    wall = rng.uniform(6, 9), rng.uniform(700, 1100)
    hu = built.cylinder(rng.uniform(70, 90), rng.uniform(25, 45), wall)
    return _soft(rng, volume(hu, 250 / built.MATRIX))


def _noise_only(rng: Generator) -> Volume:
    flat = np.full((built.SLICES, built.MATRIX, built.MATRIX), rng.uniform(-50, 60), np.float32)
    return noisy(rng, volume(flat, 0.5), rng.uniform(10, 400), rng.uniform(0.3, 1.0))


def _air(rng: Generator) -> Volume:
    flat = np.full((built.SLICES, built.MATRIX, built.MATRIX), built.AIR_HU, np.float32)
    return noisy(rng, volume(flat, 0.5), rng.uniform(2, 20))


def _changed(change: Callable[[Generator, Any], Any]) -> Draw:
    """A plain head whose values went wrong on the way."""

    def draw(rng: Generator) -> Volume:
        made = _plain(rng)
        pixels = np.asarray(change(rng, made.pixels), dtype=np.float32)
        return replace(made, pixels=pixels)

    return draw


def _grey_values(centre: float, width: float) -> Draw:
    """Pictures of 0..255 that claim to be Hounsfield units."""
    return _changed(lambda _, hu: np.clip((hu - centre + width / 2) / width * 255, 0, 255))


#: Kind -> what is expected of it, and how to make one.
KINDS: Mapping[str, tuple[Expected, Draw]] = {
    "head, adult": ("accept", _plain),
    "head, newborn": ("accept", lambda rng: _soft(rng, head(rng, newborn(rng)))),
    "head, very large": ("accept", _huge),
    "head, hydrocephalus": ("accept", _hydrocephalus),
    "head, massive bleed": ("accept", _bleeding),
    "head, part of the skull removed": ("accept", _looking(opened=True)),
    "head, metal streaks": ("accept", _looking(metal=250.0)),
    "head, 1.25 mm": ("accept", _thin),
    "head, contrast agent": ("cannot be told", _looking(vessels=130.0, tumour=22.0)),
    "head, angiography": ("cannot be told", _looking(vessels=350.0)),
    "rods and line pairs in brain's density": ("cannot be told", _with_rods((15, 45))),
    "phantom like a head": ("cannot be told", _like_a_head),
    "head, bone kernel": ("refuse", _sharp),
    "head, extreme noise": (
        "refuse", lambda rng: noisy(rng, head(rng, adult(rng)), rng.uniform(40, 150), 0.6),
    ),
    "water phantom": ("refuse", _water),
    "rods and line pairs in water or resin": ("refuse", _with_rods((-10, 8), (55, 110))),
    "chest with arms": ("refuse", lambda rng: torso(rng, "chest")),
    "abdomen": ("refuse", lambda rng: torso(rng, "abdomen")),
    "chest of a child": ("refuse", lambda rng: torso(rng, "chest", (0.4, 0.55))),
    "abdomen of a child": ("refuse", lambda rng: torso(rng, "abdomen", (0.4, 0.65))),
    "neck and shoulders": ("refuse", lambda rng: torso(rng, "shoulders")),
    "neck alone": ("cannot be told", lambda rng: torso(rng, "neck")),
    "noise alone": ("refuse", _noise_only),
    "air alone": ("refuse", _air),
    "head, slope and intercept left out": ("refuse", _changed(lambda _, hu: hu + 1024)),
    "head, intercept applied twice": ("refuse", _changed(lambda _, hu: hu - 1024)),
    "head, intercept off by 24": ("refuse", _changed(lambda _, hu: hu + 24)),
    "head, intercept off by -24": ("refuse", _changed(lambda _, hu: hu - 24)),
    "head, values turned round": ("refuse", _changed(lambda _, hu: -hu)),
    "head, stored values turned round": ("refuse", _changed(lambda _, hu: 4095 - hu - 2 * 1024)),
    "head, slope doubled": ("refuse", _changed(lambda _, hu: 2 * hu + 1024)),
    "head, slope halved": ("refuse", _changed(lambda _, hu: 0.5 * hu - 512)),
    "head, grey of a brain window": ("refuse", _grey_values(40, 80)),
    "head, grey of a wide brain window": ("refuse", _grey_values(40, 120)),
    "head, grey of a bone window": ("refuse", _grey_values(700, 3200)),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m weights.recipe.refusals", description=__doc__)
    parser.add_argument("--data", type=Path, help=f"a folder with {TABLE}; none: built ones alone")
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle's folder")
    parser.add_argument("--draws", type=int, default=DRAWS, help="volumes a kind")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    given = parser.parse_args(arguments)
    try:
        rows = list(measure(read_manifest(given.bundle / "manifest.toml"), given.data, given.draws))
    except NodeError as error:
        sys.stderr.write(f"{error.code}: {error}\n")
        return 1
    if given.json:
        json.dump({"kinds": [asdict(one) for one in rows]}, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        _show(rows, Console())
    return 0


def _show(rows: Iterable[Row], to: Console) -> None:
    table = Table("kind", "expected", "refused", "by", "values met, and allowed")
    for one in rows:
        ranges = [
            f"{rule} {low:.3g}..{high:.3g}"
            + (" ({:g}..{:g})".format(*one.limits[rule]) if rule in one.limits else "")
            for rule, (low, high) in one.met.items()
        ]
        by = ", ".join(f"{rule} {count}" for rule, count in one.rules.items())
        table.add_row(
            one.kind, one.expected, f"{one.refused} of {one.n}", by, "\n".join(ranges),
            style="" if one.is_as_expected else "yellow",
        )  # fmt: skip
    to.print(table)


if __name__ == "__main__":
    sys.exit(main())
