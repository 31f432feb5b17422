"""`vigil train` and `vigil evaluate`: the recipe of weights/recipe with a progress bar."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from node.bundles import folder_of
from node.terminal import SUCCESS, WRONG_USAGE, complain, report

MANIFEST_OF_DATA = "manifest.csv"
HEADLINE = ("auc", "sensitivity", "specificity", "brier", "log_loss", "slice_auc")


def train(data: Path, out: Path, *, seed: int, folds: int, as_json: bool) -> int:
    """Write a bundle into `out`; prints its figures."""
    from weights.recipe.train import train as run

    if _is_not_data(data):
        return WRONG_USAGE
    with _bars(is_quiet=as_json) as progress:
        figures = run(data, out, seed=seed, folds=folds, progress=progress)
    report(figures, lambda _, to: to.print(f"bundle, card and report in {out}"), as_json=as_json)
    return SUCCESS


def evaluate(model: str, data: Path, *, seed: int, as_json: bool) -> int:
    """Figures of a bundle as it stands on disk, on labelled slices."""
    from weights.recipe.evaluate import evaluate as run

    if _is_not_data(data):
        return WRONG_USAGE
    with _bars(is_quiet=as_json) as progress:
        figures = run(folder_of(model), data, seed=seed, progress=progress)
    report(figures, _show, as_json=as_json)
    return SUCCESS


def _is_not_data(data: Path) -> bool:
    if (data / MANIFEST_OF_DATA).is_file():
        return False
    complain(f"{data} holds no {MANIFEST_OF_DATA}: a folder laid out as ct-ich is needed")
    return True


def _show(figures: dict[str, Any], to: Console) -> None:
    to.print(
        f"{figures['bundle']} {figures['version']}, label {figures['label']}: "
        f"{figures['n']} patients, {figures['positives']} positive, {figures['n_slices']} images"
    )
    for name in HEADLINE:
        to.print(f"  {name:12} {_with_interval(figures[name])}")
    to.print(f"[dim]trained on: {', '.join(figures['trained_on'])}; there, figures flatter[/]")


def _with_interval(figure: Any) -> str:
    if not isinstance(figure, dict):
        return str(figure)
    low, high = figure.get("low"), figure.get("high")
    value = figure.get("value")
    return f"{value}" if low is None else f"{value} ({low} to {high})"


@contextmanager
def _bars(*, is_quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """The recipe's progress as bars on stderr, one for each of its steps."""
    bars = Progress(
        TextColumn("{task.description:24}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=Console(stderr=True, quiet=is_quiet),
    )
    tasks: dict[str, Any] = {}

    def progress(step: str, done: int, total: int) -> None:
        if step not in tasks:
            tasks[step] = bars.add_task(step)
        bars.update(tasks[step], completed=done, total=total)

    with bars:
        yield progress
