"""Versions of bundles under data_dir/models: known again by what they were when activated."""

import hashlib
from pathlib import Path

from db.activations import Installed
from db.files import models_folder
from inference.bundle import MANIFEST, Bundle, BundleError, load_bundle


def identity(bundle: Bundle) -> Installed:
    """What makes a version's numbers and words; two that share a label must share all of it."""
    manifest = bundle.manifest
    return Installed(
        bundle=manifest.name,
        version=manifest.version,
        calibration_id=bundle.calibration_id,
        weights_sha256=manifest.weights_sha256,
        manifest_sha256=hashlib.sha256((bundle.folder / MANIFEST).read_bytes()).hexdigest(),
    )


def load_installed(data_dir: Path, installed: Installed) -> Bundle:
    """An activated version, if it still is what was activated.

    Raises
    ------
    BundleError
        If a file is missing, damaged or another one than it was.
    """
    folder = models_folder(data_dir) / installed.folder
    bundle = load_bundle(folder)
    if identity(bundle) != installed:
        raise BundleError(f"{folder}: its files are not those that were activated")
    return bundle
