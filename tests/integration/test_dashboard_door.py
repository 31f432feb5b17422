"""Who gets in, and how long: log-in, links, sessions, throttling, CSRF, hosts (H48)."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, delete, select, update
from sqlalchemy.orm import Session

from config.settings import Settings
from dashboard import throttle, users
from dashboard.throttle import Throttle
from db.tables import LoginLinkRow, SessionRow, UserRow
from tests.browser.web import PASSWORD, Web, running

NEW = "another fine password"


@pytest.fixture
def web(settings: Settings, engine: Engine, web_engine: Engine) -> Iterator[Web]:
    with running(settings, engine, web_engine) as made:
        yield made


def change_user(web: Web, name: str, **values: object) -> None:
    with Session(web.engine) as session, session.begin():
        session.execute(update(UserRow).where(UserRow.name == name).values(**values))


@pytest.mark.parametrize(
    "path", ["/", "/worklist", "/health", "/account", "/study/00000000-0000-0000-0000-000000000000"]
)
def test_a_page_leads_strangers_to_the_login(web: Web, path: str) -> None:
    answer = web.visitor().get(path)

    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/login")


@pytest.mark.parametrize("path", ["/api/v1/overview", "/api/v1/studies", "/api/v1/health", "/live"])
def test_the_api_answers_strangers_with_401(web: Web, path: str) -> None:
    assert web.visitor().get(path).status_code == 401


def test_a_right_password_opens_a_session_in_a_strict_cookie(web: Web) -> None:
    name = web.account("reader", "north")

    answer = web.visitor().log_in(name)

    cookie = answer.headers["set-cookie"].lower()
    assert answer.status_code == 303
    assert "httponly" in cookie
    assert "samesite=strict" in cookie


def test_behind_tls_the_cookie_is_bound_to_this_host(
    settings: Settings, engine: Engine, web_engine: Engine
) -> None:
    with running(settings, engine, web_engine, secure_cookies=True) as web:
        name = web.account("reader", "north")

        answer = web.visitor(base_url="https://localhost").log_in(name)

        assert answer.headers["set-cookie"].startswith("__Host-vigil_session=")
        assert "; Secure" in answer.headers["set-cookie"]
        assert "max-age" in answer.headers["strict-transport-security"]


def test_the_database_never_holds_a_token(web: Web) -> None:
    person = web.person("reader", "north")
    token = person.client.cookies["vigil_session"]

    with Session(web.engine) as session:
        rows = session.scalars(select(SessionRow)).all()

    assert len(rows) == 1
    assert token not in repr([vars(row) for row in rows])


def test_a_wrong_password_an_unknown_name_and_a_disabled_account_look_alike(web: Web) -> None:
    known, disabled = web.account("reader", "north"), web.account("reader", "north", "gone")
    change_user(web, disabled, is_disabled=True)

    answers = [
        web.visitor().log_in(known, "wrong"),
        web.visitor().log_in("nobody", PASSWORD),
        web.visitor().log_in(disabled, PASSWORD),
        web.visitor().log_in("nul\0l", PASSWORD),
    ]

    assert {answer.status_code for answer in answers} == {401}
    assert len({len(answer.text) for answer in answers}) == 1


def test_a_failed_login_is_audited_without_what_was_typed(web: Web) -> None:
    web.account("reader", "north", "ann")

    web.visitor().log_in("ann", "wrong")
    web.visitor().log_in("my-secret-typed-in-the-wrong-field", "x")

    rows = web.audit("login")
    assert [(row.actor, row.outcome) for row in rows] == [
        ("ann", "refused"),
        ("unknown", "refused"),
    ]


def test_guessing_is_throttled_and_the_right_password_waits_too(web: Web) -> None:
    name = web.account("reader", "north")
    guesser = web.visitor()

    answers = [guesser.log_in(name, f"guess {n}").status_code for n in range(throttle.PER_PAIR)]

    assert answers == [401] * throttle.PER_PAIR
    assert guesser.log_in(name).status_code == 429
    assert len(web.audit("login_throttled")) == 1


def test_guessing_from_one_address_locks_nobody_out_elsewhere(web: Web) -> None:
    name = web.account("reader", "north")
    guesser = web.visitor(client=("203.0.113.9", 1))
    for n in range(throttle.PER_ADDRESS + 1):
        guesser.log_in(name, f"guess {n}")

    assert web.visitor(client=("192.0.2.7", 1)).log_in(name).status_code == 303


def test_an_attack_from_everywhere_leaves_known_addresses_and_links(web: Web) -> None:
    now = 0.0
    limits = Throttle(lambda: now)
    limits.succeeded("ann", "192.0.2.7")
    for n in range(throttle.PER_USER):
        limits.failed("ann", f"203.0.113.{n}")

    assert limits.wait_s("ann", "198.51.100.1") > 0
    assert limits.wait_s("ann", "192.0.2.7") == 0
    now = throttle.WINDOW_S + 1
    assert limits.wait_s("ann", "198.51.100.1") == 0


def test_a_first_link_asks_for_a_password_and_works_once(web: Web) -> None:
    name = web.account("reader", "north")
    change_user(web, name, password_hash="")
    link = web.link(name)
    person = web.visitor()

    looked = person.get(link)  # a mail gateway looks, too
    used = person.post(link, page=link, password=NEW, again=NEW)

    assert "Set password" in looked.text
    assert used.status_code == 303
    assert person.get("/").status_code == 200
    assert web.visitor().get(link).status_code == 404
    assert web.visitor().log_in(name, NEW).status_code == 303


@pytest.mark.parametrize(
    ("password", "again"),
    [("short", "short"), (NEW, "different one"), ("aaaaaaaaaaaaaa", "aaaaaaaaaaaaaa"), ("", "")],
)
def test_a_weak_password_leaves_the_link_usable(web: Web, password: str, again: str) -> None:
    name = web.account("reader", "north")
    change_user(web, name, password_hash="")
    link = web.link(name)
    person = web.visitor()

    refused = person.post(link, page=link, password=password, again=again)

    assert refused.status_code == 400
    assert person.post(link, page=link, password=NEW, again=NEW).status_code == 303


def test_a_link_of_a_user_with_a_password_signs_in_and_changes_nothing(web: Web) -> None:
    name = web.account("reader", "north")
    link = web.link(name)
    person = web.visitor()

    assert person.post(link, page=link).status_code == 303
    assert web.visitor().log_in(name).status_code == 303


@pytest.mark.parametrize("what", ["expired", "disabled", "made up"])
def test_a_dead_link_is_refused(web: Web, what: str) -> None:
    name = web.account("reader", "north")
    link = web.link(name)
    if what == "expired":
        with Session(web.engine) as session, session.begin():
            session.execute(
                update(LoginLinkRow).values(
                    expires_at=LoginLinkRow.expires_at - users.dt.timedelta(days=2)
                )
            )
    if what == "disabled":
        change_user(web, name, is_disabled=True)
    if what == "made up":
        link = "/login/link/x"

    person = web.visitor()

    assert person.get(link).status_code == 404
    assert person.post(link, page=link).status_code == 404


def test_a_login_never_keeps_a_session_that_came_along(web: Web) -> None:
    name = web.account("reader", "north")
    person = web.visitor()
    person.client.cookies.set("vigil_session", "chosen-by-somebody-else", domain="localhost.local")

    person.log_in(name)

    assert (
        web.visitor(cookies={"vigil_session": "chosen-by-somebody-else"}).get("/").status_code
        == 303
    )


def test_signing_out_ends_the_session_itself(web: Web) -> None:
    person = web.person("reader", "north")
    token = person.client.cookies["vigil_session"]

    person.post("/logout")

    assert web.visitor(cookies={"vigil_session": token}).get("/").status_code == 303


@pytest.mark.parametrize("how", ["disabled", "revoked", "expired"])
def test_a_revoked_user_is_out_at_the_next_request(web: Web, how: str) -> None:
    person = web.person("reader", "north")
    with Session(web.engine) as session, session.begin():
        if how == "disabled":
            users.disable_user(session, "reader-north")
        elif how == "revoked":
            session.execute(delete(SessionRow))
        else:
            session.execute(update(SessionRow).values(expires_at=SessionRow.created_at))

    assert person.get("/").status_code == 303
    assert person.get("/api/v1/overview").status_code == 401


def test_a_demoted_user_loses_the_right_at_the_next_request(web: Web) -> None:
    person = web.person("manager", "north")
    assert person.get("/health").status_code == 200

    change_user(web, "manager-north", role="reader")

    assert person.get("/health").status_code == 403


def test_a_new_password_ends_the_other_sessions(web: Web) -> None:
    name = web.account("reader", "north")
    here, elsewhere = web.visitor(), web.visitor()
    here.log_in(name)
    elsewhere.log_in(name)

    answer = here.post("/account", current=PASSWORD, password=NEW, again=NEW)

    assert answer.status_code == 303
    assert here.get("/").status_code == 200
    assert elsewhere.get("/").status_code == 303


def test_a_wrong_current_password_changes_nothing(web: Web) -> None:
    person = web.person("reader", "north")

    answer = person.post("/account", current="wrong", password=NEW, again=NEW)

    assert answer.status_code == 403
    assert web.visitor().log_in("reader-north").status_code == 303


@pytest.mark.parametrize("path", ["/logout", "/account", "/worklist"])
def test_a_change_without_the_sessions_token_is_refused_and_audited(web: Web, path: str) -> None:
    person = web.person("reader", "north")

    answer = person.client.post(path, data={"csrf": "guessed"})

    assert answer.status_code == 403
    assert web.audit("csrf")[0].outcome == "refused"


@pytest.mark.parametrize(
    "headers",
    [{"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}],
)
def test_a_post_from_another_site_is_refused(web: Web, headers: dict[str, str]) -> None:
    person = web.person("reader", "north")

    assert person.client.post("/logout", headers=headers).status_code == 403
    assert person.get("/").status_code == 200


def test_a_login_form_of_another_browser_is_refused(web: Web) -> None:
    name = web.account("reader", "north")

    answer = web.visitor().client.post(
        "/login", data={"name": name, "password": PASSWORD, "before": "planted"}
    )

    assert answer.status_code == 403


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "127.0.0.1.nip.io"])
def test_a_forged_host_is_refused(web: Web, host: str) -> None:
    answer = web.visitor().get("/login", headers={"host": host})

    assert answer.status_code == 400


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "[::1]:8080"])
def test_our_own_hosts_are_served(web: Web, host: str) -> None:
    assert web.visitor().get("/login", headers={"host": host}).status_code == 200


def test_a_body_over_the_limit_is_refused(web: Web) -> None:
    answer = web.visitor().client.post("/login", data={"name": "x" * 100_000})

    assert answer.status_code == 413


def test_a_body_that_does_not_say_its_length_is_cut_off(web: Web) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}
    chunks = (b"name=" + b"x" * 1000 for _ in range(100))

    answer = web.visitor().client.post("/login", content=chunks, headers=form)

    assert 400 <= answer.status_code < 500


@pytest.mark.parametrize("to", ["https://evil.example", "//evil.example", "/\\evil.example", "x"])
def test_a_login_leads_nowhere_else(web: Web, to: str) -> None:
    name = web.account("reader", "north")

    answer = web.visitor().post("/login", page="/login", name=name, password=PASSWORD, next=to)

    assert answer.headers["location"] == "/"


def test_every_answer_carries_the_security_headers(web: Web) -> None:
    person = web.person("reader", "north")

    for path in ("/", "/nowhere", "/healthz", "/static/app.css", "/api/v1/overview"):
        headers = person.get(path).headers
        assert "script-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cache-control"] == ("no-cache" if "static" in path else "no-store")


@pytest.mark.parametrize(
    ("name", "role", "tenant"),
    [("", "reader", "north"), ("a b", "reader", "north"), ("ann", "king", "north"),
     ("ann", "admin", "north"), ("ann", "reader", None)],
)  # fmt: skip
def test_a_bad_account_is_refused(engine: Engine, name: str, role: str, tenant: str | None) -> None:
    with Session(engine) as session, pytest.raises(users.BadAccount):
        users.create_user(session, name, role, tenant)


def test_the_first_start_prints_a_link_until_somebody_has_a_password(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        first = users.first_link(session, "http://localhost:8080")
        again = users.first_link(session, "http://localhost:8080")
        users.find_user(session, "admin").password_hash = "set"

        later = users.first_link(session, "http://localhost:8080")

    assert first
    assert again
    assert first.startswith("http://localhost:8080/login/link/")
    assert later is None
