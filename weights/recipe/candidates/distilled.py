"""A network without weights of its own, taught by one that has them.

No ImageNet weights of EfficientNet-B4 can be had offline, and 82 patients teach no network of 17
million weights from nothing. So it learns, cell by cell, what a teacher says of the same slices,
beside the labels. Its teacher is always the fit of the same split: neither has seen a patient that
the student is judged by. G. Hinton et al., Distilling the knowledge in a neural network, 2015.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from inference.evidence import EvidenceNet
from inference.manifest import EvidenceSpec
from weights.recipe import augment
from weights.recipe.augment import View
from weights.recipe.bank import Pictures
from weights.recipe.candidates.candidate import Candidate, Explanation, Fit, Maps, Rows, Weights
from weights.recipe.candidates.evidence import Evidence, lesion_maps
from weights.recipe.candidates.whole import Whole
from weights.recipe.examples import Examples
from weights.recipe.fitting import Batch, Schedule, evidence_loss, fit
from weights.recipe.progress import Progress

_VIEW = View("lesson")
_TEACHER = 4.0  # the weight of what the teacher says, beside what the labels say


@dataclass(frozen=True, slots=True, eq=False)
class Distilled:
    """`architecture` at the size of `pictures`, taught by `teacher` at the size of its own."""

    pictures: Pictures  # what is served: logits and maps are made of these
    teacher: Evidence
    architecture: str
    spec: EvidenceSpec
    device: str
    schedule: Schedule = field(
        default_factory=lambda: Schedule(samples=60_000, batch=32, rate=2e-3, decay=0.02)
    )

    @property
    def name(self) -> str:
        size, how = self.pictures.manifest.input.size, self.schedule
        return f"{self.family} {size}px n={how.samples} rate={how.rate:g} by {self.teacher.name}"

    @property
    def family(self) -> str:
        return f"distilled {self.architecture}"

    @property
    def needs(self) -> tuple[Candidate, ...]:
        return (self.teacher,)

    @property
    def evidence(self) -> EvidenceSpec | None:
        return self.spec

    @property
    def pretrained(self) -> str:
        return f"A teacher: {self.teacher.pretrained}, with a head fitted on the same patients"

    @property
    def words(self) -> str:
        return (
            f"The network is `{self.architecture}`, **fitted from its first layer on**: no "
            "ImageNet weights of it can be had offline. It learnt from the slices' labels and "
            f"boxes, and cell by cell from what a teacher says of them ({self.teacher.family}, "
            "fitted on the same patients; in every fold neither has seen whom it is judged by). "
            "It is here because the customer's design names this architecture, and so that its "
            "bundle works end to end. Compare its figures with the teacher's before you use it."
        )

    @property
    def explanations(self) -> tuple[Explanation, ...]:
        return self.teacher.explanations

    def prepare(self, progress: Progress) -> None:
        """Nothing: every fit draws its own views."""

    def fit(self, examples: Examples, rows: Rows, *, seed: int, given: tuple[Fit, ...]) -> Fit:
        labels, own = examples.labels.shape[1], self._own
        student = own.placed(own.drawn(labels, seed)).train()
        teacher = self._its.placed(self.teacher.network(given[0].weights, np.eye(labels)))
        chance = torch.Generator().manual_seed(seed)
        loss = fit(
            lambda batch: self._loss(student, teacher, batch),
            student.parameters(),
            lambda chosen, _: self._lesson(examples, chosen, chance),
            examples.labels[:, 0],
            rows,
            self.schedule,
            seed=seed,
        )
        weights = own.kept(student)
        return Fit(weights, own.logits(student, rows, examples.labels.shape), {"loss": loss})

    def maps(self, weights: Weights, rows: Rows, how: Explanation) -> Maps:
        return self._own.maps(weights, rows, how)

    def untrained(self, weights: Weights, seed: int) -> Weights:
        """Drawn from the first layer to the last."""
        drawn = self._own.drawn(weights["mix.weight"].shape[1], seed)
        return {name: value.numpy() for name, value in drawn.state_dict().items()}

    def network(self, weights: Weights, mix: NDArray[np.float64]) -> EvidenceNet:
        return self._own.network(weights, mix)

    @property
    def _own(self) -> Whole:
        return Whole(self.pictures, self.architecture, self.spec, self.device)

    @property
    def _its(self) -> Whole:
        teacher = self.teacher
        return Whole(teacher.bank.pictures, teacher.architecture, teacher.spec, self.device)

    def _lesson(self, examples: Examples, rows: Rows, chance: torch.Generator) -> Batch:
        """Slices as the teacher sees them; the student's are made of these, only smaller."""
        images, places = augment.seen(self._its.pictures.unit(rows), _VIEW, chance)
        moved = augment.moved_by(lesion_maps(examples, rows), places)
        labels = torch.from_numpy(examples.labels[rows].astype(np.float32))
        return Batch(images, labels.to(self.device), moved.to(self.device))

    def _loss(self, student: EvidenceNet, teacher: EvidenceNet, batch: Batch) -> Tensor:
        size = self.pictures.manifest.input.size
        small = functional.interpolate(
            batch.inputs[:, None], size=(size, size), mode="bilinear", antialias=True
        )[:, 0]
        said = student.head.evidence(student.features(self._own.inputs(small)))
        rows, columns = said.shape[-2:]
        with torch.no_grad():
            heard = teacher.head.evidence(teacher.features(self._its.inputs(batch.inputs)))
        target = functional.adaptive_avg_pool2d(torch.sigmoid(heard.mean(dim=1)), (rows, columns))
        copied = functional.binary_cross_entropy_with_logits(said.mean(dim=1), target)
        covered = functional.adaptive_avg_pool2d(batch.covered, (rows, columns))
        learnt = evidence_loss(said, batch.labels, covered, self.spec.cells)
        return _TEACHER * copied + learnt
