"""The table without which it does not start."""

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create it."""
    op.execute("CREATE TABLE gong (id int)")
