"""Where fits run: modules and batches go to a device, what they learnt comes back as arrays."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_BATCH = 64


def device_of(module: nn.Module) -> torch.device:
    """Where its weights are."""
    return next(module.parameters()).device


@torch.inference_mode()
def in_batches(
    judge: Callable[[Tensor], Tensor], module: nn.Module, maps: NDArray[np.floating]
) -> Tensor:
    """What `judge` makes of maps (n, ...), batch by batch on the module's device; on the CPU."""
    device = device_of(module)
    starts = range(0, len(maps), _BATCH)
    parts = (torch.from_numpy(maps[i : i + _BATCH].astype(np.float32)) for i in starts)
    return torch.cat([judge(part.to(device)).cpu() for part in parts])


def arrays(module: nn.Module, prefix: str = "") -> dict[str, NDArray[np.float32]]:
    """Copies of its state, by `prefix` and name, wherever it is."""
    return {
        prefix + name: value.cpu().numpy().copy() for name, value in module.state_dict().items()
    }
