"""Feature maps of mean 0 and deviation 1 while a head is fitted; as the network gives them after.

A head over raw maps would be fitted badly: their channels differ in size by a hundredfold.
"""

import torch
from torch import Tensor

from inference.evidence import EvidenceHead

_LEAST = 1e-3  # of a deviation: what hardly varies is not blown up


class Standard:
    """What brings each channel to mean 0 and deviation 1."""

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        self._mean, self._scale = mean, scale  # (channels,)

    @classmethod
    def of(cls, maps: Tensor) -> "Standard":
        """maps : (n, channels, rows, cols); some hundred slices are enough"""
        return cls(maps.mean(dim=(0, 2, 3)), maps.std(dim=(0, 2, 3)) + _LEAST)

    def to(self, device: torch.device) -> "Standard":
        """The same there."""
        return Standard(self._mean.to(device), self._scale.to(device))

    def __call__(self, maps: Tensor) -> Tensor:
        return (maps - self._mean[:, None, None]) / self._scale[:, None, None]

    @torch.no_grad()
    def fold_into(self, head: EvidenceHead) -> None:
        """A head of standard maps, in place, so that it takes maps as the network gives them."""
        weight, bias = _first(head)
        weight /= self._scale[None, :, None, None]
        bias -= (weight[:, :, 0, 0] * self._mean).sum(dim=1)

    @torch.no_grad()
    def take_out_of(self, head: EvidenceHead) -> None:
        """The reverse, in place: a head of maps as they are takes standard ones."""
        weight, bias = _first(head)
        bias += (weight[:, :, 0, 0] * self._mean).sum(dim=1)
        weight *= self._scale[None, :, None, None]


def _first(head: EvidenceHead) -> tuple[Tensor, Tensor]:
    layer = head.trunk.reduce
    if layer.bias is None:
        raise TypeError("the first layer has a bias")
    return layer.weight, layer.bias
