"""Why a request was withdrawn."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column; constant defaults rewrite no rows."""
    op.execute("ALTER TABLE request ADD COLUMN cause text NOT NULL DEFAULT ''")
