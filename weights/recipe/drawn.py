"""What the bundle says of drawn heads: failures that can be shown, since nobody's picture may be.

Drawings are no patients and no figure of merit. They part what comes together in patients, a bleed
from the swelling over it, and show what the network answers to.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.random import Generator
from numpy.typing import NDArray
from torch import nn

from db.result import Finding, OutputSpec
from inference.bundle import Bundle
from inference.predict import predict
from inference.volume import Volume
from weights.recipe.built import Look, adult, head, newborn, noisy

PICTURE = "drawn.png"

_Judged = tuple[Volume, Finding, list[NDArray[np.float32]]]

_DRAWS = 3
_NOISE_HU = 4.5
_SIDE_INCHES = 2.4
_MAP_FROM = 0.25  # of the study's scale, as overlays are cut

_KINDS: Mapping[str, Callable[[Generator], Look]] = {
    "plain": adult,
    "bleed in one half, large": lambda rng: adult(rng, Look(blood=0.45)),
    "bleed in one half, small": lambda rng: adult(rng, Look(blood=0.2)),
    "swollen scalp, no bleed": lambda rng: _swollen(adult(rng)),
    "swollen scalp and large bleed": lambda rng: _swollen(adult(rng, Look(blood=0.45))),
    "wide ventricles": lambda rng: adult(rng, Look(ventricles=2.2)),
    "part of the skull taken out": lambda rng: adult(rng, Look(opened=True)),
    "metal and its streaks": lambda rng: adult(rng, Look(metal=60.0)),
    "vessels full of contrast agent": lambda rng: adult(rng, Look(vessels=180.0)),
    "newborn": newborn,
}


def drawn_heads(bundle: Bundle, model: nn.Module, out: Path, *, seed: int) -> list[dict[str, Any]]:
    """Each kind drawn a few times: probabilities on the reference scale; and one picture of all.

    out : folder of the picture
    """
    entries, shown = [], {}
    for kind, look in _KINDS.items():
        judged = [_judged(_drawn(look, seed + draw), bundle, model) for draw in range(_DRAWS)]
        entries.append(
            {
                "kind": kind,
                "probabilities": [round(_chance(finding), 4) for _, finding, _ in judged],
                "called": sum(bool(finding.primary.is_present) for _, finding, _ in judged),
            }
        )
        shown[kind] = judged[0]
    _picture(shown, bundle, out / PICTURE)
    return entries


def _swollen(look: Look) -> Look:
    return replace(look, scalp_mm=22.0)


def _drawn(look: Callable[[Generator], Look], seed: int) -> Volume:
    rng = np.random.default_rng(seed)
    return noisy(rng, head(rng, look(rng)), _NOISE_HU)


def _judged(volume: Volume, bundle: Bundle, model: nn.Module) -> _Judged:
    finding, maps = predict(
        volume, bundle, model, started_at="1970-01-01T00:00:00+00:00", result_uuid="drawn"
    )
    return volume, finding, maps


def _chance(finding: Finding) -> float:
    probability = finding.primary.probability
    if probability is None:
        raise AssertionError("the primary label is validated")
    return probability.reference


def _picture(shown: Mapping[str, _Judged], bundle: Bundle, path: Path) -> None:
    """The slice with the highest score of one head of each kind, with its map if it was called."""
    columns = 5
    rows = -(-len(shown) // columns)
    size = (columns * _SIDE_INCHES, rows * (_SIDE_INCHES + 0.3))
    figure = Figure(figsize=size, layout="constrained", dpi=80)
    for place, (kind, judged) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.set_title(f"{kind}\n{100 * _chance(judged[1]):.0f} %", fontsize=7)
        axes.axis("off")
        _slice(axes, judged, bundle.manifest.output)
    figure.savefig(path, metadata={"Software": None})


def _slice(axes: Axes, judged: _Judged, output: OutputSpec) -> None:
    volume, finding, maps = judged
    top = finding.primary.top_image
    low = output.window_centre - output.window_width / 2
    axes.imshow(volume.pixels[top], cmap="gray", vmin=low, vmax=low + output.window_width)
    for key, one in zip(finding.key_images, maps, strict=True):
        if key.image == top and finding.map_scale > 0:
            part = np.ma.masked_less(one / finding.map_scale, _MAP_FROM)
            axes.imshow(part, cmap="turbo", vmin=0, vmax=1, alpha=0.4)
