"""The resident models: loaded once, checked against their reference, kept on the device."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from torch import nn

from db.errors import PermanentError
from inference.bundle import Bundle, BundleError, load_bundle
from inference.model import check_reference, load_model

log = structlog.get_logger()

#: The bundles that come with the node.
SHIPPED = Path(__file__).resolve().parents[1] / "weights"
ANSWER_S = 120.0  # for a GPU to compute 1 + 1, torch loaded first


@dataclass(frozen=True, eq=False)
class Served:
    """A bundle that is ready to serve."""

    bundle: Bundle
    model: nn.Module  # on the device
    explainer: nn.Module  # eager fp32 copy for heat maps, with gradients
    numerics: str


@dataclass(frozen=True, eq=False)
class Refused:
    """A bundle that must not serve, and why; the other bundles go on."""

    name: str
    code: str
    reason: str


def bundle_folder(model: str) -> Path:
    """The folder of a configured model: one of those shipped, else a path."""
    shipped = SHIPPED / model
    return shipped if "/" not in model and shipped.is_dir() else Path(model)


def pick_device(wanted: str) -> torch.device:
    """The device to serve on; `auto` takes the first GPU that answers, else the CPU.

    Raises
    ------
    PermanentError
        If a GPU was asked for and none can be used.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    name = "cuda" if wanted == "auto" else wanted
    if torch.cuda.is_available():
        if answers(name):
            return torch.device(name)
        log.error("gpu_does_not_answer", device=name)
    if wanted == "auto":
        return torch.device("cpu")
    raise PermanentError(f"inference.device is {wanted}, but no GPU can be used here")


def answers(name: str) -> bool:
    """Whether a device computes. In a process of its own: a driver that is gone may hang."""
    ask = f"import torch; assert torch.ones(2, device={name!r}).sum().item() == 2"
    asked = subprocess.Popen(
        [sys.executable, "-c", ask],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        return asked.wait(ANSWER_S) == 0
    except subprocess.TimeoutExpired:
        asked.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            asked.wait(1.0)  # no longer: caught in the driver it does not even die
        return False


def load_served(
    models: Sequence[str], device: torch.device
) -> tuple[Mapping[str, Served], tuple[Refused, ...]]:
    """Load every bundle; one that fails its checks is refused and the rest serve."""
    served: dict[str, Served] = {}
    refused: list[Refused] = []
    for model in models:
        started = time.monotonic()
        try:
            one = make_served(load_configured(bundle_folder(model)), device)
        except PermanentError as error:
            name = Path(model).name
            log.error("model_refused", bundle=name, exc_code=error.code)
            refused.append(Refused(name, error.code, str(error)))
            continue
        served[one.bundle.name] = one
        log.info(
            "model_loaded",
            bundle=one.bundle.name,
            version=one.bundle.manifest.version,
            device=str(device),
            numerics=one.numerics,
            duration_s=round(time.monotonic() - started, 2),
        )
    return served, tuple(refused)


def load_configured(folder: Path) -> Bundle:
    """A bundle as the configuration has it; its folder carries its name.

    Raises
    ------
    BundleError
    """
    bundle = load_bundle(folder)
    if bundle.name != folder.resolve().name:
        # Tenants name bundles by their folders, analyses by their manifests: they must agree.
        raise BundleError(f"{folder}: its manifest calls it {bundle.name!r}; rename the folder")
    return bundle


def make_served(bundle: Bundle, device: torch.device) -> Served:
    """Load the model and let it prove itself on the bundle's own reference inputs.

    Raises
    ------
    BundleError, ReferenceMissed
    """
    model = load_model(bundle, device)
    # fp32 is the reference and serves everywhere; a bundle that misses its own numbers does not.
    check_reference(bundle, model)
    return Served(bundle, model, load_model(bundle, device), numerics="fp32")
