"""Row-level security: the dashboard's role sees what its user may see, whatever it asks for."""

import pytest
from sqlalchemy import Engine, create_engine, func, insert, select, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session

from db.tables import AuditRow, Base, StudyRow, UserRow


@pytest.fixture
def studies(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        for tenant, origin in [("north", "dicom"), ("north", "user:u1"), ("south", "dicom")]:
            session.add(StudyRow(tenant=tenant, origin=origin, study_instance_uid="1.2"))


def seen(web_engine: Engine, role: str, tenant: str = "", user: str = "") -> set[tuple[str, str]]:
    with Session(web_engine) as session, session.begin():
        for name, value in (("role", role), ("tenant", tenant), ("user", user)):
            session.execute(select(func.set_config(f"vigil.{name}", value, True)))
        return {(row.tenant, row.origin) for row in session.scalars(select(StudyRow))}


@pytest.mark.usefixtures("studies")
def test_each_role_sees_its_own(web_engine):
    everything = {("north", "dicom"), ("north", "user:u1"), ("south", "dicom")}

    assert seen(web_engine, "admin") == everything
    assert seen(web_engine, "manager", "south") == {("south", "dicom")}
    assert seen(web_engine, "reader", "north") == everything - {("south", "dicom")}
    assert seen(web_engine, "uploader", "north", "u1") == {("north", "user:u1")}
    assert seen(web_engine, "uploader", "south", "u1") == set()
    assert seen(web_engine, "") == set()


@pytest.mark.usefixtures("studies")
def test_nothing_is_seen_by_a_transaction_that_says_nothing(web_engine):
    seen(web_engine, "admin")  # SET LOCAL ends with its transaction

    with Session(web_engine) as session:
        assert session.scalars(select(StudyRow)).all() == []


def test_the_web_role_cannot_change_studies(web_engine):
    with Session(web_engine) as session, pytest.raises(ProgrammingError, match="permission denied"):
        session.execute(text("UPDATE studies SET tenant = 'north'"))


@pytest.mark.parametrize("fixture", ["engine", "web_engine"])
def test_nobody_but_the_owner_alters_the_audit(request, fixture):
    engine = request.getfixturevalue(fixture)
    with Session(engine) as session, session.begin():
        # Inline: RETURNING would ask to see the row, which who appends need not.
        session.execute(insert(AuditRow).values(actor="test", action="tested").inline())

    for statement in ("UPDATE audit SET actor = 'x'", "DELETE FROM audit"):
        with Session(engine) as session, pytest.raises(ProgrammingError, match="permission"):
            session.execute(text(statement))


def test_accounts_are_seen_at_login_and_by_their_owner_only(engine, web_engine):
    with Session(engine) as session, session.begin():
        session.add(UserRow(name="anna", role="reader", tenant="north"))
        session.add(UserRow(name="ben", role="reader", tenant="south"))

    def names(role: str) -> list[str]:
        with Session(web_engine) as session, session.begin():
            session.execute(select(func.set_config("vigil.role", role, True)))
            return sorted(session.scalars(select(UserRow.name)))

    assert names("login") == ["anna", "ben"]
    assert names("reader") == []


def test_every_table_is_behind_a_policy_or_open_for_a_stated_reason(database_url):
    # Sessions and links are found by the hash of a secret; processes and bundles hold nothing of a
    # tenant.
    stated = {"sessions", "login_links", "processes", "bundles"}

    owner = create_engine(database_url)
    with owner.connect() as connection:
        closed = connection.scalars(
            text(
                "SELECT relname FROM pg_class WHERE relrowsecurity"
                " AND EXISTS (SELECT FROM pg_policies WHERE tablename = relname"
                " AND policyname = 'web_see')"
            )
        ).all()
    owner.dispose()

    assert set(Base.metadata.tables) == set(closed) | stated
    assert stated.isdisjoint(closed)
