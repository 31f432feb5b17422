"""A timm model with a bundle's weights, and the check that it still gives the bundle's numbers."""

from typing import ClassVar

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from db.errors import PermanentError
from inference.bundle import Bundle, BundleError
from inference.evidence import EvidenceNet
from inference.manifest import Manifest

REFERENCE_LIMIT = 0.02  # logits; DESIGN 7.4


class ReferenceMissed(PermanentError):
    """The model does not give the logits that were stored with it: it must not serve."""

    code: ClassVar[str] = "reference_missed"


def build_model(manifest: Manifest) -> nn.Module:
    """The manifest's network, untrained, fp32: (n, channels, size, size) -> (n, outputs) logits.

    Raises
    ------
    BundleError
        If timm knows no such architecture, or it lacks the stages.
    """
    name, channels = manifest.architecture, manifest.input.channels
    if not timm.is_model(name):
        raise BundleError(f"architecture: timm has no {name!r}")
    if manifest.evidence is None:
        model: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=manifest.outputs, in_chans=channels
        )
        return model
    try:
        return EvidenceNet(
            name,
            channels=channels,
            labels=len(manifest.labels),
            outputs=manifest.outputs,
            spec=manifest.evidence,
        )
    except ValueError as error:
        raise BundleError(f"evidence.stages: {error}") from None


def load_model(bundle: Bundle, device: str | torch.device = "cpu") -> nn.Module:
    """The bundle's model, fp32, channels-last, ready to serve: `eval`, no gradients kept.

    Raises
    ------
    BundleError
        If the weights do not fit the architecture, or are not a safetensors file.
    """
    manifest = bundle.manifest
    model = build_model(manifest)
    try:
        model.load_state_dict(load_file(bundle.weights))
    except (RuntimeError, SafetensorError, OSError) as error:
        raise BundleError(
            f"{bundle.weights}: does not fit {manifest.architecture} ({type(error).__name__})"
        ) from None
    model.eval().requires_grad_(False)
    exact_floats()
    return model.to(device=device, dtype=torch.float32).to(memory_format=torch.channels_last)


def exact_floats() -> None:
    """fp32 means fp32: a GPU would round convolutions and products to TF32 by itself."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


@torch.inference_mode()
def logits(model: nn.Module, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, channels, size, size) -> (n, outputs), on the model's own device and in its own type."""
    parameter = next(model.parameters())
    batch = torch.from_numpy(inputs).to(
        device=parameter.device, dtype=parameter.dtype, memory_format=torch.channels_last
    )
    made: NDArray[np.float32] = model(batch).float().cpu().numpy()
    return made


def reference_error(bundle: Bundle, model: nn.Module) -> float:
    """The largest difference, in logits, from what the bundle stored of its reference inputs.

    Raises
    ------
    BundleError
        If reference.safetensors cannot be read or has another shape.
    """
    inputs, expected = read_reference(bundle)
    return float(np.abs(logits(model, inputs) - expected).max())


def check_reference(bundle: Bundle, model: nn.Module) -> float:
    """As `reference_error`, but over the limit it raises `ReferenceMissed`."""
    error = reference_error(bundle, model)
    if not error <= REFERENCE_LIMIT:  # NaN fails too
        raise ReferenceMissed(f"{bundle.name}: {error:.4f} logit off the bundle's own reference")
    return error


def read_reference(bundle: Bundle) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The stored inputs (n, channels, size, size) and logits (n, outputs)."""
    try:
        tensors = load_file(bundle.reference)
        inputs, expected = tensors["inputs"].float().numpy(), tensors["logits"].float().numpy()
    except (SafetensorError, OSError, KeyError) as error:
        raise BundleError(f"{bundle.reference}: cannot be read ({type(error).__name__})") from None
    spec, n_outputs = bundle.manifest.input, bundle.manifest.outputs
    shapes = (inputs.shape[1:], expected.shape)
    if shapes != ((spec.channels, spec.size, spec.size), (len(inputs), n_outputs)) or not len(
        inputs
    ):
        raise BundleError(
            f"{bundle.reference}: shapes {inputs.shape} and {expected.shape} do not fit"
        )
    return inputs, expected
