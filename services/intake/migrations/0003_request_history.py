"""Which requests wait, and which are old enough to be forgotten."""

from alembic import op

revision = "0003"
down_revision = "0002"

INDEXES = {
    "request_waiting": "request (tenant, id) WHERE closed_at IS NULL",
    "request_answer_by": "request (answer_by)",
}


def upgrade() -> None:
    """Requests go on being written meanwhile; what an attempt that was broken off left is made anew."""
    with op.get_context().autocommit_block():
        for name, on in INDEXES.items():
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
            op.execute(f"CREATE INDEX CONCURRENTLY {name} ON {on}")
