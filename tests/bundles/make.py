"""Whole bundles for tests: real manifests, real files, untrained weights."""

import hashlib
import tomllib
from pathlib import Path

import torch
from safetensors.torch import save_file

from inference.bundle import read_manifest
from inference.model import build_model

HERE = Path(__file__).parent
TINY = "test_efficientnet"  # timm's own: 100,000 weights


#: A head that judges cells, small enough for TINY.
EVIDENCE = "[evidence]\nstages = [1, 2, 3]\ngrid = 2\nwidth = 4\nmembers = 2\ncells = 3\n"


def make_bundle(
    folder: Path,
    kind: str = "head",
    *,
    architecture: str = TINY,
    size: int = 64,
    seed: int = 0,
    evidence: bool = False,
) -> Path:
    """Write a bundle: "head" (CT volumes, three labels) or "chest" (radiographs, one label)."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (HERE / f"{kind}.toml").read_text()
    text = text.replace("@ARCHITECTURE@", architecture).replace("@SIZE@", str(size))
    if evidence:
        text = text.replace("[explain]\n", f"{EVIDENCE}[explain]\n")
        text = text.replace('layer = "conv_head"', 'layer = "head.trunk"')
    manifest = tomllib.loads(text)
    (folder / "manifest.toml").write_text(text.replace("@SHA256@", "0" * 64))
    network = read_manifest(folder / "manifest.toml")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(network).eval()
        inputs = torch.randn(4, network.input.channels, size, size)
        spread(model.mix if evidence else model.get_classifier(), model, inputs)
    with torch.inference_mode():
        save_file({"inputs": inputs, "logits": model(inputs)}, folder / "reference.safetensors")
    weights = folder / "model.safetensors"
    save_file(model.state_dict(), weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    (folder / "manifest.toml").write_text(text.replace("@SHA256@", digest))
    (folder / "calibration.toml").write_text(calibration(manifest))
    return folder


def spread(last: torch.nn.Linear, model: torch.nn.Module, inputs: torch.Tensor) -> None:
    """Stretch the last layer, so that an untrained model's logits differ from image to image."""
    with torch.no_grad():
        logits = model(inputs)
        last.weight /= logits.std(dim=0, keepdim=True).T.clamp(min=1e-6)
        last.bias -= model(inputs).mean(dim=0)


def calibration(manifest: dict) -> str:
    parts = ['fitted_on = "nothing: a test"']
    for label in manifest["labels"]:
        if label["status"] == "validated":
            parts.append(
                f"[labels.{label['id']}]\nmethod = 'temperature'\ntemperature = 1.5\n"
                f"prevalence = {label['reference_prevalence']}\nn_positive = 40\nn_negative = 60"
            )
    return "\n".join(parts) + "\n"
