"""Versions of a bundle: activated, rolled back, and what each study is judged by meanwhile."""

import gc
import json
import re
import shutil
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pydicom
import pytest
import structlog
import torch
from safetensors.torch import load_file, save_file
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from config.tenants import Tenant
from db import notices, operator, queue
from db.activations import Version
from db.files import models_folder
from db.job import JobKind
from db.result import Finding
from db.sandbox import Sandbox
from db.tables import (
    ActivationRow,
    AnalysisRow,
    AuditRow,
    JobRow,
    ObjectRow,
    ResultRow,
)
from dicom_sr.deliver import Deliverer
from inference.bundle import BundleError
from inference.calibration import log_odds
from inference.device import Device
from inference.fleet import Fleet
from inference.scheduler import Scheduler
from node import cli, doctor
from node.bundles import check_overrides
from node.models_list import active
from tests.bundles.make import make_bundle
from tests.bundles.sources import head_series
from tests.delivery import wait_until
from tests.integration.test_inference_stage import patient
from tests.stage import Stages

SOUTH = Tenant(id="south", ae_titles=("SOUTH_AI",), models=("head",), quiet_period_s=60.0)


class Answer(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def stages(engine, settings, tmp_path) -> Iterator[Stages]:
    """Two tenants with one bundle, version 0.0.1."""
    stages = Stages(engine, settings, make_bundle(tmp_path / "head"), neighbours=(SOUTH,))
    yield stages
    stages.close()


@pytest.fixture
def vigil(stages, monkeypatch, capsys, tmp_path) -> Iterator[Callable[..., Answer]]:
    """The command, as a user of that node types it."""
    config = tmp_path / "vigil.toml"
    node = stages.settings.node
    tenants = "".join(
        f'[[tenants]]\nid = "{one.id}"\nae_titles = ["{one.ae_titles[0]}"]\nmodels = ["head"]\n'
        for one in stages.settings.tenants
    )
    config.write_text(
        f'[node]\ndata_dir = "{node.data_dir}"\n'
        f'database_url = "{node.database_url.get_secret_value()}"\n'
        f'[inference]\nmodels = ["{tmp_path / "head"}"]\ndevice = "cpu"\n{tenants}'
    )

    def run(*arguments: object) -> Answer:
        line = ["vigil", "models", *map(str, arguments), "--config", str(config)]
        monkeypatch.setattr(sys, "argv", line)
        capsys.readouterr()  # what the stages have logged
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return Answer(ended.value.code or 0, said.out, said.err)

    yield run
    structlog.reset_defaults()


def version_of(source: Path, version: str, folder: Path, *, seed: int = 0, **words: str) -> Path:
    """A bundle of another version; `words` are replaced in its manifest."""
    if seed:
        make_bundle(folder, seed=seed)
    else:
        shutil.copytree(source, folder)
    edit(folder / "manifest.toml", 'version = "0.0.1"', f'version = "{version}"')
    for old, new in words.items():
        edit(folder / "manifest.toml", *(f"{old} = {value}" for value in new.split(" -> ")))
    return folder


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, old
    path.write_text(text.replace(old, new))


def study(number: int) -> list[pydicom.Dataset]:
    return patient(
        head_series(StudyInstanceUID=f"1.2.{number}", SeriesInstanceUID=f"1.2.{number}.1")
    )


def findings(stages: Stages, tenant: str = "north") -> list[Finding]:
    with Session(stages.engine) as session:
        rows = session.scalars(
            select(ResultRow).where(ResultRow.tenant == tenant).order_by(ResultRow.at)
        )
        return [Finding.from_json(row.finding) for row in rows]


def versions(stages: Stages, tenant: str = "north") -> list[str]:
    return [finding.model.version for finding in findings(stages, tenant)]


def count(stages: Stages, table: type) -> int:
    with Session(stages.engine) as session:
        return session.scalar(select(func.count()).select_from(table))


def analyse(stages: Stages, *datasets: pydicom.Dataset, tenant: str = "north") -> None:
    stages.receive(datasets, tenant=tenant)
    stages.judge()
    stages.infer()


def test_new_studies_are_judged_by_what_is_activated_and_old_ones_are_left_alone(
    stages, vigil, tmp_path
):
    analyse(stages, *study(1))
    jobs = count(stages, JobRow)
    new = version_of(tmp_path / "head", "1.1.0", tmp_path / "new", seed=5)

    answer = vigil("activate", new, "--json")
    stages.fleet.refresh()
    stages.judge()
    stages.infer()
    assert (versions(stages), count(stages, JobRow)) == (["0.0.1"], jobs)
    analyse(stages, *study(2))

    first, second = findings(stages)
    assert answer.status == 0
    assert {one["tenant"]: one["is_changed"] for one in answer.json["tenants"]} == {
        "north": True,
        "south": True,
    }
    assert (first.model.version, second.model.version) == ("0.0.1", "1.1.0")
    assert first.model.weights_sha256 != second.model.weights_sha256
    assert first.image_logits != second.image_logits


def test_the_report_names_the_version_that_is_active(stages, vigil, tmp_path):
    vigil("activate", version_of(tmp_path / "head", "1.1.0", tmp_path / "new"))
    stages.fleet.refresh()
    analyse(stages, *study(1))

    with Sandbox(size=1, memory_mb=4096, cpu_s=60) as sandbox:
        Deliverer(
            stages.engine, stages.settings, sandbox, worker="test", version="0.1.0"
        ).run_once()

    with Session(stages.engine) as session:
        row = session.scalars(select(ObjectRow).where(ObjectRow.role == "sr")).first()
    folder = stages.settings.node.data_dir / "results" / "north" / str(row.result_id)
    (path,) = folder.rglob(f"{row.sop_instance_uid}.dcm")
    assert "1.1.0" in texts(pydicom.dcmread(path), "Algorithm Version")


def texts(item: pydicom.Dataset, meaning: str) -> list[str]:
    found = [
        str(one.TextValue)
        for one in item.get("ContentSequence", [])
        if "TextValue" in one and one.ConceptNameCodeSequence[0].CodeMeaning == meaning
    ]
    return found + [x for one in item.get("ContentSequence", []) for x in texts(one, meaning)]


def test_a_rollback_leads_back_even_where_the_configured_folder_is_gone(stages, vigil, tmp_path):
    vigil("activate", version_of(tmp_path / "head", "1.1.0", tmp_path / "new"))
    shutil.rmtree(tmp_path / "head")

    answer = vigil("rollback", "head", "--tenant", "north")
    stages.fleet.refresh()
    analyse(stages, *study(1))
    analyse(stages, *study(2), tenant="south")

    assert answer.status == 0
    assert "north: head 0.0.1+" in answer.out
    assert (versions(stages), versions(stages, "south")) == (["0.0.1"], ["1.1.0"])
    again = vigil("rollback", "head", "--tenant", "north")
    assert (again.status, again.out) == (1, "")
    assert "nothing_before: north: nothing was active before head 0.0.1+" in again.err


def test_rolling_back_twice_leads_further_back_and_never_forth(stages, vigil, tmp_path):
    for version in ("1.1.0", "1.2.0"):
        vigil("activate", version_of(tmp_path / "head", version, tmp_path / version))

    was = [vigil("rollback", "head", "--json").json["tenants"][0]["version"] for _ in range(2)]

    assert [label.partition("+")[0] for label in was] == ["1.1.0", "0.0.1"]


def test_nothing_was_ever_activated(vigil):
    answer = vigil("rollback", "head")

    assert answer.status == 1
    assert "no version of head was ever activated" in answer.err


def test_every_change_is_audited_with_who_and_what(stages, vigil, tmp_path):
    vigil("activate", version_of(tmp_path / "head", "1.1.0", tmp_path / "new"), "--tenant", "north")
    vigil("activate", "head@1.1.0", "--tenant", "north")  # it is already
    vigil("rollback", "head", "--tenant", "north")

    with Session(stages.engine) as session:
        rows = session.scalars(select(AuditRow).order_by(AuditRow.id)).all()
    assert [(row.tenant, row.action, row.target.partition("+")[0]) for row in rows] == [
        ("north", "model_activate", "head 1.1.0"),
        ("north", "model_rollback", "head 0.0.1"),
    ]
    assert [row.detail["before"].partition("+")[0] for row in rows] == ["0.0.1", "1.1.0"]
    assert all(row.actor.startswith("cli:") for row in rows)


def damaged_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def other_reference(folder: Path) -> None:
    tensors = load_file(folder / "reference.safetensors")
    save_file({**tensors, "logits": tensors["logits"] + 0.05}, folder / "reference.safetensors")


def no_calibration(folder: Path) -> None:
    (folder / "calibration.toml").unlink()


def other_name(folder: Path) -> None:
    edit(folder / "manifest.toml", 'name = "head"', 'name = "foot"')


def path_as_version(folder: Path) -> None:
    edit(folder / "manifest.toml", 'version = "1.1.0"', 'version = "../../../out"')


def same_number(folder: Path) -> None:
    make_bundle(folder, seed=5)


@pytest.mark.parametrize(
    ("harm", "code"),
    [
        (damaged_weights, "weights_hash"),
        (other_reference, "reference_missed"),
        (no_calibration, "bundle_invalid"),
        (other_name, "bundle_unknown"),
        (path_as_version, "bundle_invalid"),
        (same_number, "version_taken"),
    ],
)
def test_what_cannot_serve_is_refused_and_nothing_has_changed(stages, vigil, tmp_path, harm, code):
    new = version_of(tmp_path / "head", "1.1.0", tmp_path / "new")
    harm(new)

    answer = vigil("activate", new)

    assert (answer.status, answer.out) == (1, "")
    assert answer.err.startswith(f"{code}: ")
    assert count(stages, ActivationRow) == count(stages, AuditRow) == 0
    assert list(models_folder(stages.settings.node.data_dir).glob("*")) == []


def test_a_version_that_a_tenants_threshold_does_not_fit_is_refused(stages, vigil, tmp_path):
    with (tmp_path / "vigil.toml").open("a") as file:
        file.write('thresholds = { "head.any" = 0.9 }\n')  # of the last tenant, south
    new = version_of(tmp_path / "head", "1.1.0", tmp_path / "new")
    text = (new / "calibration.toml").read_text()
    (new / "calibration.toml").write_text(text.replace("n_positive = 40", "n_positive = 4"))

    both, north = vigil("activate", new), vigil("activate", new, "--tenant", "north")

    assert both.status == 1
    assert "tenant south: head.any: threshold outside" in both.err
    assert north.status == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere/at/all"], "neither a folder nor one of head"),
        (["head@9.9"], "head@9.9 is not installed; installed: none"),
        (["head", "--tenant", "west"], "no tenant 'west' uses the bundle head"),
    ],
)
def test_what_is_not_there_is_said(stages, vigil, arguments, words):
    answer = vigil("activate", *arguments)

    assert answer.status == 1
    assert words in answer.err
    assert count(stages, ActivationRow) == 0


