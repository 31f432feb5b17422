"""Roles and row-level security, as the first migration sets them up.

- `vigil_node`: the stages; sees and writes everything.
- `vigil_web`: the dashboard; sees what the signed-in user may see, which each transaction states
  with SET LOCAL vigil.role, vigil.tenant and vigil.user; writes sessions, requests and audit only.

Row-level security is enabled, not forced, so that the owner's migrations work.
"""

#: Tables whose rows belong to a tenant and an origin.
BY_ORIGIN = (
    "studies", "instances", "quarantine", "analyses", "results", "jobs", "objects", "deliveries",
    "events", "requests",
)  # fmt: skip
#: Tables whose rows belong to a tenant as a whole: nothing for uploaders.
BY_TENANT = ("returned", "destinations", "senders")

# A subselect is evaluated once a statement, not once a row.
_SET = "(SELECT current_setting('vigil.{}', true))"
_ROLE, _TENANT, _USER = (_SET.format(name) for name in ("role", "tenant", "user"))

_STAFF = f"({_ROLE} = 'admin' OR ({_ROLE} IN ('manager', 'reader') AND tenant = {_TENANT}))"
_SEES = (
    f"({_STAFF} OR ({_ROLE} = 'uploader' AND tenant = {_TENANT} AND origin = 'user:' || {_USER}))"
)
_OPERATES = f"({_ROLE} = 'admin' OR ({_ROLE} = 'manager' AND tenant = {_TENANT}))"
# Before anybody is signed in the login page looks for one user by name: the role 'login'.
_ACCOUNT = (
    f"({_ROLE} IN ('login', 'admin') OR id::text = {_USER}"
    f" OR ({_ROLE} = 'manager' AND tenant = {_TENANT}))"
)


def statements() -> list[str]:
    """Everything to execute once the tables exist."""
    sql = [*_roles(), "GRANT USAGE ON SCHEMA public TO vigil_node, vigil_web"]
    sql.append("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO vigil_node")
    sql.append("GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO vigil_node, vigil_web")
    for table in BY_ORIGIN:
        sql += _table(table, _SEES)
    for table in BY_TENANT:
        sql += _table(table, _STAFF)
    sql += [
        *_table("users", _ACCOUNT),
        "GRANT UPDATE (password_hash) ON users TO vigil_web",
        "CREATE POLICY web_password ON users FOR UPDATE TO vigil_web"
        f" USING ({_ROLE} = 'login' OR id::text = {_USER})",
        "GRANT INSERT ON requests TO vigil_web",
        f"CREATE POLICY web_ask ON requests FOR INSERT TO vigil_web WITH CHECK {_OPERATES}",
        *_table("audit", _OPERATES),
        "GRANT INSERT ON audit TO vigil_web",
        "CREATE POLICY web_append ON audit FOR INSERT TO vigil_web WITH CHECK (true)",
        "REVOKE UPDATE, DELETE ON audit FROM vigil_node",
        # A token's hash is the secret itself: who has it may see the row.
        "GRANT SELECT, INSERT, UPDATE, DELETE ON sessions TO vigil_web",
        "GRANT SELECT ON login_links TO vigil_web",
        "GRANT UPDATE (used_at) ON login_links TO vigil_web",
        "GRANT SELECT ON processes TO vigil_web",
    ]
    return sql


def _roles() -> list[str]:
    # Roles belong to the server, not to the database: another database may have made them.
    return [
        f"""DO $$ BEGIN
            IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{role}') THEN
                CREATE ROLE {role} NOLOGIN;
            END IF;
            IF NOT pg_has_role(current_user, '{role}', 'SET') THEN
                EXECUTE format('GRANT {role} TO %I', current_user);
            END IF;
        END $$"""
        for role in ("vigil_node", "vigil_web")
    ]


def _table(table: str, visible: str) -> list[str]:
    return [
        f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY",
        f"CREATE POLICY node_all ON {table} TO vigil_node USING (true) WITH CHECK (true)",
        f"GRANT SELECT ON {table} TO vigil_web",
        f"CREATE POLICY web_see ON {table} FOR SELECT TO vigil_web USING {visible}",
    ]
