"""How the recipe tells what it is doing."""

from collections.abc import Callable

#: Told what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]


def silent(_step: str, _done: int, _total: int) -> None:
    """Progress for those who do not want any."""
