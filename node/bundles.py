"""Which model bundles there are: shipped, configured, and installed by an activation."""

from collections.abc import Mapping
from pathlib import Path

import weights
from config.settings import Settings
from db.activations import Activation, Installed, Version
from db.files import models_folder
from inference.bundle import MANIFEST, Bundle, BundleError, load_bundle
from inference.bundle import check_overrides as bundle_overrides
from inference.installed import load_installed

SHIPPED = Path(weights.__file__).parent


def folder_of(model: str) -> Path:
    """A shipped bundle by its name, or any by its folder."""
    shipped = SHIPPED / model
    return shipped if "/" not in model and shipped.is_dir() else Path(model)


def configured(settings: Settings) -> dict[str, Path]:
    """Bundle name to the folder that the configuration has for it."""
    models = zip(settings.model_names, settings.inference.models, strict=True)
    return {name: folder_of(model) for name, model in models}


def shipped() -> dict[str, Path]:
    """Bundle name to its folder, of what comes with the node."""
    return {path.parent.name: path.parent for path in sorted(SHIPPED.glob(f"*/{MANIFEST}"))}


def installed(data_dir: Path, bundle: str) -> dict[str, Path]:
    """Label to folder of each version of a bundle under data_dir, whole or not."""
    found = (models_folder(data_dir) / bundle).glob(f"*/{MANIFEST}")
    return {path.parent.name: path.parent for path in sorted(found)}


def users_of(settings: Settings, bundle: str) -> dict[str, bool]:
    """The tenants that use a bundle, and whether as a shadow."""
    return {
        tenant.id: bundle in tenant.shadow
        for tenant in settings.tenants
        if bundle in (*tenant.models, *tenant.shadow)
    }


def check_overrides(
    settings: Settings, active: Mapping[tuple[str, str], Activation] | None
) -> None:
    """Refuse a tenant's thresholds and prevalences that could never take effect.

    active : by tenant and bundle; None where it is not known: the configured folders are asked

    Raises
    ------
    BundleError
        For one that names no validated label; a bundle that cannot be read is its stage's to tell.
    """
    known: dict[Version, Bundle | None] = {}
    for tenant in settings.tenants:
        for name in (*tenant.models, *tenant.shadow):
            one = (active or {}).get((tenant.id, name))
            version = Version(name, one.installed.folder if one else "")
            if version not in known:
                known[version] = _readable(settings, name, one.installed if one else None)
            if bundle := known[version]:
                bundle_overrides(bundle, tenant.thresholds, tenant.prevalence)


def _readable(settings: Settings, name: str, version: Installed | None) -> Bundle | None:
    try:
        if version is not None:
            return load_installed(settings.node.data_dir, version)
        return load_bundle(configured(settings)[name])
    except BundleError:
        return None
