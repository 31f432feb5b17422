"""Notices, how bundles present themselves, and what a quarantined object says of itself.

Spelled out, as 0001 is: `db.tables` moves on, this does not. Every step may find its work done:
for a while 0001 itself made part of this, and such databases are about.
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for statement in (*_NOTICES, *_BUNDLES, *_QUARANTINE, *_OWNERS):
        op.execute(statement)


# As 0001 has it for every other table of a tenant and an origin.
_SET = "(SELECT current_setting('vigil.{}', true))"
_ROLE, _TENANT, _USER = (_SET.format(name) for name in ("role", "tenant", "user"))
_SEES = (
    f"{_ROLE} = 'admin'"
    f" OR ({_ROLE} IN ('manager', 'reader') AND tenant = {_TENANT})"
    f" OR ({_ROLE} = 'uploader' AND tenant = {_TENANT} AND origin = 'user:' || {_USER})"
)

_NOTICES = (
    """CREATE TABLE IF NOT EXISTS notices (
        id uuid NOT NULL CONSTRAINT pk_notices PRIMARY KEY,
        analysis_id bigint NOT NULL
            CONSTRAINT fk_notices_analysis_id REFERENCES analyses (id) ON DELETE CASCADE,
        study_id bigint NOT NULL
            CONSTRAINT fk_notices_study_id REFERENCES studies (id) ON DELETE CASCADE,
        tenant text NOT NULL,
        origin text NOT NULL,
        bundle text NOT NULL,
        result_no integer NOT NULL,
        analysis_version bigint NOT NULL,
        notice jsonb NOT NULL,
        at timestamp with time zone NOT NULL DEFAULT now(),
        CONSTRAINT uq_notices_analysis_id UNIQUE (analysis_id, result_no)
    )""",
    "CREATE INDEX IF NOT EXISTS ix_notices_study_id ON notices (study_id)",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON notices TO vigil_node",
    "GRANT SELECT ON notices TO vigil_web",
    "ALTER TABLE notices ENABLE ROW LEVEL SECURITY",
    "DROP POLICY IF EXISTS node_all ON notices",
    "CREATE POLICY node_all ON notices TO vigil_node USING (true) WITH CHECK (true)",
    "DROP POLICY IF EXISTS web_see ON notices",
    f"CREATE POLICY web_see ON notices FOR SELECT TO vigil_web USING ({_SEES})",
)

# Nothing of a tenant, and nothing that a page shows: no policy, and nothing for vigil_web.
_BUNDLES = (
    """CREATE TABLE IF NOT EXISTS bundles (
        name text NOT NULL CONSTRAINT pk_bundles PRIMARY KEY,
        model jsonb NOT NULL,
        output jsonb NOT NULL,
        at timestamp with time zone NOT NULL DEFAULT now()
    )""",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON bundles TO vigil_node",
)

_QUARANTINE = (
    "ALTER TABLE quarantine"
    " ADD COLUMN IF NOT EXISTS study_instance_uid text NOT NULL DEFAULT '',"
    " ADD COLUMN IF NOT EXISTS series_instance_uid text NOT NULL DEFAULT ''",
    "CREATE INDEX IF NOT EXISTS ix_quarantine_said ON quarantine (tenant, study_instance_uid)",
)

# What is built and owed is of a result or of a notice: no key can say that, so what is built goes
# with its analysis, as what is owed does.
_OWNERS = (
    "ALTER TABLE deliveries DROP CONSTRAINT IF EXISTS fk_deliveries_result_id",
    "ALTER TABLE objects DROP CONSTRAINT IF EXISTS fk_objects_result_id",
    "ALTER TABLE objects ADD COLUMN IF NOT EXISTS analysis_id bigint",
    """UPDATE objects SET analysis_id = owners.analysis_id
        FROM (SELECT id, analysis_id FROM results UNION ALL SELECT id, analysis_id FROM notices)
            AS owners
        WHERE owners.id = objects.result_id AND objects.analysis_id IS NULL""",
    "DELETE FROM objects WHERE analysis_id IS NULL",  # orphans: their analysis is gone
    "ALTER TABLE objects ALTER COLUMN analysis_id SET NOT NULL",
    "ALTER TABLE objects ADD CONSTRAINT fk_objects_analysis_id"
    " FOREIGN KEY (analysis_id) REFERENCES analyses (id) ON DELETE CASCADE",
    "CREATE INDEX ix_objects_analysis_id ON objects (analysis_id)",
)
