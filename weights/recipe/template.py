"""The manifest's decided part (`ich.toml`) and its measured part, put together."""

import json
import tomllib
from pathlib import Path
from string import Template

from pydantic import TypeAdapter

from inference.manifest import Manifest

_TEMPLATE = Path(__file__).with_name("ich.toml")

# Stand in for what is not yet measured; the input, the layers and the labels do not depend on them.
_UNMEASURED = {
    "version": "0",
    "architecture": "none",
    "evidence": "",
    "method": "grad-cam",
    "layer": "none",
    "weights_sha256": "0" * 64,
    "prevalence": "0.5",
    "threshold": "0.5",
    "active": "none",
    "operating_points": "",
    "aggregation_kind": "max",
    "aggregation_k": "1",
    "context": "0",
    "stat_at": "0.5",
    "pointing_game": "",
}


def draft() -> Manifest:
    """The manifest before anything is measured: how pixels become inputs, which labels."""
    values = tomllib.loads(filled(_UNMEASURED))
    return TypeAdapter(Manifest).validate_json(json.dumps(values))


def filled(values: dict[str, str]) -> str:
    """The text of manifest.toml.

    Raises
    ------
    KeyError
        If a value is missing.
    """
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(values)
