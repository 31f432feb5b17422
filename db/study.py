"""The map of the product: what states an analysis has, which moves are legal, what each one starts.

The unit of work is the analysis: one study, seen by one bundle, over one set of instances.

    WAITING --ready--> QUEUED --scored--> FOUND --objects built--> BUILT --all accepted--> DELIVERED
                          |--> NOT_ANALYSED (a reason; a notice)      '--> DELIVERED_IN_PART
                          '--> FAILED (a reason; a notice)

    from anywhere, once something was issued:  --an operator's hand--> WITHDRAWN (a rejection note)

Three counters that must never be confused:

- `row_version` changes with every write: the compare-and-swap.
- `inputs_version` changes with every instance accepted into the study.
- `result_no` numbers what is issued for an analysis, results, notices that there is none, and
  withdrawals of both: what people see as REVISION n. An analysis holds that of its newest result,
  0 where none stands.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum

from db.errors import IllegalMove
from db.job import JobKind


class AnalysisState(StrEnum):
    WAITING = "WAITING"  # instances still arrive
    QUEUED = "QUEUED"  # an INFER job waits or runs
    FOUND = "FOUND"  # numbers are persisted; a BUILD job waits or runs
    BUILT = "BUILT"  # objects are stored; deliveries wait in the outbox
    DELIVERED = "DELIVERED"  # every destination has every object
    DELIVERED_IN_PART = "DELIVERED_IN_PART"  # a refusal or an expiry, named in the events
    NOT_ANALYSED = "NOT_ANALYSED"  # the bundle cannot judge this study, with rule, value and limit
    FAILED = "FAILED"  # gave up, with a reason
    WITHDRAWN = "WITHDRAWN"  # an operator took back all that was issued; a rejection note says so


class AnalysisEvent(StrEnum):
    INPUTS_CHANGED = "INPUTS_CHANGED"  # late instances changed the analysed set
    SERIES_READY = "SERIES_READY"  # readiness chose the set to analyse
    FINDINGS_STORED = "FINDINGS_STORED"
    NOT_ELIGIBLE = "NOT_ELIGIBLE"
    GAVE_UP = "GAVE_UP"
    OBJECTS_BUILT = "OBJECTS_BUILT"
    ALL_ACCEPTED = "ALL_ACCEPTED"
    SOME_REFUSED = "SOME_REFUSED"  # at least one destination refused or expired
    RERUN = "RERUN"  # an operator's hand
    RESEND = "RESEND"  # an operator's hand: the same bytes once more
    WITHDRAWN = "WITHDRAWN"  # an operator's hand: nothing that was issued stands any more
    NOT_COMMITTED = "NOT_COMMITTED"  # a destination will not vouch for what it accepted


_S, _E = AnalysisState, AnalysisEvent

#: Every state in which nothing more happens by itself.
SETTLED = frozenset({_S.DELIVERED, _S.DELIVERED_IN_PART, _S.NOT_ANALYSED, _S.FAILED, _S.WITHDRAWN})

# Every legal move is listed; what is absent is a bug, never a default.
TRANSITIONS: Mapping[tuple[AnalysisState, AnalysisEvent], AnalysisState] = {
    # Late slices reopen any analysis: half a series must not keep the last word. (A withdrawn one
    # they leave alone: only a correction that an operator releases opens it. See inference.)
    **{(state, _E.INPUTS_CHANGED): _S.WAITING for state in AnalysisState},
    # QUEUED has its job already; every other state may be run again by hand.
    **{(state, _E.RERUN): _S.QUEUED for state in AnalysisState if state is not _S.QUEUED},
    # Also while it is open again: an older result may be out.
    **{(state, _E.WITHDRAWN): _S.WITHDRAWN for state in AnalysisState if state is not _S.WITHDRAWN},
    (_S.WAITING, _E.SERIES_READY): _S.QUEUED,
    # Readiness may already see that no series can ever qualify.
    (_S.WAITING, _E.NOT_ELIGIBLE): _S.NOT_ANALYSED,
    (_S.QUEUED, _E.FINDINGS_STORED): _S.FOUND,
    (_S.QUEUED, _E.NOT_ELIGIBLE): _S.NOT_ANALYSED,
    (_S.QUEUED, _E.GAVE_UP): _S.FAILED,
    (_S.FOUND, _E.OBJECTS_BUILT): _S.BUILT,
    (_S.FOUND, _E.GAVE_UP): _S.FAILED,
    (_S.BUILT, _E.ALL_ACCEPTED): _S.DELIVERED,
    (_S.BUILT, _E.SOME_REFUSED): _S.DELIVERED_IN_PART,
    (_S.DELIVERED, _E.RESEND): _S.BUILT,
    (_S.DELIVERED_IN_PART, _E.RESEND): _S.BUILT,
    (_S.DELIVERED, _E.NOT_COMMITTED): _S.BUILT,
    (_S.DELIVERED_IN_PART, _E.NOT_COMMITTED): _S.BUILT,
}

# The whole pipeline: entering a state enqueues this job, in the same transaction. A settled state
# stays what it is, whatever becomes of its notice.
NEXT_JOB: Mapping[AnalysisState, JobKind] = {
    _S.QUEUED: JobKind.INFER,
    _S.FOUND: JobKind.BUILD,
    _S.NOT_ANALYSED: JobKind.NOTICE,
    _S.FAILED: JobKind.NOTICE,
}


def advance(state: AnalysisState, event: AnalysisEvent) -> AnalysisState:
    """The state after `event`.

    Raises
    ------
    IllegalMove
        If the table has no such move.
    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalMove(f"no move from {state} on {event}") from None


class WithdrawalReason(StrEnum):
    """Why results are taken back, as archives are told (IHE IOCM)."""

    PATIENT_SAFETY = "patient-safety"  # wrong patient, wrong study, harmful: not to be seen
    QUALITY = "quality"  # of no use


class StudyState(StrEnum):
    RECEIVING = "RECEIVING"
    IN_PROGRESS = "IN_PROGRESS"
    DONE = "DONE"
    DONE_WITH_GAPS = "DONE_WITH_GAPS"
    HELD = "HELD"  # an identity conflict is open: nothing is built or sent until a person decides


def study_state(analyses: Iterable[AnalysisState], *, is_held: bool) -> StudyState:
    """A study's state follows from its analyses; nothing assigns it by hand."""
    states = set(analyses)
    if is_held:
        return StudyState.HELD
    if not states or _S.WAITING in states:
        return StudyState.RECEIVING
    if states & {_S.QUEUED, _S.FOUND, _S.BUILT}:
        return StudyState.IN_PROGRESS
    if states & {_S.FAILED, _S.DELIVERED_IN_PART}:
        return StudyState.DONE_WITH_GAPS
    return StudyState.DONE
