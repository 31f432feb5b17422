"""`vigil train`, `evaluate` and `calibrate`: the recipe of weights/recipe at the terminal."""

import datetime as dt
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from db.errors import PermanentError
from node.bundles import folder_of, shipped
from node.calibration_words import show_calibration
from node.terminal import SUCCESS, WRONG_USAGE, complain, report

if TYPE_CHECKING:  # torch is loaded only where it is needed
    from inference.bundle import Bundle
    from weights.recipe.cases import Source
    from weights.recipe.scores import Scale

MANIFEST_OF_DATA = "manifest.csv"
HEADLINE = (
    "auc",
    "average_precision",
    "sensitivity",
    "sensitivity_of_all",
    "specificity",
    "brier",
    "log_loss",
    "calibration_slope",
    "calibration_intercept",
    "calibration_in_the_large",
    "ece",
    "slice_auc",
)
SHOWN_LEFT_OUT = 10


def train(data: Path, out: Path, bundle: str, plan: dict[str, Any], *, as_json: bool) -> int:
    """Write a bundle into `out`; prints its figures.

    bundle : which of the recipe's
    plan : further fields of `weights.recipe.train.Plan`
    """
    from weights.recipe.checks import check_training
    from weights.recipe.template import KINDS

    if _is_not_data(data):
        return WRONG_USAGE
    if bundle not in KINDS:
        complain(f"the recipe makes no bundle {bundle!r}: {', '.join(KINDS)}")
        return WRONG_USAGE
    if words := _no_family(bundle, plan["families"]) or _no_device(plan["device"]):
        complain(words)
        return WRONG_USAGE
    check_training(data, plan["folds"])
    if words := _unwritable(out):
        complain(words)
        return WRONG_USAGE
    from weights.recipe.train import Plan  # only now torch, which takes its time
    from weights.recipe.train import train as run

    with _bars(is_quiet=as_json) as progress:
        figures = run(data, out, plan=Plan(kind=KINDS[bundle], **plan), progress=progress)
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


def evaluate(
    model: str,
    cases: Labelled,
    *,
    seed: int,
    to: Path | None,
    as_json: bool,
    calibration: Path | None = None,
    table: Path | None = None,
) -> int:
    """Figures of a bundle as it stands on disk; with `to`, a page of them in that folder.

    table : where a CSV of each case's score goes
    calibration : a site's own file in place of the bundle's
    """
    from inference.bundle import load_bundle
    from inference.model import check_reference, load_model
    from weights.recipe.evaluate import evaluate as run
    from weights.recipe.evaluate import write_scores
    from weights.recipe.page import write_page

    if words := cases.wrong() or _no_bundle(model) or _unwritable(to) or _unwritable_file(table):
        complain(words)
        return WRONG_USAGE
    if cases.data is not None and _is_not_data(cases.data):
        return WRONG_USAGE
    bundle = load_bundle(folder_of(model), calibration=calibration)
    network = load_model(bundle)
    check_reference(bundle, network)
    source = _source(cases, bundle)
    with _bars(is_quiet=as_json) as progress:
        figures, scores = run(source, bundle, network, seed=seed, progress=progress)
    report(figures, _show, as_json=as_json)
    if table is not None:
        write_scores(table, scores, source.key)
        Console(stderr=True, highlight=False).print(f"scores: {table}")
    if to is not None:
        path = write_page(to, figures, scores, bundle, network)
        Console(stderr=True, highlight=False).print(f"page: {path}")
    return SUCCESS


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteTable:
    """A site's scores and labels, and what their table cannot say."""

    scores: Path
    scale: str = "auto"  # weights.recipe.scores.SCALES
    prevalence: float | None = None  # where negatives are a random sample
    site: str = "this site"  # in words

    def wrong(self) -> str:
        """What is wrong with it, empty if nothing."""
        from weights.recipe.scores import SCALES

        if self.scale not in SCALES:
            return f"--scale {self.scale!r} is none of {', '.join(SCALES)}"
        if self.prevalence is not None and not 0 < self.prevalence < 1:
            return f"--prevalence {self.prevalence} is no share between 0 and 1, such as 0.06"
        return ""


