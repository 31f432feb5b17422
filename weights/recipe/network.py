"""The served network: the frozen backbone as it is stored, with the fitted head."""

from collections.abc import Mapping

import numpy as np
import timm
import torch
from torch import Tensor, nn

from weights.recipe.backbone import imagenet_backbone
from weights.recipe.head import Head


def stored_backbone(architecture: str) -> nn.Module:
    """The ImageNet network with its convolutions rounded to half precision, computed in fp32.

    Rounded before features are taken, so that the head is fitted to exactly the weights that ship:
    half the file, and not a bit of difference between what was judged and what serves.
    """
    network = imagenet_backbone(architecture)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.half().float()
    return network


def with_head(backbone: nn.Module, head: Head, architecture: str) -> nn.Module:
    """A plain timm network: backbone, then `head` as its classifier; evaluation mode."""
    network: nn.Module = timm.create_model(
        architecture, pretrained=False, num_classes=len(head.bias)
    )
    values = backbone.state_dict()
    values["classifier.weight"] = torch.from_numpy(head.weight.astype(np.float32))
    values["classifier.bias"] = torch.from_numpy(head.bias.astype(np.float32))
    network.load_state_dict(values)
    return network.eval().requires_grad_(False)


def storable(network: nn.Module) -> Mapping[str, Tensor]:
    """What model.safetensors holds: convolutions in half precision, all else as it is."""
    convolutions = {
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    return {
        name: (value.half() if name in convolutions else value).contiguous()
        for name, value in network.state_dict().items()
    }
