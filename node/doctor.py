"""`vigil doctor`: everything that has to work, tried one by one, each with what to do about it."""

import os
import shutil
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from config.settings import Settings, load
from config.tenants import Tenant
from db.activations import Installed
from db.errors import NodeError
from node import send
from node.database import opened
from node.terminal import FAILED, SUCCESS, report

CERTIFICATE_WARNING_DAYS = 30
CLOCK_WARNING_S = 2.0
SLOW_SYNC_S = 0.2


class Grade(StrEnum):
    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried."""

    name: str
    grade: Grade
    found: str
    advice: str = ""


Checks = Iterator[Check]
_MARKS = {Grade.GOOD: "[green]✓[/]", Grade.WARNING: "[yellow]![/]", Grade.BAD: "[red]✗[/]"}


def run(config: Path | None, *, as_json: bool) -> int:
    """Try everything, print as it goes; FAILED when something is bad."""
    settings = load(config)
    found: list[Check] = []
    console = Console(highlight=False, quiet=as_json)
    for part in PARTS:
        for check in part(settings):
            found.append(check)
            _show(check, console)
    bad = sum(check.grade is Grade.BAD for check in found)
    document = {"ok": not bad, "checks": [asdict(check) for check in found]}
    report(document, lambda _, to: to.print(_verdict(found)), as_json=as_json)
    return FAILED if bad else SUCCESS


def configuration(settings: Settings) -> Checks:
    for tenant in settings.tenants:
        name = f"tenant {tenant.id}"
        if not tenant.senders:
            yield Check(name, Grade.WARNING, "accepts any sender", "list its senders")
        if not tenant.destinations:
            advice = "add a destination, unless the dashboard alone is meant to show results"
            yield Check(name, Grade.WARNING, "has no destination", advice)
        if tenant.senders and tenant.destinations:
            words = f"{len(tenant.senders)} senders, {len(tenant.destinations)} destinations"
            yield Check(name, Grade.GOOD, words)


def disk(settings: Settings) -> Checks:
    """Room, and how long the sync takes that every received image waits for."""
    folder = settings.node.data_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free_mb = shutil.disk_usage(folder).free // 2**20
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            file.write(bytes(512 * 1024))
            started = time.monotonic()
            file.flush()
            os.fsync(file.fileno())
            took = time.monotonic() - started
    except OSError as error:
        yield Check("disk", Grade.BAD, f"{folder}: {os.strerror(error.errno or 0)}", "check rights")
        return
    is_low = free_mb < settings.node.min_free_mb
    words = f"{free_mb:,} MB free, watermark {settings.node.min_free_mb:,} MB"
    advice = "below the watermark the node answers 0xA700: make room"
    yield Check("disk", Grade.BAD if is_low else Grade.GOOD, words, advice if is_low else "")
    is_slow = took > SLOW_SYNC_S
    advice = "reception waits for this with every image: use a faster disk" if is_slow else ""
    grade = Grade.WARNING if is_slow else Grade.GOOD
    yield Check("disk sync", grade, f"{1000 * took:.1f} ms for one image", advice)


def database(settings: Settings) -> Checks:
    try:
        with opened(settings) as engine, engine.connect() as connection:
            version = connection.scalar(text("SHOW server_version"))
            theirs = float(connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())")))
            schema = connection.scalar(text("SELECT version_num FROM alembic_version"))
    except NodeError as error:
        yield Check("database", Grade.WARNING, str(error), "start the node once")
        return
    except SQLAlchemyError as error:
        advice = "check node.database_url and that the server runs; `vigil db upgrade`"
        yield Check("database", Grade.BAD, type(error).__name__, advice)
        return
    yield Check("database", Grade.GOOD, f"PostgreSQL {version}, schema {schema}")
    skew = abs(time.time() - theirs)
    is_off = skew > CLOCK_WARNING_S
    advice = "synchronise both clocks (NTP)" if is_off else ""
    grade = Grade.WARNING if is_off else Grade.GOOD
    yield Check("clock", grade, f"{skew:.1f} s from the database's", advice)


def receiver(settings: Settings) -> Checks:
    """C-ECHO to ourselves, as a scanner would."""
    host = "127.0.0.1" if settings.scp.host in ("0.0.0.0", "") else settings.scp.host
    if not settings.scp.port:
        yield Check("receiver", Grade.WARNING, "has no fixed plain port; not tried")
        return
    for tenant in settings.tenants:
        name = f"receiver as {tenant.ae_titles[0]}"
        calling = _local_sender(tenant)
        if calling is None:
            yield Check(
                name, Grade.WARNING, "no sender of this tenant may call from here; not tried"
            )
            continue
        peer = send.Peer(host, settings.scp.port, tenant.ae_titles[0], calling)
        at = f"{peer.host}:{peer.port}"
        yield _echo(name, at, partial(send.echo, peer), "is the node running? `vigil serve`")


def destinations(settings: Settings) -> Checks:
    """C-ECHO to every archive, over the same kind of line as deliveries."""
    from dicom_sr.association import echo, peer_of

    for tenant in settings.tenants:
        for destination in tenant.destinations:
            name = f"{tenant.id}: {destination.name}"
            yield _echo(
                name,
                f"{destination.host}:{destination.port}",
                partial(echo, peer_of(tenant, destination, settings.scp)),
                "check address, AE titles, certificates and firewall; the archive must know us",
            )


def certificates(settings: Settings) -> Checks:
    if not settings.scp.tls_port:
        return
    for name, path in (("tls_cert", settings.scp.tls_cert), ("tls_ca", settings.scp.tls_ca)):
        if path:
            yield _certificate(f"scp.{name}", Path(path))
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.scp.tls_cert, settings.scp.tls_key)
    except (OSError, ssl.SSLError) as error:
        reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        yield Check("scp.tls_key", Grade.BAD, str(reason), "key and certificate must be a pair")


def models(settings: Settings) -> Checks:
    """Hashes, and the bundle's own reference inputs on the device that will serve."""
    import torch

    from inference.serving import load_served, pick_device

    try:
        device = pick_device(settings.inference.device)
    except NodeError as error:
        yield Check("device", Grade.BAD, str(error), "set inference.device, or install the driver")
        return
    has_gpu = torch.cuda.is_available()
    words = torch.cuda.get_device_name(device) if has_gpu and device.type == "cuda" else str(device)
    yield Check("device", Grade.GOOD, words)
    served, refused = load_served(settings.inference.models, device)
    for name, one in served.items():
        words = f"version {one.bundle.manifest.version}, files whole, {one.numerics} agrees"
        yield Check(f"model {name}", Grade.GOOD, words)
    for bad in refused:
        advice = "put the bundle's files back as they were delivered"
        yield Check(f"model {bad.name}", Grade.BAD, bad.reason, advice)


