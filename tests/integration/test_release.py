"""An operator's decision that a newcomer is right: no identity is ever mixed, nothing is lost."""

import os
import signal
import subprocess
import sys
import threading
import uuid

import pytest
from pydicom import dcmread
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from config.tenants import Tenant
from db import operator
from db.errors import PermanentError
from db.faults import POINTS, VARIABLE, arm
from db.release import Release
from db.release_rules import CannotBeReleased, ResultsOut
from db.sandbox import Sandbox
from db.spool import scan
from db.tables import (
    AnalysisRow,
    AuditRow,
    DeliveryRow,
    EventRow,
    InstanceRow,
    ObjectRow,
    QuarantineRow,
    ResultRow,
    StudyRow,
)
from tests.builders import changed, ct_image, ct_series, other_patient, other_pixels
from tests.reception import Reception, encoded

NORTH = Tenant(id="north", ae_titles=("NORTH_AI",), quiet_period_s=60.0)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(2, memory_mb=768, cpu_s=10) as box:
        yield box


@pytest.fixture
def node(settings, engine, sandbox):
    found = Reception(settings.model_copy(update={"tenants": (NORTH,)}), engine, sandbox)
    yield found
    found.box.close()
    found.intake.close()


def decide(node):
    return Release(node.engine, node.settings, node.sandbox, "admin")


def names(node, kind):
    return {uuid.UUID(path.stem) for path in node.files(kind)}


def entry(node, key):
    with Session(node.engine) as session:
        return session.get_one(QuarantineRow, key)


def analysed(node, *ids, state="DELIVERED"):
    """As if the study's images had been analysed."""
    with Session(node.engine) as session, session.begin():
        values = {"state": state, "analysed_ids": [str(one) for one in ids], "judge_at": None}
        session.execute(update(AnalysisRow).values(**values))


def sent(node, statuses=None, state="DELIVERED", number=1):
    """A result of the study, and what a destination has of it."""
    key = uuid.uuid4()
    with Session(node.engine) as session, session.begin():
        analysis = session.scalars(select(AnalysisRow)).one()
        owner = {"analysis_id": analysis.id, "study_id": analysis.study_id}
        owner |= {"tenant": analysis.tenant, "origin": analysis.origin}
        session.add(
            ResultRow(
                id=key, bundle=analysis.bundle, result_no=number, finding={}, is_positive=True,
                urgency="STAT", **owner,
            )
        )  # fmt: skip
        session.add(
            DeliveryRow(
                result_id=key, destination="pacs", state=state, lane=1, statuses=statuses or {},
                expires_at=func.now(), **owner,
            )
        )  # fmt: skip
        analysis.result_no = number
    return key


def test_h2_a_released_newcomer_takes_the_place_of_the_first_which_is_kept(node):
    one, two = ct_series(slices=2)
    first, _ = node.file(one, two)
    twin = other_pixels(one)
    (second,) = node.file(twin)
    analysed(node, first)
    before = node.one(StudyRow)

    done = decide(node).one(second)

    assert (done.released, done.replaced) == ((str(second),), (str(first),))
    study = node.one(StudyRow)
    assert (study.is_held, study.n_instances) == (False, 2)
    assert study.inputs_version > before.inputs_version
    row = next(row for row in node.all(InstanceRow) if row.id == second)
    assert row.stored_at is not None
    path = node.data_dir / "store" / "north" / str(study.id) / f"{second}.dcm"
    assert dcmread(path).PixelData == twin.PixelData
    assert (entry(node, second).state, entry(node, second).decided_by) == ("RELEASED", "admin")
    old = entry(node, first)
    assert (old.code, old.state, old.is_conflict) == ("replaced", "DISCARDED", False)
    assert str(second) in old.reason
    assert names(node, "quarantine") == {first}
    assert first not in names(node, "store")
    analysis = node.one(AnalysisRow)
    assert analysis.state == "WAITING"
    assert analysis.judge_at is not None
    (audit,) = node.all(AuditRow)
    assert (audit.actor, audit.action, audit.target) == (
        "admin", "quarantine_release", str(second),
    )  # fmt: skip
    assert "quarantine_released" in node.events()


