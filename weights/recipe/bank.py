"""Pictures and what frozen networks make of them, kept on disk so that a run resumes.

Everything is made once, slice by slice in the cohort's order, and read through the page cache
afterwards: a training touches a few slices of every view at a time.
"""

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from inference.body import Box
from inference.manifest import Manifest
from inference.volume import volume_from_pictures
from inference.window import as_channels, cropped
from weights.recipe import augment
from weights.recipe.augment import View
from weights.recipe.bleeds import with_bleed
from weights.recipe.data import PICTURE_RANGE_HU, Cohort
from weights.recipe.progress import Progress, silent
from weights.recipe.sources import INFERENCE, RECIPE, code_digest

Images = NDArray[np.float32]

_BATCH = 32
_MADE_BY = (  # everything that is in a cache's folder, but for fits
    *(RECIPE / f"{name}.py" for name in ("pictures", "bank", "augment", "bleeds")),
    *(RECIPE / f"{name}.py" for name in ("backbone", "network", "grown", "built", "standard")),
    *(INFERENCE / f"{name}.py" for name in ("body", "volume", "window", "evidence")),
)
_BLEED_SIDE = 40  # cells a side of what is kept of where bleeds were drawn


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """All slices of a cohort as the served input function cuts them, before windows."""

    images: Images  # (slices, size, size), Hounsfield units, in the cohort's order
    boxes: tuple[Box, ...]  # one a patient: the square that was cut out, in pixels of the picture
    shapes: tuple[tuple[int, int], ...]  # one a patient: rows, columns of its pictures
    manifest: Manifest
    folder: Path  # where all is kept that is made of them

    def unit(self, rows: NDArray[np.int64]) -> Tensor:
        """(n, size, size), 0..1 of the value range."""
        low, high = self.manifest.pixels.value_range
        return torch.from_numpy((self.images[rows] - np.float32(low)) / np.float32(high - low))

    def as_input(self, unit: Tensor) -> Tensor:
        """(n, size, size), 0..1 of the value range -> (n, channels, size, size), as served."""
        low, high = self.manifest.pixels.value_range
        values = (unit.numpy() * np.float32(high - low) + np.float32(low)).astype(np.float32)
        return torch.from_numpy(as_channels(values, self.manifest.input))


def read_pictures(
    cohort: Cohort, manifest: Manifest, cache: Path, progress: Progress = silent
) -> Pictures:
    """Cut every patient's head out of its pictures; kept in `cache`."""
    folder = folder_for(manifest, cohort.digest(), cache)
    folder.mkdir(parents=True, exist_ok=True)
    places: list[tuple[float, ...]] = []

    def parts() -> Iterator[Images]:
        for done, (_, rows) in enumerate(cohort.by_patient()):
            progress("pictures", done, len(cohort.patient_ids))
            volume = volume_from_pictures(cohort.grey(rows), PICTURE_RANGE_HU)
            made = cropped(volume, manifest.pixels, manifest.input)
            box = made.boxes[0]
            places.append((box.top, box.left, box.bottom, box.right, *volume.pixels.shape[1:]))
            yield made.images

    path, corners = folder / "pictures.npy", folder / "places.npy"
    if not corners.exists():  # the second of the two
        write(path, parts(), total=len(cohort.patients))
        write(corners, iter([np.array(places)]), total=len(places))
    progress("pictures", len(cohort.patient_ids), len(cohort.patient_ids))
    kept = np.load(corners)
    return Pictures(
        np.load(path, mmap_mode="r"),
        tuple(Box(*map(float, line[:4])) for line in kept),
        tuple((int(line[4]), int(line[5])) for line in kept),
        manifest,
        folder,
    )


def folder_for(manifest: Manifest, pictures: str, cache: Path) -> Path:
    """Where all goes that is made of these pictures, cut and shown to a network in just this way.

    By the code as it is now: with other code it goes elsewhere, and nothing made by the old is
    used. What refuses a study changes no picture, so it is no part of the name.

    pictures : a digest of them
    """
    above = manifest.pixels.body.above if manifest.pixels.body else None
    code = code_digest(_MADE_BY)
    text = repr((manifest.pixels.value_range, above, manifest.input, pictures, code))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return cache / f"{manifest.input.size}px-{digest}"


