"""Jobs: their kinds, states and lanes, and how long a failed one waits."""

from enum import IntEnum, StrEnum


class JobKind(StrEnum):
    INFER = "INFER"  # pixels to a finding
    BUILD = "BUILD"  # a finding to DICOM objects and outbox rows
    NOTICE = "NOTICE"  # no finding: a page that says so, where a destination asks for one


class JobState(StrEnum):
    TODO = "TODO"
    DOING = "DOING"  # claimed under a lease
    DONE = "DONE"
    FAILED = "FAILED"


class Lane(IntEnum):
    """How urgent a study's work is; lower runs first, and ageing lifts what waits."""

    STAT = 0
    URGENT = 1
    ROUTINE = 2


def lane(name: str) -> Lane:
    """The lane that the configuration calls `stat`, `urgent` or `routine`."""
    return Lane[name.upper()]


#: Tries before a job that fails for want of something is given up. Device faults never count.
MAX_ATTEMPTS = 8
BACKOFF_FIRST_S = 2.0
BACKOFF_MAX_S = 900.0


def backoff_s(attempts: int, jitter: float, longest_s: float = BACKOFF_MAX_S) -> float:
    """Exponential back-off in seconds after the `attempts`-th failure (1, 2, ...).

    `jitter` is drawn from 0..1 by the caller and takes off up to a quarter, so that
    what failed together does not come back together.
    """
    wait = min(BACKOFF_FIRST_S * 2.0 ** min(max(attempts - 1, 0), 32), longest_s)
    return wait * (1.0 - 0.25 * jitter)
