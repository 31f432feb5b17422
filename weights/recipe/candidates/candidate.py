"""What may become the model: each is fitted on some slices and gives logits for others."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import nn

from inference.manifest import CamMethod, EvidenceSpec
from weights.recipe.examples import Examples
from weights.recipe.progress import Progress

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]
Maps = NDArray[np.float32]
Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """What a candidate learnt, and what it says of the slices."""

    weights: Weights
    # (slices, labels); of slices it learnt from it may be NaN, unless it learnt from all there are.
    logits: Floats
    log: Mapping[str, float] = field(default_factory=dict)


#: As the papers write them.
CAM_WORDS: Mapping[CamMethod, str] = {
    "grad-cam": "Grad-CAM",
    "grad-cam++": "Grad-CAM++",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
}


@dataclass(frozen=True, slots=True)
class Explanation:
    """A way to make heat maps."""

    method: CamMethod
    layer: str  # a module of the served network

    def __str__(self) -> str:
        return f"{self.method} at {self.layer}"


class Candidate(Protocol):
    """A way to fit a model."""

    @property
    def name(self) -> str:
        """In words; tells it from every other, and names its files."""

    @property
    def family(self) -> str:
        """Candidates of one family differ in numbers only; the best is chosen inside the folds."""

    @property
    def needs(self) -> tuple["Candidate", ...]:
        """Whose fits on the same slices it starts from or learns from."""

    def prepare(self, progress: Progress) -> None:
        """Make what all its fits share, unless it is there."""

    def fit(self, examples: Examples, rows: Rows, *, seed: int, given: tuple[Fit, ...]) -> Fit:
        """Learn from these slices alone; `given` are the fits of what it needs."""


@runtime_checkable
class Servable(Candidate, Protocol):
    """A candidate that a bundle can hold."""

    @property
    def architecture(self) -> str:
        """As timm names it."""

    @property
    def evidence(self) -> EvidenceSpec | None:
        """As the manifest has it."""

    @property
    def pretrained(self) -> str:
        """What it knew before it saw a head, for the manifest's `trained_on`."""

    @property
    def words(self) -> str:
        """For the model card: what the network is and what of it was fitted on what."""

    @property
    def explanations(self) -> tuple[Explanation, ...]:
        """The heat maps it offers; which of them points best is chosen inside the folds."""

    def maps(self, weights: Weights, rows: Rows, how: Explanation) -> Maps:
        """(n, h, w): raw heat maps of the first label, over the square that was cut out."""

    def untrained(self, weights: Weights, seed: int) -> Weights:
        """The same shapes, drawn: a control for heat maps."""

    def network(self, weights: Weights, mix: NDArray[np.float64]) -> nn.Module:
        """As it is served; `mix` (outputs, labels) makes outputs of the labels' logits."""


def servable(candidate: Candidate) -> Servable:
    """The same, known to be one that a bundle can hold.

    Raises
    ------
    TypeError
        If it is not.
    """
    if not isinstance(candidate, Servable):
        raise TypeError(f"no bundle can hold {candidate.name}")
    return candidate


@dataclass(frozen=True, slots=True, eq=False)
class Mean:
    """Several candidates' logits, averaged: what more networks than one would bring."""

    parts: tuple[Candidate, ...]

    @property
    def name(self) -> str:
        return "mean of " + " and ".join(part.name for part in self.parts)

    @property
    def family(self) -> str:
        return "mean of " + " and ".join(part.family for part in self.parts)

    @property
    def needs(self) -> tuple[Candidate, ...]:
        return self.parts

    def prepare(self, progress: Progress) -> None:
        """Nothing: its parts do."""

    def fit(self, examples: Examples, rows: Rows, *, seed: int, given: tuple[Fit, ...]) -> Fit:
        return Fit({}, np.mean([fit.logits for fit in given], axis=0))