def test_two_tenants_are_served_by_two_versions_at_the_same_time(stages, vigil, tmp_path):
    new = version_of(tmp_path / "head", "1.1.0", tmp_path / "new", seed=5)
    vigil("activate", new, "--tenant", "south")
    stages.fleet.refresh()
    stages.receive(study(1))
    stages.receive(study(1), tenant="south")
    stages.judge()

    stages.infer()

    (north,), (south,) = findings(stages), findings(stages, "south")
    assert (north.model.version, south.model.version) == ("0.0.1", "1.1.0")
    assert north.image_logits != south.image_logits
    assert len(stages.fleet.served) == 2


def test_a_node_that_runs_takes_it_up_by_itself(stages, vigil, tmp_path):
    stop = threading.Event()
    device = Device(torch.device("cpu"), 8)
    scheduler = Scheduler(stages.engine, stages.settings, stages.fleet, device, "running", stop)
    loops = [stages.fleet.run, stages.readiness.run]
    threads = [threading.Thread(target=run, args=(stop,)) for run in loops]
    threads.append(threading.Thread(target=scheduler.run))
    for thread in threads:
        thread.start()
    try:
        stages.receive(study(1))
        stages.pass_quiet_period()
        wait_until(lambda: versions(stages) == ["0.0.1"], 60)
        vigil("activate", version_of(tmp_path / "head", "1.1.0", tmp_path / "new"))
        stages.receive(study(2))
        stages.pass_quiet_period()
        wait_until(lambda: versions(stages) == ["0.0.1", "1.1.0"], 60)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_study_under_way_ends_as_it_began_and_the_old_version_is_let_go(stages, vigil, tmp_path):
    stages.receive(study(1))
    stages.judge()
    stages.scheduler.step()
    old = weakref.ref(stages.fleet.served[Version("head", "")])

    vigil("activate", version_of(tmp_path / "head", "1.1.0", tmp_path / "new"))
    stages.fleet.refresh()
    assert Version("head", "") not in stages.fleet.served
    stages.infer()

    assert versions(stages) == ["0.0.1"]
    gc.collect()
    assert old() is None


