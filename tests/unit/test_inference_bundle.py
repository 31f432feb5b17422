"""Bundles: whole ones load; broken ones are refused with file and key (H43)."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.bundle import (
    BundleError,
    WeightsArePickle,
    WeightsChanged,
    WeightsTruncated,
    check_overrides,
    load_bundle,
    read_manifest,
)
from inference.model import ReferenceMissed, build_model, check_reference, load_model
from tests.bundles.make import make_bundle

DOCS = Path(__file__).parents[2] / "docs" / "bundles.md"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles") / "head")


@pytest.fixture
def folder(tmp_path, whole):
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_whole_bundle_loads_and_gives_its_reference(whole):
    bundle = load_bundle(whole)

    error = check_reference(bundle, load_model(bundle))

    assert error < 1e-4
    assert bundle.identity("fp32").aggregation == "topk_mean k=2"
    assert set(bundle.calibrations) == {"any", "left"}


def test_the_documented_example_is_a_valid_bundle(tmp_path):
    manifest, calibration = re.findall(r"```toml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "manifest.toml").write_text(manifest)
    (tmp_path / "calibration.toml").write_text(calibration)

    read = read_manifest(tmp_path / "manifest.toml")

    assert read.labels[0].threshold == 0.35
    assert read.explain.shows_regions
    with pytest.raises(BundleError, match=r"model\.safetensors"):
        load_bundle(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("crop = ", "crobb = ", "input.crobb: unknown key"),
        ('version = "0.0.1"', "", "version: key is missing"),
        ("size = 64", 'size = "64"', "input.size:"),
        ("k = 2", "k = 0", "study.aggregation:"),
        ('"validated"', '"proven"', "labels.0.status:"),
        ("threshold = 0.5", "threshold = 1.5", "labels.0:"),
        ('value = "404684003"', 'value = ""', "labels.0.code: not a code"),
        ('primary = "any"', 'primary = "rare"', "primary must be the first label"),
        ('implies = ["any"]', 'implies = ["all"]', "no such label: all"),
        ('label = "any"\nlevel = "URGENT"', 'label = "rare"\nlevel = "URGENT"', "exploratory"),
        ("centre = 40.0, width = 80.0", "centre = 40.0, width = 800.0", "passes value_range"),
        ('title = "AI', 'title = "Ä', "ASCII"),
        ("[study]", "[study", "manifest.toml:"),
    ],
)
def test_a_broken_manifest_is_refused_with_file_and_key(folder, old, new, message):
    edit(folder / "manifest.toml", old, new)

    with pytest.raises(BundleError) as caught:
        load_bundle(folder)

    assert message in str(caught.value)
    assert "manifest.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[labels.left]", "[labels.right]", "no calibration for left"),
        ("temperature = 1.5", "temperature = 0.0", "temperature must be positive"),
        ("'temperature'", "'platt'", "platt takes exactly: slope, intercept"),
        ("n_negative = 60", "n_negative = 1.5", "n_negative"),
        (
            "n_positive = 40\nn_negative = 60",
            "n_positive = 1\nn_negative = 1\nx = 1",
            "unknown key",
        ),
        ("prevalence = 0.4", "prevalence = 0.0004", "all that the calibration data can support"),
    ],
)
def test_a_broken_calibration_is_refused(folder, old, new, message):
    edit(folder / "calibration.toml", old, new)

    with pytest.raises(BundleError) as caught:
        load_bundle(folder)

    assert message in str(caught.value)


def test_a_site_has_a_calibration_of_its_own(folder, tmp_path):
    site = tmp_path / "site.toml"
    site.write_text((folder / "calibration.toml").read_text().replace("1.5", "2.5"))

    ours, theirs = load_bundle(folder), load_bundle(folder, calibration=site)

    assert theirs.calibrations["any"].temperature == 2.5
    assert ours.calibration_id != theirs.calibration_id


def test_h43_altered_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)

    with pytest.raises(WeightsChanged):
        load_bundle(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 50_000])
def test_h43_truncated_weights_are_refused(folder, keep):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])

    with pytest.raises(WeightsTruncated):
        load_bundle(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_h43_a_pickle_is_refused(folder, zipped):
    torch.save(
        {"a": torch.zeros(3)},
        folder / "model.safetensors",
        _use_new_zipfile_serialization=zipped,
    )

    with pytest.raises(WeightsArePickle):
        load_bundle(folder)


def test_a_safetensors_header_that_lies_is_refused(folder):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}).encode()
    data = struct.pack("<Q", len(header)) + header + b"\0" * 4
    (folder / "model.safetensors").write_bytes(data)

    with pytest.raises(WeightsTruncated):
        load_bundle(folder)


def test_weights_of_another_architecture_are_refused(folder):
    edit(folder / "manifest.toml", '"test_efficientnet"', '"resnet10t"')

    with pytest.raises(BundleError, match="does not fit"):
        load_model(load_bundle(folder))


def test_an_architecture_timm_does_not_know_is_refused(folder):
    edit(folder / "manifest.toml", '"test_efficientnet"', '"no_such_net"')

    with pytest.raises(BundleError, match="timm has no"):
        build_model(read_manifest(folder / "manifest.toml"))


def test_a_model_that_misses_its_reference_must_not_serve(folder):
    path = folder / "reference.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "logits": tensors["logits"] + 0.05}, path)
    bundle = load_bundle(folder)

    with pytest.raises(ReferenceMissed):
        check_reference(bundle, load_model(bundle))


def test_efficientnet_b4_loads_and_runs(tmp_path):
    bundle = load_bundle(make_bundle(tmp_path, architecture="efficientnet_b4"))

    assert check_reference(bundle, load_model(bundle)) < 1e-3


def test_a_tenants_numbers_must_be_able_to_take_effect(whole):
    bundle = load_bundle(whole)

    check_overrides(bundle, {"head.any": 0.3, "other.any": 9.0}, {"head.left": 0.05})
    with pytest.raises(BundleError, match="no validated label 'rare'"):
        check_overrides(bundle, {"head.rare": 0.3}, {})
    with pytest.raises(BundleError, match="threshold outside"):
        check_overrides(bundle, {"head.any": 0.999}, {})
