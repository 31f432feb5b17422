"""Wrong data and bundles, as a user of `vigil train` and `vigil evaluate` meets them: one line."""

import sys

import numpy as np
import pytest
import structlog
import timm
from safetensors.torch import load, save_file

from node import cli
from tests.bundles.make import make_bundle
from tests.cohorts import change, cohort_folder
from weights.recipe import line_up
from weights.recipe.backbone import Backbone
from weights.recipe.bank import Pictures
from weights.recipe.families import COMPARED, SHIPPING
from weights.recipe.template import KINDS, draft


@pytest.fixture
def folder(tmp_path):
    return cohort_folder(tmp_path)


@pytest.fixture
def typed(monkeypatch, capsys):
    """Runs `vigil` as a user types it; gives the exit status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vigil", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    yield run
    structlog.reset_defaults()


def assert_one_line(done, status, *words):
    code, out, err = done
    assert (code, out) == (status, "")
    assert len(err.strip().splitlines()) == 1
    for word in words:
        assert word in err


def test_train_tells_wrong_data_in_one_line_and_writes_nothing(folder, tmp_path, typed):
    out = tmp_path / "bundle"
    change(folder / "manifest.csv", 3, any="maybe")

    done = typed("train", "--data", folder, "--out", out)

    assert_one_line(done, 1, "bad_data: ", "manifest.csv, line 5: any 'maybe'")
    assert not out.exists()


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_folder_without_a_table_is_wrong_usage(folder, tmp_path, typed, command):
    (folder / "manifest.csv").unlink()
    out = ("--out", tmp_path / "bundle") if command == "train" else ()

    assert_one_line(typed(command, "--data", folder, *out), 2, "manifest.csv")


def test_train_tells_missing_boxes_and_too_few_patients(folder, tmp_path, typed):
    out = ("--out", tmp_path / "bundle")

    done = typed("train", "--data", folder, *out, "--folds", 9)
    assert_one_line(done, 1, "too_few_patients: ", "9 folds")

    (folder / "boxes.csv").unlink()
    assert_one_line(typed("train", "--data", folder, *out), 1, "bad_boxes: ", "boxes.csv")


def test_evaluate_tells_a_cut_picture_before_it_judges_any(folder, tmp_path_factory, typed):
    model = make_bundle(tmp_path_factory.mktemp("b") / "head")
    path = folder / "13-1.png"
    path.write_bytes(path.read_bytes()[:-40])

    done = typed("evaluate", "--data", folder, "--model", model, "--json")

    assert_one_line(done, 1, "bad_picture: ", "13-1.png: cut off or damaged")


def test_evaluate_tells_weights_that_are_cut_off_and_a_wrong_manifest(
    folder, tmp_path_factory, typed
):
    model = make_bundle(tmp_path_factory.mktemp("b") / "head")
    judge = ("evaluate", "--data", folder, "--model", model)
    manifest, weights = model / "manifest.toml", model / "model.safetensors"
    text, whole = manifest.read_text(), weights.read_bytes()

    weights.write_bytes(whole[:-1000])
    assert_one_line(typed(*judge), 1, "weights_truncated: ", "model.safetensors")
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert_one_line(typed(*judge), 1, "weights_hash: ", "model.safetensors")
    weights.write_bytes(whole)
    manifest.write_text(text.replace("min_images", "least_images"))
    assert_one_line(typed(*judge), 1, "bundle_invalid: ", "least_images: unknown key")
    manifest.write_text(text[:200])
    code, out, err = typed(*judge)
    assert (code, out) == (1, "")
    assert "bundle_invalid: " in err
    manifest.unlink()
    assert_one_line(typed(*judge), 1, "bundle_invalid: ", "manifest.toml: cannot be read")


def test_evaluate_does_not_judge_by_a_bundle_whose_reference_is_not_met(
    folder, tmp_path_factory, typed
):
    model = make_bundle(tmp_path_factory.mktemp("b") / "head")
    reference = model / "reference.safetensors"
    whole = reference.read_bytes()

    reference.write_bytes(whole[:-100])
    cut = typed("evaluate", "--data", folder, "--model", model)
    tensors = load(whole)
    save_file({**tensors, "logits": tensors["logits"] + 0.05}, reference)
    missed = typed("evaluate", "--data", folder, "--model", model)

    assert_one_line(cut, 1, "bundle_invalid: ", "reference.safetensors: cannot be read")
    assert_one_line(missed, 1, "reference_missed: ", "off the bundle's own reference")


@pytest.mark.parametrize("window", ["nan/80", "40/inf", "40/nan", "40/80/1"])
def test_a_window_that_is_no_number_is_wrong_usage(tmp_path, typed, window):
    table = tmp_path / "labels.csv"

    done = typed("evaluate", "--images", tmp_path, "--labels", table, "--window", window)

    assert_one_line(done, 2, "--window", "neither auto nor CENTRE/WIDTH")


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_generator_takes_is_wrong_usage(folder, tmp_path, typed, command, seed):
    out = ("--out", tmp_path / "bundle") if command == "train" else ()

    code, said, err = typed(command, "--data", folder, *out, "--seed", seed)

    assert (code, said) == (2, "")
    assert "--seed" in err
    assert ("4294967295" in err) == (seed > 0)
    assert "Traceback" not in err


@pytest.mark.parametrize("option", ["--report", "--scores"])
def test_where_nothing_can_be_written_evaluate_says_so_before_it_judges(
    folder, tmp_path, typed, option, monkeypatch
):
    monkeypatch.setattr("inference.model.load_model", lambda _: pytest.fail("too late"))
    (tmp_path / "file").write_text("")
    where = {"--report": tmp_path / "file", "--scores": tmp_path / "file" / "scores.csv"}

    done = typed("evaluate", "--data", folder, option, where[option])

    assert_one_line(done, 2, "file: nothing can be written there")


def test_where_nothing_can_be_written_calibrate_says_so(tmp_path, typed):
    (tmp_path / "file").write_text("")

    done = typed("calibrate", "--scores", "none.csv", "--out", tmp_path / "file" / "y.toml")

    assert_one_line(done, 2, "file: nothing can be written there")


@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_a_bundle_that_is_none_is_told_with_those_there_are(folder, tmp_path, typed, command):
    rest = {
        "evaluate": ("--data", folder),
        "calibrate": ("--scores", "none.csv", "--out", tmp_path / "y.toml"),
    }

    done = typed(command, *rest[command], "--model", "nope")

    assert_one_line(done, 2, "--model nope: neither a folder nor one of ich, ich-b4")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--only", "nope"), "no family nope; there are: linear tf_efficientnet_lite0, "),
        (("--only", "gru over slices tf_efficientnet_lite0"), "no bundle can hold gru over"),
        (("--device", "cuda"), "--device cuda: no such GPU can be used here"),
    ],
)
def test_train_tells_a_wrong_family_or_device_before_it_reads_a_picture(
    folder, tmp_path, typed, monkeypatch, arguments, words
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("weights.recipe.checks.read_cohort", lambda _: pytest.fail("too late"))

    done = typed("train", "--data", folder, "--out", tmp_path / "bundle", *arguments)

    assert_one_line(done, 2, words)


def test_the_families_told_are_those_of_the_line_up(tmp_path, monkeypatch):
    """Networks untrained: names alone count."""

    def untrained(architecture):
        weights = timm.create_model(architecture, pretrained=False).state_dict()
        return Backbone(architecture, weights, "")

    monkeypatch.setattr(line_up, "stored_backbone", untrained)
    monkeypatch.setattr(line_up, "grown_b4", lambda *_: untrained("efficientnet_b4"))
    found = {}
    for name, kind in KINDS.items():
        nothing = np.empty((0, kind.size, kind.size), np.float32)
        pictures = Pictures(nothing, (), (), draft(kind), tmp_path)
        how = {"seed": 0, "samples": 1, "device": "cpu"}
        made = (
            line_up.line_up(pictures, **how)
            if name == "ich"
            else line_up.line_up_b4(pictures, pictures, **how)
        )
        found[name] = made.families()

    assert found == {name: (SHIPPING[name], COMPARED[name]) for name in KINDS}
