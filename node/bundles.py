"""Which model bundles there are: those shipped and those that the configuration names."""

from pathlib import Path
from typing import Any

import weights
from config.settings import Settings
from inference.bundle import MANIFEST, BundleError, load_bundle

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
