"""`vigil demo --once --json`: the whole path, from scanners to two hospitals' archives."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pydicom
import pytest

import weights
from tests.bundles.make import make_bundle

REAL_BUNDLE = Path(weights.__file__).parent / "ich"
TIMEOUT_S = 280


def demo(*arguments: object) -> tuple[int, dict]:
    done = subprocess.run(
        [sys.executable, "-m", "node.cli", "demo", "--once", "--json", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> tuple[int, dict, Path]:
    """One run with an untrained bundle, looked at by several tests."""
    folder = tmp_path_factory.mktemp("demo")
    bundle = make_bundle(folder / "head", "head")
    status, document = demo("--model", bundle, "--keep", folder / "work")
    return status, document, folder / "work"


def test_every_study_reaches_the_outcome_it_should(untrained):
    status, document, _ = untrained

    ended = {(study["tenant"], study["truth"], study["outcome"]) for study in document["studies"]}
    assert status == 0
    assert document["ok"]
    assert ended == {
        ("north", "lesion", "result"), ("north", "plain", "result"),
        ("south", "lesion", "result"), ("south", "plain", "result"),
        ("north", "contrast", "reason"), ("south", "chest", "reason"),
        ("south", "localiser", "reason"),
    }  # fmt: skip


def test_results_reach_their_own_hospital_and_nobody_else(untrained):
    _, document, work = untrained

    for title in ("NORTH_PACS", "SOUTH_PACS"):
        tenant = title.split("_")[0].lower()
        own = {s["study_instance_uid"] for s in document["studies"] if s["tenant"] == tenant}
        files = list((work / "pacs" / title).glob("*.dcm"))
        assert files
        assert {pydicom.dcmread(f, stop_before_pixels=True).StudyInstanceUID for f in files} <= own
    assert document["objects_in_a_wrong_pacs"] == 0


def test_each_result_has_one_report_and_refusals_have_none(untrained):
    _, document, _ = untrained

    for study in document["studies"]:
        counts = Counter(study.get("pacs", {}))
        assert counts["SR"] == (study["outcome"] == "result")
        assert counts["KO"] == counts["SR"] * bool(study.get("is_positive"))


def test_logs_and_configuration_hold_no_patient_name(untrained):
    _, _, work = untrained

    assert "PHANTOM" not in (work / "node.log").read_text()


@pytest.mark.skipif(
    not (REAL_BUNDLE / "manifest.toml").is_file(), reason="the trained bundle is not here yet"
)
def test_the_trained_bundle_finds_the_lesions_and_not_the_plain_heads():
    status, document = demo()

    answers = {
        (study["tenant"], study["truth"]): study["is_positive"]
        for study in document["studies"]
        if study["outcome"] == "result"
    }
    assert status == 0
    assert answers == {
        (tenant, truth): truth == "lesion"
        for tenant in ("north", "south")
        for truth in ("lesion", "plain")
    }
