"""The tables of the schema `digest`, as the migrations leave them.

What changes often is not indexed, so that state changes stay HOT: an item changes its state once or twice and is
found by its notification or its window, which never change. Windows are fewer; their partial indexes hold only those
at work.
"""

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    Column,
    Identity,
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
from sqlalchemy.dialects.postgresql import TIMESTAMP, UUID

from libs.links.schema import add_link_tables

metadata = MetaData()
add_link_tables(metadata)

command_seq = Sequence("command_seq", metadata=metadata)


def _text(name: str, *, key: bool = False) -> Column[str]:
    return Column(name, Text, primary_key=key, nullable=False)


def _id(name: str, *, key: bool = False, nullable: bool = False) -> Column[object]:
    return Column(name, UUID(as_uuid=True), primary_key=key, nullable=nullable)


def _at(name: str, *, nullable: bool = False) -> Column[object]:
    return Column(name, TIMESTAMP(timezone=True), nullable=nullable)


notification_type = Table(
    "notification_type",
    metadata,
    _text("tenant", key=True),
    _text("id", key=True),
    _text("name"),
    _text("description"),
    _text("default_cadence"),
    _text("default_channel"),
    Column("is_mandatory", Boolean, nullable=False),
    _text("payload_schema"),
    _id("schema_id", nullable=True),  # Of the schema's content; none: any payload.
    Column("retention", Interval, nullable=False),
    Column("formatting_service", Text, nullable=False, server_default=text("''")),
)

subscriber = Table(
    "subscriber",
    metadata,
    _text("tenant", key=True),
    _text("id", key=True),
    _text("zone"),
    _text("locale"),
    _text("email"),
    _text("webhook_url"),
    _text("apprise_url"),
    Column("quiet_hours", ARRAY(Text), nullable=False, server_default=text("'{}'")),  # channel or nothing/HH:MM/HH:MM
)

subscription = Table(
    "subscription",
    metadata,
    _text("tenant", key=True),
    _text("id", key=True),
    _text("subscriber"),
    _text("type"),
    _text("topic"),
    _text("filter"),
    Index("subscription_by_subscriber", "tenant", "subscriber", "id"),
)

# A subscription's choices, each with what it is matched by, so that expanding a notification is one look-up.
choice = Table(
    "choice",
    metadata,
    _text("tenant", key=True),
    _text("subscription", key=True),
    Column("position", SmallInteger, primary_key=True, nullable=False),
    _text("subscriber"),
    _text("topic"),
    _text("type"),  # Exact id, or the prefix without its *.
    Column("is_prefix", Boolean, nullable=False),
    _text("cadence"),
    _text("channel"),
    _text("format"),
    _text("style"),
    _text("filter"),  # The subscription's.
    Index("choice_by_topic", "tenant", "topic", "subscriber"),
    Index("choice_by_cadence", "tenant", "cadence"),
)

cadence = Table(
    "cadence",
    metadata,
    _text("tenant", key=True),
    _text("id", key=True),
    _text("name"),
    Column("kind", SmallInteger, nullable=False),  # catalog.WindowKind
    _text("cron"),
    _text("rrule"),
    _text("zone"),
    _text("batch"),
    Column("fallback_after", Interval),
    Column("duration", Interval),  # These of rolling ones.
    Column("extension", Interval),
    Column("cap", Interval),
    Column("maximum_items", Integer),
    Column("is_leading", Boolean),
)

template = Table(
    "template",
    metadata,
    _text("tenant", key=True),
    _text("id", key=True),
    _text("format", key=True),
    _text("style", key=True),
    _text("locale", key=True),
    _text("subject"),
    _text("body"),
)

notification = Table(
    "notification",
    metadata,
    _text("tenant", key=True),
    _id("id", key=True),
    _text("type"),
    _text("entity"),
    _text("group_key"),
    _text("payload"),
    Column("subscribers", ARRAY(Text), nullable=False),
    Column("topics", ARRAY(Text), nullable=False),
    _at("occurred_at"),
    _at("expires_at", nullable=True),
    _id("timer_id", nullable=True),
    _id("schedule_id", nullable=True),
    _text("timer_type"),
    _text("timeline"),
    Column("sequence", BigInteger, nullable=False),
    _at("received_at"),
    Column("priority", SmallInteger, nullable=False, server_default=text("2")),  # catalog.Priority
    # Made of it and not forgotten yet; null where nobody counted. See store_ledger.
    Column("items", Integer),
    Column("trace", LargeBinary),  # What caused it, 24 bytes (libs.trace_points); null where nobody traces that.
    Index("notification_by_entity", "tenant", "entity", postgresql_where=text("entity <> ''")),
)

