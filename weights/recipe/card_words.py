"""How the model card writes figures and tables."""

from collections.abc import Mapping, Sequence


def interval(figure: Mapping[str, float], digits: int = 2) -> str:
    """`0.83 (0.73 to 0.91)`"""
    value, low, high = (f"{figure[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def table(head: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    """Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
