"""A cell-by-cell head on a frozen network's feature maps: see `inference.evidence`."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from inference.evidence import EvidenceHead, EvidenceNet
from inference.heatmap import grad_cam
from inference.manifest import EvidenceSpec
from weights.recipe import augment
from weights.recipe.augment import PLAIN
from weights.recipe.backbone import Backbone
from weights.recipe.bank import Bank
from weights.recipe.candidates.candidate import (
    CAM_WORDS,
    Candidate,
    Explanation,
    Fit,
    Floats,
    Maps,
    Rows,
    Weights,
)
from weights.recipe.candidates.shelves import Shelves
from weights.recipe.examples import Examples
from weights.recipe.fitting import (
    Schedule,
    evidence_loss,
    fit,
    to_own_share,
)
from weights.recipe.network import with_evidence
from weights.recipe.placing import arrays, in_batches
from weights.recipe.progress import Progress

_BLEEDS_WORDS = (
    " Half of the positive slices it saw were slices without a bleed into which one was drawn "
    "(`weights/recipe/bleeds.py`), meant to have it answer to blood and not only to what comes "
    "with it; how far it does is told below. None is ever judged."
)
_TAUGHT_WORDS = (
    " Beside these it learnt, cell by cell, what a head on `{}` says of the same slices, fitted "
    "to the same patients (distillation; in every fold neither has seen whom it is judged by)."
)


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """A cell-by-cell head on a frozen network's feature maps; see `inference.evidence`."""

    bank: Bank
    backbone: Backbone
    spec: EvidenceSpec
    altered: int  # altered views beside the plain and the mirrored one
    dropout: float = 0.3
    schedule: Schedule = field(default_factory=lambda: Schedule(samples=12_000))
    grey: int = 0  # views of which only the grey is altered
    bleeds: int = 0  # views with bleeds drawn into slices that have none
    copied: int = 0  # views like pictures of pictures
    teacher: "Evidence | None" = None  # whose fit on the same slices says what cells should say

    def __post_init__(self) -> None:
        if self.bleeds and not self.altered:
            raise ValueError("drawn bleeds come altered: without altered views that would tell")

    @property
    def name(self) -> str:
        return (
            f"{self.family} w={self.spec.width} m={self.spec.members} k={self.spec.cells} "
            f"stages={self.spec.stages} grid={self.spec.grid} "
            f"a={self.altered} d={self.dropout:g} {self.schedule}"
            + (f" g={self.grey}" if self.grey else "")
            + (f" b={self.bleeds}" if self.bleeds else "")
            + (f" c={self.copied}" if self.copied else "")
            + (f" from ({self.teacher.name})" if self.teacher else "")
        )

    @property
    def architecture(self) -> str:
        return self.backbone.architecture

    @property
    def family(self) -> str:
        how = " with drawn bleeds" if self.bleeds else ""
        how += f" taught by {self.teacher.architecture}" if self.teacher else ""
        return f"evidence {self.architecture}{how}"

    @property
    def needs(self) -> tuple[Candidate, ...]:
        return (self.teacher,) if self.teacher else ()

    def prepare(self, progress: Progress) -> None:
        for view in (*self._views, *augment.views_with_bleeds(self.bleeds)):
            self.bank.features(view, progress)

    def fit(self, examples: Examples, rows: Rows, *, seed: int, given: tuple[Fit, ...]) -> Fit:
        torch.manual_seed(seed)
        heard = self.teacher.says(given[0].weights) if self.teacher else None
        shelves = self.shelves(examples, rows, heard)
        device, n_labels = self.bank.device, examples.labels.shape[1]
        standard = shelves.standard(seed).to(device)
        # Drawn on the CPU: the same beginning everywhere.
        head = EvidenceHead(shelves.channels, n_labels, self.spec, dropout=self.dropout)
        head.train().to(device)
        loss = fit(
            lambda b: evidence_loss(head.evidence(standard(b.inputs)), b, self.spec.cells),
            head.parameters(),
            shelves.draw,
            examples.labels[:, 0],
            rows,
            self.schedule,
            seed=seed,
            device=device,
        )
        standard.fold_into(head)
        # Back from the share that was drawn to the share there is, as balanced linear heads go.
        shift(head, to_own_share(examples.labels[rows, 0]))
        return Fit(
            arrays(head), head_logits(head.eval(), self.bank.features(PLAIN)), {"loss": loss}
        )

    @property
    def pretrained(self) -> str:
        return f"{self.backbone.origin}; frozen"

    @property
    def words(self) -> str:
        return (
            f"The backbone is `{self.architecture}`, frozen. {self.backbone.origin}. Its feature "
            f"maps of {len(self.spec.stages)} stages, brought to one grid of cells, go through a "
            "small head that says of each cell how much it speaks for a bleed; the mean of the "
            f"{self.spec.cells} strongest cells is the slice's logit (`inference/evidence.py`). "
            "The head was fitted to the labels of all slices and, where somebody drew them, to "
            f"lesion boxes.{_BLEEDS_WORDS if self.bleeds else ''}"
            + (_TAUGHT_WORDS.format(self.teacher.architecture) if self.teacher else "")
        )

    @property
    def explanations(self) -> tuple[Explanation, ...]:
        return tuple(Explanation(m, layer) for layer in ("head.trunk", "grid") for m in CAM_WORDS)

    def maps(self, weights: Weights, rows: Rows, how: Explanation) -> Maps:
        inputs = self.bank.features(PLAIN)[rows].astype(np.float32)
        return head_maps(self.head(weights), inputs, how)

    def untrained(self, weights: Weights, seed: int) -> Weights:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            head = self._empty(weights)
        return arrays(head)

    def network(self, weights: Weights, mix: NDArray[np.float64]) -> EvidenceNet:
        return with_evidence(self.backbone, self.spec, weights, mix)

    @property
    def evidence(self) -> EvidenceSpec | None:
        return self.spec

    @property
    def _views(self) -> tuple[augment.View, ...]:
        return augment.views(self.altered, self.grey, self.copied)

    def shelves(self, examples: Examples, rows: Rows, heard: Tensor | None = None) -> Shelves:
        """What a fit to these slices draws from."""
        return Shelves(
            self.bank,
            examples,
            rows,
            self._views,
            augment.views_with_bleeds(self.bleeds),
            heard=heard,
        )

    def head(self, weights: Weights, dropout: float = 0.0) -> EvidenceHead:
        """As it was fitted."""
        head = self._empty(weights, dropout)
        head.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        return head.eval().to(self.bank.device)

    def _empty(self, weights: Weights, dropout: float = 0.0) -> EvidenceHead:
        n_labels = weights["judge.weight"].shape[0] // self.spec.members
        channels = weights["trunk.reduce.weight"].shape[1]
        head = EvidenceHead(channels, n_labels, self.spec, dropout=dropout)
        return head.requires_grad_(False)

    def says(self, weights: Weights) -> Tensor:
        """(slices, rows, cols), 0..1: how much each cell of a plain slice speaks for a bleed."""
        return torch.sigmoid(_cells(self.head(weights), self.bank.features(PLAIN)))

    def logits(self, weights: Weights, view: augment.View, rows: Rows) -> Floats:
        """(n, labels) of slices in a view."""
        return head_logits(self.head(weights), self.bank.features(view)[rows])


