"""Who may do what, decided before any data set: titles, addresses, certificates and limits."""

import ipaddress
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from config.settings import ScpSettings, Settings, is_loopback
from config.tenants import Destination, Sender, Tenant

# Beyond all limits of storage, so that a C-ECHO is answered while every slot is taken.
VERIFICATION_SLOTS = 16


class Refusal(Enum):
    """A-ASSOCIATE-RJ result, source, reason (PS3.8 9.3.4)."""

    CALLED_AE = (1, 1, 7)
    CALLING_AE = (1, 1, 3)  # or its address, or its certificate: which one is for our log alone
    LIMIT = (2, 3, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """What is known of a peer that requests an association."""

    called_ae: str
    calling_ae: str
    address: str
    local_host: str = "127.0.0.1"  # the listener's
    tls_subject: str = ""  # RFC 4514; empty without a client certificate
    is_verification_only: bool = False  # or brings storage commitment alone: no data to keep

    def __post_init__(self) -> None:
        # Padding is not significant (PS3.5 6.2); some implementations pad with NUL.
        for name in ("called_ae", "calling_ae"):
            object.__setattr__(self, name, getattr(self, name).strip(" \0"))


@dataclass(frozen=True, slots=True)
class Admission:
    """An admitted peer."""

    tenant: Tenant
    caller: Caller
    may_store: bool
    may_ask: bool = False  # for storage commitment (N-ACTION)
    may_report: bool = False  # that it has committed itself to keep our results (N-EVENT-REPORT)

    @property
    def may_commit(self) -> bool:
        return self.may_ask or self.may_report


def judge(settings: Settings, caller: Caller) -> Admission | Refusal:
    """Decide by titles, address and certificate; `Limits` decides by number."""
    tenant = settings.by_ae_title.get(caller.called_ae)
    if tenant is None:
        return Refusal.CALLED_AE
    sender = next((one for one in tenant.senders if _is_sender(one, caller)), None)
    is_anyones = not tenant.senders and (
        settings.scp.allow_any_sender or is_loopback(caller.local_host)
    )
    destinations = [one for one in tenant.destinations if _is_destination(one, caller)]
    if not (sender or is_anyones or destinations):
        return Refusal.CALLING_AE
    return Admission(
        tenant,
        caller,
        may_store=bool(sender) or is_anyones,
        # The answer comes later, on an association of ours: where to must be known.
        may_ask=sender is not None and sender.port > 0 and tenant.keeps_for_good,
        may_report=any(one.commitment for one in destinations),
    )


def _is_sender(sender: Sender, caller: Caller) -> bool:
    return (
        sender.ae_title == caller.calling_ae
        and sender.admits(caller.address)
        and (not sender.tls_subject or _is_subject(sender.tls_subject, caller.tls_subject))
    )


def _is_subject(required: str, presented: str) -> bool:
    """Whether a certificate's subject is the one required: all of it, or its common name alone."""
    names = dict(part.partition("=")[::2] for part in presented.split(","))
    return bool(presented) and required in (presented, names.get("CN"))


def _is_destination(destination: Destination, caller: Caller) -> bool:
    return destination.ae_title == caller.calling_ae and _plain(caller.address) in _addresses(
        destination.host, int(time.monotonic() // 60)
    )


@lru_cache(maxsize=256)
def _addresses(host: str, minute: int) -> frozenset[str]:
    """The addresses of a host name; asked once a minute at most."""
    try:
        return frozenset(_plain(str(found[4][0])) for found in socket.getaddrinfo(host, None))
    except OSError:
        return frozenset()


def _plain(address: str) -> str:
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)


class LimitReached(Exception):
    """Too many associations; the peer may come back."""


class Limits:
    """Counts associations of this process; any thread may ask."""

    def __init__(self, settings: ScpSettings, processes: int = 1) -> None:
        # Each process has its share, rounded up: the peers are spread over them by the kernel.
        self._total = -(-settings.max_associations // processes)
        self._per_sender = -(-settings.max_per_sender // processes)
        self._per_minute = -(-settings.max_per_minute // processes)
        self._lock = threading.Lock()
        self._senders: Counter[tuple[str, str, str]] = Counter()
        self._verifying = 0
        self._recent: dict[str, deque[float]] = {}

    @contextmanager
    def slot(self, admission: Admission) -> Iterator[None]:
        """Hold a slot for as long as the association lives.

        Raises
        ------
        LimitReached
        """
        caller = admission.caller
        key = (admission.tenant.id, caller.calling_ae, caller.address)
        with self._lock:
            self._take(key, caller)
        try:
            yield
        finally:
            with self._lock:
                self._give_back(key, caller)

    def _take(self, key: tuple[str, str, str], caller: Caller) -> None:
        if caller.is_verification_only:
            if self._verifying >= VERIFICATION_SLOTS:
                raise LimitReached("verification")
            self._verifying += 1
            return
        self._check_rate(caller.address)
        if self._senders.total() >= self._total:
            raise LimitReached("associations")
        if self._senders[key] >= self._per_sender:
            raise LimitReached("associations of one sender")
        self._senders[key] += 1

    def _give_back(self, key: tuple[str, str, str], caller: Caller) -> None:
        if caller.is_verification_only:
            self._verifying -= 1
            return
        self._senders[key] -= 1
        self._senders += Counter()  # drops zeros: peers come from many addresses

    def _check_rate(self, address: str) -> None:
        now = time.monotonic()
        recent = self._recent.setdefault(address, deque())
        recent.append(now)
        while recent[0] < now - 60:
            recent.popleft()
        if len(self._recent) > 10_000:
            self._recent = {a: q for a, q in self._recent.items() if q[-1] > now - 60}
        if len(recent) > self._per_minute:
            recent.pop()  # what was refused does not count, or a retrying peer never comes in again
            raise LimitReached("associations of one address and minute")
