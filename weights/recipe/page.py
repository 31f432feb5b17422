"""An evaluation as one HTML file that loads nothing: figures, curves, a look at some cases."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, select_autoescape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve
from torch import nn

from inference import heatmap
from inference.bundle import Bundle
from inference.manifest import InputSpec
from weights.recipe.evaluate import Sample, Scores
from weights.recipe.figures import reliability

PAGE = "evaluation.html"

_TEMPLATES = Path(__file__).parent
_SIDE_INCHES = 3.6
_CUT = 0.25  # of the strongest map on the page; below it nothing is coloured
_ALPHA = 0.45
_SHOWN = (
    ("auc", "AUC"),
    ("average_precision", "Average precision"),
    ("sensitivity", "Sensitivity"),
    ("specificity", "Specificity"),
    ("slice_auc", "Slice AUC"),
    ("brier", "Brier score"),
    ("log_loss", "Log-loss"),
    ("calibration_slope", "Calibration slope"),
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
        confusion=_confusion(scores, figures["threshold"]),
        curves=_curves(scores, figures),
        samples=_samples(scores.samples, bundle, model),
        intended_use=bundle.manifest.intended_use,
    )
    path = out / PAGE
    path.write_text(page, encoding="utf-8")
    return path


def _confusion(scores: Scores, threshold: float) -> list[list[int]]:
    """[[true positives, false negatives], [false positives, true negatives]]"""
    present, truth = scores.probability >= threshold, scores.truth
    return [
        [int((present & truth).sum()), int((~present & truth).sum())],
        [int((present & ~truth).sum()), int((~present & ~truth).sum())],
    ]


def _curves(scores: Scores, figures: Mapping[str, Any]) -> list[str]:
    """SVG texts: ROC, precision and recall, reliability; without both classes only the last."""
    truth, z, p = scores.truth, scores.study_logit, scores.probability
    made = []
    if truth.any() and not truth.all():
        made += [_roc(truth, z, figures), _precision_recall(truth, z)]
    return [*made, _reliability(truth, p)]


def _roc(truth: NDArray[np.bool_], z: NDArray[np.float64], figures: Mapping[str, Any]) -> str:
    figure, axes = _axes("ROC", "1 - specificity", "sensitivity")
    off, on, _ = roc_curve(truth, z)
    axes.plot([0, 1], [0, 1], color="#999", linewidth=0.8, linestyle=":")
    axes.plot(off, on, color="#0b6e99")
    for name, point in figures["operating_points"].items():
        x, y = 1 - point["specificity"]["value"], point["sensitivity"]["value"]
        axes.plot([x], [y], "o", markersize=5, label=name)
    if figures["operating_points"]:
        axes.legend(loc="lower right", fontsize=7, frameon=False)
    return _svg(figure)


def _precision_recall(truth: NDArray[np.bool_], z: NDArray[np.float64]) -> str:
    figure, axes = _axes("Precision and recall", "recall (sensitivity)", "precision (PPV)")
    precision, recall, _ = precision_recall_curve(truth, z)
    axes.axhline(truth.mean(), color="#999", linewidth=0.8, linestyle=":")
    axes.plot(recall, precision, color="#0b6e99", drawstyle="steps-post")
    return _svg(figure)


def _reliability(truth: NDArray[np.bool_], p: NDArray[np.float64]) -> str:
    figure, axes = _axes("Reliability", "mean probability", "observed share")
    bins = reliability(p, truth, bins=min(5, len(p)))
    axes.plot([0, 1], [0, 1], color="#999", linewidth=0.8, linestyle=":")
    x, y = [one["predicted"] for one in bins], [one["observed"] for one in bins]
    # 95 % of a share of n: Wilson's score interval.
    ends = [_wilson(one["observed"], int(one["n"])) for one in bins]
    axes.vlines(x, [low for low, _ in ends], [high for _, high in ends], color="#0b6e99")
    axes.plot(x, y, "o-", color="#0b6e99", linewidth=1)
    return _svg(figure)


def _wilson(share: float, n: int) -> tuple[float, float]:
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)))
    return middle - half, middle + half


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_SIDE_INCHES, _SIDE_INCHES), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_aspect("equal")
    return figure, axes


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    made = text.getvalue()
    return made[made.index("<svg") :]


def _samples(
    samples: Mapping[str, Sequence[Sample]], bundle: Bundle, model: nn.Module
) -> list[tuple[str, list[dict[str, Any]]]]:
    """By kind: pictures with their attention maps, all on one scale."""
    shown = [(kind, sample) for kind in _KINDS for sample in samples.get(kind, ())]
    if not shown:
        return []
    inputs = np.stack([sample.input for _, sample in shown])
    maps = heatmap.grad_cam(model, bundle.manifest.explain.layer, inputs, [{0: 1.0}] * len(shown))
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
