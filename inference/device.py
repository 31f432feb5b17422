"""The device: runs batches, halves them when memory runs out, grows them again later."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import nn

from db.errors import TransientError
from inference.model import logits

log = structlog.get_logger()
_T = TypeVar("_T")

#: Batches at a halved size before the full size is tried again.
RECOVER_AFTER = 50
WATCH_S = 1.0
HUNG = 1  # exit status of a process whose device hangs
#: How torch's plain RuntimeErrors begin that are the device's: of its driver and its libraries.
_OF_THE_DEVICE = ("CUDA", "cuDNN", "cublas", "No CUDA", "Found no NVIDIA")


class DeviceFault(TransientError):
    """The device failed, not the study: it never counts against one."""

    code = "device_fault"
    counts = False


class Device:
    """One device and the batch size it can take. Batches are of one thread, calls of any."""

    def __init__(self, device: torch.device, max_batch: int) -> None:
        self.device = device
        self._max_batch = max_batch
        self._limit = max_batch
        self._since_halved = 0
        self._began: dict[int, float] = {}  # monotonic, of each call under way
        self._numbers = itertools.count()

    def busy_s(self) -> float:
        """How long the longest of the calls under way has taken, in seconds."""
        now = time.monotonic()
        return max((now - began for began in list(self._began.values())), default=0.0)

    @property
    def limit(self) -> int:
        """Images that the next batch may hold."""
        return self._limit

    def score(self, model: nn.Module, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, channels, size, size) -> (n, labels) logits, whatever the memory takes at once.

        Raises
        ------
        DeviceFault
            If not even a single image goes through, or the device fails otherwise.
        """
        while True:
            made = self._try(model, inputs)
            if made is not None:
                self._recover()
                return made
            # Only here is what the failed try held given back: not while its error is handled.
            if self._limit == 1:
                raise DeviceFault("out of memory for a single image")
            self._halve()

    def _try(self, model: nn.Module, inputs: NDArray[np.float32]) -> NDArray[np.float32] | None:
        parts = range(0, len(inputs), self._limit)
        try:
            with self.call():
                some = [logits(model, inputs[at : at + self._limit]) for at in parts]
                return np.concatenate(some)
        except torch.cuda.OutOfMemoryError:
            return None

    def explain(self, model: nn.Module, run: Callable[[nn.Module], _T]) -> _T:
        """Heat maps on the device; on the CPU from then on where its memory does not do.

        Raises
        ------
        DeviceFault
            If the device fails otherwise.
        """
        try:
            with self.call():
                return run(model)
        except torch.cuda.OutOfMemoryError:
            log.warning("heat_maps_moved_to_cpu")
        with self.call():
            torch.cuda.empty_cache()
            return run(model.to("cpu"))

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call, timed; what fails in it and is the device's fault is a DeviceFault."""
        number = next(self._numbers)
        self._began[number] = time.monotonic()
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not _is_of_the_device(error):
                raise
            raise DeviceFault(f"the device failed ({type(error).__name__})") from None
        finally:
            del self._began[number]

    def _halve(self) -> None:
        with self.call():
            torch.cuda.empty_cache()
        self._limit = max(1, self._limit // 2)
        self._since_halved = 0
        log.warning("batch_halved", limit=self._limit)

    def _recover(self) -> None:
        if self._limit == self._max_batch:
            return
        self._since_halved += 1
        if self._since_halved >= RECOVER_AFTER:
            self._limit = min(self._max_batch, self._limit * 2)
            self._since_halved = 0
            log.info("batch_grown", limit=self._limit)


@contextmanager
def watched(device: Device, longest_s: float, hung: Callable[[], object]) -> Iterator[None]:
    """Meanwhile call `hung` once a call takes longer: nothing in this process can end it."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(min(WATCH_S, longest_s)):
            if device.busy_s() > longest_s:
                log.critical("device_hung", wait_s=longest_s)
                hung()
                return

    thread = threading.Thread(target=watch, name="watchdog")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _is_of_the_device(error: RuntimeError) -> bool:
    return isinstance(error, torch.AcceleratorError) or str(error).startswith(_OF_THE_DEVICE)
