"""Types that a business service formats, and windows that wait for it."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """An empty name for all types there are; nobody waits."""
    op.execute("ALTER TABLE notification_type ADD COLUMN formatting_service text NOT NULL DEFAULT ''")
    op.execute("ALTER TABLE digest_window ADD COLUMN asked_until timestamptz")
