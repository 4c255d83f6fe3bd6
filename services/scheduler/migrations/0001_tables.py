"""The tables of the scheduler."""

from alembic import op
from sqlalchemy import MetaData

from libs.links.schema import add_link_tables

revision = "0001"
down_revision = None

_TABLES = """
CREATE SEQUENCE command_seq;

CREATE TABLE shard (
    shard integer PRIMARY KEY, holder text, epoch bigint NOT NULL DEFAULT 0, lease_until timestamptz,
    watermark_at timestamptz NOT NULL DEFAULT '1970-01-01T00:00:00Z',
    watermark_id uuid NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000'::uuid) WITH (fillfactor = 20);

CREATE TABLE member (replica text PRIMARY KEY, until timestamptz NOT NULL);

CREATE TABLE timer (
    id uuid PRIMARY KEY, shard integer NOT NULL, fire_at timestamptz NOT NULL, due_at timestamptz NOT NULL,
    tenant text NOT NULL, entity text NOT NULL, type text NOT NULL, state smallint NOT NULL,
    target_kind smallint NOT NULL, target bytea NOT NULL, sequence bigint NOT NULL,
    schedule_id uuid NOT NULL, occurrence integer NOT NULL, recurrence jsonb, nominal_at timestamptz,
    condition text NOT NULL, asked jsonb, expires_at timestamptz, report_within interval, retry jsonb,
    run_id uuid, timeline text, timeline_version integer, step text,
    asks smallint NOT NULL, holds boolean, attempts smallint NOT NULL, first_attempt_at timestamptz, last_error text,
    decided_at timestamptz, note text,
    is_under_way boolean NOT NULL GENERATED ALWAYS AS
        (state = ANY (ARRAY[9, 10, 11, 12]) OR state = 2 AND attempts > 0) STORED) WITH (fillfactor = 90);
CREATE INDEX timer_firing_order ON timer (shard, fire_at, id);
CREATE INDEX timer_entity ON timer (tenant, entity);
CREATE INDEX timer_schedule ON timer (schedule_id, nominal_at) WHERE schedule_id <> id;
CREATE INDEX timer_under_way ON timer (schedule_id) WHERE is_under_way;
CREATE INDEX timer_run ON timer (run_id) WHERE run_id IS NOT NULL;

CREATE TABLE attempt (
    timer_id uuid NOT NULL, number smallint NOT NULL, started_at timestamptz NOT NULL, ended_at timestamptz NOT NULL,
    error text, PRIMARY KEY (timer_id, number));

CREATE TABLE tombstone (
    tenant text NOT NULL, entity text NOT NULL, sequence bigint NOT NULL, shard integer NOT NULL,
    origin text NOT NULL, action smallint NOT NULL, type text NOT NULL, ids uuid[] NOT NULL, timeline text NOT NULL,
    cause text NOT NULL, due_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE INDEX tombstone_entity ON tombstone (tenant, entity);
CREATE INDEX tombstone_shard ON tombstone (shard, origin, sequence);
CREATE INDEX tombstone_age ON tombstone USING brin (created_at);

CREATE TABLE facts (
    tenant text NOT NULL, entity text NOT NULL, shard integer NOT NULL, facts jsonb NOT NULL,
    base jsonb NOT NULL, recent jsonb NOT NULL,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp(), PRIMARY KEY (tenant, entity));

CREATE TABLE event_outbox (
    id uuid PRIMARY KEY, tenant text NOT NULL, subject text NOT NULL, payload bytea NOT NULL, headers jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    published_at timestamptz NOT NULL DEFAULT clock_timestamp(), sweeps integer NOT NULL DEFAULT 0)
    WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02);

CREATE TABLE timeline (
    tenant text NOT NULL, name text NOT NULL, version integer NOT NULL, description text NOT NULL,
    steps jsonb NOT NULL, created_at timestamptz NOT NULL, PRIMARY KEY (tenant, name, version));
"""


def upgrade() -> None:
    """Create everything, in the schema that the connection's search_path names."""
    op.execute(_TABLES)
    links = MetaData()
    add_link_tables(links)
    links.create_all(op.get_bind())
