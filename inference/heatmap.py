"""Where a model looked: raw Grad-CAM maps, and their way back to the source image."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_grad_cam import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM
from scipy import ndimage
from torch import nn

from db.result import Region
from inference.bundle import BundleError
from inference.manifest import CamMethod
from inference.window import ModelInput, resize

_REGION_SHARE = 0.5  # of the map's peak


class _Raw:
    """Maps that keep their scale, at the layer's own resolution; mixed into the library's methods.

    The library stretches each map to 0..1 of itself before it hands it out (`scale_cam_image`),
    which paints a hot spot where the model saw nothing and cannot be undone. These are the maps
    before that.
    """

    activations_and_grads: Any
    target_layers: list[nn.Module]
    get_cam_image: Callable[..., NDArray[np.float32]]

    def compute_cam_per_layer(
        self, input_tensor: torch.Tensor, targets: list[nn.Module], eigen_smooth: bool
    ) -> list[NDArray[np.float32]]:
        activations = self.activations_and_grads.activations[0].numpy()
        gradients = self.activations_and_grads.gradients[0].numpy()
        layer = self.target_layers[0]
        cam = self.get_cam_image(input_tensor, layer, targets, activations, gradients, eigen_smooth)
        return [np.maximum(cam, 0)]  # (n, h, w)

    def aggregate_multi_layers(
        self, cam_per_target_layer: list[NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        return cam_per_target_layer[0]


class _GradCAM(_Raw, GradCAM):  # type: ignore[misc]  # the library has no types
    """R. Selvaraju et al., Grad-CAM, ICCV 2017."""


class _GradCAMPlusPlus(_Raw, GradCAMPlusPlus):  # type: ignore[misc]
    """A. Chattopadhay et al., Grad-CAM++, WACV 2018."""


class _HiResCAM(_Raw, HiResCAM):  # type: ignore[misc]
    """R. Draelos, L. Carin, HiResCAM, arXiv 2011.08891."""


class _LayerCAM(_Raw, LayerCAM):  # type: ignore[misc]
    """P.-T. Jiang et al., LayerCAM, IEEE TIP 2021."""


_METHODS: Mapping[CamMethod, Any] = {
    "grad-cam": _GradCAM,
    "grad-cam++": _GradCAMPlusPlus,
    "hirescam": _HiResCAM,
    "layercam": _LayerCAM,
}


class _Sum:
    """What a map is of: some of the model's outputs, weighted."""

    def __init__(self, weights: Mapping[int, float]) -> None:
        self._weights = weights

    def __call__(self, outputs: torch.Tensor) -> torch.Tensor:
        return torch.stack([outputs[i] * weight for i, weight in self._weights.items()]).sum()


def grad_cam(
    model: nn.Module,
    layer: str,
    inputs: NDArray[np.float32],
    targets: Sequence[Mapping[int, float]],
    method: CamMethod = "grad-cam",
) -> NDArray[np.float32]:
    """Raw ReLU maps, shape (n, h, w) of the layer, of a weighted sum of outputs for each input.

    targets : {output: weight}, one an input
    model : eager, fp32; its weights' gradients are not needed and stay off. Inputs go one by one,
    so that a map does not depend on what else is in the batch, nor the memory on how many there
    are.

    Raises
    ------
    BundleError
        If the model has no such layer.
    """
    named = dict(model.named_modules())
    if layer not in named or not layer:
        raise BundleError(f"explain.layer: the model has no module {layer!r}")
    device = next(model.parameters()).device
    maps = []
    with torch.enable_grad(), _METHODS[method](model=model, target_layers=[named[layer]]) as cam:
        for image, target in zip(inputs, targets, strict=True):
            tensor = torch.from_numpy(image[None]).to(device).requires_grad_(True)
            maps.append(cam(tensor, [_Sum(target)])[0])
    stacked: NDArray[np.float32] = np.stack(maps).astype(np.float32)
    return stacked


def to_source(cam: NDArray[np.float32], seen: ModelInput, index: int) -> NDArray[np.float32]:
    """A map of input `index` in the matrix of its source images; 0 where the model did not look.

    The inverse of turning, cutting and resizing; the volume's matrix, shape (rows, cols).
    """
    top, left, bottom, right = seen.boxes[index].pixels
    grown = resize(cam, (bottom - top, right - left))
    rows, columns = seen.matrix[::-1] if seen.reorientation.transpose else seen.matrix
    turned = np.zeros((rows, columns), np.float32)
    inside = grown[max(-top, 0) : rows - top, max(-left, 0) : columns - left]
    from_top, from_left = max(top, 0), max(left, 0)
    turned[from_top : from_top + inside.shape[0], from_left : from_left + inside.shape[1]] = inside
    return np.ascontiguousarray(seen.reorientation.undo(turned))


def region(cam: NDArray[np.float32]) -> Region | None:
    """The rectangle round the peak and all over half of it that hangs together; None if empty.

    In pixels of the map's matrix, whose origin is the corner of the first pixel (PS3.3 C.18.6.1.1).
    """
    peak = float(cam.max())
    if peak <= 0:
        return None
    named, _ = ndimage.label(cam > _REGION_SHARE * peak)
    inside = named == named[np.unravel_index(int(np.argmax(cam)), cam.shape)]
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    return Region(float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
