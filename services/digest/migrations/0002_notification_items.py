"""How many items a notification has, so that one that goes missing is missed."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Null for what was taken over before, or by a version that does not count."""
    op.execute("ALTER TABLE notification ADD COLUMN items integer")
