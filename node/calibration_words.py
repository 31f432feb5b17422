"""What `vigil calibrate` tells the operator: is the new map better, what do thresholds become."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_FIGURES = {
    "brier": "Brier score",
    "log_loss": "log-loss",
    "calibration_slope": "slope (1)",
    "calibration_intercept": "intercept there (0)",
    "calibration_in_the_large": "in the large (0)",
    "ece": "calibration error",
}


def show_calibration(made: Mapping[str, Any], out: Path, to: Console) -> None:
    """made : what `weights.recipe.site.recalibrate` gives"""
    to.print(
        f"{made['bundle']} {made['version']}, label {made['label']}: {made['n']} studies of "
        f"{made['n_patients']} patients, {made['positives']} positive "
        f"({_percent(made['prevalence'])})"
    )
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in made["log_losses"].items())
    to.print(f"map: {made['method']}, by cross-fitted log-loss ({losses})")
    to.print(f"[dim]{escape(made['note'])}[/]")
    to.print(_figures(made))
    perfect = made["after"]["ece_if_perfect"]
    to.print(
        f"[dim]a perfect map would show a calibration error of {perfect['mean']:.3f} "
        f"({perfect['low']:.3f} to {perfect['high']:.3f}) on so many studies[/]"
    )
    for line in _points(made):
        to.print(line)
    to.print(f"[dim]{_what_thresholds_are(made)}[/]")
    to.print(f"[yellow]{made['sampling']}[/]")
    to.print(escape(_tenant(made)))
    to.print(escape(f"to serve it: vigil models activate {made['bundle']} --calibration {out}"))
    to.print(f"calibration {made['calibration_id']} (was {made['replaces']}) in {escape(str(out))}")


def _figures(made: Mapping[str, Any]) -> Table:
    table = Table("(what is right)", "before", "after, unseen patients")
    for name, words in _FIGURES.items():
        table.add_row(words, *(_range(made[when][name]) for when in ("before", "after")))
    return table


def _points(made: Mapping[str, Any]) -> Iterator[str]:
    """Each threshold under both maps; the one that serves comes first, with the names it has."""
    serving, named = made["threshold"], made["operating_points"]
    same = [name for name, point in named.items() if point["value"] == serving["value"]]
    yield from _point(", ".join(["serves", *same]), serving)
    for name, point in named.items():
        if name not in same:
            yield from _point(name, point)


def _point(name: str, point: Mapping[str, Any]) -> Iterator[str]:
    yield f"threshold {point['value']:.4g} ({escape(name)}), from raw score"
    for when in ("before", "after"):
        at = point[when]
        raw = "none" if at["raw_score"] is None else f"{at['raw_score']:+.3f}"
        yield (
            f"  {when:6} {raw}: sensitivity {_range(at['sensitivity'], 2)}, PPV {_range(at['ppv'])}"
        )
        yield f"  {'':14} specificity {_range(at['specificity'], 2)}, NPV {_range(at['npv'])}"
    kept = "none" if point["keeps"] is None else f"{point['keeps']:.6f}"
    yield f"  [dim]to decide as before under the new map: {kept}[/]"


def _what_thresholds_are(made: Mapping[str, Any]) -> str:
    key = f"{made['bundle']}.{made['label']}"
    return (
        f"thresholds stay as they are, at the reference prevalence "
        f"{_percent(made['reference_prevalence'])}; under the new map each asks for another raw "
        f'score. To decide as before, give the tenant thresholds = {{ "{key}" = ... }} with that '
        "value. Shares are counted on the studies the map was fitted to; PPV and "
        f"NPV at {_percent(made['site_prevalence'])}"
    )


def _tenant(made: Mapping[str, Any]) -> str:
    whence = "as given" if made["site_prevalence_is_given"] else "the share among these studies"
    return (
        "for the tenant's configuration: prevalence = "
        f'{{ "{made["bundle"]}.{made["label"]}" = {made["site_prevalence"]} }}, {whence}'
        + ("" if made["site_prevalence_is_given"] else "; give --prevalence if they are a sample")
    )


def _range(figure: Mapping[str, float | None], digits: int = 3) -> str:
    if None in figure.values():  # nothing is called that way
        return "not defined"
    value, low, high = (f"{figure[end]:.{digits}f}" for end in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
