"""A cell-by-cell head on a frozen network's feature maps: see `inference.evidence`."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from inference.evidence import EvidenceHead, EvidenceNet
from inference.heatmap import grad_cam
from inference.manifest import CamMethod, EvidenceSpec
from weights.recipe import augment
from weights.recipe.augment import PLAIN
from weights.recipe.backbone import imagenet
from weights.recipe.bank import Bank
from weights.recipe.candidates.candidate import (
    Candidate,
    Explanation,
    Fit,
    Floats,
    Maps,
    Rows,
    Weights,
)
from weights.recipe.examples import Examples, lesion_map
from weights.recipe.fitting import (
    MARKED,
    Batch,
    Schedule,
    evidence_loss,
    fit,
    to_own_share,
)
from weights.recipe.network import with_evidence
from weights.recipe.progress import Progress

_BLEEDS_WORDS = (
    " Half of the positive slices it saw were slices without a bleed into which one was drawn "
    "(`weights/recipe/bleeds.py`), meant to have it answer to blood and not only to what comes "
    "with it; how far it does is told below. None is ever judged."
)
_BATCH = 64
_DRAWN_SHARE = 0.5  # of the positive slices in a batch, where bleeds are drawn
_MAP_SIDE = 80  # cells of a lesion map


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """A cell-by-cell head on a frozen network's feature maps; see `inference.evidence`."""

    bank: Bank
    architecture: str
    spec: EvidenceSpec
    altered: int  # altered views beside the plain and the mirrored one
    uses_boxes: bool = True
    dropout: float = 0.3
    schedule: Schedule = field(default_factory=lambda: Schedule(samples=12_000))
    grey: int = 0  # views of which only the grey is altered
    bleeds: int = 0  # views with bleeds drawn into slices that have none

    @property
    def name(self) -> str:
        return (
            f"{self.family} w={self.spec.width} m={self.spec.members} k={self.spec.cells} "
            f"a={self.altered} d={self.dropout:g} n={self.schedule.samples}"
            + (f" g={self.grey}" if self.grey else "")
            + (f" b={self.bleeds}" if self.bleeds else "")
        )

    @property
    def family(self) -> str:
        how = " with drawn bleeds" if self.bleeds else ""
        how += "" if self.uses_boxes else " without boxes"
        return f"evidence {self.architecture}{how}"

    @property
    def needs(self) -> tuple[Candidate, ...]:
        return ()

    def prepare(self, progress: Progress) -> None:
        for view in (*self._views, *augment.views_with_bleeds(self.bleeds)):
            self.bank.features(view, progress)

    def fit(self, examples: Examples, rows: Rows, *, seed: int, given: tuple[Fit, ...]) -> Fit:
        torch.manual_seed(seed)
        shelves = [_Shelf(self.bank.features(v), self._covered(examples, v)) for v in self._views]
        bled = (self._drawn(examples, rows, v) for v in augment.views_with_bleeds(self.bleeds))
        drawn = [shelf for shelf in bled if len(shelf.rows)]  # where a skull closes at all
        standard = _Standard.of(self.bank.features(PLAIN), rows, seed)
        n_labels = examples.labels.shape[1]
        head = EvidenceHead(shelves[0].maps.shape[1], n_labels, self.spec, dropout=self.dropout)
        head.train()

        def draw(chosen: Rows, rng: np.random.Generator) -> Batch:
            picked = [self._picked(examples, shelves, drawn, row, rng) for row in chosen]
            maps, covered, labels = zip(*picked, strict=True)
            inputs = standard(torch.from_numpy(np.stack(maps)).float())
            return Batch(inputs, torch.from_numpy(np.stack(labels)), torch.stack(covered))

        loss = fit(
            lambda b: evidence_loss(head.evidence(b.inputs), b.labels, b.covered, self.spec.cells),
            head.parameters(),
            draw,
            examples.labels[:, 0],
            rows,
            self.schedule,
            seed=seed,
        )
        standard.fold_into(head)
        # Back from the share that was drawn to the share there is, as balanced linear heads go.
        # The first label's alone: how often the others came depends on what was drawn.
        with torch.no_grad():
            first = head.judge.get_parameter("bias")[:: examples.labels.shape[1]]
            first.add_(to_own_share(examples.labels[rows, 0]))
        weights = {name: value.numpy().copy() for name, value in head.state_dict().items()}
        return Fit(weights, _logits(head.eval(), self.bank.features(PLAIN)), {"loss": loss})

    @property
    def pretrained(self) -> str:
        return f"{imagenet(self.architecture)}; frozen"

    @property
    def words(self) -> str:
        return (
            f"The backbone is `{self.architecture}` with its ImageNet weights, frozen. Its feature "
            f"maps of {len(self.spec.stages)} stages, brought to one grid of cells, go through a "
            "small head that says of each cell how much it speaks for a bleed; the mean of the "
            f"{self.spec.cells} strongest cells is the slice's logit (`inference/evidence.py`). "
            "The head was fitted to the labels of all slices and, where somebody drew them, to "
            f"lesion boxes.{_BLEEDS_WORDS if self.bleeds else ''}"
        )

    @property
    def explanations(self) -> tuple[Explanation, ...]:
        # HiResCAM and LayerCAM light up the strongest cells alone, and objects call a map Grad-CAM.
        methods: tuple[CamMethod, ...] = ("grad-cam", "grad-cam++")
        return tuple(Explanation(m, layer) for layer in ("head.trunk", "grid") for m in methods)

    def maps(self, weights: Weights, rows: Rows, how: Explanation) -> Maps:
        network = _HeadAlone(self._head(weights)).eval()
        inputs = self.bank.features(PLAIN)[rows].astype(np.float32)
        return grad_cam(network, how.layer, inputs, [{0: 1.0}] * len(rows), how.method)

    def untrained(self, weights: Weights, seed: int) -> Weights:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            head = self._empty(weights)
        return {name: value.numpy() for name, value in head.state_dict().items()}

    def network(self, weights: Weights, mix: NDArray[np.float64]) -> EvidenceNet:
        return with_evidence(self.architecture, self.spec, weights, mix)

    @property
    def evidence(self) -> EvidenceSpec | None:
        return self.spec

    @property
    def _views(self) -> tuple[augment.View, ...]:
        return augment.views(self.altered, self.grey)

    def _head(self, weights: Weights) -> EvidenceHead:
        head = self._empty(weights)
        head.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        return head.eval()

    def _empty(self, weights: Weights) -> EvidenceHead:
        n_labels = weights["judge.weight"].shape[0] // self.spec.members
        head = EvidenceHead(weights["trunk.reduce.weight"].shape[1], n_labels, self.spec)
        return head.requires_grad_(False)

    def _picked(
        self,
        examples: Examples,
        shelves: list["_Shelf"],
        drawn: list["_Shelf"],
        row: int,
        rng: np.random.Generator,
    ) -> tuple[NDArray[np.float16], Tensor, NDArray[np.float32]]:
        """A slice in one of its views; in place of half the positive ones, one drawn into."""
        labels = examples.labels[row].astype(np.float32)
        shelf = shelves[rng.integers(len(shelves))]
        if drawn and labels[0] and rng.random() < _DRAWN_SHARE:
            shelf = drawn[rng.integers(len(drawn))]
            row = int(rng.choice(shelf.rows))
            labels = np.full_like(labels, np.nan)  # of no subtype that a radiologist would name
            labels[0] = 1.0
        return shelf.maps[row], shelf.covered[row], labels

    def _drawn(self, examples: Examples, rows: Rows, view: augment.View) -> "_Shelf":
        """Of the slices that may be learnt from, those without a bleed that were given one."""
        maps = self.bank.features(view)
        bleeds = torch.from_numpy(self.bank.bleeds(view))
        covered = functional.adaptive_avg_pool2d(bleeds, (maps.shape[2], maps.shape[3]))
        is_drawn = covered.amax(dim=(1, 2)).numpy() > MARKED
        return _Shelf(maps, covered, rows[is_drawn[rows] & ~examples.labels[rows, 0]])

    def _covered(self, examples: Examples, view: augment.View) -> Tensor:
        """(slices, rows, cols): the lesion maps, moved as the view moved the slices."""
        rows, columns = self.bank.features(view).shape[2:]
        made = torch.zeros(len(examples.labels), rows, columns)
        marked = np.array(sorted(examples.lesions) if self.uses_boxes else [], np.int64)
        if len(marked):
            places = torch.from_numpy(self.bank.places(view)[marked])
            moved = augment.moved_by(lesion_maps(examples, marked), places)
            made[torch.from_numpy(marked)] = functional.adaptive_avg_pool2d(moved, (rows, columns))
        return made

    def logits(self, weights: Weights, view: augment.View, rows: Rows) -> Floats:
        """(n, labels) of slices in a view."""
        return _logits(self._head(weights), self.bank.features(view)[rows])


