"""Wrong data and bundles, as a user of `vigil train` and `vigil evaluate` meets them: one line."""

import sys

import pytest
import structlog

from node import cli
from tests.bundles.make import make_bundle
from tests.cohorts import change, cohort_folder


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
