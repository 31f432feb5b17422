"""Results of one analysis on their way to one destination, whatever comes between (H21)."""

import datetime as dt
import uuid

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, func, select, text, update
from sqlalchemy.orm import Session

from db import claims, dispatch
from db.answers import is_delivered
from db.outbox import OPEN
from db.tables import DeliveryRow, DestinationRow, ResultRow
from tests.integration.test_studies import PACS, built, claim_delivery, owe

#: Each result has two objects: `a` is sent first.
STEPS = ("a newer result", "claim", "sent", "half", "away", "refused", "refused in part", "dies")


class Line:
    """One destination, and what it has got in the order in which it took it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.analysis_id = built(engine, PACS, uid=f"1.2.{uuid.uuid4().int}")
        self.n_results = 1
        self.under_way: claims.ClaimedDelivery | None = None
        self.got: list[tuple[int, str]] = []  # result number, object

    def no(self, result_id: uuid.UUID) -> int:
        with Session(self.engine) as session:
            return session.get_one(ResultRow, result_id).result_no

    def forget_waiting(self) -> None:
        with Session(self.engine) as session, session.begin():
            session.execute(update(DestinationRow).values(retry_at=func.now()))
            session.execute(update(DeliveryRow).values(run_after=func.now()))

    def take(self) -> claims.ClaimedDelivery | None:
        self.forget_waiting()
        found = claim_delivery(self.engine)
        if found is not None:
            assert self.under_way is None, "two at once"
            self.under_way = found
        return found

    def send(self, *objects: str, refused: tuple[str, ...] = ()) -> dict[str, str]:
        """Offer what it lacks; its answers."""
        delivery = self.under_way
        had = {uid for uid, code in delivery.statuses.items() if is_delivered(code)}
        answers = {one: "0xA900" if one in refused else "0x0000" for one in objects}
        number = self.no(delivery.result_id)
        new = [one for one in objects if one not in had and one not in refused]
        self.got += [(number, one) for one in new]
        return {one: code for one, code in answers.items() if one not in had}

    def do(self, step: str) -> None:
        if step == "a newer result":
            self.n_results += 1
            owe(self.engine, self.analysis_id, self.n_results, PACS)
        elif step == "claim":
            self.take()
        elif self.under_way is not None:
            self.end(step)
            self.under_way = None

    def end(self, step: str) -> None:
        delivery = self.under_way
        with Session(self.engine) as session, session.begin():
            if step == "sent":
                dispatch.accept(session, delivery, self.send("a", "b"))
            elif step == "half":
                dispatch.postpone(
                    session, delivery, self.send("a"), error_code="association_aborted"
                )
            elif step == "away":
                dispatch.postpone(session, delivery, {}, error_code="no_connection")
            elif step == "refused":
                answers = self.send("a", "b", refused=("a", "b"))
                dispatch.refuse(session, delivery, answers, error_code="0xA900")
            elif step == "refused in part":
                answers = self.send("a", "b", refused=("b",))
                dispatch.refuse(session, delivery, answers, error_code="0xA900")
            elif step == "dies":  # after the first object, which it has written down
                claims.note(session, delivery, self.send("a"))
                ago = func.now() - dt.timedelta(seconds=1)
                session.execute(
                    update(DeliveryRow).where(DeliveryRow.id == delivery.id).values(lease_until=ago)
                )


@pytest.mark.timeout(900)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.sampled_from(STEPS), max_size=14))
def test_h21_no_older_result_ever_follows_a_newer_one_and_the_newest_arrives(engine, steps):
    line = Line(engine)
    for step in steps:
        line.do(step)
    if line.under_way is not None:
        line.do("sent")
    for _ in range(3 * line.n_results):  # the destination is well from now on
        if line.take() is None:
            line.forget_waiting()
            if line.take() is None:
                break
        line.do("sent")

    numbers = [number for number, _ in line.got]
    assert numbers == sorted(numbers)
    assert len(set(line.got)) == len(line.got)
    with Session(engine) as session:
        query = select(DeliveryRow).where(DeliveryRow.analysis_id == line.analysis_id)
        rows = session.scalars(query.order_by(DeliveryRow.id)).all()
    assert not [row for row in rows if row.state in OPEN]
    # Unless it has refused that very one, the last to be taken is the newest there is.
    assert rows[-1].state in ("DELIVERED", "REFUSED")
    if rows[-1].state == "DELIVERED":
        assert line.got[-1][0] == line.n_results
    with Session(engine) as session, session.begin():
        session.execute(text("DELETE FROM studies"))