def lesion_maps(examples: Examples, rows: Rows) -> Tensor:
    """(n, side, side), 0..1: finer than any grid, so that they can be moved; 0 where unmarked."""
    maps = [lesion_map(examples.lesions.get(int(row), ()), _MAP_SIDE) for row in rows]
    return torch.from_numpy(np.stack(maps))


@dataclass(frozen=True, slots=True, eq=False)
class _Shelf:
    """One view of all slices."""

    maps: NDArray[np.float16]  # (slices, channels, rows, cols)
    covered: Tensor  # (slices, rows, cols), 0..1
    rows: Rows = field(default_factory=lambda: np.empty(0, np.int64))  # to pick from, if not all


@torch.inference_mode()
def _logits(head: EvidenceHead, maps: NDArray[np.float16]) -> Floats:
    starts = range(0, len(maps), _BATCH)
    parts = [head(torch.from_numpy(maps[i : i + _BATCH].astype(np.float32))) for i in starts]
    return torch.cat(parts).double().numpy()


class _HeadAlone(nn.Module):
    """What follows the feature maps, by the served network's names; it takes what a bank holds."""

    def __init__(self, head: EvidenceHead) -> None:
        super().__init__()
        self.grid = nn.Identity()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        made: Tensor = self.head(self.grid(features))
        return made


class _Standard:
    """Brings each channel to mean 0 and deviation 1 while fitting; folded into the head after."""

    _SLICES = 400  # are enough for a mean over hundreds of cells each

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        self._mean, self._scale = mean, scale  # (channels,)

    @classmethod
    def of(cls, maps: NDArray[np.float16], rows: Rows, seed: int) -> "_Standard":
        """From some of these slices."""
        rng = np.random.default_rng(seed)
        some = np.sort(rng.choice(rows, min(cls._SLICES, len(rows)), replace=False))
        values = torch.from_numpy(maps[some].astype(np.float32))
        return cls(values.mean(dim=(0, 2, 3)), values.std(dim=(0, 2, 3)) + 1e-3)

    def __call__(self, maps: Tensor) -> Tensor:
        return (maps - self._mean[:, None, None]) / self._scale[:, None, None]

    def fold_into(self, head: EvidenceHead) -> None:
        """So that the head takes maps as the network gives them."""
        reduce = head.trunk.reduce
        if reduce.bias is None:
            raise AssertionError("the first layer has a bias")
        with torch.no_grad():
            reduce.weight /= self._scale[None, :, None, None]
            reduce.bias -= (reduce.weight[:, :, 0, 0] * self._mean).sum(dim=1)
