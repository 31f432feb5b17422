"""Whole networks as they are served: a backbone as it is stored, with what was fitted on it."""

from collections.abc import Mapping

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from inference.evidence import EvidenceNet
from inference.manifest import EvidenceSpec
from weights.recipe.backbone import imagenet_backbone

Weights = Mapping[str, NDArray[np.float32]]


def stored_backbone(architecture: str) -> nn.Module:
    """The ImageNet network with its convolutions rounded to half precision, computed in fp32.

    Rounded before features are taken, so that the head is fitted to exactly the weights that ship,
    and the file is half as long. Features are kept in half precision, too, which the served network
    does not do: a difference of some thousandths of a logit.
    """
    network = imagenet_backbone(architecture)
    round_convolutions(network)
    return network


def round_convolutions(network: nn.Module) -> None:
    """To half precision, as they are stored, in place: what is judged is what ships."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.half().float()


class Pooled(nn.Module):
    """(n, channels, size, size) -> (n, width): what timm hands to its classifier."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

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


def feature_maps(architecture: str, spec: EvidenceSpec) -> FeatureMaps:
    """The frozen part of a network with an evidence head."""
    return FeatureMaps(_evidence_net(architecture, spec, labels=1, outputs=1).eval())


def with_classifier(
    architecture: str,
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    mix: NDArray[np.float64],
) -> nn.Module:
    """A plain timm network whose classifier gives `mix` of the fitted layer's labels."""
    network: nn.Module = timm.create_model(architecture, pretrained=False, num_classes=len(mix))
    values = stored_backbone(architecture).state_dict()
    values["classifier.weight"] = _tensor(mix @ weight)
    values["classifier.bias"] = _tensor(mix @ bias)
    network.load_state_dict(values)
    return network.eval().requires_grad_(False)


def with_evidence(
    architecture: str, spec: EvidenceSpec, weights: Weights, mix: NDArray[np.float64]
) -> EvidenceNet:
    """The frozen backbone under a fitted evidence head."""
    outputs, labels = mix.shape
    network = _evidence_net(architecture, spec, labels=labels, outputs=outputs)
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
    architecture: str, spec: EvidenceSpec, *, labels: int, outputs: int
) -> EvidenceNet:
    network = empty_evidence(architecture, spec, labels=labels, outputs=outputs)
    stored = stored_backbone(architecture).state_dict()
    network.backbone.load_state_dict({name: stored[name] for name in network.backbone.state_dict()})
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
