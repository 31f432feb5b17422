"""A site's own calibration, fitted to drawn scores whose true map is known."""

import csv
import json
import math

import numpy as np
import pytest
from scipy.special import expit
from typer.testing import CliRunner

from inference.bundle import BundleError, load_bundle
from node.cli import app
from tests.bundles.make import make_bundle
from weights.recipe import site
from weights.recipe.calibrate import apply, fit
from weights.recipe.scores import BadScores, read_scores


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


def recalibrated(bundle, path, out, **options):
    return site.recalibrate(
        bundle,
        read_scores(path),
        out,
        label=primary(bundle),
        site="north",
        at="2026-11-23",
        **options,
    )


def primary(bundle):
    return bundle.manifest.labels[0].id


def test_the_new_map_means_what_it_says_and_the_weights_stay(bundle, tmp_path):
    before = bundle.weights.read_bytes()

    made = recalibrated(bundle, drawn(tmp_path / "s.csv", 1500), tmp_path / "calibration.toml")

    served = load_bundle(bundle.folder, calibration=tmp_path / "calibration.toml")
    new = served.calibrations[primary(bundle)]
    shown = apply(new, np.array([-1.0, 0.0, 2.0]))
    np.testing.assert_allclose(shown, expit(np.array([-3.0, -2.0, 0.0])), atol=0.05)
    assert (
        made["after"]["calibration_slope"]["low"] < 1 < made["after"]["calibration_slope"]["high"]
    )
    assert made["after"]["log_loss"]["value"] < made["before"]["log_loss"]["value"]
    assert made["calibration_id"] == served.calibration_id != bundle.calibration_id
    assert bundle.weights.read_bytes() == before


def test_other_labels_keep_their_maps(bundle, tmp_path):
    recalibrated(bundle, drawn(tmp_path / "s.csv", 800), tmp_path / "c.toml")

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

    made = recalibrated(bundle, tmp_path / "s.csv", tmp_path / "c.toml")

    assert made["method"] == "temperature+isotonic"


def test_what_the_threshold_means_is_said(bundle, tmp_path):
    made = recalibrated(bundle, drawn(tmp_path / "s.csv", 1500), tmp_path / "c.toml")["threshold"]

    for when in ("before", "after"):
        assert math.isfinite(made[when]["raw_score"])
        for share in ("sensitivity", "specificity", "ppv", "npv"):
            assert (
                made[when][share]["low"] <= made[when][share]["value"] <= made[when][share]["high"]
            )
    # The old map is far too sure here: the same threshold now asks for more.
    assert made["after"]["raw_score"] > made["before"]["raw_score"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("value,label\n1,1\n", "no column 'score'"),
        ("score\n1\n", "no column 'label'"),
        ("score,label\nhigh,1\n", "line 2: score 'high'"),
        ("score,label\nnan,1\n", "line 2: score 'nan'"),
        ("score,label\ninf,1\n", "line 2: score 'inf'"),
        ("score,label\n,1\n", "line 2: score ''"),
        ("score,label\n1,2\n", "line 2: label '2'"),
        ("score,label\n1\n", "line 2: label ''"),
        ("score,label\n\n1,1\n\n2,x\n", "line 5: label 'x'"),
        ("score,label,study\n1,1,a\n2,0,b\n3,0,a\n", "line 4: the same study as in line 2$"),
        ("score,label,patient\n1,1,p\n1,1,p\n", "line 3: the same study as in line 2; if they"),
        ("score,label\n", "no lines"),
        ("score,label\n1,1\n2,0\n", "1 positive patients, 50 are needed; negatives must be"),
    ],
)
def test_a_wrong_table_is_refused_with_the_reason(tmp_path, text, words):
    (tmp_path / "s.csv").write_text(text)

    with pytest.raises(BadScores, match=words):
        read_scores(tmp_path / "s.csv")


def test_patients_are_counted_not_studies(tmp_path):
    lines = ["score,label,patient", *(f"{i},{i % 2},p{i % 20}" for i in range(400))]
    (tmp_path / "s.csv").write_text("\n".join(lines))

    with pytest.raises(BadScores, match="10 positive patients"):
        read_scores(tmp_path / "s.csv")


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