def calibrate(
    model: str, table: SiteTable, out: Path, *, label: str, seed: int, as_json: bool
) -> int:
    """Write a site's calibration file; prints how the old map and the new one fare."""
    from inference.bundle import load_bundle
    from weights.recipe.scores import read_scores
    from weights.recipe.site import recalibrate

    if words := table.wrong() or _no_bundle(model) or _unwritable_file(out):
        complain(words)
        return WRONG_USAGE
    bundle = load_bundle(folder_of(model))
    name = label or bundle.manifest.labels[0].id
    if name not in bundle.calibrations:
        complain(
            f"{bundle.name} has no calibrated label {name!r}: {', '.join(bundle.calibrations)}"
        )
        return WRONG_USAGE
    figures = recalibrate(
        bundle,
        read_scores(table.scores, cast("Scale", table.scale)),
        out,
        label=name,
        site=table.site,
        at=dt.datetime.now(dt.UTC).date().isoformat(),
        prevalence=table.prevalence,
        seed=seed,
    )
    report(figures, lambda made, to: show_calibration(made, out, to), as_json=as_json)
    return SUCCESS


def _source(cases: Labelled, bundle: "Bundle") -> "Source":
    from weights.recipe import cases as kinds
    from weights.recipe.checks import check_pictures
    from weights.recipe.data import read_cohort
    from weights.recipe.pictures import parse_window

    if cases.data is not None:
        cohort = read_cohort(cases.data)
        check_pictures(cohort)
        return kinds.from_cohort(cohort, bundle.manifest)
    assert cases.labels is not None  # `wrong` has seen to it
    if cases.images is not None:
        return kinds.from_pictures(
            cases.images, cases.labels, bundle.manifest, parse_window(cases.window)
        )
    assert cases.dicom is not None
    return kinds.from_studies(cases.dicom, cases.labels, bundle)


def _no_family(bundle: str, wanted: Sequence[str]) -> str:
    """What is wrong with --only, empty if nothing."""
    from weights.recipe.families import COMPARED, SHIPPING, NoSuchFamily, check_families

    try:
        check_families(wanted, SHIPPING[bundle], COMPARED[bundle])
    except NoSuchFamily as error:
        return f"--only: {error}"
    return ""


def _no_device(name: str) -> str:
    """What is wrong with --device, empty if nothing. Torch is loaded only to look for a GPU."""
    if name in ("auto", "cpu"):
        return ""
    from inference.serving import pick_device

    try:
        pick_device(name)
    except PermanentError:
        return f"--device {name}: no such GPU can be used here"
    return ""


def _no_bundle(model: str) -> str:
    """What is wrong with a bundle's name, empty if nothing."""
    if folder_of(model).is_dir():
        return ""
    return f"--model {model}: neither a folder nor one of {', '.join(shipped())}"


def _unwritable(folder: Path | None) -> str:
    """Why nothing can be written into a folder, which is made if need be; empty if it can be.

    Asked before what takes long, whose answer would be lost.
    """
    if folder is None:
        return ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder}: nothing can be written there ({type(error).__name__})"


def _unwritable_file(path: Path | None) -> str:
    return "" if path is None else _unwritable(path.parent)


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
        f"{figures['positives']} positive{_missing(figures)}"
    )
    for name in HEADLINE:
        if name == "sensitivity_of_all" and not figures["left_out_positives"]:
            continue  # the same again
        if name in figures:
            to.print(f"  {name:24} {_with_interval(figures[name], figures['intervals'][name])}")
    perfect = figures["ece_if_perfect"]
    to.print(
        f"  {'ece if perfect':24} {perfect['mean']:.4f} "
        f"({perfect['low']:.4f} to {perfect['high']:.4f}), at this n"
    )
    if figures["left_out_positives"]:
        to.print(
            "[yellow]sensitivity_of_all counts positives that were left out as missed[/]; at "
            + "; ".join(_point_of_all(*one) for one in figures["operating_points"].items())
        )
    for note in figures["notes"]:
        to.print(f"[dim]note: {escape(note)}[/]")
    for reason, n in figures["left_out_reasons"].items():
        to.print(f"[yellow]{n} left out[/]: {escape(reason)}")
    for one in figures["left_out"][:SHOWN_LEFT_OUT]:
        to.print(f"[yellow]left out[/] {escape(one['name'])}: {escape(one['reason'])}")
    if (more := len(figures["left_out"]) - SHOWN_LEFT_OUT) > 0:
        to.print(f"[yellow]left out[/] and {more} more")
    trained_on = "; ".join(map(escape, figures["trained_on"]))
    to.print(f"[dim]trained on: {trained_on}; there, figures flatter[/]")


def _missing(figures: Mapping[str, Any]) -> str:
    if not figures["n_left_out"]:
        return ""
    return f"; {figures['n_left_out']} left out, {figures['left_out_positives']} of them positive"


def _point_of_all(name: str, point: Mapping[str, Any]) -> str:
    figure = point["sensitivity_of_all"]
    ends = (figure["low"], figure["high"])
    return escape(f"{name}: {_with_interval(figure['value'], ends)}")


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
