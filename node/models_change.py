"""`vigil models activate` and `rollback`: which version serves a tenant from now on."""

import getpass
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from sqlalchemy.orm import Session

from config.settings import Settings, load
from config.tenants import Tenant
from db import activations
from db.activations import Activation, Installed
from db.errors import PermanentError
from inference.bundle import Bundle, BundleError, load_bundle
from inference.installed import identity, load_installed
from inference.serving import load_configured
from node.bundles import configured, users_of
from node.database import opened
from node.models_install import (
    Source,
    VersionTaken,
    check_name,
    check_number,
    find,
    prove,
    settle,
    staged,
    taken,
)
from node.moved_thresholds import Cut, MovedThresholds, check_accepted, cuts, in_words


class NoSuchTenant(PermanentError):
    """A tenant that was named does not exist, or does not use the bundle."""

    code: ClassVar[str] = "no_such_tenant"


class OtherWeights(PermanentError):
    """A calibration belongs to the weights that it was fitted for."""

    code: ClassVar[str] = "other_weights"


def activate(
    text: str,
    tenant_ids: Sequence[str],
    calibration: Path | None,
    config: Path | None,
    *,
    accept_moved: bool = False,
) -> dict[str, Any]:
    """Check a version, copy it into data_dir and let it serve; says what has changed.

    accept_moved : also where its calibration moves the raw scores from which a tenant's are called

    Raises
    ------
    MovedThresholds
        If it does, unasked.
    NodeError
        Nothing has changed then.
    """
    settings = load(config)
    source = find(settings, text)
    bundle = _read(settings, source, calibration)
    tenants = _tenants(settings, bundle.name, tenant_ids)
    with ExitStack() as stack:
        if not source.is_installed or calibration is not None:
            bundle = stack.enter_context(staged(settings, source.folder, calibration))
        prove(bundle, tenants)
        engine = stack.enter_context(opened(settings, create=True))
        session = stack.enter_context(Session(engine))
        stack.enter_context(session.begin())
        activations.lock(session)
        active = activations.current(session)
        if activations.contradiction(session, identity(bundle)):
            raise VersionTaken(taken(identity(bundle), "those that were activated"))
        if calibration is not None:
            _check_weights(bundle, tenants, active)
        moved = {
            tenant.id: _cuts(
                settings,
                active.get((tenant.id, bundle.name)),
                bundle,
                tenant,
                is_needed=not accept_moved,
            )
            for tenant in tenants
        }
        check_accepted(moved, is_accepted=accept_moved)
        return _switch(session, settings, bundle, tenants, active, moved)


def _read(settings: Settings, source: Source, calibration: Path | None) -> Bundle:
    """The version as it lies there; errors name what was given, not our copy of it."""
    bundle = load_bundle(source.folder, calibration=calibration)
    check_name(settings, bundle)
    if not source.is_installed:
        check_number(settings, bundle)
    elif calibration is None and source.folder.name != identity(bundle).label:
        raise BundleError(f"{source.folder}: its files are not those that were activated")
    return bundle


def _switch(
    session: Session,
    settings: Settings,
    bundle: Bundle,
    tenants: Sequence[Tenant],
    active: Mapping[tuple[str, str], Activation],
    moved: Mapping[str, Sequence[Cut]],
) -> dict[str, Any]:
    """Files first, rows after them: a row never speaks of what is not there."""
    is_first = any((tenant.id, bundle.name) not in active for tenant in tenants)
    baseline = _baseline(settings, bundle.name) if is_first else None
    version = settle(settings, bundle)
    changed, before = {}, {}
    for tenant in tenants:
        one = active.get((tenant.id, version.bundle))
        before[tenant.id] = one.installed if one else baseline
        changed[tenant.id] = activations.activate(
            session,
            tenant.id,
            version,
            actor=_actor(),
            baseline=baseline,
            detail=_audited(moved[tenant.id]),
        )
    return _document(version, changed, before, moved)


def roll_back(name: str, tenant_ids: Sequence[str], config: Path | None) -> dict[str, Any]:
    """Go back, in each tenant, to what was active before; says what has changed.

    Raises
    ------
    NodeError
        Nothing has changed then.
    """
    settings = load(config)
    tenants = _tenants(settings, name, tenant_ids)
    with opened(settings) as engine, Session(engine) as session, session.begin():
        activations.lock(session)
        active = activations.current(session)
        if not tenant_ids:  # those that have something to go back to
            tenants = [one for one in tenants if _has_before(active, one, name)] or tenants
        results = []
        for tenant in tenants:
            target = activations.rollback_target(session, tenant.id, name)
            bundle = load_installed(settings.node.data_dir, target)
            prove(bundle, [tenant])
            was = active[tenant.id, name]
            # What serves may be damaged: that must not stand in the way back.
            moved = _cuts(settings, was, bundle, tenant, is_needed=False)
            activations.roll_back(session, tenant.id, name, actor=_actor(), detail=_audited(moved))
            results.append(
                _document(target, {tenant.id: True}, {tenant.id: was.installed}, {tenant.id: moved})
            )
    return {"bundle": name, "tenants": [one for made in results for one in made["tenants"]]}


