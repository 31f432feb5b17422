"""EfficientNet-B4 grown from EfficientNet-Lite0, layer by layer, to say at first much the same.

No ImageNet weights of B4 can be had offline, and 82 patients teach no network of 17 million weights
from nothing. But B4 has Lite0's stages, and blocks with kernels of the same size, only more of
each: more channels, more blocks, squeeze-and-excitation, SiLU in place of ReLU6. So Lite0's kernels
find a place inside, and what is new starts beside them as it is drawn (T. Chen, I. Goodfellow,
J. Shlens, Net2Net, ICLR 2016). SiLU does not clip at 6 as ReLU6 does, which matters on a CT; so
wherever channels are mixed, the weights that make an old channel are fitted anew, by least squares,
to what Lite0 has there on the same slices. Errors are not handed on: each block aims at Lite0's own
output. The slices are drawn heads (`weights.recipe.built`), so no patient has a part in it, and one
grown network serves every fold.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from inference.manifest import Manifest
from inference.window import as_channels, cropped
from weights.recipe import augment
from weights.recipe.backbone import Backbone, round_convolutions
from weights.recipe.bleeds import with_bleed
from weights.recipe.built import Look, adult, head, newborn, noisy

_B4 = "efficientnet_b4"
_SEED = 0
_HEADS = 8  # of 16 slices
_NOISE_HU = (2.0, 7.0)
_BLOOD = (0.0, 0.2, 0.4)
_SHARP = 4.0  # SiLU(4 x) / 4 is ReLU(x) but for 0.07 at most
_GATE = 2.0  # bias of squeeze-and-excitation: open, and not too far to learn
_MOST_PLACES = 20_000  # of all slices, that a least-squares fit rests on
_RIDGE = 1e-3  # of the mean variance of what is mixed


def grown_b4(path: Path, manifest: Manifest, small: Backbone) -> Backbone:
    """EfficientNet-B4 grown from `small`; made at the first call and kept in `path`.

    manifest : how pixels become inputs
    """
    if not path.exists():
        seed: nn.Module = timm.create_model(small.architecture, pretrained=False)
        seed.load_state_dict(small.weights)
        with torch.random.fork_rng():
            torch.manual_seed(_SEED)
            large: nn.Module = timm.create_model(_B4, pretrained=False)
        grow(large, seed, drawn_inputs(manifest, _HEADS))
        round_convolutions(large)
        part = path.with_suffix(".part")
        save_file(large.state_dict(), part)
        part.replace(path)
    origin = (
        f"Grown from {small.architecture} on drawn heads, since no ImageNet weights of it can be "
        f"had offline: its channels and blocks hold, fitted anew, what that one has there, beside "
        f"what was drawn (`weights/recipe/grown.py`). That one: {small.origin}"
    )
    return Backbone(_B4, load_file(path), origin)


def drawn_inputs(manifest: Manifest, heads: int) -> Tensor:
    """(n, channels, size, size): drawn heads, some of them bleeding, altered as views are."""
    low, high = map(np.float32, manifest.pixels.value_range)
    view, parts = augment.View("drawn"), []
    for number in range(heads):
        rng = np.random.default_rng([_SEED, number])
        look = adult(rng, Look(blood=rng.choice(_BLOOD))) if number % 6 else newborn(rng)
        volume = noisy(rng, head(rng, look), rng.uniform(*_NOISE_HU))
        images = cropped(volume, manifest.pixels, manifest.input).images
        bled = np.stack([with_bleed(image, rng)[0] for image in images])
        unit = torch.from_numpy((np.clip(bled, low, high) - low) / (high - low))
        seen, _ = augment.seen(unit, view, view.generator(number))
        parts.append(seen.numpy() * (high - low) + low)
    return torch.from_numpy(as_channels(np.concatenate(parts), manifest.input))


@torch.no_grad()
def grow(large: nn.Module, small: nn.Module, inputs: Tensor) -> None:
    """Put `small` into `large`, in place; networks of timm with stem and blocks alike.

    Padding is the large network's throughout: TensorFlow's "SAME" would lay maps elsewhere.

    inputs : shape (n, channels, size, size), as the large network will see them
    """
    large.eval(), small.eval()
    x, aim = _stem(large, small, inputs)
    for stage, old in zip(_blocks(large), _blocks(small), strict=True):
        seeds = list(old.children())
        for number, block in enumerate(stage.children()):
            seed = seeds[number] if number < len(seeds) else None
            x, aim = _block(block, seed, x, aim)


def _stem(large: nn.Module, small: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    conv, norm = _conv(large, "conv_stem"), _norm(large, "bn1")
    old, its = _conv(small, "conv_stem"), _norm(small, "bn1")
    conv.weight[: len(old.weight)] = old.weight
    raw, aim = conv(inputs), _plain(its, _through(old, inputs))
    _match(norm, raw, aim)
    made: Tensor = norm(raw)
    return made, functional.relu6(aim)


def _block(
    block: nn.Module, seed: nn.Module | None, x: Tensor, aim: Tensor
) -> tuple[Tensor, Tensor]:
    """One block of each behind what came before.

    seed : the old network's block; None where it has none, and the new one mends what is left
    x, aim : what the new and the old network have before the block
    """
    skips = bool(getattr(block, "has_skip"))  # noqa: B009  # timm's attribute
    layers = ["conv_pw", "conv_dw", "conv_pwl"]
    if not hasattr(block, "conv_pwl"):  # the first stage's: nothing widens
        layers = ["conv_dw", "conv_pw"]
    wide, goal = x, aim
    for number, layer in enumerate(layers[:-1], start=1):
        conv, norm = _conv(block, layer), _norm(block, f"bn{number}")
        if seed is None:
            raw = conv(wide)
            _match(norm, raw, None)
        else:
            old = _conv(seed, layer)
            wanted = _plain(_norm(seed, f"bn{number}"), _through(old, goal))
            if layer == "conv_dw":
                conv.weight[: len(old.weight)] = old.weight
                raw = conv(wide)
                _match(norm, raw, wanted)
            else:
                raw = _mix(conv, norm, wide, wanted, _SHARP)
            goal = functional.relu6(wanted)
        wide = norm(raw)
    wide = _opened(block.get_submodule("se"))(wide)
    last, norm = layers[-1], _norm(block, f"bn{len(layers)}")
    behind = aim
    if seed is not None:
        behind = _plain(_norm(seed, f"bn{len(layers)}"), _through(_conv(seed, last), goal))
        behind = behind + aim if skips else behind
    rest = behind - x[:, : behind.shape[1]] if skips else behind
    made: Tensor = norm(_mix(_conv(block, last), norm, wide, rest, 1.0))
    return (made + x if skips else made), behind


def _mix(conv: nn.Conv2d, norm: nn.BatchNorm2d, seen: Tensor, aim: Tensor, scale: float) -> Tensor:
    """Fit a 1 x 1 convolution and its norm so that old channels come near `scale` times the aim.

    Returns what the convolution makes of `seen`.
    """
    n, some = aim.shape[1], _some(seen)
    at, wanted = _places(seen)[some].double(), _places(aim)[some].double()
    level = wanted.mean(dim=0)
    at = at - at.mean(dim=0)
    square = at.T @ at / len(at)
    square += _RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
    weight = torch.linalg.solve(square, at.T @ (wanted - level) / len(at)).T
    conv.weight[:n] = weight.float()[:, :, None, None]
    raw: Tensor = conv(seen)
    mean, variance = _moments(raw)
    _set(norm, mean, variance)
    norm.weight[:n] = scale * torch.sqrt(variance[:n] + norm.eps)
    norm.bias[:n] = scale * level.float()
    return raw


def _match(norm: nn.BatchNorm2d, raw: Tensor, aim: Tensor | None) -> None:
    """Bring channels to mean 0 and deviation 1, and old ones to what is aimed at, made sharp."""
    mean, variance = _moments(raw)
    _set(norm, mean, variance)
    if aim is None:
        return
    n = aim.shape[1]
    level, spread = _moments(aim)
    together = ((raw[:, :n] - mean[:n, None, None]) * aim).mean(dim=(0, 2, 3))
    norm.weight[:n] = _SHARP * torch.where(together < 0, -1.0, 1.0) * torch.sqrt(spread)
    norm.bias[:n] = _SHARP * level


def _set(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    running = (norm.running_mean, norm.running_var)
    for kept, value in zip(running, (mean, variance), strict=True):
        if kept is None:
            raise TypeError("a norm without running statistics")
        kept.copy_(value)
    norm.weight.fill_(1.0)
    norm.bias.zero_()


def _moments(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel."""
    variance, mean = torch.var_mean(maps, dim=(0, 2, 3), correction=0)
    return mean, variance


