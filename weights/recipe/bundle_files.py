"""A bundle's files, written whole: weights, reference, calibration, manifest."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from inference.bundle import MANIFEST, REFERENCE, WEIGHTS, read_manifest
from inference.calibration import LabelCalibration
from weights.recipe import template
from weights.recipe.network import storable
from weights.recipe.phantoms import reference_inputs


def write_weights(out: Path, network: nn.Module) -> str:
    """model.safetensors; its SHA-256 in hexadecimal."""
    _save(dict(storable(network)), out / WEIGHTS)
    return hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest()


@torch.inference_mode()
def write_reference(out: Path, network: nn.Module) -> None:
    """reference.safetensors: drawn inputs in half precision, and fp32 logits of exactly those.

    The manifest must be there: it says what inputs look like.
    """
    inputs = torch.from_numpy(reference_inputs(read_manifest(out / MANIFEST)))
    _save({"inputs": inputs, "logits": network(inputs.float())}, out / REFERENCE)


def write_calibration(
    path: Path, labels: Mapping[str, LabelCalibration], *, fitted_on: str, fitted_at: str = ""
) -> None:
    """calibration.toml: numbers in full precision; without a date the same fit is the same file."""
    lines = [f"fitted_on = {json.dumps(fitted_on)}"]
    lines += [f"fitted_at = {json.dumps(fitted_at)}"] if fitted_at else []
    for name, calibration in labels.items():
        lines += ["", f"[labels.{name}]"]
        values = asdict(calibration)
        lines += [f"{k} = {_toml(v)}" for k, v in values.items() if v not in (None, (), "")]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_manifest(out: Path, kind: template.Kind, values: Mapping[str, Any]) -> None:
    """manifest.toml: the recipe's decided part with the measured one filled in."""
    texts = {
        key: value if isinstance(value, str) else _toml(value) for key, value in values.items()
    }
    (out / MANIFEST).write_text(template.filled(kind, texts), encoding="utf-8")


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path)
    path.chmod(0o644)  # safetensors leaves 0600, and the node serves under another account


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value) if isinstance(value, str) else repr(value)
