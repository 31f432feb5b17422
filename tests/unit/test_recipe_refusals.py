"""What the shipped bundle's pixel rules refuse, on built volumes; and that no real head is."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from db.result import Eligibility
from inference.body import usual_box
from inference.bundle import load_bundle, read_manifest
from inference.gates import body_refusal, measures
from inference.manifest import Gate
from tests.bundles.make import make_bundle
from weights.recipe import built, refusals
from weights.recipe.cases import WrongBundle
from weights.recipe.refusals import KINDS, measure, row

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "weights" / "ich"
DATA = Path(os.environ.get("VIGIL_TEST_DATA", ROOT.parent / "shared" / "data")) / "ct-ich"


@pytest.fixture(scope="module")
def manifest():
    return read_manifest(BUNDLE / "manifest.toml")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_judged_as_expected(kind, manifest):
    expected, draw = KINDS[kind]
    rngs = [np.random.default_rng([1, place]) for place in range(2)]  # not those of the command

    found = row(kind, expected, map(draw, rngs), manifest)

    assert found.n == 2
    assert found.refused == sum(found.rules.values())
    if kind == "head, intercept off by -24":  # some are told, some are not
        assert found.refused >= 1
    else:
        assert found.is_as_expected, found


def test_contrast_agent_cannot_be_told_by_these_rules(manifest):
    """Its grey values lie within a head's: only headers, and readers, know."""
    for kind in ("head, contrast agent", "head, angiography"):
        assert body_refusal(KINDS[kind][1](np.random.default_rng(3)), manifest) is None


def test_no_real_head_is_refused_and_all_keep_a_margin(manifest):
    if not (DATA / "manifest.csv").is_file():
        pytest.skip(f"no {DATA}")
    real = [one for one in measure(manifest, DATA, draws=0) if one.kind.startswith("real")]

    assert real[0].n == 82
    assert [one.refused for one in real] == [0] * len(real)
    for one in real:
        for rule, (low, high) in one.met.items():
            if rule.startswith("gate:"):
                least, most = one.limits[rule]
                assert low >= 1.4 * least, rule
                assert high <= max(0.85 * most, most - 0.15), rule


def test_the_same_seed_builds_the_same_volume():
    draw = KINDS["head, newborn"][1]

    one, other = (draw(np.random.default_rng(5)) for _ in range(2))

    assert np.array_equal(one.pixels, other.pixels)


def test_the_committed_limits_are_those_of_the_recipe():
    recipe = (ROOT / "weights" / "recipe" / "ich.toml").read_text()
    shipped = (BUNDLE / "manifest.toml").read_text()

    part = recipe[recipe.index("[applies]") : recipe.index("[input]")]
    assert part in shipped


def with_noise(manifest, limit):
    gates = (Gate(name="noise", values=(5.0, 80.0), noise=(0.0, limit)),)
    return replace(manifest, pixels=replace(manifest.pixels, gates=gates))


@pytest.mark.parametrize("strength", [3.0, 12.0])
def test_noise_is_measured_as_its_standard_deviation(manifest, strength):
    flat = built.volume(built.cylinder(80.0, 40.0, (0.0, 40.0)), 250 / built.MATRIX)
    noisy = built.noisy(np.random.default_rng(0), flat, strength, grain=0.01)

    (found,) = (m for m in measures(noisy, with_noise(manifest, 5.0)) if m.rule == "gate:noise")

    assert found.value == pytest.approx(strength, rel=0.05)
    assert found.is_broken is (strength > 5)


def test_noise_is_that_of_the_slabs_the_model_sees(manifest):
    flat = built.volume(built.cylinder(80.0, 40.0, (0.0, 40.0)), 0.65, step_mm=1.25)
    noisy = built.noisy(np.random.default_rng(0), flat, 12.0, grain=0.01)

    (found,) = (m for m in measures(noisy, with_noise(manifest, 20)) if m.rule == "gate:noise")

    assert found.value == pytest.approx(12.0 / 2, rel=0.05)  # four images of 1.25 mm


def test_a_refusal_tells_value_and_limit(manifest):
    sharp = KINDS["head, bone kernel"][1](np.random.default_rng(2))

    refused = body_refusal(sharp, with_noise(manifest, 12.0))

    assert isinstance(refused, Eligibility)
    assert (refused.rule, refused.limit) == ("gate:noise", "0..12 HU")
    assert refused.value.endswith(" HU")
    assert refused.reason == "The noise in the pixel values is unlikely."


@pytest.mark.parametrize("limits", [{}, {"share": (0.0, 1.0), "noise": (0.0, 9.0)}])
def test_a_gate_limits_one_thing(limits):
    with pytest.raises(ValueError, match="either share or noise"):
        Gate(name="x", values=(0.0, 1.0), **limits)


def test_bodies_without_a_place_in_common_have_no_box(manifest):
    """As noise makes them: each image's largest spot lies elsewhere."""
    masks = np.zeros((8, 16, 16), np.bool_)
    masks[np.arange(8), 2 * np.arange(8), 3] = True

    assert usual_box(masks) is None

    noise = KINDS["noise alone"][1](np.random.default_rng([refusals.SEED, 3]))
    assert body_refusal(noise, manifest) is not None


@pytest.fixture
def few(monkeypatch):
    """Three kinds are enough where their figures do not matter."""
    kinds = {name: KINDS[name] for name in ("head, adult", "air alone", "water phantom")}
    monkeypatch.setattr(refusals, "KINDS", kinds)
    return kinds


def test_any_bundle_of_hounsfield_units_can_be_measured(few, tmp_path):
    head = load_bundle(make_bundle(tmp_path / "head")).manifest
    chest = load_bundle(make_bundle(tmp_path / "chest", "chest")).manifest

    rows = list(measure(head, draws=1))

    assert [one.kind for one in rows] == list(few)
    json.dumps([asdict(one) for one in rows], allow_nan=False)
    with pytest.raises(WrongBundle):
        list(measure(chest, draws=1))


def test_the_command_prints_a_table_or_one_json_document(few, capsys):
    given = ["--bundle", str(BUNDLE), "--draws", "1"]

    assert refusals.main([*given, "--json"]) == 0
    kinds = json.loads(capsys.readouterr().out)["kinds"]
    assert [(one["kind"], one["n"], one["refused"]) for one in kinds] == [
        ("head, adult", 1, 0), ("air alone", 1, 1), ("water phantom", 1, 1),
    ]  # fmt: skip

    assert refusals.main(given) == 0
    assert capsys.readouterr().out.count(" of 1 ") == len(few)


def test_the_command_tells_what_is_wrong_in_one_line(tmp_path, capsys):
    for given in ((tmp_path,), (BUNDLE, "--data", tmp_path, "--draws", 0)):
        assert refusals.main(["--bundle", *map(str, given)]) == 1

        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1


def test_the_command_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "weights.recipe.refusals", "--bundle", "nowhere"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("bundle_invalid: ")