def test_a_study_that_waits_is_judged_anew_by_the_rules_of_what_it_is_claimed_for(
    stages, vigil, tmp_path
):
    stages.receive(study(1))
    stages.judge()
    new = version_of(
        tmp_path / "head",
        "1.1.0",
        tmp_path / "new",
        excluded_kernels='["BONE", "BONEPLUS", "H60*", "H70*"] -> ["STANDARD"]',
    )

    vigil("activate", new)
    stages.fleet.refresh()
    stages.infer()

    with Session(stages.engine) as session:
        row = session.scalars(select(AnalysisRow)).one()
        assert (row.state, row.reason_code) == ("NOT_ANALYSED", "kernel")
        job = queue.claim(session, [JobKind.NOTICE], "test")
        (source, *_) = notices.sources(session, job)
        notice = notices.Notice.from_json(notices.draw(session, job, source).notice)
    assert notice.model.version == "1.1.0"
    assert findings(stages) == []


def test_until_a_version_is_loaded_its_studies_wait_for_it(stages, vigil, tmp_path):
    stages.receive(study(1))
    stages.judge()
    vigil("activate", version_of(tmp_path / "head", "1.1.0", tmp_path / "new"))

    stages.infer()
    assert findings(stages) == []
    stages.fleet.refresh()
    stages.infer()

    assert versions(stages) == ["1.1.0"]


