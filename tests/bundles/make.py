"""Whole bundles for tests: real manifests, real files, untrained weights."""

import hashlib
import tomllib
from pathlib import Path

import torch
from safetensors.torch import save_file

from inference.model import build_model

HERE = Path(__file__).parent
TINY = "test_efficientnet"  # timm's own: 100,000 weights


def make_bundle(
    folder: Path, kind: str = "head", *, architecture: str = TINY, size: int = 64, seed: int = 0
) -> Path:
    """Write a bundle: "head" (CT volumes, three labels) or "chest" (radiographs, one label)."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (HERE / f"{kind}.toml").read_text()
    text = text.replace("@ARCHITECTURE@", architecture).replace("@SIZE@", str(size))
    manifest = tomllib.loads(text)
    channels, labels = len(manifest["input"]["mean"]), len(manifest["labels"])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(architecture, outputs=labels, channels=channels).eval()
        inputs = torch.randn(4, channels, size, size)
        spread(model, inputs)
    with torch.inference_mode():
        save_file({"inputs": inputs, "logits": model(inputs)}, folder / "reference.safetensors")
    weights = folder / "model.safetensors"
    save_file(model.state_dict(), weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    (folder / "manifest.toml").write_text(text.replace("@SHA256@", digest))
    (folder / "calibration.toml").write_text(calibration(manifest))
    return folder


def spread(model: torch.nn.Module, inputs: torch.Tensor) -> None:
    """Stretch the last layer, so that an untrained model's logits differ from image to image."""
    last = model.get_classifier()
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
