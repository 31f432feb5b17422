"""An evaluation as one HTML file that loads nothing: figures, curves, a look at some cases."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, select_autoescape
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from inference import heatmap
from inference.bundle import Bundle
from inference.manifest import InputSpec
from weights.recipe.charts import charts
from weights.recipe.evaluate import Sample, Scores

PAGE = "evaluation.html"

_TEMPLATES = Path(__file__).parent
_CUT = 0.25  # of the strongest map on the page; below it nothing is coloured
_ALPHA = 0.45
_SHOWN = (
    ("auc", "AUC"),
    ("average_precision", "Average precision"),
    ("sensitivity", "Sensitivity"),
    ("sensitivity_of_all", "Sensitivity, positives left out counted as missed"),
    ("specificity", "Specificity"),
    ("slice_auc", "Slice AUC"),
    ("brier", "Brier score"),
    ("log_loss", "Log-loss"),
    ("calibration_slope", "Calibration slope (1 is right, under 1 too sure)"),
    ("calibration_intercept", "Calibration intercept at that slope (0 is right)"),
    ("calibration_in_the_large", "Calibration in the large (0 is right, over 0 too low)"),
    ("ece", "Expected calibration error, bins of equally many"),
)
_KINDS = ("true positive", "false positive", "false negative", "true negative")


def write_page(
    out: Path, figures: Mapping[str, Any], scores: Scores, bundle: Bundle, model: nn.Module
) -> Path:
    """evaluation.html in `out`, which is made if need be; gives its path."""
    out.mkdir(parents=True, exist_ok=True)
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=select_autoescape(default=True)
    )
    page = environment.get_template("evaluation.html.j2").render(
        figures=figures,
        rows=[(words, figures[k], figures["intervals"][k]) for k, words in _SHOWN if k in figures],
        points=_points(figures),
        curves=charts(scores, figures),
        samples=_samples(scores.samples, bundle, model),
        intended_use=bundle.manifest.intended_use,
    )
    path = out / PAGE
    path.write_text(page, encoding="utf-8")
    return path


def _points(figures: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The threshold that serves, and the operating points."""
    named = figures["operating_points"]
    same = [name for name, one in named.items() if one["threshold"] == figures["threshold"]]
    serving = f"serves ({', '.join(same)})" if same else "serves"
    others = [(name, point) for name, point in named.items() if name not in same]
    return [(serving, _serving(figures)), *others]


def _serving(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    """The figures of the serving threshold, in the form of an operating point's."""
    shares = {
        name: dict(
            zip(("value", "low", "high"), (figures[name], *figures["intervals"][name]), strict=True)
        )
        for name in ("sensitivity", "sensitivity_of_all", "specificity")
    }
    alike = ("threshold", "confusion", "predictive_values")
    return {**{name: figures[name] for name in alike}, **shares}


def _samples(
    samples: Mapping[str, Sequence[Sample]], bundle: Bundle, model: nn.Module
) -> list[tuple[str, list[dict[str, Any]]]]:
    """By kind: pictures with their attention maps, all on one scale."""
    shown = [(kind, sample) for kind in _KINDS for sample in samples.get(kind, ())]
    if not shown:
        return []
    inputs = np.stack([sample.input for _, sample in shown])
    how = bundle.manifest.explain
    maps = heatmap.grad_cam(model, how.layer, inputs, [{0: 1.0}] * len(shown), how.method)
    scale = max(float(np.max(one)) for one in maps) or 1.0
    made: dict[str, list[dict[str, Any]]] = {}
    for (kind, sample), one in zip(shown, maps, strict=True):
        grey = _grey(sample.input, bundle.manifest.input)
        made.setdefault(kind, []).append(
            {
                "name": sample.name,
                "percent": round(100 * sample.probability),
                "picture": _png(grey, (np.asarray(one) / scale).astype(np.float32)),
            }
        )
    return list(made.items())


def _grey(seen: NDArray[np.float32], spec: InputSpec) -> NDArray[np.float32]:
    """(size, size), 0..1: the last window of the middle image, as the model saw it."""
    channel = spec.neighbours * len(spec.windows) + len(spec.windows) - 1
    grey: NDArray[np.float32] = np.clip(
        seen[channel] * spec.std[channel] + spec.mean[channel], 0, 1
    )
    return grey


def _png(grey: NDArray[np.float32], attention: NDArray[np.float32]) -> str:
    """Base64 of the picture in grey, and beside it with the map over it."""
    side = grey.shape[0] / 100
    figure = Figure(figsize=(2 * side, side), dpi=100)
    for place in (0, 1):
        axes = figure.add_axes((place / 2, 0, 0.5, 1))
        axes.axis("off")
        axes.imshow(grey, cmap="gray", vmin=0, vmax=1)
        if place:
            extent = (-0.5, grey.shape[1] - 0.5, grey.shape[0] - 0.5, -0.5)
            cut = np.ma.masked_less(attention, _CUT)
            axes.imshow(
                cut, cmap="turbo", vmin=0, vmax=1, alpha=_ALPHA, extent=extent,
                interpolation="bilinear",
            )  # fmt: skip
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return base64.b64encode(data.getvalue()).decode("ascii")
