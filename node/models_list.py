"""`vigil models list`: which versions there are, whom they serve, how shadows compare."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from config.settings import Settings
from db import activations, comparison
from db.activations import Activation, Installed
from db.comparison import Comparison
from db.errors import NodeError
from db.files import models_folder
from db.heartbeat import GONE_S
from db.tables import ProcessRow
from inference.bundle import BundleError, load_bundle
from inference.installed import identity
from node.bundles import configured, installed, shipped, users_of
from node.database import opened

Entry = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Activity:
    """What the database knows of bundles; `active` holds no tenant that has what is configured."""

    active: Mapping[tuple[str, str], Activation]  # by tenant and bundle
    loaded: frozenset[tuple[str, str]] | None  # bundle and label; None: no inference runs
    refused: Mapping[str, str]  # bundle, or bundle and label: the reason an inference gave
    comparisons: tuple[Comparison, ...]


def activity(settings: Settings) -> Activity | str:
    """What is active, or in a few words why that is not known."""
    try:
        with opened(settings) as engine, Session(engine) as session:
            loaded, refused = _reported(session)
            return Activity(
                activations.current(session),
                loaded,
                refused,
                tuple(comparison.compare(session)),
            )
    except NodeError as error:
        return str(error)
    except DBAPIError as error:  # away, or older than this version
        return f"the database does not answer as it should ({type(error.orig).__name__})"


def active(settings: Settings) -> Mapping[tuple[str, str], Activation] | None:
    """What is active by tenant and bundle; None where that is not known."""
    try:
        with opened(settings) as engine, Session(engine) as session:
            return activations.current(session)
    except (NodeError, DBAPIError):
        return None


def _reported(session: Session) -> tuple[frozenset[tuple[str, str]] | None, dict[str, str]]:
    """What the inference processes that live say they serve and refuse."""
    is_alive = func.extract("epoch", func.now() - ProcessRow.seen_at) < GONE_S
    details = session.scalars(
        select(ProcessRow.detail).where(ProcessRow.stage == "inference", is_alive)
    ).all()
    loaded = {
        (name, label)
        for detail in details
        for name, labels in detail.get("models", {}).items()
        for label in labels.split(", ")
    }
    refused = {
        name: f"{one['code']}: {one['reason']}"
        for detail in details
        for name, one in detail.get("refused", {}).items()
    }
    return (frozenset(loaded) if details else None), refused


def listed(settings: Settings, known: Activity | str) -> list[Entry]:
    """One entry a bundle, those of the configuration first."""
    folders = {**configured(settings), **shipped(), **configured(settings)}
    return [_bundle(name, folder, settings, known) for name, folder in folders.items()]


def _bundle(name: str, folder: Path, settings: Settings, known: Activity | str) -> Entry:
    facts = known if isinstance(known, Activity) else None
    own = _version(name, folder, None, facts)
    versions = [own, *_installed(name, settings, facts)]
    users = users_of(settings, name)
    for tenant, is_shadow in users.items():
        if facts is not None:
            one = facts.active.get((tenant, name))
            version = _named(versions, one.installed.label) if one else own
            version["active"].append(_use(tenant, one, is_shadow=is_shadow))
    return {
        "name": name,
        **{key: own[key] for key in ("folder", "version", "architecture", "labels")},
        "tenants": [f"{one} (shadow)" if users[one] else one for one in users],
        "problem": "; ".join(one["problem"] for one in versions if _stops_somebody(one, facts)),
        "activity": "known" if facts is not None else f"unknown: {known}",
        "versions": versions,
        "comparisons": [
            one.to_json()
            for one in (facts.comparisons if facts else ())
            if name in (one.serving, one.shadow)
        ],
    }


def _installed(name: str, settings: Settings, facts: Activity | None) -> list[Entry]:
    """What lies on the disk, and what ought to."""
    wanted = {
        one.installed.label: one.installed
        for (_, bundle), one in (facts.active if facts else {}).items()
        if bundle == name
    }
    home = models_folder(settings.node.data_dir) / name
    labels = sorted({*installed(settings.node.data_dir, name), *wanted})
    return [_version(name, home / label, label, facts, wanted.get(label)) for label in labels]


def _version(
    name: str,
    folder: Path,
    label: str | None,
    facts: Activity | None,
    wanted: Installed | None = None,
) -> Entry:
    """A version as it lies there. label : of an installed one; wanted : what was activated"""
    version, _, calibration = (label or "").rpartition("+")
    entry: Entry = {
        "source": "configured" if label is None else "installed",
        "version": version,
        "calibration_id": calibration,
        "weights_sha256": "",
        "architecture": "",
        "labels": [],
        "folder": str(folder),
        "active": [],
        "is_loaded": None,
        "problem": "",
    }
    try:
        bundle = load_bundle(folder)
        found = identity(bundle)
        if label is not None and (found.folder != f"{name}/{label}" or wanted not in (None, found)):
            raise BundleError(f"{folder}: its files are not those that were activated")
    except BundleError as error:
        return {**entry, "problem": str(error)}
    entry["version"], entry["calibration_id"] = found.version, found.calibration_id
    entry["weights_sha256"] = found.weights_sha256[:12]
    entry["architecture"] = bundle.manifest.architecture
    entry["labels"] = [one.id for one in bundle.manifest.labels]
    if facts is not None and facts.loaded is not None:
        entry["is_loaded"] = (name, found.label) in facts.loaded
        refused = name if label is None else f"{name} {label}"
        entry["problem"] = facts.refused.get(refused, "")
    return entry


def _named(versions: list[Entry], label: str) -> Entry:
    # The first is the configured folder, which may have the same label.
    return next(v for v in versions[1:] if Path(v["folder"]).name == label)


def _use(tenant: str, one: Activation | None, *, is_shadow: bool) -> Entry:
    return {
        "tenant": tenant,
        "is_shadow": is_shadow,
        "since": one.since.isoformat(timespec="seconds") if one else None,
        "by": one.actor if one else "configuration",
        "previous": one.before.label if one and one.before else None,
    }


def _stops_somebody(version: Entry, facts: Activity | None) -> bool:
    """Whether what is wrong with a version matters; nobody waits for what is active nowhere."""
    is_wanted = bool(version["active"]) if facts is not None else version["source"] == "configured"
    return bool(version["problem"]) and is_wanted


def show(entries: list[Entry], console: Console) -> None:
    """For a terminal: a table of versions, then how the shadows compare."""
    table = Table("bundle", "version", "network", "for", "files", show_lines=True)
    for entry in entries:
        for version in entry["versions"]:
            table.add_row(
                entry["name"],
                _numbers(version),
                "\n".join([version["architecture"], ", ".join(version["labels"])]).strip(),
                "\n".join(_words(use) for use in version["active"]) or _nobody(entry),
                _state(version),
            )
    console.print(table)
    for reason in dict.fromkeys(entry["activity"] for entry in entries):
        if reason != "known":
            console.print(f"Which versions are active is {reason}", markup=False)
    shown = [one for entry in entries for one in entry["comparisons"]]
    for comparison_ in {tuple(one.items()): one for one in shown}.values():
        console.print(_compared(comparison_), soft_wrap=True, markup=False)


def _numbers(version: Entry) -> str:
    lines = [version["version"], f"+{version['calibration_id']}", version["weights_sha256"]]
    return "\n".join([*(line for line in lines if line.strip("+")), version["source"]])


def _words(use: Entry) -> str:
    shadow = " (shadow)" if use["is_shadow"] else ""
    if use["since"] is None:
        return f"{use['tenant']}{shadow} by configuration"
    before = f", before {use['previous']}" if use["previous"] else ""
    return f"{use['tenant']}{shadow} since {use['since']}{before}"


def _nobody(entry: Entry) -> str:
    return "-" if entry["activity"] == "known" else ", ".join(entry["tenants"]) or "-"


def _state(version: Entry) -> str:
    if version["problem"]:
        return str(version["problem"])
    if version["active"] and version["is_loaded"] is not None:
        return "whole, loaded" if version["is_loaded"] else "whole, not loaded yet"
    return "whole"


def _compared(one: Entry) -> str:
    """Every figure with the number of studies that it is of."""
    words = (
        f"{one['tenant']}: shadow {one['shadow']} {one['shadow_version']} beside "
        f"{one['serving']} {one['serving_version']}: "
    )
    if not one["n"]:
        return words + "no study yet of which both say PRESENT or absent"
    same = one["n_both_present"] + one["n_both_absent"]
    words += (
        f"agree on {same} of {one['n']} studies ({100 * one['agreement']:.0f} %; both PRESENT "
        f"{one['n_both_present']}, both absent {one['n_both_absent']}); PRESENT only by the shadow "
        f"{one['n_only_shadow']}, only by the one that serves {one['n_only_serving']}"
    )
    if one["mean_difference"] is None:
        return words
    words += f"; probability {100 * one['mean_difference']:+.1f} points"
    if one["correlation"] is not None:
        words += f", correlation {one['correlation']:.2f}"
    return f"{words} (n {one['n_probabilities']})"
