"""Fits a network that judges cell by cell, from slice labels and, where there are any, boxes.

Three things are asked of the evidence: the strongest cells of a slice must say what the slice's
labels say; no cell outside the boxes, nor of a slice without the finding, may speak for it; and
some cells inside each marked slice's boxes must. A box is loose round a lesion, so not all do.
Slices of positive patients that nobody marked teach by their labels alone.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from inference.evidence import strongest

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]

_CPU = torch.device("cpu")
_POSITIVE_SHARE = 1 / 3  # of a batch: one slice in eight is positive
_OTHER_LABELS = 0.2  # the weight of each label but the first
_OUTSIDE, _INSIDE = 2.0, 0.5  # the weights of what boxes say, beside the slices' labels
_TEACHER = 2.0  # the weight of what a teacher says, where there is one
_SLOW = 0.1  # of the rate, for what knew something before
_INSIDE_CELLS = 4  # of the marked ones, so many must speak
_COVERED = 0.25  # of a cell, from which it counts as marked
MARKED = 0.1  # of any cell: less of a box is left in view, and the slice counts as unmarked


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how hard is fitted."""

    samples: int  # slices drawn in all
    batch: int = 64
    rate: float = 2e-3  # the peak of a one-cycle learning rate
    decay: float = 0.05  # AdamW's weight decay

    def __str__(self) -> str:
        return f"n={self.samples} batch={self.batch} rate={self.rate:g} decay={self.decay:g}"


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some slices."""

    inputs: Tensor  # (n, ...), whatever the network takes
    labels: Tensor  # (n, labels), 0 or 1; NaN where it is not known
    covered: Tensor  # (n, rows, cols), 0..1: how much of each cell lies in a box
    heard: Tensor | None = None  # the same, 0..1: what a teacher says; NaN where it says nothing

    def to(self, device: torch.device) -> "Batch":
        """The same there."""
        heard = None if self.heard is None else self.heard.to(device)
        return Batch(self.inputs.to(device), self.labels.to(device), self.covered.to(device), heard)


#: Draws a batch of these slices.
Draw = Callable[[Rows, np.random.Generator], Batch]


def fit(
    loss_of: Callable[[Batch], Tensor],
    parameters: Iterable[nn.Parameter],
    draw: Draw,
    truth: NDArray[np.bool_],
    among: Rows,
    schedule: Schedule,
    *,
    seed: int,
    device: torch.device = _CPU,
    slow: Iterable[nn.Parameter] = (),
) -> float:
    """Fit in place; the mean loss of the last tenth.

    device : where the parameters are; batches are drawn on the CPU and go there
    truth : (slices,), the first label; among : the slices that may be drawn
    slow : parameters that knew something before, and learn at a tenth of the rate

    Raises
    ------
    ValueError
        If one class is missing among them.
    """
    positive, negative = among[truth[among]], among[~truth[among]]
    if not len(positive) or not len(negative):
        raise ValueError("slices with and without the finding are needed")
    rng, steps = np.random.default_rng(seed), max(schedule.samples // schedule.batch, 1)
    groups = [{"params": list(parameters)}, {"params": list(slow)}]
    optimiser = torch.optim.AdamW(groups, lr=schedule.rate, weight_decay=schedule.decay)
    peaks = [schedule.rate, _SLOW * schedule.rate]
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, peaks, total_steps=steps + 1)
    n_positive, losses = round(schedule.batch * _POSITIVE_SHARE), []
    for _ in range(steps):
        chosen = (
            rng.choice(positive, n_positive),
            rng.choice(negative, schedule.batch - n_positive),
        )
        batch = draw(np.concatenate(chosen), rng).to(device)
        loss = loss_of(batch)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
        optimiser.step()
        rate.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses[-max(steps // 10, 1) :]))


def to_own_share(truth: NDArray[np.bool_]) -> float:
    """Log-odds from the share of positive slices that `fit` draws to the share there is."""
    share = float(truth.mean())
    return float(np.log(share / (1 - share)) - np.log(_POSITIVE_SHARE / (1 - _POSITIVE_SHARE)))


def evidence_loss(evidence: Tensor, batch: Batch, cells: int) -> Tensor:
    """One number.

    evidence : shape (n, members, labels, rows, cols)
    """
    labels, covered = batch.labels, batch.covered
    first, is_marked = evidence[:, :, 0], covered.amax(dim=(1, 2)) > MARKED
    loss = _by_labels(strongest(evidence, cells), labels)
    is_known = is_marked | (labels[:, 0] == 0)
    outside = ((covered <= 0) & is_known[:, None, None])[:, None].expand_as(first)
    quiet = (functional.softplus(first) * outside).sum() / outside.sum().clamp(min=1)
    loss = loss + _OUTSIDE * quiet
    if is_marked.any():
        loss = loss + _INSIDE * _inside(first[is_marked], covered[is_marked])
    if batch.heard is not None and (is_heard := torch.isfinite(batch.heard)).any():
        said, heard = first.mean(dim=1)[is_heard], batch.heard[is_heard]
        loss = loss + _TEACHER * functional.binary_cross_entropy_with_logits(said, heard)
    return loss


def _by_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """(n, members, labels) against (n, labels)."""
    weights = torch.full((labels.shape[1],), _OTHER_LABELS, device=labels.device)
    weights[0] = 1.0
    is_known = torch.isfinite(labels)[:, None].expand_as(logits)
    each = functional.binary_cross_entropy_with_logits(
        logits, torch.nan_to_num(labels)[:, None].expand_as(logits), reduction="none"
    )
    return (each * weights * is_known).sum(dim=2).mean()


def _inside(evidence: Tensor, covered: Tensor) -> Tensor:
    """(n, members, rows, cols) of marked slices: the strongest marked cells must be positive."""
    most = covered.amax(dim=(1, 2), keepdim=True)
    marked = ((covered > _COVERED) | (covered >= most)).flatten(1)[:, None]
    inside = evidence.flatten(2).masked_fill(~marked, -torch.inf)
    best = inside.topk(min(_INSIDE_CELLS, inside.shape[2]), dim=2).values
    is_there = torch.isfinite(best)  # fewer may be marked
    return functional.softplus(-best[is_there]).mean()
