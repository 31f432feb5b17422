"""Whole networks as they are served: a backbone as it is stored, with what was fitted on it."""

from collections.abc import Mapping

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from inference.evidence import EvidenceNet
from inference.manifest import EvidenceSpec
from weights.recipe.backbone import Backbone

Weights = Mapping[str, NDArray[np.float32]]


class Pooled(nn.Module):
    """(n, channels, size, size) -> (n, width): what timm hands to its classifier."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.network: nn.Module = timm.create_model(backbone.architecture, pretrained=False)
        self.network.load_state_dict(backbone.weights)

    def forward(self, images: Tensor) -> Tensor:
        network = self.network
        made: Tensor = network.forward_head(  # type: ignore[operator]  # timm's methods, which
            network.forward_features(images),  # type: ignore[operator]  # nn.Module lacks
            pre_logits=True,
        )
        return made


class FeatureMaps(nn.Module):
    """(n, channels, size, size) -> (n, channels of the grid, rows, cols): all but the head."""

    def __init__(self, network: EvidenceNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.features(images)


def feature_maps(backbone: Backbone, spec: EvidenceSpec) -> FeatureMaps:
    """The frozen part of a network with an evidence head."""
    return FeatureMaps(_evidence_net(backbone, spec, labels=1, outputs=1).eval())


def with_classifier(
    backbone: Backbone,
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    mix: NDArray[np.float64],
) -> nn.Module:
    """A plain timm network whose classifier gives `mix` of the fitted layer's labels."""
    network: nn.Module = timm.create_model(
        backbone.architecture, pretrained=False, num_classes=len(mix)
    )
    classifier = {"weight": _tensor(mix @ weight), "bias": _tensor(mix @ bias)}
    named = {f"classifier.{name}": value for name, value in classifier.items()}
    network.load_state_dict({**backbone.weights, **named})
    return network.eval().requires_grad_(False)


def with_evidence(
    backbone: Backbone, spec: EvidenceSpec, weights: Weights, mix: NDArray[np.float64]
) -> EvidenceNet:
    """The frozen backbone under a fitted evidence head."""
    outputs, labels = mix.shape
    network = _evidence_net(backbone, spec, labels=labels, outputs=outputs)
    network.head.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    with torch.no_grad():
        network.mix.weight.copy_(_tensor(mix))
        network.mix.bias.zero_()
    return network.eval().requires_grad_(False)


def empty_evidence(
    architecture: str, spec: EvidenceSpec, *, labels: int, outputs: int
) -> EvidenceNet:
    """Untrained, for three windows as channels."""
    return EvidenceNet(architecture, channels=3, labels=labels, outputs=outputs, spec=spec)


def _evidence_net(
    backbone: Backbone, spec: EvidenceSpec, *, labels: int, outputs: int
) -> EvidenceNet:
    network = empty_evidence(backbone.architecture, spec, labels=labels, outputs=outputs)
    kept = network.backbone.state_dict()  # a network of some stages lacks the rest
    network.backbone.load_state_dict({name: backbone.weights[name] for name in kept})
    return network


def storable(network: nn.Module) -> Mapping[str, Tensor]:
    """What model.safetensors holds: the backbone's convolutions in half precision, all else as is.

    They were rounded before anything was fitted on them; what was fitted is stored as fitted.
    """
    halved = {
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and not name.startswith("head.")
    }
    return {
        name: (value.half() if name in halved else value).contiguous()
        for name, value in network.state_dict().items()
    }


def _tensor(values: NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))