# One notification for one subscriber by one choice: INV-6 is this table's primary key.
item = Table(
    "item",
    metadata,
    _text("tenant", key=True),
    _id("notification_id", key=True),
    _text("subscriber", key=True),
    _text("choice", key=True),  # cadence/channel/format/style; topic:<topic> for a topic nobody listens to.
    Column("state", SmallInteger, nullable=False),  # catalog.ItemState
    _text("reason"),
    _id("window_id", nullable=True),
    _at("changed_at"),
    Index("item_by_window", "window_id", postgresql_where=text("window_id IS NOT NULL")),
    # An item changes its state at most twice in its life, soon after one another or in the same page's lifetime.
    postgresql_with={"fillfactor": "70"},
)

digest_window = Table(
    "digest_window",
    metadata,
    _text("tenant", key=True),
    _id("id", key=True),
    _text("subscriber"),
    _text("cadence"),
    _text("channel"),
    _text("format"),
    _text("style"),
    Column("kind", SmallInteger, nullable=False),  # catalog.WindowKind
    Column("priority", SmallInteger, nullable=False, server_default=text("2")),  # The notification's, if sent alone.
    _text("rule"),  # cron:… or rrule:… of an aligned window whose boundaries follow the subscriber's zone, else empty.
    _text("batch"),
    # due_at of aligned windows; of external and of rolling ones, of which one is open at a time, each a day of its own.
    _at("slot_at"),
    _at("opened_at"),
    _at("due_at"),
    Column("state", SmallInteger, nullable=False),  # catalog.WindowState
    _at("closed_at", nullable=True),
    Column("extension", Interval),  # These of rolling windows: the rule they were opened with; see store_rolling.
    _at("latest_at", nullable=True),
    Column("full_at", Integer),
    Column("placed", Integer, nullable=False, server_default=text("0")),
    # Closing, but a process has set it aside until then, for a business service to answer; see store_formatting.
    _at("asked_until", nullable=True),
    Column("trace", LargeBinary),  # What closed it, or of what is sent alone what caused that; likewise.
    # Closing, but quiet hours hold until due_at.
    Column("is_held", Boolean, nullable=False, server_default=text("false")),
    Index(
        "digest_window_open",
        *("tenant", "subscriber", "cadence", "channel", "format", "style", "slot_at"),
        unique=True,
        postgresql_where=text("state = 1"),
    ),
    Index("digest_window_open_batch", "tenant", "batch", postgresql_where=text("state = 1 AND batch <> ''")),
    Index("digest_window_closing", text("priority DESC"), "id", postgresql_where=text("state = 2 AND NOT is_held")),
    Index("digest_window_held", "tenant", "subscriber", postgresql_where=text("state = 2 AND is_held")),
    Index("digest_window_by_subscriber", "tenant", "subscriber", "id"),
)

digest = Table(
    "digest",
    metadata,
    _text("tenant", key=True),
    _id("id", key=True),
    _text("subscriber"),
    _text("cadence"),
    _text("channel"),
    _text("format"),
    _text("style"),
    _text("address"),
    _text("subject"),
    _at("closed_at"),
    Column("item_count", Integer, nullable=False),
    Column("parts", Integer, nullable=False),  # 0: it could not be rendered.
    _text("template_error"),  # Why others wrote than should have, or nobody could.
    Index("digest_newest", "tenant", "closed_at", "id"),
    Index("digest_by_subscriber", "tenant", "subscriber", "closed_at", "id"),
)

delivery = Table(
    "delivery",
    metadata,
    _text("tenant", key=True),
    _id("digest_id", key=True),
    Column("part", Integer, primary_key=True, nullable=False),
    _id("id"),
    _text("outcome"),  # pending, then as the dispatcher says.
    _text("reason"),
    _at("ended_at", nullable=True),
    postgresql_with={"fillfactor": "70"},
)

# What Cancel has forbidden: notifications accepted before it that arrive after it are born cancelled (INV-4).
tombstone = Table(
    "tombstone",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    _text("tenant"),
    _text("entity"),
    _text("type"),
    Column("timer_ids", ARRAY(UUID(as_uuid=True)), nullable=False),
    _text("timeline"),
    Column("sequence", BigInteger, nullable=False),
    Column("recorded_at", TIMESTAMP(timezone=True), nullable=False, server_default=text("clock_timestamp()")),
    Index("tombstone_by_entity", "tenant", "entity"),
)

# A logical window of a batch that has been triggered: a second run finds its row.
batch_run = Table(
    "batch_run",
    metadata,
    _text("tenant", key=True),
    _text("batch", key=True),
    Column("window_end_at", TIMESTAMP(timezone=True), primary_key=True, nullable=False),
    _at("window_start_at", nullable=True),
    _at("ran_at"),
    Column("windows", BigInteger, nullable=False),
    Index("batch_run_by_time", "ran_at"),
)

# What has ended, many in a row, until all of it has been kept long enough; see store_history.
ended = Table(
    "ended",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    _text("tenant"),
    _at("ended_at"),
    _at("due_at"),  # When some of it may be forgotten.
    Column("window_ids", ARRAY(UUID(as_uuid=True)), nullable=False),
    Column("notification_ids", ARRAY(UUID(as_uuid=True)), nullable=False),
    Index("ended_by_due", "due_at"),
)
