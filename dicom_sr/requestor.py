"""Answers to the one who asked: keeps pynetdicom's own thread from taking them off the queue.

A requestor's association has a thread that looks for incoming messages, and pauses it during each
send_*(). Whether it has paused is read from a flag that is stale for a moment after the last send:
on a busy machine the thread runs on, takes the answer to the second C-STORE for a request, and the
sender waits for it in vain (pynetdicom 3.0.4, seen here as a time-out of 60 s after the peer had
stored the object). Here it is held at one gate from the first send to the release.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pynetdicom.association import Association

_LOOK_AGAIN_S = 0.1


class _Gate(threading.Event):
    """Takes the checkpoint's place: whoever waits here goes on when the holder says so."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.reached.set()
        return super().wait(timeout)

    def set(self) -> None:
        """Not by pynetdicom, after each send."""

    def open(self) -> None:
        super().set()


@contextmanager
def sole_reader(association: Association) -> Iterator[None]:
    """Hold the association's thread; the association is released at the end, if it still stands."""
    checkpoint, gate = association._reactor_checkpoint, _Gate()
    association._reactor_checkpoint = gate
    # An association that has just ended never comes to the gate.
    while association.is_established and not gate.reached.wait(_LOOK_AGAIN_S):
        pass
    try:
        yield
    finally:
        if association.is_established:
            association.release()
        association._reactor_checkpoint = checkpoint
        checkpoint.set()
        gate.open()