def table(path, n=300, *, head="score,label", line="{z},{y}", ending="\n", seed=0, **encoding):
    """Logits of studies, half of them positive, in the words of some spreadsheet."""
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.5
    z = rng.normal(0, 1.5, n) + y
    lines = [line.format(z=a, y=int(b), i=i) for i, (a, b) in enumerate(zip(z, y, strict=True))]
    text = ending.join([head, *lines, ""])
    path.write_bytes(text.encode(encoding.get("encoding", "utf-8")))
    return z, y


def test_spreadsheets_habits_are_understood(tmp_path):
    z, y = table(tmp_path / "plain.csv")
    table(
        tmp_path / "excel.csv", head="Study; SCORE ;note;Label", line="s{i};{z};a, b;{y}.0",
        ending="\r\n", encoding="utf-8-sig",
    )  # fmt: skip
    commas = (tmp_path / "excel.csv").read_text("utf-8").replace(".", ",").replace(",0\n", "\n")
    (tmp_path / "comma.csv").write_text(commas.replace(",0\r", "\r"), "utf-8")

    for name in ("plain", "excel", "comma"):
        read = read_scores(tmp_path / f"{name}.csv")

        np.testing.assert_allclose(read.logits, z)
        np.testing.assert_array_equal(read.truth, y)


def test_a_patients_studies_are_one_patients(tmp_path):
    table(tmp_path / "s.csv", head="score,label,patient", line="{z},{y},p{i}")
    text = (tmp_path / "s.csv").read_text().replace(",p1\n", ",p0\n").replace(",p2\n", ",\n")
    (tmp_path / "s.csv").write_text(text.replace(",p3\n", ",\n"))

    patients = read_scores(tmp_path / "s.csv").patients

    assert patients[0] == patients[1]
    assert len(np.unique(patients)) == 299  # two without a name are two patients


def test_outputs_of_reports_are_asked_for_and_turned_back_into_logits(tmp_path):
    z, _ = table(tmp_path / "logits.csv", 400)
    lines = (tmp_path / "logits.csv").read_text().splitlines()
    outputs = [f"{expit(float(a)):.4f},{b}" for a, b in (line.split(",") for line in lines[1:])]
    (tmp_path / "outputs.csv").write_text("\n".join([lines[0], *outputs, "0.0000,0", "1.0000,1"]))

    with pytest.raises(BadScores, match=r"within 0\.\.1\. Say --scale output"):
        read_scores(tmp_path / "outputs.csv")
    read = read_scores(tmp_path / "outputs.csv", "output")

    np.testing.assert_allclose(read.logits[:-2], z, atol=0.01)
    assert np.isfinite(read.logits).all()
    with pytest.raises(BadScores, match=r"line \d+: score '.*' is no output within 0\.\.1"):
        read_scores(tmp_path / "logits.csv", "output")


def test_small_logits_are_taken_where_it_is_said(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(200) % 2
    lines = [f"{a},{b}" for a, b in zip(rng.uniform(0.1, 0.6, 200) + 0.3 * y, y, strict=True)]
    (tmp_path / "s.csv").write_text("\n".join(["score,label", *lines]))

    read = read_scores(tmp_path / "s.csv", "logit")

    assert (read.logits.min() > 0.1, read.logits.max() < 0.9) == (True, True)


def test_labels_the_wrong_way_round_are_told(tmp_path):
    z, y = table(tmp_path / "s.csv", line="{z},{y}")
    lines = [f"{-a},{int(b)}" for a, b in zip(z, y, strict=True)]
    (tmp_path / "s.csv").write_text("\n".join(["score,label", *lines]))

    with pytest.raises(BadScores, match="no higher in positives"):
        read_scores(tmp_path / "s.csv")


@pytest.mark.parametrize("name", ["none.csv", "."])
def test_a_table_that_cannot_be_read_is_said(tmp_path, name):
    with pytest.raises(BadScores, match=r"no such file|cannot be read"):
        read_scores(tmp_path / name)


def test_a_stated_prevalence_changes_no_map_but_what_a_call_is_worth(bundle, tmp_path):
    """Negatives were a tenth of all: the odds among these studies are ten times the site's."""
    path = drawn(tmp_path / "s.csv", 1500)

    plain = recalibrated(bundle, path, tmp_path / "a.toml")
    stated = recalibrated(bundle, path, tmp_path / "b.toml", prevalence=0.03)

    one, other = (
        load_bundle(bundle.folder, calibration=tmp_path / name).calibrations[primary(bundle)]
        for name in ("a.toml", "b.toml")
    )
    z = np.linspace(-5, 5, 50)
    assert apply(one, z).tobytes() == apply(other, z).tobytes()
    assert plain["site_prevalence"] == plain["prevalence"]
    assert (stated["site_prevalence"], stated["prevalence"]) == (0.03, plain["prevalence"])
    assert stated["after"] == plain["after"]
    ppv = [made["threshold"]["after"]["ppv"]["value"] for made in (plain, stated)]
    assert ppv[1] < ppv[0]
    assert "negatives taken to be consecutive" in one.note
    assert "randomly sampled; prevalence at the site 0.03, as given" in other.note


def test_a_sample_of_negatives_gives_the_map_of_all_once_shifted_back(bundle, tmp_path):
    """Why the map does not ask for the site's prevalence: its log-odds shift to any."""
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, 40_000)
    y = rng.random(40_000) < expit(z - 4)
    kept = y | (rng.random(40_000) < 0.1)
    who = np.arange(40_000)

    all_of_them = fit("platt", z, y, who)
    sample = fit("platt", z[kept], y[kept], who[kept])

    some = np.linspace(-2, 4, 20)
    np.testing.assert_allclose(
        apply(sample, some, prevalence=y.mean()), apply(all_of_them, some), atol=0.02
    )


