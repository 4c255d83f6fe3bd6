"""What caused a notification, and what closed a window: a digest links to these traces."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the columns; without a default, so no row is written again."""
    op.execute("ALTER TABLE notification ADD COLUMN trace bytea")
    op.execute("ALTER TABLE digest_window ADD COLUMN trace bytea")