class Bank:
    """What a frozen network makes of every slice, in every view."""

    def __init__(
        self, pictures: Pictures, network: nn.Module, folder: Path, *, seed: int, device: str
    ) -> None:
        self.pictures = pictures
        # As it is served, and several times faster on a CPU than the other order.
        self._network = network.to(device).to(memory_format=torch.channels_last).eval()
        self._folder = folder
        self._seed = seed
        self._device = device
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def device(self) -> torch.device:
        """Where the network runs, and what is fitted to its features."""
        return torch.device(self._device)

    def features(self, view: View, progress: Progress = silent) -> NDArray[np.float16]:
        """(slices, ...), half precision; made at the first call."""
        path = self._path(view)
        if not path.exists():
            self._make(view, progress)
        made: NDArray[np.float16] = np.load(path, mmap_mode="r")
        return made

    def places(self, view: View) -> NDArray[np.float32]:
        """(slices, 2, 3): where each slice of the view comes from; see `augment.seen`."""
        made: NDArray[np.float32] = np.load(self._path(view).with_suffix(".places.npy"))
        return made

    def bleeds(self, view: View) -> NDArray[np.float32]:
        """(slices, side, side), 0..1: how much of each cell a drawn bleed covers in the view."""
        kept: NDArray[np.uint8] = np.load(self._path(view).with_suffix(".bleeds.npy"))
        return (kept / np.float32(255)).astype(np.float32)

    def _path(self, view: View) -> Path:
        return self._folder / f"{view.name}.npy"

    def _make(self, view: View, progress: Progress) -> None:
        draws, places = view.generator(self._seed), list[NDArray[np.float32]]()
        bleeds: list[NDArray[np.uint8]] = []
        total = len(self.pictures.images)

        def parts() -> Iterator[NDArray[np.float16]]:
            for start in range(0, total, _BATCH):
                progress(f"features, {view.name}", start, total)
                rows = np.arange(start, min(start + _BATCH, total))
                images, drawn = self._drawn_into(rows, view)
                images, moved = augment.seen(images, view, draws)
                if drawn is not None:
                    covered = functional.adaptive_avg_pool2d(
                        augment.moved_by(drawn, moved), (_BLEED_SIDE, _BLEED_SIDE)
                    )
                    bleeds.append((covered * 255).round().numpy().astype(np.uint8))
                places.append(moved.numpy())
                yield self._through(images).astype(np.float16)
            progress(f"features, {view.name}", total, total)
            where = self._path(view).with_suffix(".places.npy")
            write(where, iter([np.concatenate(places)]), total=total)
            if bleeds:
                where = self._path(view).with_suffix(".bleeds.npy")
                write(where, iter([np.concatenate(bleeds)]), total=total)

        write(self._path(view), parts(), total=total)

    def _drawn_into(self, rows: NDArray[np.int64], view: View) -> tuple[Tensor, Tensor | None]:
        """Slices, 0..1, and where bleeds were drawn into them, if the view has any."""
        if not view.has_bleeds:
            return self.pictures.unit(rows), None
        low, high = self.pictures.manifest.pixels.value_range
        images, drawn = [], []
        for row in rows:
            # By its own number, so that a slice gets the same bleed however rows are batched.
            rng = np.random.default_rng([self._seed, zlib.crc32(view.name.encode()), int(row)])
            image, where = with_bleed(np.asarray(self.pictures.images[row]), rng)
            images.append(np.clip(image, low, high))
            drawn.append(where)
        unit = (np.stack(images) - np.float32(low)) / np.float32(high - low)
        return torch.from_numpy(unit.astype(np.float32)), torch.from_numpy(np.stack(drawn))

    @torch.inference_mode()
    def _through(self, images: Tensor) -> NDArray[np.float32]:
        inputs = self.pictures.as_input(images)
        inputs = inputs.to(self._device, memory_format=torch.channels_last)
        made: NDArray[np.float32] = self._network(inputs).float().cpu().numpy()
        return made


def write(path: Path, parts: Iterator[NDArray[Any]], *, total: int) -> None:
    """One array from its parts, under its own name only once it is whole."""
    part = path.with_suffix(".part")
    at, file = 0, None
    for values in parts:
        if file is None:
            shape = (total, *values.shape[1:])
            file = np.lib.format.open_memmap(part, mode="w+", dtype=values.dtype, shape=shape)
        file[at : at + len(values)] = values
        at += len(values)
    if file is None or at != total:
        raise AssertionError(f"{path.name}: {at} rows of {total}")
    file.flush()
    part.replace(path)
