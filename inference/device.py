"""The device: runs batches, halves them when memory runs out, grows them again later."""

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import nn

from db.errors import TransientError
from inference.model import logits

log = structlog.get_logger()

#: Batches at a halved size before the full size is tried again.
RECOVER_AFTER = 50


class DeviceFault(TransientError):
    """The device failed, not the study: it never counts against one."""

    code = "device_fault"


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
        try:
            made = np.concatenate(
                [
                    logits(model, inputs[at : at + self._limit])
                    for at in range(0, len(inputs), self._limit)
                ]
            )
        except torch.cuda.OutOfMemoryError:
            if self._limit == 1:
                raise DeviceFault("out of memory for a single image") from None
            self._halve()
            return self.score(model, inputs)
        except torch.AcceleratorError as error:
            raise DeviceFault(f"the device failed ({type(error).__name__})") from None
        self._recover()
        return made

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
