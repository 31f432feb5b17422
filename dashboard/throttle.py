"""Slowing down who guesses passwords, without letting anybody lock out somebody else."""

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from threading import Lock

WINDOW_S = 900.0
PER_PAIR = 6  # failures of one user from one address
PER_ADDRESS = 30  # failures of one address, whoever it claims to be
PER_USER = 100  # failures of one user from everywhere
_MAX_KEYS = 20_000


class Throttle:
    """Counts failed log-ins in a sliding window, in this process.

    A user under attack from many addresses can still sign in from an address where the password
    was right before, and always by a one-time link: the limit per user is no lock-out.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._failures: OrderedDict[tuple[str, str], deque[float]] = OrderedDict()
        self._trusted: OrderedDict[tuple[str, str], None] = OrderedDict()

    def wait_s(self, user: str, address: str) -> float:
        """Seconds until this user may try again from this address; 0 when now."""
        with self._lock:
            waits = [
                self._wait((user, address), PER_PAIR),
                self._wait(("", address), PER_ADDRESS),
            ]
            if (user, address) not in self._trusted:
                waits.append(self._wait((user, ""), PER_USER))
            return max(waits)

    def failed(self, user: str, address: str) -> None:
        now = self._clock()
        with self._lock:
            for key in ((user, address), ("", address), (user, "")):
                self._failures.setdefault(key, deque(maxlen=PER_USER)).append(now)
                self._failures.move_to_end(key)
            while len(self._failures) > _MAX_KEYS:
                self._failures.popitem(last=False)

    def succeeded(self, user: str, address: str) -> None:
        with self._lock:
            self._failures.pop((user, address), None)
            self._trusted[user, address] = None
            while len(self._trusted) > _MAX_KEYS:
                self._trusted.popitem(last=False)

    def _wait(self, key: tuple[str, str], limit: int) -> float:
        failures = self._failures.get(key)
        if not failures:
            return 0.0
        horizon = self._clock() - WINDOW_S
        while failures and failures[0] <= horizon:
            failures.popleft()
        if len(failures) < limit:
            return 0.0
        return failures[-limit] - horizon
