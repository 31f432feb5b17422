"""What a head CT can undergo before a model sees it: views of the same slices for training.

Patients lie turned and off centre, heads differ in size, scanners in sharpness, noise and the grey
they give to brain, pictures in the window they were exported with. A head is nearly its own mirror
image. Nothing here bends a head or paints into it.
"""

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class _Strength:
    """How far chance goes."""

    turn: float  # degrees
    scale: tuple[float, float]
    shift: float  # of half the image's side
    noise: float  # sigma, of the value range, in every second image
    gain: tuple[float, float]  # of the contrast round the middle of the value range
    offset: float  # of the value range
    stretch: float = 0.0  # logarithm: one side against the other
    gamma: float = 0.0  # logarithm: of the grey's power
    sides: tuple[float, float] | None = None  # pixels: what is left of finer grain is lost


_SCANNED = _Strength(15.0, (0.88, 1.12), 0.06, 0.05, (0.85, 1.18), 0.05)
#: Through slides, a phone or the web, in whatever window, without its proportions.
_COPIED = _Strength(20.0, (0.8, 1.25), 0.1, 0.06, (0.65, 1.5), 0.1, 0.18, 0.3, (80.0, 240.0))
_BLUR_PIXELS = (0.3, 1.2)  # sigma; below the first nothing is done
_ALTERED = "altered-"
_GREY = "grey-"
_COPIES = "copied-"
_BLEEDS = "bleeds-"
_AIR = 0.02  # of the value range; what lies below is the air round the head and stays so


@dataclass(frozen=True, slots=True)
class View:
    """One way in which all slices are seen: as they are, mirrored, or altered by chance."""

    name: str

    @property
    def is_random(self) -> bool:
        return self not in (PLAIN, MIRRORED)

    @property
    def is_altered(self) -> bool:
        """Whether it looks as those with bleeds do, but for the bleeds."""
        return self.name.startswith(_ALTERED)

    @property
    def has_bleeds(self) -> bool:
        """Whether bleeds are drawn into it first: `weights.recipe.bleeds`."""
        return self.name.startswith(_BLEEDS)

    @property
    def is_copied(self) -> bool:
        """Whether it looks like a picture of a picture: coarse, stretched, in another window."""
        return self.name.startswith(_COPIES)

    @property
    def moves(self) -> bool:
        """Whether it turns, scales, blurs; else only the grey is another."""
        return not self.name.startswith(_GREY)

    def generator(self, seed: int) -> torch.Generator:
        """The same draws for the same view and seed."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.name} {seed}".encode()))


PLAIN, MIRRORED = View("plain"), View("mirrored")


def views_with_bleeds(n: int) -> tuple[View, ...]:
    """So many altered ones into which bleeds are drawn."""
    return tuple(View(f"{_BLEEDS}{number}") for number in range(n))


def views(altered: int, grey: int = 0, copied: int = 0) -> tuple[View, ...]:
    """Plain, mirrored, so many altered ones, of which only the grey is altered, and copied ones."""
    return (
        PLAIN,
        MIRRORED,
        *(View(f"{_ALTERED}{number}") for number in range(altered)),
        *(View(f"{_GREY}{number}") for number in range(grey)),
        *(View(f"{_COPIES}{number}") for number in range(copied)),
    )


def seen(images: Tensor, view: View, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images in a view, and where each of their points comes from.

    images : shape (n, size, size), 0..1 of the value range, 0 outside the head

    Returns
    -------
    the images, and affine maps (n, 2, 3) as `torch.nn.functional.affine_grid` takes them, by which
    anything drawn on the images follows
    """
    n = len(images)
    if not view.is_random or not view.moves:
        sign = -1.0 if view == MIRRORED else 1.0
        same = torch.tensor([[sign, 0.0, 0.0], [0.0, 1.0, 0.0]]).repeat(n, 1, 1)
        if view.is_random:
            return _greyed(images, draws, _SCANNED), same
        return (images.flip(2) if view == MIRRORED else images), same
    how = _COPIED if view.is_copied else _SCANNED
    places = _places(n, draws, how)
    moved = moved_by(images, places)
    if how.sides:
        sides = _uniform(n, *how.sides, draws).int().tolist()
        parts = [_coarse(one, side) for one, side in zip(moved, sides, strict=True)]
    else:
        sigmas = _uniform(n, 0.0, _BLUR_PIXELS[1], draws)
        parts = [_blurred(one, float(s)) for one, s in zip(moved, sigmas, strict=True)]
    return _greyed(_noisy(torch.stack(parts), draws, how), draws, how), places


