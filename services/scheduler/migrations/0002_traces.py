"""What set a timer: its firing, perhaps a month later, links to that trace."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column; without a default, so no row is written again."""
    op.execute("ALTER TABLE timer ADD COLUMN trace bytea")
