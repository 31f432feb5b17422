"""A head that judges cells: its bundle, its logits, and that a map of it is the evidence itself."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inference.bundle import BundleError, load_bundle, read_manifest
from inference.evidence import EvidenceHead, EvidenceNet, Grid, strongest
from inference.heatmap import grad_cam
from inference.manifest import EvidenceSpec
from inference.model import build_model, check_reference, load_model, logits
from tests.bundles.make import make_bundle

SPEC = EvidenceSpec(stages=(1, 2, 3), grid=2, width=4, members=2, cells=3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return load_bundle(make_bundle(tmp_path_factory.mktemp("evidence") / "head", evidence=True))


def test_such_a_bundle_loads_and_gives_its_reference(bundle):
    model = load_model(bundle)

    assert isinstance(model, EvidenceNet)
    assert check_reference(bundle, model) < 1e-3


def test_an_images_logit_does_not_depend_on_its_batch(bundle):
    model, rng = load_model(bundle), np.random.default_rng(0)
    images = rng.normal(size=(5, bundle.manifest.input.channels, 64, 64)).astype(np.float32)

    alone = np.concatenate([logits(model, images[i : i + 1]) for i in range(5)])

    np.testing.assert_allclose(logits(model, images), alone, atol=1e-4)


def test_grad_cam_at_the_trunk_is_the_evidence_but_for_its_constant(bundle):
    model, rng = load_model(bundle), np.random.default_rng(1)
    image = rng.normal(size=(1, bundle.manifest.input.channels, 64, 64)).astype(np.float32)
    model.mix.weight.data.copy_(torch.eye(3))

    seen = grad_cam(model, "head.trunk", image, [{1: 1.0}])[0]

    with torch.inference_mode():
        cells = model.head.evidence(model.features(torch.from_numpy(image)))[0, :, 1]
    constant = model.head.judge.bias.reshape(2, 3)[:, 1]
    wanted = (cells - constant[:, None, None]).mean(dim=0).clamp(min=0) / cells[0].numel()
    np.testing.assert_allclose(seen, wanted.numpy(), atol=1e-6)


@pytest.mark.parametrize("method", ["grad-cam", "grad-cam++", "hirescam", "layercam"])
@pytest.mark.parametrize("layer", ["head.trunk", "grid"])
def test_every_method_gives_a_raw_map_at_either_layer(bundle, method, layer):
    model, rng = load_model(bundle), np.random.default_rng(2)
    image = rng.normal(size=(2, bundle.manifest.input.channels, 64, 64)).astype(np.float32)

    maps = grad_cam(model, layer, image, [{0: 1.0}] * 2, method)

    doubled = grad_cam(model, layer, image, [{0: 2.0}] * 2, method)
    assert maps.shape[0] == 2
    assert maps.min() >= 0
    assert np.isfinite(maps).all()
    if method != "grad-cam++":  # whose weights are ratios of gradients
        np.testing.assert_allclose(doubled, 2 * maps, rtol=1e-4, atol=1e-9)


@given(st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_the_strongest_cells_make_the_logit(cells, seed):
    evidence = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 3, 4, 5)))

    made = strongest(evidence, cells)

    kept = min(cells, 20)
    wanted = np.sort(evidence.numpy().reshape(2, 3, 20))[..., -kept:].mean(axis=-1)
    np.testing.assert_allclose(made.numpy(), wanted)


def test_members_are_judged_apart_and_averaged():
    head = EvidenceHead(6, 2, SPEC).eval()
    features = torch.randn(3, 6, 8, 8)

    members = strongest(head.evidence(features), SPEC.cells)

    assert members.shape == (3, 2, 2)
    torch.testing.assert_close(head(features), members.mean(dim=1))


def test_a_finer_map_comes_as_mean_and_maximum_and_a_coarser_one_is_grown():
    grid = Grid((1, 1, 1), place=1)
    fine, own, coarse = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 1, 1)
    fine[0, 0, 0, 0] = 4.0

    made = grid([fine, own, coarse])

    assert grid.channels == 4
    assert made[0, :, 0, 0].tolist() == [1.0, 4.0, 0.0, 1.0]
    assert made[0, :, 1, 1].tolist() == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("grid = 2", "grid = 7", "evidence.*grid be one of them"),
        ("cells = 3", "cells = 0", "evidence.*at least 1"),
        ("cells = 3", "cells = 3\ncolour = 1", "unknown key"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_with_its_key(tmp_path, old, new, words):
    path = make_bundle(tmp_path / "head", evidence=True) / "manifest.toml"
    path.write_text(path.read_text().replace(old, new))

    with pytest.raises(BundleError, match=words):
        read_manifest(path)


def test_stages_that_the_architecture_lacks_are_refused(tmp_path):
    path = make_bundle(tmp_path / "head", evidence=True) / "manifest.toml"
    text = path.read_text().replace("stages = [1, 2, 3]", "stages = [2, 9]")
    path.write_text(text)

    with pytest.raises(BundleError, match=r"evidence\.stages: test_efficientnet has no"):
        build_model(read_manifest(path))
