"""Batches formed at dispatch: by lane, from the images of several studies."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

#: Batches are padded to these sizes, so that a compiled or tuned model meets few shapes.
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(eq=False)
class Work:
    """The inputs of one study for one bundle, and the model's outputs as they come in."""

    key: int  # the job's id
    bundle: str
    lane: int
    inputs: NDArray[np.float32]  # (n, channels, size, size)
    n_outputs: int
    sent: int = 0  # images handed out so far
    outputs: NDArray[np.float32] = field(init=False)  # (n, outputs)
    n_scored: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.outputs = np.full((len(self.inputs), self.n_outputs), np.nan, np.float32)

    @property
    def is_scored(self) -> bool:
        return self.n_scored == len(self.inputs)


@dataclass(frozen=True, eq=False)
class Batch:
    """Images of one bundle; `parts` says whose they are and where their logits belong."""

    bundle: str
    inputs: NDArray[np.float32]  # (size, channels, rows, cols), padded with zeros
    n: int  # real images in it
    parts: tuple[tuple[Work, int, int], ...]  # work, first, behind the last

    def scatter(self, logits: NDArray[np.float32]) -> Iterator[Work]:
        """Give each study its logits; yields those that are complete now."""
        if logits.shape[0] < self.n:
            raise ValueError(f"{logits.shape[0]} rows of logits for {self.n} images")
        at = 0
        for work, first, end in self.parts:
            work.outputs[first:end] = logits[at : at + end - first]
            work.n_scored += end - first
            at += end - first
            if work.is_scored:
                yield work


class Batcher:
    """What waits for the device. Used by the device's thread alone."""

    def __init__(self, max_batch: int) -> None:
        self._max_batch = max_batch
        self._waiting: deque[Work] = deque()

    def __len__(self) -> int:
        """Images that wait."""
        return sum(len(work.inputs) - work.sent for work in self._waiting)

    def add(self, work: Work) -> None:
        self._waiting.append(work)

    def discard(self, key: int) -> None:
        """Forget a study: its job failed or was taken away."""
        self._waiting = deque(work for work in self._waiting if work.key != key)

    def next(self, limit: int | None = None) -> Batch | None:
        """The next batch: the most urgent study's images, filled up from the studies behind it."""
        if not self._waiting:
            return None
        room = min(limit or self._max_batch, self._max_batch)
        # Stable: inside a lane the order of arrival stays.
        order = sorted(self._waiting, key=lambda work: work.lane)
        bundle = order[0].bundle
        parts: list[tuple[Work, int, int]] = []
        for work in order:
            if work.bundle != bundle or room == 0:
                continue
            end = min(work.sent + room, len(work.inputs))
            parts.append((work, work.sent, end))
            room -= end - work.sent
        for work, _, end in parts:
            work.sent = end
        self._waiting = deque(work for work in self._waiting if work.sent < len(work.inputs))
        return _batch(bundle, parts)


def _batch(bundle: str, parts: list[tuple[Work, int, int]]) -> Batch:
    images = np.concatenate([work.inputs[first:end] for work, first, end in parts])
    n = len(images)
    size = next((size for size in SIZES if size >= n), n)
    if size > n:
        padding = np.zeros((size - n, *images.shape[1:]), np.float32)
        images = np.concatenate([images, padding])
    return Batch(bundle, images, n, tuple(parts))
