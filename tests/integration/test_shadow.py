"""A shadow bundle beside the one that serves: the figures, on rows made for them."""

import uuid
from io import StringIO

import pytest
from rich.console import Console
from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from db.comparison import Comparison, compare
from db.tables import AnalysisRow, ResultRow, StudyRow
from node.models_list import show


def judged(engine: Engine, *analyses: AnalysisRow, tenant: str = "north") -> int:
    """A study with these analyses; returns its row's id."""
    with Session(engine) as session, session.begin():
        study = StudyRow(
            tenant=tenant, origin="dicom", study_instance_uid=f"2.25.{uuid.uuid4().int}"
        )
        session.add(study)
        session.flush()
        for one in analyses:
            one.study_id, one.tenant, one.origin = study.id, tenant, "dicom"
            session.add(one)
        return study.id


def analysis(bundle: str, *, is_shadow: bool = False) -> AnalysisRow:
    return AnalysisRow(bundle=bundle, is_shadow=is_shadow, state="FOUND")


def result(
    engine: Engine,
    study_id: int,
    bundle: str,
    probability: float | None,
    *,
    result_no: int = 1,
    version: str = "1.0.0",
    threshold: float = 0.5,
) -> None:
    """The newest result of a study's analysis; the shown probability is half the reference one."""
    with Session(engine) as session, session.begin():
        row = session.scalars(
            select(AnalysisRow).where(
                AnalysisRow.study_id == study_id, AnalysisRow.bundle == bundle
            )
        ).one()
        row.result_no = result_no
        label = {"probability": None, "threshold": None}
        if probability is not None:
            label = {"probability": {"reference": probability}, "threshold": threshold}
        session.add(
            ResultRow(
                id=uuid.uuid4(), analysis_id=row.id, study_id=study_id, tenant=row.tenant,
                origin="dicom", bundle=bundle, result_no=result_no,
                finding={
                    "labels": [label, {"probability": {"reference": 0.9}, "threshold": 0.1}],
                    "model": {"version": version, "calibration_id": "c0"},
                },
                is_positive=True, urgency="STAT",  # by another label than the primary one
                probability=probability / 2 if probability is not None else None,
            )
        )  # fmt: skip


def pair(
    engine: Engine, serving: float | None, shadow: float | None, tenant: str = "north", **more: str
) -> int:
    study = judged(engine, analysis("one"), analysis("two", is_shadow=True), tenant=tenant)
    result(engine, study, "one", serving, **more)
    result(engine, study, "two", shadow)
    return study


def test_agreement_and_discordance_are_counted_both_ways_on_the_primary_label(engine):
    for serving, shadow in ((0.9, 0.8), (0.5, 0.6), (0.1, 0.2), (0.9, 0.3), (0.2, 0.7), (0.1, 0.9)):
        pair(engine, serving, shadow)

    with Session(engine) as session:
        (found,) = compare(session)

    assert (found.tenant, found.serving, found.shadow) == ("north", "one", "two")
    assert (found.serving_version, found.shadow_version) == ("1.0.0+c0", "1.0.0+c0")
    assert (found.n, found.n_both_present, found.n_both_absent) == (6, 2, 1)
    assert (found.n_only_serving, found.n_only_shadow) == (1, 2)
    assert found.agreement == pytest.approx(0.5)
    assert found.n_probabilities == 6
    # As shown, which is half of the reference here: (-.1 + .1 + .1 - .6 + .5 + .8) / 6 / 2
    assert found.mean_difference == pytest.approx(0.8 / 12)
    assert found.correlation == pytest.approx(-0.066422, abs=1e-5)


def test_only_what_both_have_judged_counts(engine):
    judged(engine, analysis("one"), analysis("two", is_shadow=True))
    alone = judged(engine, analysis("one"))
    result(engine, alone, "one", 0.9)
    half = judged(engine, analysis("one"), analysis("two", is_shadow=True))
    result(engine, half, "two", 0.9)

    with Session(engine) as session:
        assert compare(session) == []


def test_an_exploratory_label_has_no_verdict_and_is_not_counted(engine):
    pair(engine, 0.9, None)

    with Session(engine) as session:
        (found,) = compare(session)

    assert (found.n, found.n_probabilities, found.agreement) == (0, 0, None)
    assert (found.mean_difference, found.correlation) == (None, None)


def test_the_newest_result_of_each_counts(engine):
    study = pair(engine, 0.9, 0.1)
    result(engine, study, "two", 0.8, result_no=2)

    with Session(engine) as session:
        (found,) = compare(session)

    assert (found.n, found.n_both_present) == (1, 1)


def test_versions_and_tenants_are_never_mixed(engine):
    pair(engine, 0.9, 0.8)
    pair(engine, 0.9, 0.8, version="1.1.0")
    pair(engine, 0.9, 0.1, tenant="south")

    with Session(engine) as session:
        found = compare(session)

    assert [(one.tenant, one.serving_version, one.n, one.agreement) for one in found] == [
        ("north", "1.0.0+c0", 1, 1.0),
        ("north", "1.1.0+c0", 1, 1.0),
        ("south", "1.0.0+c0", 1, 0.0),
    ]


def test_two_bundles_that_both_serve_are_not_compared(engine):
    pair(engine, 0.9, 0.8)
    with Session(engine) as session, session.begin():
        session.execute(update(AnalysisRow).values(is_shadow=False))

    with Session(engine) as session:
        assert compare(session) == []


def said(*comparisons: Comparison) -> str:
    """What `vigil models list` prints below its table."""
    console = Console(file=StringIO(), width=200)
    entry = {"name": "b", "activity": "known", "tenants": [], "versions": []}
    show([{**entry, "comparisons": [one.to_json() for one in comparisons]}] * 2, console)
    return console.file.getvalue().partition("\nnorth")[2]


def test_every_figure_is_said_once_and_with_its_number_of_studies():
    words = said(Comparison("north", "a", "1+c", "b", "2+c", 4, 1, 2, 1, 0, 3, 0.05, None))

    assert words == (
        ": shadow b 2+c beside a 1+c: agree on 3 of 4 studies (75 %; both PRESENT 1, both absent "
        "2); PRESENT only by the shadow 0, only by the one that serves 1; probability +5.0 points "
        "(n 3)\n"
    )


def test_without_studies_there_is_no_figure():
    words = said(Comparison("north", "a", "1+c", "b", "2+c", 0, 0, 0, 0, 0, 0, None, None))

    assert (
        words == ": shadow b 2+c beside a 1+c: no study yet of which both say PRESENT or absent\n"
    )
