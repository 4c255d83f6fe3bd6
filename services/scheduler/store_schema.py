"""The scheduler's tables.

A turn's statements touch its own shards' rows only, so that shards may live on other servers one day. Nothing that
changes is indexed, so that updates stay heap-only (HOT): cancelling or recording a verdict touches one page.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Computed,
    Index,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    Sequence,
    SmallInteger,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP, UUID

from libs.links.schema import add_link_tables

metadata = MetaData()
add_link_tables(metadata)

_INSTANT = TIMESTAMP(timezone=True)
_UUID = UUID(as_uuid=True)
_NOW = text("clock_timestamp()")

Sequence("command_seq", metadata=metadata)

# One row per shard, for ever: `holder`, `lease_until` and `epoch` are who may change it, `watermark_*` how far it is.
shard = Table(
    "shard",
    metadata,
    Column("shard", Integer, primary_key=True, autoincrement=False),
    Column("holder", Text),
    Column("epoch", BigInteger, nullable=False, server_default=text("0")),
    Column("lease_until", _INSTANT),
    Column("watermark_at", _INSTANT, nullable=False, server_default=text("'1970-01-01T00:00:00Z'")),
    Column("watermark_id", _UUID, nullable=False, server_default=text("'00000000-0000-0000-0000-000000000000'::uuid")),
    postgresql_with={"fillfactor": "20"},  # A row is updated all the time; its page must have room for it.
)

# Replicas that are alive, for the rendezvous; losing it costs a moment of rebalancing.
member = Table(
    "member",
    metadata,
    Column("replica", Text, primary_key=True),
    Column("until", _INSTANT, nullable=False),
)

timer = Table(
    "timer",
    metadata,
    Column("id", _UUID, primary_key=True),
    Column("shard", Integer, nullable=False),
    Column("fire_at", _INSTANT, nullable=False),
    Column("due_at", _INSTANT, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("entity", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("state", SmallInteger, nullable=False),
    Column("target_kind", SmallInteger, nullable=False),
    Column("target", LargeBinary, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("schedule_id", _UUID, nullable=False),
    Column("occurrence", Integer, nullable=False),
    Column("recurrence", JSONB),
    Column("nominal_at", _INSTANT),
    Column("condition", Text, nullable=False),
    Column("asked", JSONB),
    Column("expires_at", _INSTANT),
    Column("report_within", Interval),
    Column("retry", JSONB),
    Column("run_id", _UUID),
    Column("timeline", Text),
    Column("timeline_version", Integer),
    Column("step", Text),
    Column("asks", SmallInteger, nullable=False),
    Column("holds", Boolean),
    Column("attempts", SmallInteger, nullable=False),
    Column("first_attempt_at", _INSTANT),
    Column("last_error", Text),
    Column("decided_at", _INSTANT),
    Column("note", Text),
    Column("trace", LargeBinary),  # What set it, 24 bytes (libs.trace_points); null where nobody traces that.
    # As Timer.is_under_way. A column of its own, because an index with `state` in its predicate would end HOT for all.
    Column(
        "is_under_way",
        Boolean,
        Computed("state = ANY (ARRAY[9, 10, 11, 12]) OR state = 2 AND attempts > 0", persisted=True),
        nullable=False,
    ),
    # State PAUSED or BUFFERED: what waits, but for no time of its own, so that it may lie behind the watermark. A
    # column for the same reason; the trigger keep_on_hold keeps it: to generate it the table would be written again.
    Column("is_on_hold", Boolean, nullable=False, server_default=text("false")),
    Index("timer_firing_order", "shard", "fire_at", "id"),
    Index("timer_of_entity", "tenant", "entity", "fire_at"),
    # Few, however long an entity's history is.
    Index("timer_on_hold", "tenant", "entity", postgresql_where=text("is_on_hold")),
    # One-shot timers, the great majority, are in none of these.
    Index("timer_schedule", "schedule_id", "nominal_at", postgresql_where=text("schedule_id <> id")),
    Index("timer_run", "run_id", postgresql_where=text("run_id IS NOT NULL")),
    # Few, however long a schedule's history is.
    Index("timer_under_way", "schedule_id", postgresql_where=text("is_under_way")),
    postgresql_with={"fillfactor": "90"},
)

# Attempts of timers with events that have ended.
attempt = Table(
    "attempt",
    metadata,
    Column("timer_id", _UUID, primary_key=True),
    Column("number", SmallInteger, primary_key=True),
    Column("started_at", _INSTANT, nullable=False),
    Column("ended_at", _INSTANT, nullable=False),
    Column("error", Text),
)

# What orders (cancel, pause, resume, reschedule) leave behind. No key: the cancels of one call share their sequence,
# and each leaves its own selection.
tombstone = Table(
    "tombstone",
    metadata,
    Column("tenant", Text, nullable=False),
    Column("entity", Text, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("shard", Integer, nullable=False),
    Column("origin", Text, nullable=False),
    Column("action", SmallInteger, nullable=False),
    Column("type", Text, nullable=False),
    Column("ids", ARRAY(_UUID), nullable=False),
    Column("timeline", Text, nullable=False),
    Column("cause", Text, nullable=False),
    Column("due_at", _INSTANT),
    Column("created_at", _INSTANT, nullable=False, server_default=_NOW),
    Index("tombstone_entity", "tenant", "entity"),
    Index("tombstone_shard", "shard", "origin", "sequence"),
    Index("tombstone_age", "created_at", postgresql_using="brin"),
)

facts = Table(
    "facts",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("entity", Text, primary_key=True),
    Column("shard", Integer, nullable=False),
    Column("facts", JSONB, nullable=False),
    # For patches that arrive late: the last few, and what was known before them.
    Column("base", JSONB, nullable=False),
    Column("recent", JSONB, nullable=False),
    Column("changed_at", _INSTANT, nullable=False, server_default=_NOW),
)

# Events of fired timers, until JetStream has acknowledged them.
event_outbox = Table(
    "event_outbox",
    metadata,
    Column("id", _UUID, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Column("headers", JSONB, nullable=False),
    Column("created_at", _INSTANT, nullable=False, server_default=_NOW),
    # Not indexed: they change with every sweep, and the table is short.
    Column("published_at", _INSTANT, nullable=False, server_default=_NOW),
    Column("sweeps", Integer, nullable=False, server_default=text("0")),
    postgresql_with={"fillfactor": "70", "autovacuum_vacuum_scale_factor": "0.02"},
)

timeline = Table(
    "timeline",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("description", Text, nullable=False),
    Column("steps", JSONB, nullable=False),
    Column("created_at", _INSTANT, nullable=False),
)