def test_h2_what_was_replaced_can_be_put_back_and_the_newcomer_again(node):
    image = ct_image()
    (first,) = node.file(image)
    (second,) = node.file(other_pixels(image))

    decide(node).one(second)
    decide(node).one(first)
    assert [row.id for row in node.all(InstanceRow)] == [first]
    assert dcmread(node.files("store")[0]).PixelData == image.PixelData
    decide(node).one(second)

    assert [row.id for row in node.all(InstanceRow)] == [second]
    assert (entry(node, first).state, entry(node, second).state) == ("DISCARDED", "RELEASED")
    assert (names(node, "store"), names(node, "quarantine")) == ({second}, {first})


def test_h2_the_study_stays_held_while_another_conflict_is_open(node):
    one, two = ct_series(slices=2)
    node.file(one, two)
    (a,) = node.file(other_pixels(one))
    (b,) = node.file(other_pixels(two))

    assert decide(node).one(a).is_held
    assert node.one(StudyRow).is_held
    assert not decide(node).one(b).is_held

    assert not node.one(StudyRow).is_held


def test_h2_what_was_decided_stays_so_when_the_sender_tries_again(node):
    image = ct_image()
    (first,) = node.file(image)
    (second,) = node.file(other_pixels(image))
    with Session(node.engine) as session, session.begin():
        operator.discard(session, second, actor="admin")

    node.file(other_pixels(image), calling_ae="OTHER")
    assert not node.one(StudyRow).is_held
    assert node.events()[-1] == "instance_came_again"
    decide(node).one(second)  # it was discarded by mistake
    node.file(image)

    assert [row.id for row in node.all(InstanceRow)] == [second]
    assert {row.id for row in node.all(QuarantineRow)} == {first, second}
    assert not node.one(StudyRow).is_held


def test_h2_what_lies_there_undecided_is_set_aside_once(node):
    image = ct_image()
    node.file(image)

    node.file(other_pixels(image))
    node.file(other_pixels(image))

    assert len(node.all(QuarantineRow)) == len(node.files("quarantine")) == 1
    assert node.one(StudyRow).is_held


