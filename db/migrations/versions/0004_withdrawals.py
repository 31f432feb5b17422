"""Withdrawals: what an operator took back, in one sequence with the results and notices.

Spelled out, as the others are. Every step may find its work done.
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for statement in _WITHDRAWALS:
        op.execute(statement)


# As 0002 has it for notices.
_SET = "(SELECT current_setting('vigil.{}', true))"
_ROLE, _TENANT, _USER = (_SET.format(name) for name in ("role", "tenant", "user"))
_SEES = (
    f"{_ROLE} = 'admin'"
    f" OR ({_ROLE} IN ('manager', 'reader') AND tenant = {_TENANT})"
    f" OR ({_ROLE} = 'uploader' AND tenant = {_TENANT} AND origin = 'user:' || {_USER})"
)

_WITHDRAWALS = (
    """CREATE TABLE IF NOT EXISTS withdrawals (
        id uuid NOT NULL CONSTRAINT pk_withdrawals PRIMARY KEY,
        analysis_id bigint NOT NULL
            CONSTRAINT fk_withdrawals_analysis_id REFERENCES analyses (id) ON DELETE CASCADE,
        study_id bigint NOT NULL
            CONSTRAINT fk_withdrawals_study_id REFERENCES studies (id) ON DELETE CASCADE,
        tenant text NOT NULL,
        origin text NOT NULL,
        bundle text NOT NULL,
        result_no integer NOT NULL,
        withdrawal jsonb NOT NULL,
        actor text NOT NULL,
        at timestamp with time zone NOT NULL DEFAULT now(),
        CONSTRAINT uq_withdrawals_analysis_id UNIQUE (analysis_id, result_no)
    )""",
    "CREATE INDEX IF NOT EXISTS ix_withdrawals_study_id ON withdrawals (study_id)",
    # Never changed: it says what other people's archives were told.
    "GRANT SELECT, INSERT, DELETE ON withdrawals TO vigil_node",
    "GRANT SELECT ON withdrawals TO vigil_web",
    "ALTER TABLE withdrawals ENABLE ROW LEVEL SECURITY",
    "DROP POLICY IF EXISTS node_all ON withdrawals",
    "CREATE POLICY node_all ON withdrawals TO vigil_node USING (true) WITH CHECK (true)",
    "DROP POLICY IF EXISTS web_see ON withdrawals",
    f"CREATE POLICY web_see ON withdrawals FOR SELECT TO vigil_web USING ({_SEES})",
)