def _through(conv: nn.Conv2d, maps: Tensor) -> Tensor:
    """An old convolution, padded alike on all sides."""
    half = conv.kernel_size[0] // 2
    return functional.conv2d(
        maps, conv.weight, stride=conv.stride, padding=half, groups=conv.groups
    )


def _plain(norm: nn.BatchNorm2d, raw: Tensor) -> Tensor:
    """A norm without the activation that timm puts into it."""
    return functional.batch_norm(
        raw, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )


def _opened(gate: nn.Module) -> nn.Module:
    """Squeeze-and-excitation that at first lets all channels through alike."""
    expand = _conv(gate, "conv_expand")
    expand.weight.zero_()
    if expand.bias is None:
        raise TypeError("a gate without biases")
    expand.bias.fill_(_GATE)
    return gate


def _places(maps: Tensor) -> Tensor:
    """(n, channels, rows, cols) -> (places, channels)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def _some(maps: Tensor) -> Tensor:
    total = maps.shape[0] * maps.shape[2] * maps.shape[3]
    return torch.linspace(0, total - 1, min(total, _MOST_PLACES)).long()


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    return network.get_submodule("blocks").children()


def _conv(network: nn.Module, name: str) -> nn.Conv2d:
    made = network.get_submodule(name)
    assert isinstance(made, nn.Conv2d)
    return made


def _norm(network: nn.Module, name: str) -> nn.BatchNorm2d:
    made = network.get_submodule(name)
    assert isinstance(made, nn.BatchNorm2d)
    return made
