"""Pictures for the study page: slices decoded in the sandbox, heat maps from the result's file."""

import time
import uuid
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dashboard import render
from dashboard.stack import StackImage
from db import paint
from db.errors import NodeError
from db.files import result_folder
from db.pixels import read_images
from db.result import Finding, OutputSpec
from db.sandbox import Sandbox

Window = Literal["display", "wide", "full"]
WIDE = 5.0  # times the display window's width
DECODE_TIMEOUT_S = 30.0
CACHE_BYTES = 192 * 2**20
STACK_KEPT_S = 10.0


class NoPicture(Exception):
    """There is nothing to show at this place; the message says why, without patient data."""


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    values: NDArray[np.float32]  # (rows, cols), the modality's rescaled values
    window: tuple[float, float] | None  # the first one the image brings: centre, width
    is_inverted: bool  # MONOCHROME1: the lowest value is shown white


class ImageCache:
    """Decoded images and stacks used lately. Who asks has shown before that they may see them."""

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        self._limit = limit_bytes
        self._lock = Lock()
        self._images: OrderedDict[Hashable, Decoded] = OrderedDict()
        self._bytes = 0
        self._stacks: OrderedDict[Hashable, tuple[float, tuple[StackImage, ...]]] = OrderedDict()

    def image(self, key: Hashable, decode: Callable[[], Decoded]) -> Decoded:
        with self._lock:
            if found := self._images.get(key):
                self._images.move_to_end(key)
                return found
        made = decode()
        with self._lock:
            if key not in self._images:
                self._images[key] = made
                self._bytes += made.values.nbytes
            while self._bytes > self._limit and self._images:
                self._bytes -= self._images.popitem(last=False)[1].values.nbytes
        return made

    def stack(
        self, key: Hashable, read: Callable[[], tuple[StackImage, ...]]
    ) -> tuple[StackImage, ...]:
        now = time.monotonic()
        with self._lock:
            kept = self._stacks.get(key)
        if kept and now - kept[0] < STACK_KEPT_S:
            return kept[1]
        made = read()
        with self._lock:
            self._stacks[key] = (now, made)
            while len(self._stacks) > 64:
                self._stacks.popitem(last=False)
        return made


def slice_png(
    cache: ImageCache,
    sandbox: Sandbox,
    image: StackImage,
    window: Window,
    output: OutputSpec | None,
    max_pixels: int,
) -> bytes:
    """One picture of the stack through a window. Raises NoPicture."""
    decoded = _decoded(cache, sandbox, image, max_pixels)
    centre, width = _window(decoded, window, output)
    inverted = decoded.is_inverted
    return render.png(paint.grey_levels(decoded.values, centre, width, is_inverted=inverted))


def heat_map_png(
    cache: ImageCache,
    sandbox: Sandbox,
    image: StackImage,
    cam: NDArray[np.float32],
    scale: float,
    max_pixels: int,
) -> bytes:
    """The heat map of an image, transparent where it says nothing. Raises NoPicture.

    `scale` is the study's strongest value.
    """
    values = _decoded(cache, sandbox, image, max_pixels).values
    if values.shape != cam.shape:
        raise NoPicture("The heat map does not fit its image.")
    return render.png(render.painted(paint.inside(cam, values, image.modality), scale))


def heat_map(data_dir: Path, tenant: str, finding: Finding, number: int) -> NDArray[np.float32]:
    """The stored heat map of a key image, shape (rows, columns). Raises NoPicture."""
    if not 0 <= number < len(finding.key_images):
        raise NoPicture("There is no such key image.")
    folder = result_folder(data_dir, tenant, uuid.UUID(finding.result_uuid))
    try:
        with np.load(folder / "maps.npz", allow_pickle=False) as maps:
            cam: NDArray[np.float32] = maps[f"cam_{number}"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        raise NoPicture("The heat map is not kept any more.") from None
    if cam.ndim != 2 or cam.dtype.kind != "f":
        raise NoPicture("The heat map cannot be read.")
    return cam


def presets(output: OutputSpec | None) -> list[tuple[str, str, str]]:
    """Key, name and detail of each window that the page offers."""
    if output is None:
        return [("display", "As sent", ""), ("full", "Full range", "")]
    centre, width = output.window_centre, output.window_width
    return [
        ("display", "Display", f"C {centre:g} W {width:g}"),
        ("wide", "Wide", f"C {centre:g} W {width * WIDE:g}"),
        ("full", "Full range", ""),
    ]


def _decoded(cache: ImageCache, sandbox: Sandbox, image: StackImage, max_pixels: int) -> Decoded:
    key = (image.instance_id, image.frame)
    return cache.image(key, lambda: _decode(sandbox, image, max_pixels))


def _decode(sandbox: Sandbox, image: StackImage, max_pixels: int) -> Decoded:
    if not image.path.exists():
        raise NoPicture("The original image is not kept any more.")
    frames = None if image.frame is None else [image.frame - 1]
    path = str(image.path.resolve())
    try:
        meta, arrays = sandbox.run(
            read_images, path, frames, max_pixels, timeout_s=DECODE_TIMEOUT_S
        )
    except NodeError as error:
        raise NoPicture(f"This image cannot be shown ({error.code}).") from error
    return Decoded(arrays[0][0], _own_window(meta), meta["photometric"] == "MONOCHROME1")


def _own_window(meta: dict[str, Any]) -> tuple[float, float] | None:
    windows = meta["frames"][0]["windows"]
    return (float(windows[0][0]), float(windows[0][1])) if windows else None


def _window(decoded: Decoded, name: Window, output: OutputSpec | None) -> tuple[float, float]:
    if name == "full":
        return render.full_range(decoded.values)
    if output is None:
        return decoded.window or render.full_range(decoded.values)
    factor = WIDE if name == "wide" else 1.0
    return output.window_centre, output.window_width * factor
