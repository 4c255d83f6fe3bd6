"""What readers unsubscribe from, who suppresses an address, and addresses that are about to be."""

from alembic import op

revision = "0003"
down_revision = "0002"

# Constant defaults: no row is written again. What waits from before is on no list and is sent, as it would have been.
_UNSUBSCRIBES = """
ALTER TABLE delivery ADD COLUMN list_id text NOT NULL DEFAULT '';

ALTER TABLE suppression
    ADD COLUMN list_id text NOT NULL DEFAULT '',
    ADD COLUMN source smallint NOT NULL DEFAULT 1,
    ADD COLUMN subscriber text NOT NULL DEFAULT '',
    DROP CONSTRAINT suppression_pkey,
    ADD PRIMARY KEY (tenant, channel, address, list_id, source);

CREATE TABLE bounce (
    tenant text NOT NULL,
    channel text NOT NULL,
    address text NOT NULL,
    times integer NOT NULL,
    stored_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant, channel, address)
);
CREATE INDEX bounce_by_age ON bounce (stored_at);
"""


def upgrade() -> None:
    """Add columns and table."""
    op.execute(_UNSUBSCRIBES)
