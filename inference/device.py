"""The device: runs batches, halves them when memory runs out, grows them again later."""

from collections.abc import Callable
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


class DeviceFault(TransientError):
    """The device failed, not the study: it never counts against one."""

    code = "device_fault"
    counts = False


class Device:
    """One device and the batch size it can take. Used by one thread."""

    def __init__(self, device: torch.device, max_batch: int) -> None:
        self.device = device
        self._max_batch = max_batch
        self._limit = max_batch
        self._since_halved = 0

    @property
    def limit(self) -> int:
        """Images that the next batch may hold."""
        return self._limit

    def score(self, model: nn.Module, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, channels, size, size) -> (n, labels) logits, whatever the memory takes at once.

        Raises
        ------
        DeviceFault
            If not even a single image goes through.
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
            return np.concatenate([logits(model, inputs[at : at + self._limit]) for at in parts])
        except torch.cuda.OutOfMemoryError:
            return None
        except torch.AcceleratorError as error:
            raise DeviceFault(f"the device failed ({type(error).__name__})") from None

    def explain(self, model: nn.Module, run: Callable[[nn.Module], _T]) -> _T:
        """Heat maps on the device; on the CPU from then on where its memory does not do.

        Raises
        ------
        DeviceFault
            If the device fails otherwise.
        """
        try:
            return run(model)
        except torch.cuda.OutOfMemoryError:
            log.warning("heat_maps_moved_to_cpu")
        except torch.AcceleratorError as error:
            raise DeviceFault(f"the device failed ({type(error).__name__})") from None
        torch.cuda.empty_cache()
        return run(model.to("cpu"))

    def _halve(self) -> None:
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
