"""The fleet: every version that a tenant has active, loaded once, beside the one before it."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import structlog
import torch
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from config.settings import Settings
from db import activations, notices
from db.activations import Installed, Version
from db.errors import DatabaseAway, PermanentError
from db.files import models_folder
from db.process import Stop
from inference.bundle import MANIFEST, Bundle, BundleError, check_overrides, read_manifest
from inference.device import Device
from inference.installed import load_installed
from inference.manifest import Manifest
from inference.serving import Refused, Served, bundle_folder, load_configured, make_served

log = structlog.get_logger()

POLL_S = 1.0
#: Until a version that was refused is tried again: somebody may have put its files back.
RETRY_S = 30.0


class OverrideRefused(BundleError):
    """A tenant's thresholds or prevalences could never take effect with its version."""

    code: ClassVar[str] = "override_invalid"


class Fleet:
    """Follows the activations; any thread may look at `served`, a mapping that never changes.

    A version is let go of when nobody wants it: a study under way holds its own for as long as it
    needs it.
    """

    def __init__(self, engine: Engine, settings: Settings, device: Device) -> None:
        self._engine = engine
        self._device = device
        self._data_dir = settings.node.data_dir
        self._tenants = settings.tenants
        self._models = dict(zip(settings.model_names, settings.inference.models, strict=True))
        self._served: Mapping[Version, Served] = {}
        self._refused: Mapping[Version, Refused] = {}
        self._retry_at: dict[Version, float] = {}  # monotonic

    @property
    def served(self) -> Mapping[Version, Served]:
        return self._served

    @property
    def refused(self) -> Mapping[Version, Refused]:
        """What tenants have active and this process cannot serve; their studies wait."""
        return self._refused

    def first(self, stop: Stop) -> None:
        """Load what is active, however long the database is away, or until told to stop."""
        while not self._try_refresh() and not stop.wait(POLL_S):
            pass

    def run(self, stop: Stop) -> None:
        """Follow the activations until told to stop."""
        while not stop.wait(POLL_S):
            self._try_refresh()

    def refresh(self) -> None:
        """Load what is new, then let go of what nobody wants any more."""
        wanted = self._wanted()
        for version, (installed, tenants) in wanted.items():
            is_due = time.monotonic() >= self._retry_at.get(version, 0.0)
            if version not in self._served and is_due:
                self._take_in(version, installed, tenants)
        for version in self._served.keys() - wanted.keys():
            log.info("model_released", **_fields(version, self._served[version]))
        self._served = {key: one for key, one in self._served.items() if key in wanted}
        self._refused = {key: one for key, one in self._refused.items() if key in wanted}

    def present(self) -> None:
        """Have the database know what the versions call themselves, for what has no finding."""
        for version, one in self._served.items():
            self._present(version, one)

    def manifest_of(self, version: Version) -> Manifest | None:
        """The rules that a version judges by, whether it serves or not; None if they are gone."""
        if version in self._served:
            return self._served[version].bundle.manifest
        try:
            return read_manifest(self._folder(version) / MANIFEST)
        except BundleError:
            return None

    def detail(self) -> dict[str, Any]:
        """What this process says of itself in its heartbeat."""
        models: dict[str, set[str]] = {}
        for version, one in self._served.items():
            models.setdefault(version.bundle, set()).add(_label(one.bundle))
        return {
            "device": str(self._device.device),
            "models": {name: ", ".join(sorted(labels)) for name, labels in models.items()},
            "refused": {
                one.name: {"code": one.code, "reason": one.reason} for one in self._refused.values()
            },
        }

    def _try_refresh(self) -> bool:
        try:
            self.refresh()
        except DBAPIError:
            log.warning("database_away", exc_code=DatabaseAway.code)
            return False
        return True

    def _wanted(self) -> dict[Version, tuple[Installed | None, list[str]]]:
        """Version -> where it is installed, and the tenants that want it."""
        pairs = {
            (tenant.id, bundle)
            for tenant in self._tenants
            for bundle in (*tenant.models, *tenant.shadow)
        }
        with Session(self._engine) as session:
            active = activations.current(session)
            # What was begun before a tenant or its bundle left the configuration is ended.
            pairs |= activations.at_work(session)
        wanted: dict[Version, tuple[Installed | None, list[str]]] = {}
        for tenant, bundle in sorted(pairs):
            if bundle not in self._models:
                continue
            one = active.get((tenant, bundle))
            installed = one.installed if one else None
            version = Version(bundle, installed.folder if installed else "")
            wanted.setdefault(version, (installed, []))[1].append(tenant)
        return wanted

    def _take_in(self, version: Version, installed: Installed | None, tenants: list[str]) -> None:
        started = time.monotonic()
        try:
            served = self._load(version, installed, tenants)
        except (PermanentError, torch.OutOfMemoryError) as error:
            self._refuse(version, error)
            return
        # Before the first study: a notice may have to say of what it speaks.
        self._present(version, served)
        self._served = {**self._served, version: served}
        self._refused = {key: one for key, one in self._refused.items() if key != version}
        self._retry_at.pop(version, None)
        log.info(
            "model_loaded",
            **_fields(version, served),
            device=str(self._device.device),
            numerics=served.numerics,
            duration_s=round(time.monotonic() - started, 2),
        )

    def _load(self, version: Version, installed: Installed | None, tenants: list[str]) -> Served:
        bundle = (
            load_installed(self._data_dir, installed)
            if installed is not None
            else load_configured(self._folder(version))
        )
        for tenant in self._tenants:
            if tenant.id in tenants:
                _check_overrides(bundle, tenant.id, tenant.thresholds, tenant.prevalence)
        with self._device.call():
            return make_served(bundle, self._device.device)

    def _refuse(self, version: Version, error: Exception) -> None:
        code = error.code if isinstance(error, PermanentError) else "device_fault"
        name = version.folder.replace("/", " ", 1) or version.bundle
        refused = Refused(name, code, str(error))
        was = self._refused.get(version)
        if was is None or was.code != code:  # once, not with every try
            log.error("model_refused", bundle=version.bundle, version=name, exc_code=code)
        self._refused = {**self._refused, version: refused}
        self._retry_at[version] = time.monotonic() + RETRY_S

    def _present(self, version: Version, one: Served) -> None:
        with Session(self._engine) as session, session.begin():
            identity = one.bundle.identity(one.numerics)
            output = one.bundle.manifest.output
            notices.present(session, identity, output, folder=version.folder)

    def _folder(self, version: Version) -> Path:
        if version.folder:
            return models_folder(self._data_dir) / version.folder
        return bundle_folder(self._models[version.bundle])


def _check_overrides(
    bundle: Bundle, tenant: str, thresholds: Mapping[str, float], prevalence: Mapping[str, float]
) -> None:
    try:
        check_overrides(bundle, thresholds, prevalence)
    except BundleError as error:
        raise OverrideRefused(f"tenant {tenant}: {error}") from None


def _label(bundle: Bundle) -> str:
    return f"{bundle.manifest.version}+{bundle.calibration_id}"


def _fields(version: Version, one: Served) -> dict[str, str]:
    return {"bundle": version.bundle, "version": _label(one.bundle)}
