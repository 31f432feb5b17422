"""Turns: by weight, without memory of idleness, and nobody waits for ever."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from db.job import Lane
from db.shares import LANE_WEIGHTS, Turns

weights = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 100), min_size=1)


def served(turns: Turns, waiting: list[str], n: int) -> list[str]:
    """Whose the next turns are while all of these have work."""
    order = []
    for _ in range(n):
        order.append(min(waiting, key=lambda one: (turns.begins(one), one)))
        turns.took(order[-1])
    return order


@given(weights, st.integers(1, 400))
def test_h45_those_who_always_have_work_share_by_weight(shares, n):
    order = Counter(served(Turns(shares), sorted(shares), n))

    for one, weight in shares.items():
        fair = n * weight / sum(shares.values())
        # Within what is under way at once: one turn, and one of each other beside it.
        assert abs(order[one] - fair) <= 1 + weight / min(shares.values()), one


@given(weights, st.integers(0, 10_000))
def test_h45_a_tenant_that_comes_to_a_backlog_waits_for_one_turn_of_each_other(shares, before):
    turns = Turns(shares)
    served(turns, sorted(shares), min(before, 300))

    order = served(turns, [*sorted(shares), "new"], len(shares) + 1)

    assert "new" in order


@given(st.integers(1, 200))
def test_h45_idleness_is_not_saved_up(n):
    turns = Turns({})
    served(turns, ["busy"], n)

    order = served(turns, ["busy", "idle"], 6)

    assert 2 <= order.count("idle") <= 4


@given(st.integers(1, 50))
def test_h45_what_has_aged_moves_and_what_is_fresh_does_not_wait_for_all_of_it(n):
    lanes = Turns({str(lane): weight for lane, weight in LANE_WEIGHTS.items()})

    order = served(lanes, [str(int(Lane.URGENT)), str(int(Lane.ROUTINE))], 5 * n)

    assert n - 1 <= order.count(str(int(Lane.ROUTINE))) <= n + 1
