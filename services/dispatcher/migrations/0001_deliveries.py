"""Deliveries, their queue and attempts, suppressions, idempotency keys, and the link tables."""

from alembic import op
from sqlalchemy import MetaData

from libs.links.schema import add_link_tables

revision = "0001"
down_revision = None

_TABLES = """
CREATE TABLE delivery (
    tenant text NOT NULL,
    id uuid NOT NULL,
    digest_id uuid NOT NULL,
    subscriber text NOT NULL,
    channel text NOT NULL,
    address text NOT NULL,
    lane text NOT NULL,
    priority smallint NOT NULL DEFAULT 2,
    destination text NOT NULL,
    subject text NOT NULL,
    html text NOT NULL,
    text text NOT NULL,
    json text NOT NULL,
    expires_at timestamptz,
    created_at timestamptz NOT NULL,
    state smallint NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    budget integer NOT NULL DEFAULT 0,
    fresh_since timestamptz NOT NULL,
    last_error text NOT NULL DEFAULT '',
    ended_at timestamptz,
    next_attempt_at timestamptz,
    dead_letter_at timestamptz,
    PRIMARY KEY (tenant, id)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX delivery_by_age ON delivery (tenant, created_at, id);
CREATE INDEX delivery_by_subscriber ON delivery (tenant, subscriber, created_at, id);
CREATE INDEX delivery_by_digest ON delivery (tenant, digest_id);
CREATE INDEX delivery_dead_letters ON delivery (tenant, dead_letter_at, id) WHERE dead_letter_at IS NOT NULL;

CREATE TABLE queue (
    tenant text NOT NULL,
    delivery_id uuid NOT NULL,
    lane text NOT NULL,
    priority smallint NOT NULL DEFAULT 2,
    destination text NOT NULL,
    claimable_at timestamptz NOT NULL DEFAULT now(),
    attempt integer NOT NULL DEFAULT 0,
    claimed_by text NOT NULL DEFAULT '',
    PRIMARY KEY (tenant, delivery_id)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 500);
CREATE INDEX queue_next ON queue (lane, priority DESC, claimable_at);

CREATE TABLE attempt (
    tenant text NOT NULL,
    delivery_id uuid NOT NULL,
    number integer NOT NULL,
    started_at timestamptz NOT NULL,
    ended_at timestamptz,
    is_sent boolean NOT NULL DEFAULT false,
    reply text NOT NULL DEFAULT '',
    reason text NOT NULL DEFAULT '',
    PRIMARY KEY (tenant, delivery_id, number)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);

CREATE TABLE suppression (
    tenant text NOT NULL,
    channel text NOT NULL,
    address text NOT NULL,
    reason text NOT NULL,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (tenant, channel, address)
);

CREATE TABLE idempotency_key (
    tenant text NOT NULL,
    method text NOT NULL,
    key text NOT NULL,
    fingerprint bytea NOT NULL,
    response bytea NOT NULL,
    stored_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant, method, key)
);
CREATE INDEX idempotency_key_by_age ON idempotency_key (stored_at);

CREATE SEQUENCE command_seq;
"""


def upgrade() -> None:
    """Create everything; nothing was there before."""
    op.execute(_TABLES)
    links = MetaData()
    add_link_tables(links)
    links.create_all(op.get_bind())
