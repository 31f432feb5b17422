"""The views of all slices that a head is fitted on, and what is known of their cells."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from weights.recipe import augment
from weights.recipe.augment import PLAIN, View
from weights.recipe.bank import Bank
from weights.recipe.bleeds import SHARE
from weights.recipe.candidates.candidate import Rows
from weights.recipe.examples import Examples, lesion_maps
from weights.recipe.fitting import MARKED, Batch
from weights.recipe.standard import Standard

_STANDARD_ON = 400  # slices, are enough for a mean over hundreds of cells each


@dataclass(frozen=True, slots=True, eq=False)
class _Shelf:
    """One view of all slices."""

    maps: NDArray[np.float16]  # (slices, channels, rows, cols)
    covered: Tensor  # (slices, rows, cols), 0..1
    heard: Tensor  # (slices, rows, cols), 0..1, from a teacher; NaN where none says anything
    rows: Rows = field(default_factory=lambda: np.empty(0, np.int64))  # to pick from, if not all


class Shelves:
    """Draws batches of some slices, each in a view drawn by chance."""

    def __init__(
        self,
        bank: Bank,
        examples: Examples,
        among: Rows,
        views: Sequence[View],
        bleeds: Sequence[View] = (),
        *,
        heard: Tensor | None = None,
    ) -> None:
        """Read what is kept.

        among : the slices that may be learnt from
        bleeds : views with bleeds drawn into slices that have none
        heard : shape (slices, rows, cols), 0..1; what a teacher says of plain slices
        """
        self._bank = bank
        self._examples = examples
        self._among = among
        self._views = [self._view(view, heard) for view in views]
        self._altered = [i for i, view in enumerate(views) if view.is_altered]
        drawn = [self._with_bleeds(view) for view in bleeds]
        self._drawn = [shelf for shelf in drawn if len(shelf.rows)]  # where a skull closes at all

    @property
    def channels(self) -> int:
        return int(self._views[0].maps.shape[1])

    def standard(self, seed: int) -> Standard:
        """From some of the slices, as they are."""
        rng = np.random.default_rng(seed)
        some = rng.choice(self._among, min(_STANDARD_ON, len(self._among)), replace=False)
        maps = self._bank.features(PLAIN)[np.sort(some)]
        return Standard.of(torch.from_numpy(maps.astype(np.float32)))

    def draw(self, chosen: Rows, rng: np.random.Generator) -> Batch:
        """These slices; in place of half the positive ones, one with a drawn bleed.

        Drawn bleeds come altered, so half of the others are drawn from altered views as well:
        how a slice looks must not tell what it is.
        """
        picked = [self._picked(row, rng) for row in chosen]
        maps, covered, heard, labels = zip(*picked, strict=True)
        return Batch(
            torch.from_numpy(np.stack(maps)).float(),
            torch.from_numpy(np.stack(labels)),
            torch.stack(covered),
            torch.stack(heard),
        )

    def _picked(
        self, row: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.float16], Tensor, Tensor, NDArray[np.float32]]:
        labels = self._examples.labels[row].astype(np.float32)
        shelf = self._views[rng.integers(len(self._views))]
        if self._drawn and rng.random() < SHARE:
            if labels[0]:
                shelf = self._drawn[rng.integers(len(self._drawn))]
                row = int(rng.choice(shelf.rows))
                labels = np.full_like(labels, np.nan)  # of no subtype that anybody would name
                labels[0] = 1.0
            else:
                shelf = self._views[rng.choice(self._altered)]
        return shelf.maps[row], shelf.covered[row], shelf.heard[row], labels

    def _view(self, view: View, heard: Tensor | None) -> _Shelf:
        """A view with what boxes and, if there is one, the teacher say of it."""
        maps, examples = self._bank.features(view), self._examples
        shape = (maps.shape[2], maps.shape[3])
        covered = torch.zeros(len(examples.labels), *shape)
        marked = np.array(sorted(examples.lesions), np.int64)
        if len(marked):
            places = torch.from_numpy(self._bank.places(view)[marked])
            moved = augment.moved_by(lesion_maps(examples, marked), places)
            covered[torch.from_numpy(marked)] = functional.adaptive_avg_pool2d(moved, shape)
        if heard is None:
            return _Shelf(maps, covered, torch.full_like(covered, torch.nan))
        moved = augment.moved_by(heard, torch.from_numpy(self._bank.places(view)))
        return _Shelf(maps, covered, functional.adaptive_avg_pool2d(moved, shape))

    def _with_bleeds(self, view: View) -> _Shelf:
        """Of the slices that may be learnt from, those without a bleed that were given one."""
        maps, rows = self._bank.features(view), self._among
        bleeds = torch.from_numpy(self._bank.bleeds(view))
        covered = functional.adaptive_avg_pool2d(bleeds, (maps.shape[2], maps.shape[3]))
        is_drawn = covered.amax(dim=(1, 2)).numpy() > MARKED
        chosen = rows[is_drawn[rows] & ~self._examples.labels[rows, 0]]
        return _Shelf(maps, covered, torch.full_like(covered, torch.nan), chosen)
