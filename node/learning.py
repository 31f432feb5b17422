"""`vigil train`, `evaluate` and `calibrate`: the recipe of weights/recipe at the terminal."""

import datetime as dt
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from node.bundles import folder_of
from node.terminal import SUCCESS, WRONG_USAGE, complain, report

if TYPE_CHECKING:  # torch is loaded only where it is needed
    from inference.bundle import Bundle
    from weights.recipe.cases import Source

MANIFEST_OF_DATA = "manifest.csv"
HEADLINE = (
    "auc",
    "average_precision",
    "sensitivity",
    "specificity",
    "brier",
    "log_loss",
    "calibration_slope",
    "slice_auc",
)
SHOWN_LEFT_OUT = 10


def train(data: Path, out: Path, *, seed: int, folds: int, as_json: bool) -> int:
    """Write a bundle into `out`; prints its figures."""
    from weights.recipe.train import train as run

    if _is_not_data(data):
        return WRONG_USAGE
    with _bars(is_quiet=as_json) as progress:
        figures = run(data, out, seed=seed, folds=folds, progress=progress)
    report(figures, lambda _, to: to.print(f"bundle, card and report in {out}"), as_json=as_json)
    return SUCCESS


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Where labelled cases are: one of three folders, and a table for the latter two."""

    data: Path | None = None
    images: Path | None = None
    dicom: Path | None = None
    labels: Path | None = None
    window: str = "auto"  # of `images`

    def wrong(self) -> str:
        """What is wrong with it, empty if nothing."""
        given = [one for one in (self.data, self.images, self.dicom) if one is not None]
        if len(given) != 1:
            return "one of --data, --images and --dicom is needed, and only one"
        if self.data is None and self.labels is None:
            return "--labels names the CSV that goes with --images and --dicom"
        if self.data is not None and self.labels is not None:
            return "--data brings its own labels, in manifest.csv"
        return self._wrong_window()

    def _wrong_window(self) -> str:
        from weights.recipe.pictures import parse_window

        try:
            parse_window(self.window)
        except ValueError:
            return f"--window {self.window!r} is neither auto nor CENTRE/WIDTH, such as 40/80"
        return ""


def evaluate(model: str, cases: Labelled, *, seed: int, to: Path | None, as_json: bool) -> int:
    """Figures of a bundle as it stands on disk; with `to`, a page of them in that folder."""
    from inference.bundle import load_bundle
    from inference.model import load_model
    from weights.recipe.evaluate import evaluate as run
    from weights.recipe.page import write_page

    if words := cases.wrong():
        complain(words)
        return WRONG_USAGE
    if cases.data is not None and _is_not_data(cases.data):
        return WRONG_USAGE
    bundle = load_bundle(folder_of(model))
    network = load_model(bundle)
    source = _source(cases, bundle)
    with _bars(is_quiet=as_json) as progress:
        figures, scores = run(source, bundle, network, seed=seed, progress=progress)
    report(figures, _show, as_json=as_json)
    if to is not None:
        path = write_page(to, figures, scores, bundle, network)
        Console(stderr=True, highlight=False).print(f"page: {path}")
    return SUCCESS


def calibrate(
    model: str, scores: Path, out: Path, *, label: str, site: str, seed: int, as_json: bool
) -> int:
    """Write a site's calibration file; prints how the old map and the new one fare."""
    from inference.bundle import load_bundle
    from weights.recipe.site import read_scores, recalibrate

    bundle = load_bundle(folder_of(model))
    name = label or bundle.manifest.labels[0].id
    if name not in bundle.calibrations:
        complain(
            f"{bundle.name} has no calibrated label {name!r}: {', '.join(bundle.calibrations)}"
        )
        return WRONG_USAGE
    today = dt.datetime.now(dt.UTC).date().isoformat()
    figures = recalibrate(
        bundle, read_scores(scores), out, label=name, site=site, at=today, seed=seed
    )
    report(figures, lambda made, to: _show_calibration(made, out, to), as_json=as_json)
    return SUCCESS


def _show_calibration(made: dict[str, Any], out: Path, to: Console) -> None:
    to.print(
        f"{made['bundle']} {made['version']}, label {made['label']}: {made['n']} studies of "
        f"{made['n_patients']} patients, {made['positives']} positive "
        f"(prevalence {made['prevalence']})"
    )
    note = f" ({escape(made['note'])})" if made["note"] else ""
    to.print(f"  map: {made['method']}{note}; log-losses {made['log_losses']}")
    for name in ("brier", "log_loss", "slope", "in_the_large"):
        old, new = (_range(made[when][name]) for when in ("before", "after"))
        to.print(f"  {name:14} before {old:32} after {new}")
    for when in ("before", "after"):
        point = made["threshold"][when]
        to.print(
            f"  threshold {made['threshold']['value']} {when}: raw score {point['raw_score']}, "
            f"sensitivity {point['sensitivity']}, specificity {point['specificity']}"
        )
    to.print(f"[yellow]{made['sampling']}[/]")
    to.print(f"calibration {made['calibration_id']} (was {made['replaces']}) in {escape(str(out))}")


def _range(figure: dict[str, float]) -> str:
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def _source(cases: Labelled, bundle: "Bundle") -> "Source":
    from weights.recipe import cases as kinds
    from weights.recipe.data import read_cohort
    from weights.recipe.pictures import parse_window

    if cases.data is not None:
        return kinds.from_cohort(read_cohort(cases.data), bundle.manifest)
    assert cases.labels is not None  # `wrong` has seen to it
    if cases.images is not None:
        return kinds.from_pictures(
            cases.images, cases.labels, bundle.manifest, parse_window(cases.window)
        )
    assert cases.dicom is not None
    return kinds.from_studies(cases.dicom, cases.labels, bundle)


def _is_not_data(data: Path) -> bool:
    if (data / MANIFEST_OF_DATA).is_file():
        return False
    complain(f"{data} holds no {MANIFEST_OF_DATA}: a folder laid out as ct-ich is needed")
    return True


def _show(figures: dict[str, Any], to: Console) -> None:
    unit = "pictures" if figures["unit"] == "picture" else "studies"
    to.print(
        f"{figures['bundle']} {figures['version']}, label {figures['label']}: "
        f"{figures['n']} {unit} of {figures['n_patients']} patients, "
        f"{figures['positives']} positive"
    )
    for name in HEADLINE:
        if name in figures:
            to.print(f"  {name:18} {_with_interval(figures[name], figures['intervals'][name])}")
    for note in figures["notes"]:
        to.print(f"[dim]assumed: {escape(note)}[/]")
    for one in figures["left_out"][:SHOWN_LEFT_OUT]:
        to.print(f"[yellow]left out[/] {escape(one['name'])}: {escape(one['reason'])}")
    if (more := len(figures["left_out"]) - SHOWN_LEFT_OUT) > 0:
        to.print(f"[yellow]left out[/] and {more} more")
    trained_on = "; ".join(map(escape, figures["trained_on"]))
    to.print(f"[dim]trained on: {trained_on}; there, figures flatter[/]")


def _with_interval(value: float | None, ends: Sequence[float | None]) -> str:
    if value is None:
        return "not defined here"
    return f"{value:.4f}" if None in ends else f"{value:.4f} ({ends[0]:.4f} to {ends[1]:.4f})"


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
