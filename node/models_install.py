"""Versions of bundles copied into data_dir: whole, checked and durable before they serve."""

import filecmp
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from config.settings import Settings
from config.tenants import Tenant
from db.activations import Installed
from db.errors import PermanentError
from db.files import copy_durably, make_folder, models_folder, storage_errors, sync_folder
from inference.bundle import (
    CALIBRATION,
    MANIFEST,
    REFERENCE,
    WEIGHTS,
    Bundle,
    BundleError,
    check_overrides,
    load_bundle,
)
from inference.installed import identity, load_installed
from node.bundles import configured, installed

#: What a bundle is made of (docs/bundles.md); nothing else of its folder is taken along.
FILES = (MANIFEST, WEIGHTS, CALIBRATION, REFERENCE, "MODEL_CARD.md")
FOLDERS = ("report",)
# It names a folder, and stands in reports.
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,31}")


class UnknownBundle(PermanentError):
    """What was named is no bundle that could be activated."""

    code: ClassVar[str] = "bundle_unknown"


class VersionTaken(PermanentError):
    """A version's number belongs to other files already: reports could not tell them apart."""

    code: ClassVar[str] = "version_taken"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a version comes from."""

    folder: Path
    is_installed: bool  # under data_dir already


def find(settings: Settings, text: str) -> Source:
    """A configured bundle by its name, an installed version as name@version, or any folder.

    Raises
    ------
    UnknownBundle
    """
    if text in settings.model_names:
        return Source(configured(settings)[text], is_installed=False)
    name, at, wanted = text.partition("@")
    if at and name in settings.model_names:
        return Source(_installed_folder(settings, name, wanted), is_installed=True)
    if not Path(text).is_dir():
        known = ", ".join(settings.model_names)
        raise UnknownBundle(
            f"{text}: neither a folder nor one of {known}, or one of these @version"
        )
    return Source(Path(text), is_installed=False)


def _installed_folder(settings: Settings, name: str, wanted: str) -> Path:
    found = installed(settings.node.data_dir, name)
    labels = [label for label in found if wanted in (label, label.rpartition("+")[0])]
    if len(labels) == 1:
        return found[labels[0]]
    if labels:
        several = ", ".join(f"{name}@{label}" for label in labels)
        raise UnknownBundle(f"{name}@{wanted} is several: {several}")
    known = ", ".join(f"{name}@{label}" for label in found) or "none"
    raise UnknownBundle(f"{name}@{wanted} is not installed; installed: {known}")


def prove(bundle: Bundle, tenants: Sequence[Tenant]) -> None:
    """Whether a version can serve these tenants: their thresholds, and its own reference in fp32.

    Raises
    ------
    BundleError, ReferenceMissed
    """
    from inference.model import check_reference, load_model  # torch: only once all else is right

    for tenant in tenants:
        try:
            check_overrides(bundle, tenant.thresholds, tenant.prevalence)
        except BundleError as error:
            raise BundleError(f"tenant {tenant.id}: {error}") from None
    check_reference(bundle, load_model(bundle))


def check_name(settings: Settings, bundle: Bundle) -> None:
    """Refuse what no tenant could use, or what cannot be told from another version.

    Raises
    ------
    UnknownBundle, BundleError
    """
    name, version = bundle.name, bundle.manifest.version
    if name not in settings.model_names:
        known = ", ".join(settings.model_names)
        raise UnknownBundle(f"{bundle.folder}: is {name!r}, which is not one of {known}")
    if not _VERSION.fullmatch(version):
        raise BundleError(
            f"{bundle.folder / MANIFEST}: version: {version!r} has other characters than letters, "
            "digits and . _ + -, or more than 32"
        )


def check_number(settings: Settings, bundle: Bundle) -> None:
    """Refuse the version number of the configured folder for other files than it has.

    What was activated before is the database's to tell: its files may have been altered since.

    Raises
    ------
    VersionTaken
    """
    folder = configured(settings)[bundle.name]
    try:
        other = identity(load_bundle(folder))
    except BundleError:  # a damaged one keeps nobody from putting it right
        return
    if identity(bundle).contradicts(other):
        raise VersionTaken(taken(other, str(folder)))


def taken(version: Installed, where: str) -> str:
    return (
        f"{version.bundle} {version.version} is known already with other files ({where}): give "
        "this one a version of its own in its manifest"
    )


@contextmanager
def staged(settings: Settings, folder: Path, calibration: Path | None = None) -> Iterator[Bundle]:
    """A durable copy of a bundle, gone again unless `settle` gives it its name.

    A copy and no link: what is written into a linked file later would change what serves.

    Raises
    ------
    DiskFull, StorageError, BundleError
    """
    home = models_folder(settings.node.data_dir)
    stage = home / f".{uuid.uuid4().hex}.part"
    try:
        for name in FILES:
            source = calibration if calibration and name == CALIBRATION else folder / name
            if source.is_file():
                copy_durably(source, stage / name)
        for path in (path for name in FOLDERS for path in sorted((folder / name).rglob("*"))):
            if path.is_file():
                copy_durably(path, stage / path.relative_to(folder))
        yield load_bundle(stage)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def settle(settings: Settings, bundle: Bundle) -> Installed:
    """Give a staged version its place; one that lies there damaged is replaced.

    Raises
    ------
    DiskFull, StorageError
    """
    made = identity(bundle)
    target = models_folder(settings.node.data_dir) / made.folder
    with storage_errors():
        make_folder(target.parent)
        if target.exists():
            if _is_whole(settings, made, bundle.folder):
                return made
            aside = target.with_name(f".{uuid.uuid4().hex}.old")
            os.rename(target, aside)
            shutil.rmtree(aside)
        os.rename(bundle.folder, target)
        sync_folder(target.parent)
        sync_folder(bundle.folder.parent)
    return made


def _is_whole(settings: Settings, version: Installed, source: Path) -> bool:
    """Whether a version lies there as it should, its reference inputs among the rest."""
    try:
        lying = load_installed(settings.node.data_dir, version)
        return filecmp.cmp(source / REFERENCE, lying.reference, shallow=False)
    except (BundleError, FileNotFoundError):
        return False
