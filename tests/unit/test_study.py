"""The map of the product: what is legal, and what follows."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from db.errors import IllegalMove
from db.job import BACKOFF_MAX_S, JobKind, backoff_s
from db.study import (
    NEXT_JOB,
    SETTLED,
    TRANSITIONS,
    AnalysisEvent,
    AnalysisState,
    StudyState,
    advance,
    study_state,
)

_S, _E = AnalysisState, AnalysisEvent


def test_the_way_of_a_study():
    events = [_E.SERIES_READY, _E.FINDINGS_STORED, _E.OBJECTS_BUILT, _E.ALL_ACCEPTED]

    states = list(itertools.accumulate(events, advance, initial=_S.WAITING))

    assert states == [_S.WAITING, _S.QUEUED, _S.FOUND, _S.BUILT, _S.DELIVERED]


def test_late_instances_reopen_any_analysis():
    assert {advance(state, _E.INPUTS_CHANGED) for state in _S} == {_S.WAITING}


def test_what_the_table_lacks_is_refused():
    for pair in set(itertools.product(_S, _E)) - set(TRANSITIONS):
        with pytest.raises(IllegalMove):
            advance(*pair)


def test_every_state_can_be_reached_and_every_settled_one_left_by_hand():
    reached = {state for state in TRANSITIONS.values()}

    assert reached == set(_S)
    assert {advance(state, _E.RERUN) for state in SETTLED} == {_S.QUEUED}


def test_work_starts_jobs_and_an_end_without_a_result_owes_a_notice():
    assert NEXT_JOB == {
        _S.QUEUED: JobKind.INFER,
        _S.FOUND: JobKind.BUILD,
        _S.NOT_ANALYSED: JobKind.NOTICE,
        _S.FAILED: JobKind.NOTICE,
    }


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([], StudyState.RECEIVING),
        ([_S.WAITING, _S.DELIVERED], StudyState.RECEIVING),
        ([_S.QUEUED, _S.DELIVERED], StudyState.IN_PROGRESS),
        ([_S.DELIVERED, _S.NOT_ANALYSED], StudyState.DONE),
        ([_S.DELIVERED, _S.FAILED], StudyState.DONE_WITH_GAPS),
        ([_S.DELIVERED_IN_PART], StudyState.DONE_WITH_GAPS),
    ],
)
def test_a_studys_state_follows_from_its_analyses(states, expected):
    assert study_state(states, is_held=False) is expected
    assert study_state(states, is_held=True) is StudyState.HELD


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_back_off_grows_to_its_limit_and_never_passes_it(attempts, jitter):
    wait = backoff_s(attempts, jitter)

    assert 0 < wait <= BACKOFF_MAX_S
    assert backoff_s(attempts + 1, jitter) >= wait