def test_after_an_activation_only_slices_that_matter_issue_a_result_again(stages, vigil, tmp_path):
    images = study(1)
    analyse(stages, *images[:-4])
    # By its rules, twelve images are not enough.
    new = version_of(tmp_path / "head", "1.1.0", tmp_path / "new", min_images="4 -> 14")
    vigil("activate", new)
    stages.fleet.refresh()
    other = patient(
        head_series(n=2, StudyInstanceUID="1.2.1", SeriesInstanceUID="1.2.1.9", SeriesNumber=9)
    )

    analyse(stages, *other)
    assert versions(stages) == ["0.0.1"]
    analyse(stages, *images[-4:])

    assert versions(stages) == ["0.0.1", "1.1.0"]
    assert len(findings(stages)[-1].images) == len(images)


def test_an_object_that_changes_nothing_does_not_bring_another_choice(stages, vigil, tmp_path):
    """The new rules prefer the other of two series that lie there."""
    one = study(1)
    other = patient(
        head_series(
            StudyInstanceUID="1.2.1", SeriesInstanceUID="1.2.1.2", SeriesNumber=2,
            ConvolutionKernel="ODD",
        )
    )  # fmt: skip
    analyse(stages, *one, *other)
    (first,) = findings(stages)
    was = first.images[0].series_instance_uid
    kernel = '["ODD"]' if was.endswith(".1") else '["STANDARD"]'
    new = version_of(tmp_path / "head", "1.1.0", tmp_path / "new")
    prefer(new / "manifest.toml", kernel)
    vigil("activate", new)
    stages.fleet.refresh()

    analyse(
        stages,
        *patient(head_series(n=2, StudyInstanceUID="1.2.1", SeriesInstanceUID="1.2.1.9")),
    )
    assert versions(stages) == ["0.0.1"]
    with Session(stages.engine) as session, session.begin():
        operator.rerun(session, session.scalars(select(AnalysisRow.id)).one(), actor="test")
    stages.infer()

    assert versions(stages) == ["0.0.1", "1.1.0"]
    assert findings(stages)[-1].images[0].series_instance_uid != was


def prefer(manifest: Path, kernels: str) -> None:
    lines = [line for line in manifest.read_text().splitlines() if "preferred_kernels" not in line]
    at = lines.index("[selection]") + 1
    manifest.write_text("\n".join([*lines[:at], f"preferred_kernels = {kernels}", *lines[at:]]))


def test_the_source_may_go_and_what_was_activated_still_starts(stages, vigil, tmp_path):
    new = version_of(tmp_path / "head", "1.1.0", tmp_path / "new")
    vigil("activate", new)
    shutil.rmtree(new)
    shutil.rmtree(tmp_path / "head")

    fleet = Fleet(stages.engine, stages.settings, Device(torch.device("cpu"), 8))
    fleet.refresh()

    assert [one.bundle.manifest.version for one in fleet.served.values()] == ["1.1.0"]
    assert fleet.refused == {}


