"""A device that runs out of memory, fails or is gone, as far as a machine without one can show."""

import numpy as np
import pytest
import torch
from torch import nn

from db.errors import PermanentError
from inference import device as devices
from inference import serving
from inference.device import Device, DeviceFault
from inference.serving import answers, pick_device


class Model(nn.Module):
    """Gives each image its first pixel; fails for batches of more than `room`, or as told."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.room = 1000
        self.error: Exception | None = None
        self.batches: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        if len(x) > self.room:
            raise torch.cuda.OutOfMemoryError("made up")
        self.batches.append(len(x))
        return x[:, 0, 0, :1] * self.weight


def images(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.float32)[:, None, None, None] * np.ones((1, 1, 2, 2), np.float32)


@pytest.fixture
def model() -> Model:
    return Model().eval()


@pytest.fixture
def device() -> Device:
    return Device(torch.device("cpu"), 8)


def test_h41_out_of_memory_halves_the_batch_and_no_image_is_lost(device, model):
    model.room = 3

    scored = device.score(model, images(8))

    assert scored[:, 0].tolist() == list(range(8))
    assert (device.limit, model.batches) == (2, [2, 2, 2, 2])


def test_h41_the_batch_grows_again_once_there_is_room(device, model, monkeypatch):
    monkeypatch.setattr(devices, "RECOVER_AFTER", 2)
    model.room = 2
    device.score(model, images(8))
    model.room = 1000

    limits = []
    for _ in range(6):
        device.score(model, images(2))
        limits.append(device.limit)

    assert limits[0] == 2 or limits[0] == 4
    assert limits[-1] == 8


def test_h41_memory_for_no_image_at_all_is_the_devices_fault(device, model):
    model.room = 0

    with pytest.raises(DeviceFault):
        device.score(model, images(8))

    assert DeviceFault.counts is False


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: unspecified launch failure",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "No CUDA GPUs are available",
    ],
)
def test_h41_a_driver_that_is_gone_is_the_devices_fault_in_scores_and_heat_maps(
    device, model, words
):
    model.error = RuntimeError(words)

    with pytest.raises(DeviceFault):
        device.score(model, images(2))
    with pytest.raises(DeviceFault):
        device.explain(model, lambda one: one(torch.zeros(1, 1, 2, 2)))


def test_h41_an_error_of_the_models_own_is_not_called_the_devices(device, model):
    model.error = RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        device.score(model, images(2))


def test_h41_heat_maps_that_do_not_fit_are_made_on_the_cpu(device, model):
    asked = []

    def run(one: nn.Module) -> str:
        asked.append(next(one.parameters()).device.type)
        if len(asked) == 1:
            raise torch.cuda.OutOfMemoryError("made up")
        return "maps"

    assert device.explain(model, run) == "maps"
    assert asked[-1] == "cpu"


def test_h41_a_gpu_that_does_not_answer_is_left_for_the_cpu_where_that_is_allowed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(serving, "answers", lambda name: False)

    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(PermanentError):
        pick_device("cuda")


def test_h41_a_device_is_asked_in_a_process_that_may_hang(monkeypatch):
    assert answers("cpu")
    assert not answers("cuda:99")
    monkeypatch.setattr(serving, "ANSWER_S", 0.0)
    assert not answers("cpu")
