"""An evidence network whose last stages learn, too.

It starts from the fit of the frozen candidate on the same slices. What comes before stays as it
is, so the maps that are kept for the head serve here as well: those of the grid's own stage are
what the last stages take.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from inference.evidence import EvidenceNet, stage_channels
from inference.manifest import EvidenceSpec
from weights.recipe.augment import PLAIN
from weights.recipe.backbone import round_convolutions
from weights.recipe.candidates.candidate import (
    Candidate,
    Explanation,
    Fit,
    Maps,
    Rows,
    Weights,
)
from weights.recipe.candidates.evidence import Evidence, head_logits, head_maps, shift
from weights.recipe.examples import Examples
from weights.recipe.fitting import Schedule, evidence_loss, fit, to_own_share
from weights.recipe.network import feature_maps
from weights.recipe.placing import arrays, in_batches
from weights.recipe.progress import Progress

_HEAD, _LAST = "head.", "last."


@dataclass(frozen=True, slots=True, eq=False)
class Tuned:
    """All behind the grid's own stage, and the head, fitted on."""

    base: Evidence
    schedule: Schedule = field(
        default_factory=lambda: Schedule(samples=6_000, rate=1e-3, decay=0.1)
    )

    @property
    def name(self) -> str:
        return f"{self.family} {self.schedule} from {self.base.name}"

    @property
    def family(self) -> str:
        return f"{self.base.family} tuned behind stage {self.base.spec.grid}"

    @property
    def needs(self) -> tuple[Candidate, ...]:
        return (self.base,)

    @property
    def architecture(self) -> str:
        return self.base.architecture

    @property
    def evidence(self) -> EvidenceSpec | None:
        return self.base.spec

    @property
    def pretrained(self) -> str:
        return f"{self.base.backbone.origin}; tuned behind stage {self.base.spec.grid}"

    @property
    def words(self) -> str:
        how = f"Then the backbone's blocks behind stage {self.base.spec.grid} were fitted with it."
        return f"{self.base.words} {how}"

    @property
    def explanations(self) -> tuple[Explanation, ...]:
        return self.base.explanations

    def prepare(self, progress: Progress) -> None:
        self.base.prepare(progress)

    def fit(self, examples: Examples, rows: Rows, *, seed: int, given: tuple[Fit, ...]) -> Fit:
        torch.manual_seed(seed)
        spec, shelves = self.base.spec, self.base.shelves(examples, rows)
        device = self.base.bank.device
        last, head = self._last(), self.base.head(given[0].weights, self.base.dropout)
        standard = shelves.standard(seed).to(device)
        share = to_own_share(examples.labels[rows, 0])
        standard.take_out_of(head)
        shift(head, -share)
        loss = fit(
            lambda b: evidence_loss(head.evidence(standard(last(b.inputs))), b, spec.cells),
            head.train().requires_grad_(True).parameters(),
            shelves.draw,
            examples.labels[:, 0],
            rows,
            self.schedule,
            seed=seed,
            device=device,
            slow=last.requires_grad_(True).parameters(),
        )
        standard.fold_into(head)
        shift(head, share)
        round_convolutions(last)
        grids = _through(last, self.base.bank.features(PLAIN))
        weights = {**arrays(head, _HEAD), **arrays(last, _LAST)}
        return Fit(weights, head_logits(head.eval(), grids), {"loss": loss})

    def maps(self, weights: Weights, rows: Rows, how: Explanation) -> Maps:
        last = self._last()
        last.load_state_dict(_part(weights, _LAST))
        grids = _through(last, self.base.bank.features(PLAIN)[rows])
        return head_maps(self.base.head(_arrays(weights, _HEAD)), grids, how)

    def untrained(self, weights: Weights, seed: int) -> Weights:
        """The same backbone under a drawn head."""
        drawn = self.base.untrained(_arrays(weights, _HEAD), seed)
        return {**weights, **{_HEAD + name: value for name, value in drawn.items()}}

    def network(self, weights: Weights, mix: NDArray[np.float64]) -> EvidenceNet:
        made = self.base.network(_arrays(weights, _HEAD), mix)
        made.backbone.load_state_dict({**made.backbone.state_dict(), **_part(weights, _LAST)})
        return made

    def _last(self) -> "_Last":
        """As the backbone has them."""
        network = feature_maps(self.base.backbone, self.base.spec).network
        return _Last(network).eval().requires_grad_(False).to(self.base.bank.device)


class _Last(nn.Module):
    """Makes the part of a grid anew that comes from the coarsest stage, by blocks that may learn.

    Their batch norms keep the statistics they have: slices are too few for others.
    """

    def __init__(self, network: EvidenceNet) -> None:
        super().__init__()
        stages: Any = network.backbone  # timm's attribute, which nn.Module does not declare
        channels, place = stage_channels(stages), network.grid.place
        if place != len(channels) - 2:
            raise ValueError("the grid's stage must be the last but one")
        self.end = 2 * sum(channels[:place]) + channels[place]
        self.begin = self.end - channels[place]
        blocks = stages.get_submodule("blocks")
        modules = stages.feature_info.module_name()[place:]
        first, behind = (int(name.removeprefix("blocks.")) for name in modules)
        names = map(str, range(first + 1, behind + 1))
        self.blocks = nn.ModuleDict({name: blocks.get_submodule(name) for name in names})

    def forward(self, grid: Tensor) -> Tensor:
        """(n, channels of the grid, rows, cols) -> the same."""
        coarse = grid[:, self.begin : self.end]
        for block in self.blocks.values():
            coarse = block(coarse)
        size = (grid.shape[2], grid.shape[3])
        grown = functional.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
        return torch.cat([grid[:, : self.end], grown], dim=1)


def _through(last: _Last, grids: NDArray[np.float16]) -> NDArray[np.float32]:
    made: NDArray[np.float32] = in_batches(last, last, grids).numpy()
    return made


def _arrays(weights: Weights, prefix: str) -> dict[str, NDArray[np.float32]]:
    """Those of a part, under their own names."""
    return {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}


def _part(weights: Weights, prefix: str) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in _arrays(weights, prefix).items()}