def test_a_version_damaged_later_keeps_its_studies_waiting_and_is_put_right_by_activating_it(
    stages, vigil, tmp_path, monkeypatch
):
    new = version_of(tmp_path / "head", "1.1.0", tmp_path / "new")
    vigil("activate", new)
    (home,) = models_folder(stages.settings.node.data_dir).glob("head/1.1.0+*")
    damaged_weights(home)

    stages.fleet.refresh()
    analyse(stages, *study(1))
    (refused,) = stages.fleet.refused.values()
    (entry,) = (one for one in vigil("list", "--json").json if one["name"] == "head")
    assert (refused.code, refused.name) == ("weights_hash", f"head {home.name}")
    assert stages.fleet.detail()["refused"][refused.name]["code"] == "weights_hash"
    assert "the manifest says" in entry["problem"]
    assert findings(stages) == []

    assert vigil("activate", new, "--json").json["tenants"][0]["is_changed"] is False
    monkeypatch.setattr("inference.fleet.RETRY_S", 0.0)
    stages.fleet._retry_at.clear()
    stages.fleet.refresh()
    stages.judge()
    stages.infer()

    assert versions(stages) == ["1.1.0"]


@pytest.mark.parametrize("name", ["manifest.toml", "calibration.toml"])
def test_a_version_whose_words_were_edited_in_place_is_not_served(stages, vigil, tmp_path, name):
    new = version_of(tmp_path / "head", "1.1.0", tmp_path / "new")
    vigil("activate", new)
    (home,) = models_folder(stages.settings.node.data_dir).glob("head/1.1.0+*")
    with (home / name).open("a") as file:
        file.write("# edited\n")

    stages.fleet.refresh()

    assert stages.fleet.served == {}
    (refused,) = stages.fleet.refused.values()
    assert "not those that were activated" in refused.reason
    assert vigil("activate", "head@1.1.0").status == 1
    assert vigil("activate", new).status == 0
    fleet = Fleet(stages.engine, stages.settings, Device(torch.device("cpu"), 8))
    fleet.refresh()
    assert [one.bundle.manifest.version for one in fleet.served.values()] == ["1.1.0"]


def test_activating_again_puts_a_damaged_reference_right(stages, vigil, tmp_path):
    new = version_of(tmp_path / "head", "1.1.0", tmp_path / "new")
    vigil("activate", new)
    (home,) = models_folder(stages.settings.node.data_dir).glob("head/1.1.0+*")
    other_reference(home)
    stages.fleet.refresh()
    assert [one.code for one in stages.fleet.refused.values()] == ["reference_missed"]

    vigil("activate", new)

    fleet = Fleet(stages.engine, stages.settings, Device(torch.device("cpu"), 8))
    fleet.refresh()
    assert fleet.refused == {}


def test_a_new_threshold_is_held_against_what_the_tenant_has_active(stages, vigil, tmp_path):
    new = version_of(tmp_path / "head", "1.1.0", tmp_path / "new")
    edit(new / "calibration.toml", "n_positive = 40", "n_positive = 4")
    vigil("activate", new, "--tenant", "south")
    south = stages.settings.tenants[1].model_copy(update={"thresholds": {"head.any": 0.9}})
    settings = stages.settings.model_copy(update={"tenants": (stages.settings.tenants[0], south)})

    check_overrides(settings, None)  # by the configured folder it could take effect
    with pytest.raises(BundleError, match=r"head.any: threshold outside"):
        check_overrides(settings, active(settings))


def test_the_doctor_looks_at_what_is_active_too(stages, vigil, tmp_path):
    new = version_of(tmp_path / "head", "1.1.0", tmp_path / "new")
    vigil("activate", new, "--tenant", "south")

    (whole,) = doctor.activated(stages.settings)
    (home,) = models_folder(stages.settings.node.data_dir).glob("head/1.1.0+*")
    damaged_weights(home)
    (damaged,) = doctor.activated(stages.settings)

    assert (whole.name, whole.grade) == ("model head for south", doctor.Grade.GOOD)
    assert "version 1.1.0" in whole.found
    assert damaged.grade is doctor.Grade.BAD
    assert "the manifest says" in damaged.found