def activated(settings: Settings) -> Checks:
    """The versions that tenants have active in place of what is configured."""
    from inference.installed import load_installed
    from inference.serving import make_served, pick_device
    from node.models_list import active

    users: dict[Installed, list[str]] = {}
    for (tenant, _), one in sorted((active(settings) or {}).items()):
        users.setdefault(one.installed, []).append(tenant)
    for version, tenants in users.items():
        name = f"model {version.bundle} for {', '.join(tenants)}"
        try:
            bundle = load_installed(settings.node.data_dir, version)
            numerics = make_served(bundle, pick_device(settings.inference.device)).numerics
        except NodeError as error:
            advice = "`vigil models activate` its folder again, or `vigil models rollback`"
            yield Check(name, Grade.BAD, f"version {version.label}: {error}", advice)
            continue
        words = f"version {version.label}, files whole, {numerics} agrees"
        yield Check(name, Grade.GOOD, words)


def phantom(settings: Settings) -> Checks:
    """A synthetic study from file to DICOM objects, without network: nothing reaches an archive."""
    from node.predict import trial

    for model in settings.inference.models:
        name = f"phantom through {Path(model).name}"
        started = time.monotonic()
        try:
            words = trial(settings, model)
        except NodeError as error:
            yield Check(name, Grade.BAD, f"{error.code}: {error}", "see the model's check")
            continue
        yield Check(name, Grade.GOOD, f"{words} in {time.monotonic() - started:.1f} s")


PARTS: tuple[Callable[[Settings], Checks], ...] = (
    configuration, disk, database, receiver, destinations, certificates, models, activated, phantom,
)  # fmt: skip


def _local_sender(tenant: Tenant) -> str | None:
    """An AE title under which this machine may call the tenant."""
    if not tenant.senders:
        return "VIGIL_DOCTOR"
    found = (s.ae_title for s in tenant.senders if s.admits("127.0.0.1") and not s.tls_subject)
    return next(found, None)


def _echo(name: str, at: str, ask: Callable[[], str | None], advice: str) -> Check:
    started = time.monotonic()
    if problem := ask():
        return Check(name, Grade.BAD, f"{at} {problem.replace('_', ' ')}", advice)
    took = 1000 * (time.monotonic() - started)
    return Check(name, Grade.GOOD, f"{at} answers C-ECHO in {took:.0f} ms")


def _certificate(name: str, path: Path) -> Check:
    try:
        # The one decoder that the standard library has for a certificate in a file.
        decoded: dict[str, Any] = ssl._ssl._test_decode_cert(str(path))  # type: ignore[attr-defined]
    except (OSError, ssl.SSLError, ValueError):
        return Check(name, Grade.BAD, f"{path} cannot be read", "a PEM certificate is needed")
    days = (ssl.cert_time_to_seconds(decoded["notAfter"]) - time.time()) / 86400
    if days < 0:
        return Check(name, Grade.BAD, f"expired {-days:.0f} days ago", "renew it")
    grade = Grade.WARNING if days < CERTIFICATE_WARNING_DAYS else Grade.GOOD
    return Check(name, grade, f"valid for {days:.0f} days", "renew it soon" if days < 30 else "")


def _show(check: Check, console: Console) -> None:
    console.print(f"{_MARKS[check.grade]} {check.name:24} {check.found}")
    if check.advice:
        console.print(f"  [dim]{'':24} {check.advice}[/]")


def _verdict(checks: list[Check]) -> str:
    bad = sum(check.grade is Grade.BAD for check in checks)
    warnings = sum(check.grade is Grade.WARNING for check in checks)
    if bad:
        return f"[red]{bad} of {len(checks)} checks failed[/]"
    return f"[green]all {len(checks)} checks passed[/]" + (
        f", {warnings} with a remark" if warnings else ""
    )
