"""Everything the first release needs: tables, roles, row-level security."""

from alembic import op

from db.migrations.security import statements
from db.tables import Base

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    Base.metadata.create_all(op.get_bind())
    for statement in statements():
        op.execute(statement)