def shift(head: EvidenceHead, by: float) -> None:
    """Move the first label's logit, in place.

    Its own alone: how often the others came depends on what was drawn.
    """
    with torch.no_grad():
        head.judge.get_parameter("bias")[:: head.labels].add_(by)


def head_logits(head: EvidenceHead, maps: NDArray[np.floating]) -> Floats:
    """(n, channels, rows, cols) -> (n, labels)."""
    made: Floats = in_batches(head, head, maps).double().numpy()
    return made


def _cells(head: EvidenceHead, maps: NDArray[np.float16]) -> Tensor:
    """(slices, rows, cols): the first label's evidence, the mean of all members."""
    return in_batches(lambda part: head.evidence(part)[:, :, 0].mean(dim=1), head, maps)


def head_maps(head: EvidenceHead, inputs: NDArray[np.float32], how: Explanation) -> Maps:
    """(n, h, w): raw heat maps of the first label, of feature maps (n, channels, rows, cols)."""
    network = _HeadAlone(head).eval()
    return grad_cam(network, how.layer, inputs, [{0: 1.0}] * len(inputs), how.method)


class _HeadAlone(nn.Module):
    """What follows the feature maps, by the served network's names; it takes what a bank holds."""

    def __init__(self, head: EvidenceHead) -> None:
        super().__init__()
        self.grid = nn.Identity()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        made: Tensor = self.head(self.grid(features))
        return made
