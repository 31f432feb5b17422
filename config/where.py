"""Where in a TOML file a key stands: tomllib tells no lines, and an error wants one."""

import re
from collections.abc import Sequence

_HEADER = re.compile(r"^\s*(\[\[?)\s*([A-Za-z0-9_.\-]+)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"^\s*([A-Za-z0-9_\-]+)\s*=")


def line_of(text: str, key: Sequence[str | int]) -> int | None:
    """The 1-based line of `key`, such as ("tenants", 0, "lane"), or of the nearest table above it.

    None where the file has neither: the value came from the environment or is missing altogether.
    """
    best: tuple[int, int] | None = None  # matched length, line
    for number, path in _paths(text):
        if tuple(key[: len(path)]) == path and (best is None or len(path) > best[0]):
            best = (len(path), number)
    return best[1] if best else None


def _paths(text: str) -> list[tuple[int, tuple[str | int, ...]]]:
    """Every header and key with its line; arrays of tables are counted."""
    found: list[tuple[int, tuple[str | int, ...]]] = []
    counts: dict[tuple[str | int, ...], int] = {}
    table: tuple[str | int, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            table = _resolve(header.group(2).split("."), header.group(1) == "[[", counts)
            found.append((number, table))
        elif assignment := _KEY.match(line):
            found.append((number, (*table, assignment.group(1))))
    return found


def _resolve(
    names: Sequence[str], is_array: bool, counts: dict[tuple[str | int, ...], int]
) -> tuple[str | int, ...]:
    path: tuple[str | int, ...] = ()
    for depth, name in enumerate(names):
        path = (*path, name)
        is_last = depth == len(names) - 1
        if is_last and is_array:
            counts[path] = counts.get(path, -1) + 1
        if path in counts:
            path = (*path, counts[path])
    return path
