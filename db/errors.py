"""The two ways in which anything fails: try again later, or ask a person."""

from typing import ClassVar


class NodeError(Exception):
    """Any failure the node knows; its message never holds patient data.

    `code` is stable: logs, events and pages show it, and documentation names it.
    """

    code: ClassVar[str] = "node_error"


class TransientError(NodeError):
    """May pass by itself: the queue tries again with back-off and jitter."""

    code: ClassVar[str] = "transient"
    #: Whether a try that ends so is one of the tries that a job has. Faults of the node are not.
    counts: ClassVar[bool] = True


class PermanentError(NodeError):
    """Will not pass by itself: the study ends in a stated outcome that a person can read."""

    code: ClassVar[str] = "permanent"


class StaleAnalysis(TransientError):
    """Somebody else moved the analysis meanwhile; look again and decide again."""

    code: ClassVar[str] = "stale_analysis"


class IllegalMove(PermanentError):
    """The table of moves has no such move: a bug, never a default."""

    code: ClassVar[str] = "illegal_move"


class DatabaseAway(TransientError):
    """PostgreSQL does not answer."""

    code: ClassVar[str] = "database_away"
    counts = False


class DiskFull(TransientError):
    """The disk is under its watermark, or a write failed for want of space."""

    code: ClassVar[str] = "disk_full"
    counts = False


class NotDicom(PermanentError):
    """The bytes are no DICOM data set that can be read."""

    code: ClassVar[str] = "not_dicom"


class CutOff(NotDicom):
    """A DICOM data set that ends in the middle: its sender, or the line, lost the rest."""

    code: ClassVar[str] = "cut_off"


class ChildDied(TransientError):
    """A sandboxed child crashed, hung or passed one of its limits."""

    code: ClassVar[str] = "child_died"
