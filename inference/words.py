"""Comparing what people type into scanners with a manifest's lists of words."""

import re
from collections.abc import Iterable
from functools import lru_cache


def first_match(text: str, words: Iterable[str]) -> str | None:
    """The first of `words` that stands in `text` as a whole word, without regard to case.

    `ANGIO*` matches the beginning of a word; a word may hold spaces and signs. Letters and digits
    make a word: `HEAD_5MM` and `head/neck` both hold HEAD.
    """
    return next((word for word in words if _pattern(word).search(text)), None)


@lru_cache(maxsize=1024)
def _pattern(word: str) -> re.Pattern[str]:
    """A word ends where no letter or digit follows; one that ends in a sign, wherever."""
    stem = word.removesuffix("*")
    starts = r"(?<![^\W_])" if stem[:1].isalnum() else ""
    ends = r"(?![^\W_])" if stem == word and stem[-1:].isalnum() else ""
    parts = [re.escape(part) for part in stem.split()]
    return re.compile(starts + r"\s+".join(parts) + ends, re.IGNORECASE)
