"""Stored values as they are meant to be seen: VOI windows and tables (PS3.3 C.11.2)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def shown_grey(
    values: NDArray[np.float32], frame: dict[str, Any], meta: dict[str, Any]
) -> NDArray[np.float32]:
    """The grey a viewer shows by default: 0 black, 1 white, MONOCHROME1 turned round.

    The first VOI LUT, else the first window, else the range of the values. `frame` and `meta` are
    what `db.pixels.read_images` says of the image; `values` are rescaled, shape (rows, cols).
    """
    if meta["voi_lut"] is not None:
        grey = _by_table(values, meta["voi_lut"])
    elif frame["windows"]:
        centre, width = frame["windows"][0]
        grey = by_window(values, centre, width, frame["voi_function"])
    else:
        low, high = float(values.min()), float(values.max())
        grey = (values - low) / max(high - low, 1e-6)
    if meta["photometric"] == "MONOCHROME1":
        grey = 1.0 - grey
    return grey.astype(np.float32)


def by_window(
    values: NDArray[np.float32], centre: float, width: float, function: str
) -> NDArray[np.float32]:
    """0..1 by PS3.3 C.11.2.1.2 (LINEAR) or C.11.2.1.3 (LINEAR_EXACT, SIGMOID)."""
    grey: NDArray[np.float32]
    if function == "SIGMOID":
        grey = 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - centre) / max(width, 1e-6), -60, 60)))
    elif function == "LINEAR_EXACT":
        grey = np.clip((values - centre) / max(width, 1e-6) + 0.5, 0.0, 1.0)
    else:  # LINEAR, also where the attribute is absent
        grey = np.clip((values - (centre - 0.5)) / max(width - 1.0, 1e-6) + 0.5, 0.0, 1.0)
    return grey.astype(np.float32)


def _by_table(values: NDArray[np.float32], table: dict[str, Any]) -> NDArray[np.float32]:
    entries = np.asarray(table["data"], dtype=np.float32) / np.float32(2 ** table["bits"] - 1)
    index = np.clip(np.rint(values).astype(np.int64) - table["first"], 0, len(entries) - 1)
    grey: NDArray[np.float32] = entries[index]
    return grey
