"""The tables of digest."""

from alembic import op
from sqlalchemy import MetaData

from libs.links.schema import add_link_tables

revision = "0001"
down_revision = None

# Postgres 18 or newer: windows get their ids from uuidv7().
_TABLES = """
CREATE SEQUENCE command_seq;

CREATE TABLE notification_type (
    tenant text NOT NULL, id text NOT NULL, name text NOT NULL, description text NOT NULL,
    default_cadence text NOT NULL, default_channel text NOT NULL, is_mandatory boolean NOT NULL,
    payload_schema text NOT NULL, schema_id uuid, retention interval NOT NULL,
    PRIMARY KEY (tenant, id));

CREATE TABLE subscriber (
    tenant text NOT NULL, id text NOT NULL, zone text NOT NULL, locale text NOT NULL,
    email text NOT NULL, webhook_url text NOT NULL, apprise_url text NOT NULL,
    quiet_hours text[] NOT NULL DEFAULT '{}',
    PRIMARY KEY (tenant, id));

CREATE TABLE subscription (
    tenant text NOT NULL, id text NOT NULL, subscriber text NOT NULL, type text NOT NULL, topic text NOT NULL,
    filter text NOT NULL,
    PRIMARY KEY (tenant, id));
CREATE INDEX subscription_by_subscriber ON subscription (tenant, subscriber, id);

CREATE TABLE choice (
    tenant text NOT NULL, subscription text NOT NULL, position smallint NOT NULL,
    subscriber text NOT NULL, topic text NOT NULL, type text NOT NULL, is_prefix boolean NOT NULL,
    cadence text NOT NULL, channel text NOT NULL, format text NOT NULL, style text NOT NULL,
    filter text NOT NULL,
    PRIMARY KEY (tenant, subscription, position));
CREATE INDEX choice_by_topic ON choice (tenant, topic, subscriber);
CREATE INDEX choice_by_cadence ON choice (tenant, cadence);

CREATE TABLE cadence (
    tenant text NOT NULL, id text NOT NULL, name text NOT NULL, kind smallint NOT NULL,
    cron text NOT NULL, rrule text NOT NULL, zone text NOT NULL, batch text NOT NULL, fallback_after interval,
    duration interval, extension interval, cap interval, maximum_items integer, is_leading boolean,
    PRIMARY KEY (tenant, id));

CREATE TABLE template (
    tenant text NOT NULL, id text NOT NULL, format text NOT NULL, style text NOT NULL, locale text NOT NULL,
    subject text NOT NULL, body text NOT NULL,
    PRIMARY KEY (tenant, id, format, style, locale));

CREATE TABLE notification (
    tenant text NOT NULL, id uuid NOT NULL, type text NOT NULL, entity text NOT NULL, group_key text NOT NULL,
    payload text NOT NULL, subscribers text[] NOT NULL, topics text[] NOT NULL,
    occurred_at timestamptz NOT NULL, expires_at timestamptz,
    timer_id uuid, schedule_id uuid, timer_type text NOT NULL, timeline text NOT NULL,
    sequence bigint NOT NULL, received_at timestamptz NOT NULL, priority smallint NOT NULL DEFAULT 2,
    PRIMARY KEY (tenant, id));
CREATE INDEX notification_by_entity ON notification (tenant, entity) WHERE entity <> '';

CREATE TABLE item (
    tenant text NOT NULL, notification_id uuid NOT NULL, subscriber text NOT NULL, choice text NOT NULL,
    state smallint NOT NULL, reason text NOT NULL, window_id uuid, changed_at timestamptz NOT NULL,
    PRIMARY KEY (tenant, notification_id, subscriber, choice)) WITH (fillfactor = 70);
CREATE INDEX item_by_window ON item (window_id) WHERE window_id IS NOT NULL;

CREATE TABLE digest_window (
    tenant text NOT NULL, id uuid NOT NULL, subscriber text NOT NULL, cadence text NOT NULL,
    channel text NOT NULL, format text NOT NULL, style text NOT NULL,
    kind smallint NOT NULL, priority smallint NOT NULL DEFAULT 2, rule text NOT NULL, batch text NOT NULL,
    slot_at timestamptz NOT NULL, opened_at timestamptz NOT NULL, due_at timestamptz NOT NULL,
    state smallint NOT NULL, closed_at timestamptz,
    extension interval, latest_at timestamptz, full_at integer, placed integer NOT NULL DEFAULT 0,
    is_held boolean NOT NULL DEFAULT false,
    PRIMARY KEY (tenant, id));
CREATE UNIQUE INDEX digest_window_open
    ON digest_window (tenant, subscriber, cadence, channel, format, style, slot_at) WHERE state = 1;
CREATE INDEX digest_window_open_batch ON digest_window (tenant, batch) WHERE state = 1 AND batch <> '';
CREATE INDEX digest_window_closing ON digest_window (priority DESC, id) WHERE state = 2 AND NOT is_held;
CREATE INDEX digest_window_held ON digest_window (tenant, subscriber) WHERE state = 2 AND is_held;
CREATE INDEX digest_window_by_subscriber ON digest_window (tenant, subscriber, id);

CREATE TABLE digest (
    tenant text NOT NULL, id uuid NOT NULL, subscriber text NOT NULL, cadence text NOT NULL,
    channel text NOT NULL, format text NOT NULL, style text NOT NULL, address text NOT NULL, subject text NOT NULL,
    closed_at timestamptz NOT NULL, item_count integer NOT NULL, parts integer NOT NULL, template_error text NOT NULL,
    PRIMARY KEY (tenant, id));
CREATE INDEX digest_newest ON digest (tenant, closed_at, id);
CREATE INDEX digest_by_subscriber ON digest (tenant, subscriber, closed_at, id);

CREATE TABLE delivery (
    tenant text NOT NULL, digest_id uuid NOT NULL, part integer NOT NULL, id uuid NOT NULL,
    outcome text NOT NULL, reason text NOT NULL, ended_at timestamptz,
    PRIMARY KEY (tenant, digest_id, part)) WITH (fillfactor = 70);

CREATE TABLE tombstone (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant text NOT NULL, entity text NOT NULL, type text NOT NULL, timer_ids uuid[] NOT NULL, timeline text NOT NULL,
    sequence bigint NOT NULL, recorded_at timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE INDEX tombstone_by_entity ON tombstone (tenant, entity);

CREATE TABLE batch_run (
    tenant text NOT NULL, batch text NOT NULL, window_end_at timestamptz NOT NULL, window_start_at timestamptz,
    ran_at timestamptz NOT NULL, windows bigint NOT NULL,
    PRIMARY KEY (tenant, batch, window_end_at));
CREATE INDEX batch_run_by_time ON batch_run (ran_at);

CREATE TABLE ended (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant text NOT NULL,
    ended_at timestamptz NOT NULL, due_at timestamptz NOT NULL,
    window_ids uuid[] NOT NULL, notification_ids uuid[] NOT NULL);
CREATE INDEX ended_by_due ON ended (due_at);
"""


def upgrade() -> None:
    """Create everything."""
    op.execute(_TABLES)
    links = MetaData()
    add_link_tables(links)
    links.create_all(op.get_bind())