def test_the_number_of_what_was_once_active_is_taken_for_good(stages, vigil, tmp_path):
    vigil("activate", version_of(tmp_path / "head", "1.1.0", tmp_path / "new"))
    vigil("rollback", "head")
    shutil.rmtree(models_folder(stages.settings.node.data_dir) / "head")

    answer = vigil("activate", version_of(tmp_path / "head", "1.1.0", tmp_path / "x", seed=5))

    assert answer.status == 1
    assert "version_taken: head 1.1.0 is known already with other files" in answer.err


ACCEPT = "--accept-moved-thresholds"


def moved(tmp_path: Path, by: float = 1.5) -> Path:
    """A calibration of the site's own: every raw score counts for `by` more than it did."""
    site = tmp_path / f"site-{by:g}.toml"
    text = (tmp_path / "head" / "calibration.toml").read_text()
    text = text.replace("'temperature'", "'platt'")
    site.write_text(text.replace("temperature = 1.5", f"slope = {1 / 1.5}\nintercept = {by / 1.5}"))
    return site


def test_a_calibration_that_moves_what_is_called_is_refused_unless_that_is_accepted(
    stages, vigil, tmp_path
):
    arguments = ["activate", "head", "--calibration", moved(tmp_path), "--tenant", "north"]

    refused = vigil(*arguments)
    rows = count(stages, ActivationRow), count(stages, AuditRow)
    accepted = vigil(*arguments, ACCEPT, "--json")

    assert (refused.status, rows) == (1, (0, 0))
    assert refused.err.startswith(
        "thresholds_moved: north: head.any (serves) at 0.5: raw score +0.000 "
    )
    assert "set the tenant's thresholds = {" in refused.err
    assert len(refused.err.splitlines()) == 1
    told = {
        f"{one['key']} ({one['name']})": one for one in accepted.json["tenants"][0]["thresholds"]
    }
    assert set(told) == {"head.any (serves)", "head.any (STAT at 0.8)", "head.left (serves)"}
    serves, stat = told["head.any (serves)"], told["head.any (STAT at 0.8)"]
    assert (serves["raw_score_before"], serves["raw_score_after"]) == (0.0, -1.5)
    assert serves["way"] == "sensitivity rises, specificity falls"
    assert stat["raw_score_before"] == pytest.approx(1.5 * log_odds(0.8), abs=1e-4)
    assert stat["raw_score_after"] == pytest.approx(1.5 * log_odds(0.8) - 1.5, abs=1e-4)
    with Session(stages.engine) as session:
        (audited,) = session.scalars(select(AuditRow)).all()
    assert serves["words"] in audited.detail["thresholds"]


def test_the_threshold_that_a_refusal_names_keeps_what_is_called(stages, vigil, tmp_path):
    edit(tmp_path / "head" / "manifest.toml", "at = 0.8\n", "")  # STAT, which no tenant can move
    site = moved(tmp_path, 1.0)
    refused = vigil("activate", "head", "--calibration", site, "--tenant", "south")
    kept = re.findall(r'"head.(?:any|left)" = [0-9.]+', refused.err)
    with (tmp_path / "vigil.toml").open("a") as file:
        file.write(f"thresholds = {{ {', '.join(kept)} }}\n")  # of the last tenant, south

    answer = vigil("activate", "head", "--calibration", site, "--tenant", "south")

    assert (refused.status, len(kept), answer.status) == (1, 2, 0)
    assert "head.any (serves) at 0.660756: raw score +0.000 before, -0.000 now" in answer.out
    assert answer.out.count("decides as before") == 2


def test_a_rollback_tells_what_it_moves(stages, vigil, tmp_path):
    vigil("activate", "head", "--calibration", moved(tmp_path), "--tenant", "north", ACCEPT)

    back = vigil("rollback", "head", "--tenant", "north")

    assert back.status == 0
    assert "head.any (serves) at 0.5: raw score -1.500 before, +0.000 now" in back.out
    with Session(stages.engine) as session:
        rows = session.scalars(select(AuditRow).order_by(AuditRow.id)).all()
    assert "sensitivity falls" in rows[-1].detail["thresholds"]


