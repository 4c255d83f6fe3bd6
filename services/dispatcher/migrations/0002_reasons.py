"""Why a delivery ended, apart from what the other side said: what dead letters are chosen and counted by."""

from alembic import op

revision = "0002"
down_revision = "0001"

# Filling the column in changes every dead letter's row once; those that were sent have no reason.
_REASONS = """
ALTER TABLE delivery ADD COLUMN reason text NOT NULL DEFAULT '';
UPDATE delivery SET reason = split_part(last_error, ':', 1) WHERE dead_letter_at IS NOT NULL;
"""


def upgrade() -> None:
    """Add the column."""
    op.execute(_REASONS)