def test_every_operating_point_is_told_and_how_to_decide_as_before(tmp_path):
    folder = make_bundle(tmp_path / "head")
    manifest = folder / "manifest.toml"
    point = '[[labels.operating_points]]\nname = "keen"\nthreshold = 0.3\n'
    point += "sensitivity = 0.9\nspecificity = 0.5\n"
    text = manifest.read_text().replace("threshold = 0.5\n", f"threshold = 0.5\n{point}", 1)
    manifest.write_text(text)
    bundle = load_bundle(folder)
    path = drawn(tmp_path / "s.csv", 1500)
    scores = read_scores(path)

    made = recalibrated(bundle, path, tmp_path / "c.toml")

    new = load_bundle(folder, calibration=tmp_path / "c.toml").calibrations[primary(bundle)]
    reference = made["reference_prevalence"]
    assert made["operating_points"].keys() == {"keen"}
    for told in (made["threshold"], made["operating_points"]["keen"]):
        present = apply(new, scores.logits, reference=reference) >= told["value"]
        assert told["after"]["sensitivity"]["value"] == pytest.approx(
            present[scores.truth].mean(), abs=1e-4
        )
        as_before = apply(new, scores.logits, reference=reference) >= told["keeps"]
        old = apply(bundle.calibrations[primary(bundle)], scores.logits, reference=reference)
        np.testing.assert_array_equal(as_before, old >= told["value"])


def test_a_map_that_cannot_reach_the_threshold_leaves_no_file(tmp_path):
    """Where half of all studies are positive, a low threshold may lie under the clips."""
    folder = make_bundle(tmp_path / "head")
    text = (folder / "manifest.toml").read_text()
    (folder / "manifest.toml").write_text(text.replace("threshold = 0.5", "threshold = 0.013", 1))
    table(tmp_path / "s.csv", 110, seed=1)

    with pytest.raises(BundleError, match="outside"):
        recalibrated(load_bundle(folder), tmp_path / "s.csv", tmp_path / "c.toml")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["head", "s.csv"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prevalence", "6"], "no share between 0 and 1"),
        (["--prevalence", "0"], "no share between 0 and 1"),
        (["--scale", "percent"], "none of auto, logit, output"),
    ],
)
def test_a_wrong_option_is_wrong_usage(bundle, tmp_path, options, words):
    told = ["--scores", tmp_path / "s.csv", "--out", tmp_path / "c.toml", "--model", bundle.folder]

    done = CliRunner().invoke(app, ["calibrate", *map(str, told), *options])

    assert done.exit_code == 2
    assert words in done.stderr


def test_the_command_tells_what_to_configure(bundle, tmp_path):
    scores, out = drawn(tmp_path / "s.csv", 800), tmp_path / "new" / "c.toml"
    options = ["--scores", scores, "--out", out, "--model", bundle.folder, "--prevalence", 0.06]

    done = CliRunner().invoke(app, ["calibrate", *map(str, options)])

    told = " ".join(done.stdout.split())
    assert out.is_file()
    assert f'prevalence = {{ "head.{primary(bundle)}" = 0.06 }}, as given' in told
    assert "to decide as before under the new map: 0." in told
    helped = CliRunner().invoke(app, ["calibrate", "--help"]).stdout
    assert "consecutive or randomly sampled" in " ".join(helped.split())
