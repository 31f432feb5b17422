"""A network that judges an image cell by cell: what it says and where it says so are one thing.

    backbone -> feature maps of several stages, brought to one grid -> evidence of each cell
             -> the mean of the strongest cells is the image's logit

Averaging features over the whole image first, as a plain classifier does, drowns a lesion of a few
cells. Here nothing outside the strongest cells has a say, and Grad-CAM at `head.trunk` is, but for
a constant, the evidence itself.
"""

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from inference.manifest import EvidenceSpec


class Grid(nn.Module):
    """Brings the feature maps of several stages to the cells of one of them."""

    def __init__(self, channels: tuple[int, ...], place: int) -> None:
        super().__init__()
        self.place = place  # of the grid's own stage among the maps
        # Of a finer map both the mean and the maximum of a cell: a small bright thing is in one.
        self.channels = sum(2 * n if i < place else n for i, n in enumerate(channels))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """[(n, c, h, w), ...] from fine to coarse -> (n, channels, rows, cols)."""
        rows, columns = maps[self.place].shape[-2:]
        size = (rows, columns)
        parts: list[Tensor] = []
        for finer in maps[: self.place]:
            parts += [
                functional.adaptive_avg_pool2d(finer, size),
                functional.adaptive_max_pool2d(finer, size),
            ]
        parts.append(maps[self.place])
        parts += [
            functional.interpolate(coarser, size=size, mode="bilinear", align_corners=False)
            for coarser in maps[self.place + 1 :]
        ]
        return torch.cat(parts, dim=1)


class Trunk(nn.Module):
    """Each cell's features and its neighbours' become `width` numbers a member."""

    def __init__(self, channels: int, width: int, members: int, dropout: float) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, width * members, 1)
        self.beside = nn.Conv2d(width * members, width * members, 3, padding=1, groups=members)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """(n, channels, rows, cols) -> (n, members * width, rows, cols), none below 0."""
        own = functional.relu(self.reduce(self.dropout(features)))
        made: Tensor = self.dropout(own + functional.relu(self.beside(own)))
        return made


class EvidenceHead(nn.Module):
    """From a grid of features to logits; all members at once."""

    def __init__(
        self, channels: int, labels: int, spec: EvidenceSpec, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.members, self.labels, self.cells = spec.members, labels, spec.cells
        self.trunk = Trunk(channels, spec.width, spec.members, dropout)
        self.judge = nn.Conv2d(
            spec.width * spec.members, labels * spec.members, 1, groups=spec.members
        )

    def evidence(self, features: Tensor) -> Tensor:
        """(n, channels, rows, cols) -> (n, members, labels, rows, cols), logits of cells."""
        cells: Tensor = self.judge(self.trunk(features))
        return cells.view(len(cells), self.members, self.labels, *cells.shape[-2:])

    def forward(self, features: Tensor) -> Tensor:
        """(n, channels, rows, cols) -> (n, labels), logits of images."""
        return strongest(self.evidence(features), self.cells).mean(dim=1)


def strongest(evidence: Tensor, cells: int) -> Tensor:
    """(..., rows, cols) -> (...): the mean of the strongest cells."""
    flat = evidence.flatten(-2)
    return flat.topk(min(cells, flat.shape[-1]), dim=-1).values.mean(dim=-1)


class EvidenceNet(nn.Module):
    """Backbone, grid, head, and the last mix of labels into the outputs that are served.

    Weights: `backbone.*` under timm's names of a `features_only` network, `head.*`, and `mix.*`,
    which turns logits of labels into outputs: the labels themselves, or with context (see
    `inference.predict.in_context`) each label's own say and its neighbourhood's.
    """

    def __init__(
        self, architecture: str, *, channels: int, labels: int, outputs: int, spec: EvidenceSpec
    ) -> None:
        super().__init__()
        self.backbone = feature_stages(architecture, channels=channels, stages=spec.stages)
        self.grid = Grid(stage_channels(self.backbone), spec.stages.index(spec.grid))
        self.head = EvidenceHead(self.grid.channels, labels, spec)
        self.mix = nn.Linear(labels, outputs)

    def features(self, images: Tensor) -> Tensor:
        """(n, channels, size, size) -> (n, channels of the grid, rows, cols)."""
        made: Tensor = self.grid(self.backbone(images))
        return made

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, size, size) -> (n, outputs)."""
        made: Tensor = self.mix(self.head(self.features(images)))
        return made


def feature_stages(architecture: str, *, channels: int, stages: tuple[int, ...]) -> nn.Module:
    """A timm network, untrained, that gives the maps of some stages from fine to coarse.

    Raises
    ------
    ValueError
        If the architecture has no such stages.
    """
    try:
        backbone: nn.Module = timm.create_model(
            architecture,
            pretrained=False,
            features_only=True,
            out_indices=stages,
            in_chans=channels,
        )
    except (AssertionError, IndexError, RuntimeError):
        raise ValueError(f"{architecture} has no feature stages {stages}") from None
    return backbone


def stage_channels(backbone: nn.Module) -> tuple[int, ...]:
    """Channels of each map a `features_only` network gives."""
    network: Any = backbone  # timm's attribute, which nn.Module does not declare
    return tuple(network.feature_info.channels())