def moved_by(images: Tensor, places: Tensor) -> Tensor:
    """(n, size, size) images or maps, by affine maps (n, 2, 3); outside is 0."""
    grid = functional.affine_grid(places, [len(images), 1, *images.shape[1:]], align_corners=False)
    return functional.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def _uniform(n: int, low: float, high: float, draws: torch.Generator) -> Tensor:
    return torch.empty(n).uniform_(low, high, generator=draws)


def _places(n: int, draws: torch.Generator, how: _Strength) -> Tensor:
    angle = _uniform(n, -1, 1, draws) * math.radians(how.turn)
    scale = _uniform(n, *how.scale, draws)
    across, down = (_uniform(n, -how.shift, how.shift, draws) for _ in range(2))
    mirror = torch.where(_uniform(n, 0, 1, draws) < 0.5, -1.0, 1.0)
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = (
        torch.stack([cosine * mirror, -sine, across], dim=1),
        torch.stack([sine * mirror, cosine, down], dim=1),
    )
    places = torch.stack(rows, dim=1)
    if how.stretch:
        by = torch.exp(_uniform(n, -how.stretch, how.stretch, draws))
        places[:, :, :2] *= torch.stack([1 / by, by], dim=1)[:, :, None]
    return places


def _coarse(image: Tensor, side: int) -> Tensor:
    """(size, size), through one of so many pixels a side."""
    size = image.shape[-1]
    small = functional.interpolate(
        image[None, None], size=(side, side), mode="bilinear", antialias=True
    )
    return functional.interpolate(small, size=(size, size), mode="bilinear")[0, 0]


def _blurred(image: Tensor, sigma: float) -> Tensor:
    """(size, size), by a Gaussian of `sigma` pixels."""
    if sigma < _BLUR_PIXELS[0]:
        return image
    half = math.ceil(3 * sigma)
    at = torch.arange(-half, half + 1, dtype=torch.float32)
    weights = torch.exp(-(at**2) / (2 * sigma**2))
    weights /= weights.sum()
    across = functional.conv2d(image[None, None], weights.view(1, 1, 1, -1), padding=(0, half))
    return functional.conv2d(across, weights.view(1, 1, -1, 1), padding=(half, 0))[0, 0]


def _noisy(images: Tensor, draws: torch.Generator, how: _Strength) -> Tensor:
    n = len(images)
    sigma = _uniform(n, 0, how.noise, draws) * (_uniform(n, 0, 1, draws) < 0.5)
    noise = torch.randn(images.shape, generator=draws) * sigma.view(-1, 1, 1)
    return (images + noise * (images > _AIR)).clamp(0, 1)


def _greyed(images: Tensor, draws: torch.Generator, how: _Strength) -> Tensor:
    n, raised = len(images), images
    gain = _uniform(n, *how.gain, draws).view(-1, 1, 1)
    offset = _uniform(n, -how.offset, how.offset, draws).view(-1, 1, 1)
    if how.gamma:
        raised = images ** torch.exp(_uniform(n, -how.gamma, how.gamma, draws)).view(-1, 1, 1)
    altered = ((raised - 0.5) * gain + 0.5 + offset).clamp(0, 1)
    return torch.where(images < _AIR, images, altered)
