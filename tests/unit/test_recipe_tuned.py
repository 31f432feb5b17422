"""A network whose last stages learn says the same when it is served as when it was judged."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from inference.manifest import EvidenceSpec
from weights.recipe.augment import PLAIN
from weights.recipe.backbone import Backbone, round_convolutions
from weights.recipe.candidates.candidate import Explanation
from weights.recipe.candidates.evidence import Evidence
from weights.recipe.candidates.tuned import Tuned
from weights.recipe.data import LesionBox
from weights.recipe.examples import Examples
from weights.recipe.fitting import Schedule
from weights.recipe.network import feature_maps

SPEC = EvidenceSpec(stages=(2, 3, 4), grid=3, width=8, members=1, cells=2)
ARCHITECTURE = "efficientnet_lite0"
SIZE, SLICES = 64, 24


class Images:
    """Stands in for a bank: what a network makes of a few images, all views alike."""

    device = torch.device("cpu")

    def __init__(self, images, backbone):
        network = feature_maps(backbone, SPEC)
        with torch.no_grad():
            self._maps = network(images).half().numpy()

    def features(self, view, progress=None):
        return self._maps

    def places(self, view):
        return np.tile(np.array([[1.0, 0, 0], [0, 1, 0]], np.float32), (SLICES, 1, 1))


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    network = timm.create_model(ARCHITECTURE, pretrained=False)
    round_convolutions(network)
    backbone = Backbone(ARCHITECTURE, network.state_dict(), "drawn")
    labels = np.zeros((SLICES, 2), np.bool_)
    labels[::3] = True
    images = 0.1 * torch.randn(SLICES, 3, SIZE, SIZE)
    images[::3, :, 16:32, 16:32] += 3.0
    box = LesionBox(0.25, 0.25, 0.5, 0.5)
    lesions = {int(row): (box,) for row in np.flatnonzero(labels[:, 0])}
    groups = tuple(np.split(np.arange(SLICES), 4))
    examples = Examples(labels, groups, np.arange(4), lesions)
    base = Evidence(
        Images(images, backbone), backbone, SPEC, 0, schedule=Schedule(samples=320, batch=16)
    )
    tuned = Tuned(base, Schedule(samples=160, batch=16, rate=1e-3))
    rows = np.concatenate(groups[:3])
    given = base.fit(examples, rows, seed=0, given=())
    return tuned, images, backbone, given, tuned.fit(examples, rows, seed=0, given=(given,))


def test_the_served_network_says_what_the_fit_said(fitted):
    tuned, images, _, _, made = fitted

    with torch.no_grad():
        served = tuned.network(made.weights, np.eye(2))(images).numpy()

    assert np.abs(served - made.logits).max() < 0.02  # maps are kept in half precision


def test_the_last_stages_learn_and_all_else_stays(fitted):
    tuned, _, backbone, given, made = fitted
    served = tuned.network(made.weights, np.eye(2)).backbone.state_dict()

    changed = {name for name, v in served.items() if not torch.equal(v, backbone.weights[name])}

    assert any(name.startswith("blocks.6.") for name in changed)
    assert all(name.startswith(("blocks.5.", "blocks.6.")) for name in changed)
    assert not any("running" in name for name in changed)
    kernels = [v for name, v in served.items() if name.startswith("blocks.6.") and v.ndim == 4]
    assert all(torch.equal(kernel, kernel.half().float()) for kernel in kernels)
    assert not np.allclose(given.logits, made.logits, atol=1e-3)


def test_its_maps_are_those_of_the_served_network(fitted):
    from inference.heatmap import grad_cam

    tuned, images, _, _, made = fitted
    how, rows = Explanation("grad-cam", "head.trunk"), np.arange(3)

    maps = tuned.maps(made.weights, rows, how)

    network = tuned.network(made.weights, np.eye(2))
    wanted = grad_cam(network, how.layer, images[:3].numpy(), [{0: 1.0}] * 3, how.method)
    scale = max(float(wanted.max()), 1e-6)
    assert np.abs(maps - wanted).max() < 0.05 * scale
    guess = tuned.untrained(made.weights, 1)
    assert not np.array_equal(guess["head.judge.weight"], made.weights["head.judge.weight"])
    learnt = "last.blocks.6.0.bn1.weight"
    assert np.array_equal(guess[learnt], made.weights[learnt])


def test_it_needs_the_frozen_fit_and_says_what_learnt(fitted):
    tuned, *_ = fitted

    assert tuned.needs == (tuned.base,)
    assert "tuned behind stage 3" in tuned.family
    assert "blocks behind stage 3" in tuned.words
    assert tuned.base.bank.features(PLAIN) is not None


def test_it_is_fitted_on_the_device_of_its_bank(fitted, monkeypatch):
    tuned, images, backbone, given, _ = fitted
    bank = Images(images, backbone)
    bank.device = torch.device("meta")  # computes nothing, and mixes with nothing on the CPU
    there = replace(tuned, base=replace(tuned.base, bank=bank))
    labels = np.zeros((SLICES, 2), np.bool_)
    labels[::3] = True
    examples = Examples(labels, tuple(np.split(np.arange(SLICES), 4)), np.arange(4), {})

    def loss(evidence, batch, cells):
        assert {str(part.device) for part in (evidence, batch.inputs, batch.labels)} == {"meta"}
        raise RuntimeError("seen")

    monkeypatch.setattr("weights.recipe.candidates.tuned.evidence_loss", loss)

    with pytest.raises(RuntimeError, match=r"^seen$"):
        there.fit(examples, np.arange(SLICES), seed=0, given=(given,))
