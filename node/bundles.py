"""Which model bundles there are: those shipped and those that the configuration names."""

from pathlib import Path
from typing import Any

import weights
from config.settings import Settings
from inference.bundle import MANIFEST, BundleError, load_bundle
from inference.bundle import check_overrides as bundle_overrides

SHIPPED = Path(weights.__file__).parent


def folder_of(model: str) -> Path:
    """A shipped bundle by its name, or any by its folder."""
    shipped = SHIPPED / model
    return shipped if "/" not in model and shipped.is_dir() else Path(model)


def listed(settings: Settings) -> list[dict[str, Any]]:
    """One entry a bundle; a file that is missing or altered is named in `problem`."""
    configured = [folder_of(model) for model in settings.inference.models]
    shipped = sorted(path.parent for path in SHIPPED.glob(f"*/{MANIFEST}"))
    return [_entry(folder, settings) for folder in dict.fromkeys([*configured, *shipped])]


def check_overrides(settings: Settings) -> None:
    """Refuse a tenant's thresholds and prevalences that could never take effect.

    Raises
    ------
    BundleError
        For one that names no validated label; a bundle that cannot be read is its stage's to tell.
    """
    for model in settings.inference.models:
        try:
            bundle = load_bundle(folder_of(model))
        except BundleError:
            continue
        for tenant in settings.tenants:
            bundle_overrides(bundle, tenant.thresholds, tenant.prevalence)


def _entry(folder: Path, settings: Settings) -> dict[str, Any]:
    tenants = [
        f"{tenant.id} (shadow)" if folder.name in tenant.shadow else tenant.id
        for tenant in settings.tenants
        if folder.name in (*tenant.models, *tenant.shadow)
    ]
    entry: dict[str, Any] = {
        "name": folder.name,
        "folder": str(folder),
        "version": "",
        "architecture": "",
        "labels": [],
        "tenants": tenants,
        "problem": "",
    }
    try:
        manifest = load_bundle(folder).manifest
    except BundleError as error:
        return {**entry, "problem": str(error)}
    labels = [label.id for label in manifest.labels]
    return {
        **entry,
        "name": manifest.name,
        "version": manifest.version,
        "architecture": manifest.architecture,
        "labels": labels,
    }
