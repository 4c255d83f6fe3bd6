"""A table that Postgres does not take."""

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Fail."""
    op.execute("CREATE TABLE torn (id rope)")