def show(document: Mapping[str, Any], console: Console) -> None:
    """For a terminal."""
    for one in document["tenants"]:
        version = f"{document['bundle']} {one['version']}"
        if one["is_changed"]:
            before = f" (before: {one['before']})" if one["before"] else ""
            words = f"{one['tenant']}: {version} is active{before}"
        else:
            words = f"{one['tenant']}: {version} was active already"
        console.print(words, soft_wrap=True, markup=False)
        for line in one["thresholds"]:
            console.print(f"  {line['words']}", soft_wrap=True, markup=False)
    if not any(one["is_changed"] for one in document["tenants"]):
        return
    console.print(
        "Studies claimed from now on are judged by it; nothing is analysed again. `vigil models "
        "list` says when the inference has loaded it.",
        soft_wrap=True,
        markup=False,
    )


def _tenants(settings: Settings, bundle: str, wanted: Sequence[str]) -> list[Tenant]:
    users = users_of(settings, bundle)
    if strange := [one for one in wanted if one not in users]:
        raise NoSuchTenant(f"no tenant {strange[0]!r} uses the bundle {bundle}")
    if not users:
        raise NoSuchTenant(f"no tenant uses the bundle {bundle}")
    return [one for one in settings.tenants if one.id in (wanted or users)]


def _has_before(active: Mapping[tuple[str, str], Activation], tenant: Tenant, bundle: str) -> bool:
    one = active.get((tenant.id, bundle))
    return one is not None and one.before is not None


def _check_weights(
    bundle: Bundle, tenants: Sequence[Tenant], active: Mapping[tuple[str, str], Activation]
) -> None:
    """A new calibration alone must not bring older weights back unasked."""
    for tenant in tenants:
        one = active.get((tenant.id, bundle.name))
        if one and one.installed.weights_sha256 != bundle.manifest.weights_sha256:
            raise OtherWeights(
                f"{tenant.id} has {bundle.name} {one.installed.version} active, whose weights are "
                f"others: name it, as {bundle.name}@{one.installed.version}, or activate "
                f"{bundle.manifest.version} first"
            )


def _cuts(
    settings: Settings,
    now: Activation | None,
    bundle: Bundle,
    tenant: Tenant,
    *,
    is_needed: bool,
) -> tuple[Cut, ...]:
    """Where the tenant's thresholds cut, with what serves it now and with `bundle`.

    is_needed : whether not to know it is an error

    Raises
    ------
    MovedThresholds
        If what serves cannot be read, where that is needed.
    """
    if now is None:
        try:
            return cuts(load_configured(configured(settings)[bundle.name]), bundle, tenant)
        except BundleError:  # it serves nobody as it is
            return ()
    was = now.installed
    if was.weights_sha256 != bundle.manifest.weights_sha256:
        return ()
    if was.calibration_id == bundle.calibration_id:
        return ()  # its files may be damaged, which this activation is to put right
    try:
        return cuts(load_installed(settings.node.data_dir, was), bundle, tenant)
    except BundleError as error:
        if not is_needed:
            return ()
        raise MovedThresholds(
            f"{tenant.id}: {error}; so how far its thresholds move is not known. Nothing has "
            "changed; --accept-moved-thresholds activates it all the same"
        ) from None


def _audited(moved: Sequence[Cut]) -> dict[str, str]:
    return {"thresholds": in_words(moved)} if moved else {}


def _baseline(settings: Settings, name: str) -> Installed | None:
    """A copy of what serves by configuration alone, so that there is a way back to it."""
    try:
        bundle = load_configured(configured(settings)[name])
        check_name(settings, bundle)
        check_number(settings, bundle)
        with staged(settings, bundle.folder) as copy:
            return settle(settings, copy)
    except PermanentError:  # it does not serve as it is: nobody wants it back
        return None


def _document(
    version: Installed,
    changed: Mapping[str, bool],
    before: Mapping[str, Installed | None],
    moved: Mapping[str, Sequence[Cut]],
) -> dict[str, Any]:
    return {
        "bundle": version.bundle,
        "tenants": [
            {
                "tenant": tenant,
                "version": version.label,
                "weights_sha256": version.weights_sha256,
                "folder": version.folder,
                "is_changed": is_changed,
                "before": was.label if (was := before[tenant]) else None,
                "thresholds": [cut.to_json() for cut in moved[tenant]],
            }
            for tenant, is_changed in changed.items()
        ],
    }


def _actor() -> str:
    return f"cli:{getpass.getuser()}"
