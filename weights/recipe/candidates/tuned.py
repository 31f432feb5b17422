"""An evidence network whose backbone learns, too: all of it, or its later stages.

It starts from the fit of the frozen candidate on the same slices, at a low rate, and sees slices
altered anew each time. On a CPU an hour and more for all splits; on a GPU minutes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from inference.evidence import EvidenceNet
from inference.manifest import EvidenceSpec
from weights.recipe import augment
from weights.recipe.augment import View
from weights.recipe.backbone import imagenet
from weights.recipe.candidates.candidate import Candidate, Explanation, Fit, Maps, Rows, Weights
from weights.recipe.candidates.evidence import Evidence, lesion_maps
from weights.recipe.candidates.whole import Whole
from weights.recipe.examples import Examples
from weights.recipe.fitting import Batch, Schedule, evidence_loss, fit
from weights.recipe.progress import Progress

_VIEW = View("tuning")


@dataclass(frozen=True, slots=True, eq=False)
class Tuned:
    """The backbone's blocks from `first` on, and the head, fitted on."""

    base: Evidence
    first: int  # block stage, as timm counts them; 0: all but the stem
    device: str
    schedule: Schedule = field(
        default_factory=lambda: Schedule(samples=4_000, batch=32, rate=3e-4, decay=0.05)
    )

    @property
    def name(self) -> str:
        how = self.schedule
        return f"{self.family} n={how.samples} rate={how.rate:g} from {self.base.name}"

    @property
    def family(self) -> str:
        return f"{self.base.family} tuned from stage {self.first}"

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
        return f"{imagenet(self.architecture)}; tuned from stage {self.first} on"

    @property
    def words(self) -> str:
        how = f"Then the backbone's stages from {self.first} on were fitted with it."
        return f"{self.base.words} {how}"

    @property
    def explanations(self) -> tuple[Explanation, ...]:
        return self.base.explanations

    def prepare(self, progress: Progress) -> None:
        """Nothing: its base does, and every fit draws its own views."""

    def fit(self, examples: Examples, rows: Rows, *, seed: int, given: tuple[Fit, ...]) -> Fit:
        labels, whole = examples.labels.shape[1], self._whole
        network = whole.placed(self.base.network(given[0].weights, np.eye(labels)))
        chance = torch.Generator().manual_seed(seed)
        loss = fit(
            lambda b: evidence_loss(
                network.head.evidence(network.features(b.inputs)),
                b.labels,
                b.covered,
                self.base.spec.cells,
            ),
            _learning(network, self.first),
            lambda chosen, _: self._batch(examples, chosen, chance),
            examples.labels[:, 0],
            rows,
            self.schedule,
            seed=seed,
        )
        weights = whole.kept(network)
        return Fit(weights, whole.logits(network, rows, examples.labels.shape), {"loss": loss})

    def maps(self, weights: Weights, rows: Rows, how: Explanation) -> Maps:
        return self._whole.maps(weights, rows, how)

    def untrained(self, weights: Weights, seed: int) -> Weights:
        """The same backbone under a drawn head."""
        head = {k[5:]: v for k, v in weights.items() if k.startswith("head.")}
        drawn = self.base.untrained(head, seed)
        return {**weights, **{f"head.{name}": value for name, value in drawn.items()}}

    def network(self, weights: Weights, mix: NDArray[np.float64]) -> EvidenceNet:
        return self._whole.network(weights, mix)

    @property
    def _whole(self) -> Whole:
        return Whole(self.base.bank.pictures, self.architecture, self.base.spec, self.device)

    def _batch(self, examples: Examples, rows: Rows, chance: torch.Generator) -> Batch:
        whole = self._whole
        images, places = augment.seen(whole.pictures.unit(rows), _VIEW, chance)
        moved = augment.moved_by(lesion_maps(examples, rows), places)
        grid = self.base.bank.features(augment.PLAIN).shape[2:]
        return Batch(
            whole.inputs(images),
            torch.from_numpy(examples.labels[rows].astype(np.float32)).to(self.device),
            functional.adaptive_avg_pool2d(moved, (grid[0], grid[1])).to(self.device),
        )


def _learning(network: EvidenceNet, first: int) -> Iterator[nn.Parameter]:
    """Batch norms keep ImageNet's statistics: there are too few slices for others."""
    for stage, block in enumerate(network.backbone.get_submodule("blocks").children()):
        if stage >= first:
            yield from block.requires_grad_(True).parameters()
    yield from network.head.requires_grad_(True).parameters()
