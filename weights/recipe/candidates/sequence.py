"""Heads that read a study's slices in order, on a frozen network's pooled features.

For comparison: the node hands slices of several studies to the device in one batch, so a bundle
holds no such head. It would have to win clearly to be worth another way to serve.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from weights.recipe.augment import PLAIN
from weights.recipe.bank import Bank
from weights.recipe.candidates.candidate import Candidate, Fit, Floats, Rows
from weights.recipe.examples import Examples
from weights.recipe.progress import Progress

Kind = Literal["gru", "attention", "convolution"]

_WIDTH = 32
_STUDIES = 12  # in a batch
_STEPS = 400
_RATE, _DECAY, _DROPOUT = 2e-3, 0.05, 0.5
_POSITIVE_WEIGHT = 3.0  # one slice in eight is positive


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """A small recurrent, attentive or convolving head over a study's slices."""

    bank: Bank
    backbone: str
    kind: Kind

    @property
    def name(self) -> str:
        return f"{self.family} steps={_STEPS}"

    @property
    def family(self) -> str:
        return f"{self.kind} over slices {self.backbone}"

    @property
    def needs(self) -> tuple[Candidate, ...]:
        return ()

    def prepare(self, progress: Progress) -> None:
        self.bank.features(PLAIN, progress)

    def fit(self, examples: Examples, rows: Rows, *, seed: int, given: tuple[Fit, ...]) -> Fit:
        torch.manual_seed(seed)
        features = np.asarray(self.bank.features(PLAIN), np.float32)
        mean, scale = features[rows].mean(axis=0), features[rows].std(axis=0) + 1e-3
        device = self.bank.device
        standard = torch.from_numpy((features - mean) / scale).to(device)
        labels = torch.from_numpy(examples.labels.astype(np.float32)).to(device)
        chosen = set(rows.tolist())
        studies = [torch.from_numpy(g) for g in examples.groups if g[0] in chosen]
        network = _Reader(features.shape[1], labels.shape[1], self.kind).to(device)
        optimiser = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=_DECAY)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=_STEPS + 1)
        rng, loss = np.random.default_rng(seed), torch.zeros(())
        for _ in range(_STEPS):
            batch = [studies[i] for i in rng.integers(len(studies), size=_STUDIES)]
            loss = _loss(network, [standard[s] for s in batch], [labels[s] for s in batch])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
            optimiser.step()
            rate.step()
        return Fit({}, _logits(network.eval(), standard, examples), {"loss": float(loss.detach())})


class _Reader(nn.Module):
    """(studies, slices, features) and which slices are there -> (studies, slices, labels)."""

    def __init__(self, features: int, labels: int, kind: Kind) -> None:
        super().__init__()
        self.reduce = nn.Sequential(
            nn.Dropout(_DROPOUT), nn.Linear(features, _WIDTH), nn.ReLU(), nn.Dropout(_DROPOUT)
        )
        self.kind = kind
        self.gru = nn.GRU(_WIDTH, _WIDTH // 2, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(_WIDTH, 2, batch_first=True)
        self.convolution = nn.Conv1d(_WIDTH, _WIDTH, 5, padding=2)
        self.judge = nn.Linear(_WIDTH, labels)

    def forward(self, features: Tensor, is_there: Tensor) -> Tensor:
        own = self.reduce(features) * is_there[..., None]
        if self.kind == "gru":
            beside = self.gru(own)[0]
        elif self.kind == "attention":
            beside = self.attention(own, own, own, key_padding_mask=~is_there)[0]
        else:
            beside = functional.relu(self.convolution(own.transpose(1, 2))).transpose(1, 2)
        made: Tensor = self.judge(own + beside)
        return made


def _loss(network: _Reader, features: list[Tensor], labels: list[Tensor]) -> Tensor:
    padded, is_there = _padded(features)
    truth, _ = _padded(labels)
    weight = torch.full((truth.shape[-1],), _POSITIVE_WEIGHT, device=truth.device)
    each = functional.binary_cross_entropy_with_logits(
        network(padded, is_there), truth, reduction="none", pos_weight=weight
    )
    return each[is_there].mean()


def _padded(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(studies, most slices, ...), zeros behind the shorter ones; and which slices are there."""
    lengths = torch.tensor([len(part) for part in parts])
    is_there = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return nn.utils.rnn.pad_sequence(parts, batch_first=True), is_there.to(parts[0].device)


@torch.inference_mode()
def _logits(network: _Reader, features: Tensor, examples: Examples) -> Floats:
    made: NDArray[np.float64] = np.empty(examples.labels.shape)
    for rows in examples.groups:
        padded, is_there = _padded([features[torch.from_numpy(rows)]])
        made[rows] = network(padded, is_there)[0].double().cpu().numpy()
    return made