def test_where_what_serves_is_damaged_its_thresholds_are_not_taken_for_unmoved(
    stages, vigil, tmp_path
):
    vigil("activate", "head", "--calibration", moved(tmp_path), "--tenant", "north", ACCEPT)
    for folder in models_folder(stages.settings.node.data_dir).glob("head/*"):
        edit(folder / "calibration.toml", "n_positive = 40", "n_positive = 41")

    arguments = ["activate", "head", "--calibration", moved(tmp_path, 1.0), "--tenant", "north"]
    refused, accepted = vigil(*arguments), vigil(*arguments, ACCEPT)

    assert (refused.status, accepted.status) == (1, 0)
    assert "how far its thresholds move is not known" in refused.err


def test_other_weights_have_raw_scores_of_their_own_and_nothing_is_compared(
    stages, vigil, tmp_path
):
    new = version_of(tmp_path / "head", "1.1.0", tmp_path / "new", seed=5)
    edit(new / "calibration.toml", "temperature = 1.5", "temperature = 90.0")

    answer = vigil("activate", new, "--json")

    assert answer.status == 0
    assert answer.json["tenants"][0]["thresholds"] == []


def test_a_site_has_a_calibration_of_its_own(stages, vigil, tmp_path):
    site = tmp_path / "site.toml"
    text = (tmp_path / "head" / "calibration.toml").read_text()
    site.write_text(text.replace("temperature = 1.5", "temperature = 90.0"))
    analyse(stages, *study(1))

    answer = vigil("activate", "head", "--calibration", site, "--tenant", "north", ACCEPT)
    stages.fleet.refresh()
    analyse(stages, *study(2))

    first, second = findings(stages)
    assert answer.status == 0
    assert first.model.weights_sha256 == second.model.weights_sha256
    assert first.model.calibration_id != second.model.calibration_id
    assert first.primary.raw == second.primary.raw
    assert first.primary.probability != second.primary.probability


def test_a_calibration_alone_does_not_bring_older_weights_back(stages, vigil, tmp_path):
    vigil("activate", version_of(tmp_path / "head", "1.1.0", tmp_path / "new", seed=5))
    site = tmp_path / "site.toml"
    site.write_text((tmp_path / "head" / "calibration.toml").read_text() + "# ours\n")

    refused = vigil("activate", "head", "--calibration", site)
    named = vigil("activate", "head@1.1.0", "--calibration", site)

    assert (refused.status, named.status) == (1, 0)
    assert "other_weights: north has head 1.1.0 active" in refused.err
    assert "head 1.1.0+" in named.out


def test_what_was_begun_before_a_bundle_left_a_tenant_is_ended(stages, vigil, tmp_path):
    vigil("activate", version_of(tmp_path / "head", "1.1.0", tmp_path / "new"), "--tenant", "south")
    stages.fleet.refresh()
    stages.receive(study(1), tenant="south")
    stages.judge()
    settings = stages.settings.model_copy(update={"tenants": stages.settings.tenants[:1]})

    fleet = Fleet(stages.engine, settings, Device(torch.device("cpu"), 8))
    fleet.refresh()

    assert sorted(one.bundle.manifest.version for one in fleet.served.values()) == [
        "0.0.1",
        "1.1.0",
    ]


def test_list_says_what_is_active_for_whom_and_what_was_before(
    stages, vigil, tmp_path, monkeypatch
):
    new = version_of(tmp_path / "head", "1.1.0", tmp_path / "new")
    vigil("activate", new, "--tenant", "north")

    (entry,) = (one for one in vigil("list", "--json").json if one["name"] == "head")
    monkeypatch.setenv("COLUMNS", "200")
    table = vigil("list").out

    uses = {v["version"]: v["active"] for v in entry["versions"] if v["active"]}
    (north,), (south,) = uses["1.1.0"], uses["0.0.1"]
    assert (entry["activity"], entry["problem"]) == ("known", "")
    assert north["tenant"] == "north"
    assert north["previous"].startswith("0.0.1+")
    assert north["since"] is not None
    assert (south["tenant"], south["since"], south["by"]) == ("south", None, "configuration")
    assert "south by configuration" in table


def test_list_without_a_database_says_that_activity_is_not_known(vigil, stages, monkeypatch):
    monkeypatch.setenv("VIGIL_NODE__DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")

    answer = vigil("list", "--json")

    (entry,) = (one for one in answer.json if one["name"] == "head")
    assert answer.status == 0
    assert entry["activity"].startswith("unknown: ")
    assert (entry["version"], entry["problem"]) == ("0.0.1", "")
