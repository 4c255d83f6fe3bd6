"""Which deliveries were not sent, so that the few of a state are found among all that were."""

from alembic import op

revision = "0005"
down_revision = "0004"

# Of those retrying, suppressed or expired since before there were reasons.
_REASONS = "UPDATE delivery SET reason = split_part(last_error, ':', 1) WHERE state IN (3, 6, 8) AND reason = ''"


def upgrade() -> None:
    """Deliveries go on being written meanwhile; what an attempt that was broken off left is made anew."""
    op.execute(_REASONS)
    with op.get_context().autocommit_block():
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS delivery_unsent")
        op.execute("CREATE INDEX CONCURRENTLY delivery_unsent ON delivery (tenant, created_at, id) WHERE reason <> ''")
