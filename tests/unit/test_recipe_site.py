"""A site's own calibration, fitted to drawn scores whose true map is known."""

import csv
import json
import math

import numpy as np
import pytest
from scipy.special import expit
from typer.testing import CliRunner

from inference.bundle import load_bundle
from node.cli import app
from tests.bundles.make import make_bundle
from weights.recipe import site
from weights.recipe.calibrate import apply


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return load_bundle(make_bundle(tmp_path_factory.mktemp("head")))


def drawn(path, n, *, shift=-2.0, spread=2.0, seed=0):
    """Studies with chance sigmoid(z + shift): far from what the bundle believes."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, spread, n)
    y = rng.random(n) < expit(z + shift)
    with path.open("w", newline="") as file:
        rows = [("score", "label"), *zip(z.tolist(), y.astype(int).tolist(), strict=True)]
        csv.writer(file).writerows(rows)
    return path


def fit(bundle, path, out):
    return site.recalibrate(
        bundle, site.read_scores(path), out, label=primary(bundle), site="north", at="2026-11-23"
    )


def primary(bundle):
    return bundle.manifest.labels[0].id


def test_the_new_map_means_what_it_says_and_the_weights_stay(bundle, tmp_path):
    before = bundle.weights.read_bytes()

    made = fit(bundle, drawn(tmp_path / "s.csv", 1500), tmp_path / "calibration.toml")

    served = load_bundle(bundle.folder, calibration=tmp_path / "calibration.toml")
    new = served.calibrations[primary(bundle)]
    shown = apply(new, np.array([-1.0, 0.0, 2.0]))
    np.testing.assert_allclose(shown, expit(np.array([-3.0, -2.0, 0.0])), atol=0.05)
    assert made["after"]["slope"]["low"] < 1 < made["after"]["slope"]["high"]
    assert made["after"]["log_loss"]["value"] < made["before"]["log_loss"]["value"]
    assert made["calibration_id"] == served.calibration_id != bundle.calibration_id
    assert bundle.weights.read_bytes() == before


def test_other_labels_keep_their_maps(bundle, tmp_path):
    fit(bundle, drawn(tmp_path / "s.csv", 800), tmp_path / "c.toml")

    served = load_bundle(bundle.folder, calibration=tmp_path / "c.toml")

    for name in bundle.calibrations.keys() - {primary(bundle)}:
        assert served.calibrations[name] == bundle.calibrations[name]


def test_enough_positives_of_a_bent_map_warrant_isotonic(bundle, tmp_path):
    """A step that no straight line in log-odds can follow."""
    rng = np.random.default_rng(1)
    z = rng.normal(0, 2, 3000)
    y = rng.random(3000) < np.where(z < 0, 0.05, np.where(z < 2, 0.5, 0.55))
    lines = ["score,label", *(f"{a},{int(b)}" for a, b in zip(z, y, strict=True))]
    (tmp_path / "s.csv").write_text("\n".join(lines))

    made = fit(bundle, tmp_path / "s.csv", tmp_path / "c.toml")

    assert made["method"] == "temperature+isotonic"


def test_what_the_threshold_means_is_said(bundle, tmp_path):
    made = fit(bundle, drawn(tmp_path / "s.csv", 1500), tmp_path / "c.toml")["threshold"]

    for when in ("before", "after"):
        assert math.isfinite(made[when]["raw_score"])
        assert 0 <= made[when]["sensitivity"] <= 1
    # The old map is far too sure here: the same threshold now asks for more.
    assert made["after"]["raw_score"] > made["before"]["raw_score"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("value,label\n1,1\n", "no column 'score'"),
        ("score\n1\n", "no column 'label'"),
        ("score,label\nhigh,1\n", "line 2: score 'high'"),
        ("score,label\nnan,1\n", "line 2: score 'nan'"),
        ("score,label\n1,2\n", "line 2: label '2'"),
        ("score,label\n", "no lines"),
        ("score,label\n1,1\n2,0\n", "1 positive patients, 50 are needed; negatives must be"),
    ],
)
def test_a_wrong_table_is_refused_with_the_reason(tmp_path, text, words):
    (tmp_path / "s.csv").write_text(text)

    with pytest.raises(site.BadScores, match=words):
        site.read_scores(tmp_path / "s.csv")


def test_patients_are_counted_not_studies(tmp_path):
    lines = ["score,label,patient", *(f"1,{i % 2},p{i % 20}" for i in range(400))]
    (tmp_path / "s.csv").write_text("\n".join(lines))

    with pytest.raises(site.BadScores, match="10 positive patients"):
        site.read_scores(tmp_path / "s.csv")


def test_the_command_says_what_it_needs_of_the_negatives(bundle, tmp_path):
    scores, out = drawn(tmp_path / "s.csv", 800), tmp_path / "c.toml"
    options = ["--scores", scores, "--out", out, "--model", bundle.folder]

    told = CliRunner().invoke(app, ["calibrate", *map(str, options)])
    as_json = CliRunner().invoke(app, ["calibrate", *map(str, options), "--json"])

    assert told.exit_code == 0
    assert "consecutive or randomly sampled" in " ".join(told.stdout.split())
    assert json.loads(as_json.stdout)["positives"] > 50
    assert not list(tmp_path.glob("*.part"))


def test_a_label_without_a_calibration_is_wrong_usage(bundle, tmp_path):
    scores = drawn(tmp_path / "s.csv", 800)
    options = ["--scores", scores, "--out", tmp_path / "c.toml", "--model", bundle.folder]

    done = CliRunner().invoke(app, ["calibrate", *map(str, options), "--label", "other"])

    assert done.exit_code == 2
    assert "no calibrated label 'other'" in done.stderr