@pytest.mark.parametrize(
    "change",
    [
        {"PatientID": "OTHER-1"},
        {"PatientName": "Married^Name"},
        {"PatientBirthDate": "19010101"},
        {"PatientSex": "F"},
        {"IssuerOfPatientID": "ELSEWHERE"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_h3_half_a_corrected_study_is_never_released(node, change):
    images = ct_series(slices=3)
    node.file(*images)
    one, two, three = changed(images, **change)
    (a,) = node.file(one)
    node.file(two)
    study = node.one(StudyRow)

    with pytest.raises(CannotBeReleased, match=f"--study {study.public_id}"):
        decide(node).one(a)
    with pytest.raises(CannotBeReleased, match="1 of the study's 3 instances"):
        decide(node).study(study.id)
    assert node.one(StudyRow).is_held
    assert {row.state for row in node.all(QuarantineRow)} == {"OPEN"}
    assert len(names(node, "store")) == 3

    node.file(three)
    done = decide(node).study(study.id)

    assert (done.is_other_patient, done.is_held, len(done.replaced)) == (True, False, 3)


def test_h3_a_whole_corrected_study_becomes_the_right_patients(node):
    images = ct_series(slices=3)
    wrong = node.file(*images)
    analysed(node, *wrong)
    sent(node, {}, "WAITING")
    extra = changed([images[0]], SOPInstanceUID="2.25.77", ImagePositionPatient=[0, 0, 900])
    right = node.file(*other_patient(images), *other_patient(extra))
    assert {row.code for row in node.all(QuarantineRow)} == {"identity_conflict", "second_patient"}
    study = node.one(StudyRow)

    decide(node).study(study.id)

    now = node.one(StudyRow)
    assert (now.patient_id, now.patient_name) == ("OTHER-1", "INTRUDER^OTHER")
    assert (now.is_held, now.n_instances, now.id) == (False, 4, study.id)
    assert {row.id for row in node.all(InstanceRow)} == set(right) == names(node, "store")
    assert all(row.stored_at for row in node.all(InstanceRow))
    assert names(node, "quarantine") == set(wrong)
    analysis = node.one(AnalysisRow)
    assert (analysis.state, analysis.result_no) == (
        "WAITING",
        0,
    )  # nothing said of the other stands
    node.file(*images)  # the wrong one again: it was decided
    assert not node.one(StudyRow).is_held


def test_h3_a_correction_can_be_taken_back(node):
    images = ct_series(slices=2)
    wrong = node.file(*images)
    node.file(*other_patient(images))
    study = node.one(StudyRow)

    decide(node).study(study.id)
    decide(node).study(study.id)

    now = node.one(StudyRow)
    assert now.patient_id == images[0].PatientID
    assert {row.id for row in node.all(InstanceRow)} == set(wrong)


def test_h3_an_intruder_among_the_correction_is_discarded_first(node):
    images = ct_series(slices=2)
    node.file(*images)
    node.file(*other_patient(images))
    (intruder,) = node.file(*changed([images[0]], PatientID="THIRD", PatientName="THIRD"))
    study = node.one(StudyRow)

    with pytest.raises(CannotBeReleased, match="contradict each other"):
        decide(node).study(study.id)
    with Session(node.engine) as session, session.begin():
        operator.discard(session, intruder, actor="admin")
    decide(node).study(study.id)

    assert node.one(StudyRow).patient_id == "OTHER-1"


def test_h3_two_patients_beside_the_first_are_nobodys_correction(node):
    one, two = ct_series(slices=2)
    node.file(one, two)
    node.file(*changed([one], PatientID="B"), *changed([two], PatientID="C"))

    with pytest.raises(CannotBeReleased, match="names 2 patients"):
        decide(node).study(node.one(StudyRow).id)


@pytest.mark.parametrize(
    ("statuses", "state"),
    [({"1.1": "0x0000"}, "DELIVERED"), ({"1.1": "in_doubt"}, "WAITING"), ({}, "SENDING")],
)
def test_h3_results_that_may_be_out_must_be_withdrawn_before_the_patient_changes(
    node, statuses, state
):
    image = ct_image()
    ids = node.file(image)
    analysed(node, *ids)
    sent(node, statuses, state)
    node.file(*other_patient([image]))
    study = node.one(StudyRow)

    with pytest.raises(ResultsOut, match=f"out at pacs: `vigil withdraw {study.public_id}`"):
        decide(node).study(study.id)

    assert node.one(StudyRow).is_held
    assert node.one(StudyRow).patient_id == image.PatientID


def test_h8_what_was_not_sent_yet_of_replaced_images_never_is(node):
    image = ct_image()
    (first,) = node.file(image)
    analysed(node, first, state="BUILT")
    sent(node, {}, "WAITING")
    (second,) = node.file(other_pixels(image))

    decide(node).one(second)

    assert node.one(DeliveryRow).state == "DROPPED"
    assert node.one(AnalysisRow).state == "WAITING"


def test_what_does_not_rest_on_a_replaced_image_is_left_alone(node):
    one, two = ct_series(slices=2)
    _, other = node.file(one, two)
    analysed(node, other)
    sent(node, {}, "WAITING")
    (second,) = node.file(other_pixels(one))

    decide(node).one(second)

    assert node.one(AnalysisRow).state == "DELIVERED"
    assert node.one(AnalysisRow).judge_at is not None  # it is looked at all the same
    assert node.one(DeliveryRow).state == "WAITING"


def test_a_study_that_was_too_old_to_be_analysed_stays_so(node):
    image = ct_image()
    node.file(image)
    analysed(node, state="NOT_ANALYSED")
    with Session(node.engine) as session, session.begin():
        session.execute(update(AnalysisRow).values(reason_code="study_too_old"))
    node.file(*other_patient([image]))

    decide(node).study(node.one(StudyRow).id)

    assert node.one(StudyRow).patient_id == "OTHER-1"
    assert node.one(AnalysisRow).state == "NOT_ANALYSED"


def test_h5_a_second_patient_is_not_merged_and_the_operator_is_told_what_to_do(node):
    one, two, three = ct_series(slices=3)
    node.file(one, three)
    (newcomer,) = node.file(*other_patient([two]))
    study = node.one(StudyRow)

    with pytest.raises(CannotBeReleased, match="another patient") as told:
        decide(node).one(newcomer)
    with pytest.raises(CannotBeReleased, match="2 of the study's 2 instances"):
        decide(node).study(study.id)

    assert f"--study {study.public_id}" in str(told.value)
    assert "another Study Instance UID" in str(told.value)
    assert "OTHER-1" not in str(told.value)
    assert node.one(StudyRow).is_held
    assert entry(node, newcomer).state == "OPEN"


def test_h6_what_was_sent_under_another_uid_is_filed_under_its_own(node):
    image = ct_image()
    (key,) = node.file(image, sop_instance_uid="1.2.3")
    assert node.all(StudyRow) == []

    done = decide(node).one(key)

    row = node.one(InstanceRow)
    assert (row.id, row.sop_instance_uid) == (key, image.SOPInstanceUID)
    study = node.one(StudyRow)
    assert (str(study.public_id), study.n_instances, study.is_held) == (done.study, 1, False)
    assert dcmread(node.files("store")[0]) == image
    assert node.files("quarantine") == []
    assert node.one(AnalysisRow).state == "WAITING"


def test_h6_a_uid_that_is_taken_is_taken(node):
    image = ct_image()
    node.file(image)
    (same,) = node.file(image, sop_instance_uid="1.2.3")
    (other,) = node.file(other_pixels(image), sop_instance_uid="1.2.3")

    with pytest.raises(CannotBeReleased, match="the same image already"):
        decide(node).one(same)
    with pytest.raises(CannotBeReleased, match="taken by another image"):
        decide(node).one(other)


def test_h6_the_same_uid_in_two_series_of_a_study_is_for_the_operator_to_settle(node):
    image = ct_image()
    node.file(image)
    (second,) = node.file(*changed([image], SeriesInstanceUID="2.25.5"))

    decide(node).one(second)

    row = node.one(InstanceRow)
    assert (row.id, row.series_instance_uid) == (second, "2.25.5")


def test_h6_the_same_uid_in_another_study_takes_no_place(node):
    image = ct_image()
    node.file(image)
    (second,) = node.file(*changed([image], StudyInstanceUID="2.25.5"))

    with pytest.raises(CannotBeReleased, match="image of another study"):
        decide(node).one(second)
    with pytest.raises(CannotBeReleased, match="another study: discard it"):
        decide(node).study(node.one(StudyRow).id)

    assert node.one(StudyRow).is_held


@pytest.mark.parametrize(
    ("change", "body", "code", "why"),
    [
        ({"StudyInstanceUID": ""}, None, "missing_uid", "lacks a UID"),
        ({"StudyInstanceUID": "1.2.abc"}, None, "bad_uid", "such UIDs"),
        ({}, b"hello, this is no DICOM at all\n" * 20, "not_dicom", "no DICOM data set"),
        ({}, "cut", "cut_off", "ends in the middle"),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_what_cannot_be_filed_cannot_be_released_and_why_is_said(node, change, body, code, why):
    (image,) = changed([ct_image()], **change)
    whole = encoded(image)
    key = node.keep(image, {None: whole, "cut": whole[:-1000]}.get(body, body))
    node.drain()
    assert entry(node, key).code == code

    with pytest.raises(CannotBeReleased, match=why):
        decide(node).one(key)

    assert entry(node, key).state == "OPEN"


def test_a_result_of_ours_is_no_image(node):
    image = ct_image()
    (key,) = node.file(image, sop_instance_uid="1.2.3")
    node.file(*ct_series(slices=1, salt="another"))
    with Session(node.engine) as session, session.begin():
        analysis = session.scalars(select(AnalysisRow)).one()
        session.add(
            ObjectRow(
                id=uuid.uuid4(), result_id=uuid.uuid4(), analysis_id=analysis.id,
                study_id=analysis.study_id, tenant="north", origin="dicom", variant="", role="sr",
                seq=1, sop_class_uid="1", sop_instance_uid=image.SOPInstanceUID,
                series_instance_uid="1", transfer_syntax_uid="1", sha256="", size_bytes=1,
            )
        )  # fmt: skip

    with pytest.raises(CannotBeReleased, match="a result of ours"):
        decide(node).one(key)


def test_what_is_decided_or_unknown_is_not_decided_again(node):
    image = ct_image()
    node.file(image)
    (second,) = node.file(other_pixels(image))
    decide(node).one(second)

    with pytest.raises(operator.NotOpen, match="released already"):
        decide(node).one(second)
    with pytest.raises(operator.NotOpen, match="goes by this id"):
        decide(node).one(uuid.uuid4())
    with (
        pytest.raises(operator.NotOpen),
        Session(node.engine) as session,
        session.begin(),
    ):
        operator.discard(session, second, actor="admin")
    assert entry(node, second).state == "RELEASED"


def test_two_operators_at_once_decide_once(node):
    image = ct_image()
    node.file(image)
    (second,) = node.file(other_pixels(image))
    outcomes = []

    def act(work):
        try:
            work()
            outcomes.append("done")
        except PermanentError as error:
            outcomes.append(error.code)

    def discard():
        with Session(node.engine) as session, session.begin():
            operator.discard(session, second, actor="b")

    threads = [
        threading.Thread(target=act, args=(work,))
        for work in (lambda: decide(node).one(second), discard)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    state = entry(node, second).state
    assert "done" in outcomes
    # A release may follow a discard; never the other way round.
    assert state == "RELEASED" or outcomes == ["done", "not_open"]
    is_in = {row.id for row in node.all(InstanceRow)} == {second}
    assert is_in == (state == "RELEASED")


def test_a_release_and_an_intake_of_the_same_study_leave_one_of_each(node):
    images = ct_series(slices=12)
    node.file(*images[:6])
    node.file(*other_patient(images[:6]))
    study = node.one(StudyRow)
    node.receive(*images[6:])  # still the wrong patient
    done = threading.Event()

    def work():
        while not done.is_set() or scan(node.box.folder):
            node.intake.take(node.box.folder)
            node.intake._later.clear()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        refused = None
        try:
            decide(node).study(study.id)
        except PermanentError as error:
            refused = error
    finally:
        done.set()
        thread.join()

    # Either the correction came first, and the rest is a second patient's; or it came too late.
    whole = node.one(StudyRow)
    rows = node.all(InstanceRow)
    files = [dcmread(path, stop_before_pixels=True) for path in node.files("store")]
    patients = {str(file.PatientID) for file in files}
    assert patients == {whole.patient_id}
    assert len(rows) == whole.n_instances == len(node.files("store"))
    assert whole.is_held
    assert whole.patient_id == (images[0].PatientID if refused else "OTHER-1")


KILLED = """
import sys, uuid
from pathlib import Path
from config.settings import load
from db.engine import engine_for
from db.release import Release
from db.sandbox import Sandbox
if __name__ == "__main__":
    settings = load(Path(sys.argv[1]))
    engine = engine_for(settings, "node")
    with Sandbox(1) as sandbox:
        Release(engine, settings, sandbox, "admin").study(int(sys.argv[2]))
"""


@pytest.mark.parametrize("point", POINTS["operator"])
def test_h38_a_release_that_is_killed_has_happened_wholly_or_not_at_all(node, tmp_path, point):
    images = ct_series(slices=2)
    wrong = node.file(*images)
    right = node.file(*other_patient(images))
    study = node.one(StudyRow)
    url = node.settings.node.database_url.get_secret_value()
    config = tmp_path / "vigil.toml"
    config.write_text(
        f'[node]\ndata_dir = "{node.data_dir}"\ndatabase_url = "{url}"\nmin_free_mb = 0\n'
        '[[tenants]]\nid = "north"\nae_titles = ["NORTH_AI"]\n'
    )
    script = tmp_path / "release.py"
    script.write_text(KILLED)
    faults = tmp_path / "faults"
    (faults / "armed").mkdir(parents=True)
    arm(faults, point)

    run = subprocess.run(
        [sys.executable, str(script), str(config), str(study.id)],
        env={**os.environ, VARIABLE: str(faults), "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=300,
    )

    assert run.returncode == -signal.SIGKILL
    has_happened = point == "release_committed"
    assert node.one(StudyRow).is_held is not has_happened
    present = {row.id for row in node.all(InstanceRow)}
    assert present == set(right if has_happened else wrong)
    assert present <= names(node, "store")
    assert set(wrong if has_happened else right) <= names(node, "quarantine")
    if not has_happened:
        decide(node).study(study.id)
    node.file(*images, *other_patient(images))  # and what comes again finds everything in its place
    assert {row.id for row in node.all(InstanceRow)} == set(right)
    assert not node.one(StudyRow).is_held
    with Session(node.engine) as session:
        n = session.scalar(select(func.count()).where(EventRow.kind == "quarantine_released"))
    assert n == 1
