"""The curves of the evaluation page, each as the text of one SVG that loads nothing."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from weights.recipe.evaluate import Scores

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

_SIDE_INCHES = 3.6
_INK, _WARM, _FAINT = "#0b6e99", "#c2570c", "#999"
_BINS = 20  # of the histogram, 5 % each


def charts(scores: Scores, figures: Mapping[str, Any]) -> list[str]:
    """ROC, precision and recall, reliability, probabilities by truth, predictive values.

    Without both classes only reliability and the histogram.
    """
    truth, z, p = scores.truth, scores.study_logit, scores.probability
    both = truth.any() and not truth.all()
    made = [_roc(truth, z, figures), _precision_recall(truth, z)] if both else []
    made += [_reliability(figures["reliability"]), _histogram(truth, p, figures)]
    return [*made, _predictive(figures)] if both else made


def _roc(truth: Bools, z: Floats, figures: Mapping[str, Any]) -> str:
    figure, axes = _axes("ROC", "1 - specificity", "sensitivity")
    off, on, _ = roc_curve(truth, z)
    axes.plot([0, 1], [0, 1], color=_FAINT, linewidth=0.8, linestyle=":")
    axes.plot(off, on, color=_INK)
    for name, point in figures["operating_points"].items():
        x, y = 1 - point["specificity"]["value"], point["sensitivity"]["value"]
        axes.plot([x], [y], "o", markersize=5, label=name)
    if figures["operating_points"]:
        axes.legend(loc="lower right", fontsize=7, frameon=False)
    return _svg(figure)


def _precision_recall(truth: Bools, z: Floats) -> str:
    figure, axes = _axes("Precision and recall", "recall (sensitivity)", "precision (PPV)")
    precision, recall, _ = precision_recall_curve(truth, z)
    axes.axhline(truth.mean(), color=_FAINT, linewidth=0.8, linestyle=":")
    # Backwards from full recall: a step holds until the next positive is found.
    axes.plot(recall, precision, color=_INK, drawstyle="steps-post")
    return _svg(figure)


def _reliability(bins: list[Mapping[str, float]]) -> str:
    figure, axes = _axes("Reliability", "mean probability", "observed share")
    axes.plot([0, 1], [0, 1], color=_FAINT, linewidth=0.8, linestyle=":")
    x, y = [one["predicted"] for one in bins], [one["observed"] for one in bins]
    # 95 % of a share of n: Wilson's score interval.
    ends = [_wilson(one["observed"], int(one["n"])) for one in bins]
    axes.vlines(x, [low for low, _ in ends], [high for _, high in ends], color=_INK)
    axes.plot(x, y, "o-", color=_INK, linewidth=1, markersize=4)
    for at, (low, high), one in zip(x, ends, bins, strict=True):
        # Under the bar, over it where there is no room, and clear of the edges.
        below = low > 0.1
        axes.annotate(
            f"n={one['n']:.0f}",
            (min(max(at, 0.05), 0.95), low if below else high),
            xytext=(0, -3 if below else 3),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            fontsize=7,
            color="#1c2733",
        )
    return _svg(figure)


def _histogram(truth: Bools, p: Floats, figures: Mapping[str, Any]) -> str:
    figure, axes = _axes("Probabilities by truth", "probability", "studies")
    edges = np.linspace(0, 1, _BINS + 1)
    positive, negative = (np.histogram(p[truth == kind], edges)[0] for kind in (True, False))
    width = edges[1] - edges[0]
    axes.bar(edges[:-1], negative, width, align="edge", color=_INK, label="truth: negative")
    axes.bar(edges[:-1], -positive, width, align="edge", color=_WARM, label="truth: positive")
    axes.axhline(0, color="#1c2733", linewidth=0.8)
    axes.axvline(figures["threshold"], color=_FAINT, linewidth=0.8, linestyle=":")
    most = max(int(positive.max()), int(negative.max()))
    axes.set(ylim=(-1.25 * most, 1.25 * most), aspect="auto")
    axes.yaxis.set_major_formatter(lambda n, _: f"{abs(n):.0f}")  # downwards is a count, too
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right", fontsize=7, frameon=False)
    return _svg(figure)


def _predictive(figures: Mapping[str, Any]) -> str:
    figure, axes = _axes("Predictive values, serving threshold", "prevalence, %", "PPV, NPV")
    for which, ink in (("ppv", _WARM), ("npv", _INK)):
        known = [x for x in figures["predictive_values"] if x[which]["value"] is not None]
        x = [one["prevalence"] for one in known]
        value, low, high = ([one[which][end] for one in known] for end in ("value", "low", "high"))
        axes.fill_between(x, low, high, color=ink, alpha=0.15, linewidth=0)
        axes.plot(x, value, "o-", color=ink, linewidth=1, markersize=3, label=which.upper())
    shown = [one["prevalence"] for one in figures["predictive_values"]]
    axes.set(xscale="log", xlim=(shown[0] * 0.9, shown[-1] * 1.1), aspect="auto")
    axes.set_xticks(shown, [f"{100 * at:.0f}" for at in shown], fontsize=7)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(loc="center left", fontsize=7, frameon=False)
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
