"""The manifest's decided part (`ich.toml`) and its measured part, put together."""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from string import Template

from pydantic import TypeAdapter

from inference.manifest import Manifest

_TEMPLATE = Path(__file__).with_name("ich.toml")


@dataclass(frozen=True, slots=True)
class Kind:
    """In what the recipe's bundles differ by decision."""

    name: str
    size: int  # pixels a side of the input
    algorithm: str
    short_name: str
    series_words: str  # the beginning of every series' description

    def values(self) -> dict[str, str]:
        return {
            "name": self.name,
            "size": str(self.size),
            "algorithm": self.algorithm,
            "short_name": self.short_name,
            "series_words": self.series_words,
        }


ICH = Kind("ich", 320, "Vigil ICH", "ICH AI", "AI ICH")
#: The customer's architecture; smaller pictures, since all of it is fitted, on a CPU too.
ICH_B4 = Kind("ich-b4", 224, "Vigil ICH B4", "ICH B4 AI", "AI ICH B4")
KINDS = {kind.name: kind for kind in (ICH, ICH_B4)}

# Stand in for what is not yet measured; the input and the labels do not depend on them.
_UNMEASURED = {
    "version": "0",
    "architecture": "none",
    "pretrained": "none",
    "evidence": "",
    "method": "grad-cam",
    "cam": "Grad-CAM",
    "layer": "none",
    "weights_sha256": "0" * 64,
    "prevalence": "0.5",
    "threshold": "0.5",
    "active": "none",
    "operating_points": "",
    "aggregation": '{ kind = "max" }',
    "context": "0",
    "stat_rule": "",
    "pointing_game": "",
}


def draft(kind: Kind = ICH) -> Manifest:
    """The manifest before anything is measured: how pixels become inputs, which labels."""
    values = tomllib.loads(filled(kind, _UNMEASURED))
    return TypeAdapter(Manifest).validate_json(json.dumps(values))


def filled(kind: Kind, values: dict[str, str]) -> str:
    """The text of manifest.toml.

    Raises
    ------
    KeyError
        If a value is missing.
    """
    text = Template(_TEMPLATE.read_text(encoding="utf-8"))
    return text.substitute({**kind.values(), **values})
