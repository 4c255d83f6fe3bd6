"""What made a delivery, and what brought one back for a retry: attempts belong to these traces, or link to them."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the columns; without a default, so no row is written again."""
    op.execute("ALTER TABLE delivery ADD COLUMN trace bytea")
    op.execute("ALTER TABLE queue ADD COLUMN trace bytea")
