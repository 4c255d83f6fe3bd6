"""The dispatcher's tables, and what its SQL shares.

- `delivery`: one row per message, from its arrival until its retention is over. None of its indexes covers a column
  that sending changes (the reason of what is not sent at once and a dead letter's date excepted), so that every update
  stays on the row's page (HOT).
- `queue`: one short row for each delivery that waits for its turn or is being sent, and for no other; the one index
  that changes all the time is here, over a table that stays small, in the order in which deliveries are claimed.
  `claimable_at` is on the database's clock: until when a claim holds while `attempt` is not 0, otherwise since when the
  delivery waits, or until when it is parked.
- `attempt`: one row per try, written before anything leaves; without an end it is under way, or in doubt.
- `suppression`: addresses that get nothing, or nothing of one list, one row for each source that wants it so.
  `bounce`: how often in a row an address was said not to exist, until that is often enough for a suppression.
- `idempotency_key`: answers to calls that may be repeated.

Locks are taken in the order queue, then delivery, then attempt, then bounce and suppression. Whoever claims skips
locked rows; nobody else holds rows that another transaction of the same attempt could want.
"""

from sqlalchemy import Boolean, Column, Index, Integer, LargeBinary, MetaData, SmallInteger, Table, Text, text
from sqlalchemy.dialects.postgresql import TIMESTAMP, UUID
from sqlalchemy.schema import Sequence

from libs.links.schema import add_link_tables

_INSTANT = TIMESTAMP(timezone=True)
_HOT = {"fillfactor": "70", "autovacuum_vacuum_scale_factor": "0.05"}

metadata = MetaData()

delivery = Table(
    "delivery",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("id", UUID(as_uuid=True), primary_key=True),
    Column("digest_id", UUID(as_uuid=True), nullable=False),
    Column("subscriber", Text, nullable=False),
    Column("channel", Text, nullable=False),
    Column("address", Text, nullable=False),
    Column("lane", Text, nullable=False),
    Column("priority", SmallInteger, nullable=False, server_default=text("2")),  # delivery.Priority; never changes.
    Column("destination", Text, nullable=False),
    Column("list_id", Text, nullable=False, server_default=text("''")),  # Empty: cannot be unsubscribed from.
    Column("subject", Text, nullable=False),
    Column("html", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("json", Text, nullable=False),
    Column("expires_at", _INSTANT),
    Column("created_at", _INSTANT, nullable=False),
    Column("state", SmallInteger, nullable=False),  # delivery.State
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("budget", Integer, nullable=False, server_default=text("0")),  # Attempts made before the last redrive.
    Column("fresh_since", _INSTANT, nullable=False),  # Arrival, or the last redrive.
    Column("last_error", Text, nullable=False, server_default=text("''")),
    Column("reason", Text, nullable=False, server_default=text("''")),  # delivery.Reason; empty when sent.
    Column("ended_at", _INSTANT),
    Column("next_attempt_at", _INSTANT),
    Column("dead_letter_at", _INSTANT),  # Set exactly while the delivery is dead or held.
    Column("trace", LargeBinary),  # What made it, 24 bytes (libs.trace_points); null where nobody traces that.
    postgresql_with=_HOT,
)
Index("delivery_by_age", delivery.c.tenant, delivery.c.created_at, delivery.c.id)
Index("delivery_by_subscriber", delivery.c.tenant, delivery.c.subscriber, delivery.c.created_at, delivery.c.id)
Index("delivery_by_digest", delivery.c.tenant, delivery.c.digest_id)
Index(
    "delivery_unsent",
    delivery.c.tenant,
    delivery.c.created_at,
    delivery.c.id,
    postgresql_where=delivery.c.reason != "",
)
Index(
    "delivery_dead_letters",
    delivery.c.tenant,
    delivery.c.dead_letter_at,
    delivery.c.id,
    postgresql_where=delivery.c.dead_letter_at.is_not(None),
)

queue = Table(
    "queue",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("delivery_id", UUID(as_uuid=True), primary_key=True),
    Column("lane", Text, nullable=False),
    Column("priority", SmallInteger, nullable=False, server_default=text("2")),  # The delivery's.
    Column("destination", Text, nullable=False),
    Column("claimable_at", _INSTANT, nullable=False, server_default=text("now()")),
    Column("attempt", Integer, nullable=False, server_default=text("0")),  # Under way; 0: waiting.
    Column("claimed_by", Text, nullable=False, server_default=text("''")),  # For people; the attempt is the fence.
    Column("trace", LargeBinary),  # What brought it back, of a retry; likewise.
    postgresql_with={
        "fillfactor": "70",
        "autovacuum_vacuum_scale_factor": "0.02",
        "autovacuum_vacuum_threshold": "500",
    },
)
Index("queue_next", queue.c.lane, queue.c.priority.desc(), queue.c.claimable_at)

attempt = Table(
    "attempt",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("delivery_id", UUID(as_uuid=True), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("started_at", _INSTANT, nullable=False),
    Column("ended_at", _INSTANT),
    Column("is_sent", Boolean, nullable=False, server_default=text("false")),
    Column("reply", Text, nullable=False, server_default=text("''")),
    Column("reason", Text, nullable=False, server_default=text("''")),
    postgresql_with=_HOT,
)

suppression = Table(
    "suppression",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("channel", Text, primary_key=True),
    Column("address", Text, primary_key=True),  # E-mail addresses in lower case.
    Column("list_id", Text, primary_key=True, server_default=text("''")),  # Empty: all lists, and what is on none.
    Column("source", SmallInteger, primary_key=True, server_default=text("1")),  # records.Source
    Column("subscriber", Text, nullable=False, server_default=text("''")),
    Column("reason", Text, nullable=False),
    Column("created_at", _INSTANT, nullable=False),
)

bounce = Table(
    "bounce",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("channel", Text, primary_key=True),
    Column("address", Text, primary_key=True),  # As in suppression.
    Column("times", Integer, nullable=False),
    Column("stored_at", _INSTANT, nullable=False, server_default=text("now()")),
)
Index("bounce_by_age", bounce.c.stored_at)

idempotency_key = Table(
    "idempotency_key",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("method", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("response", LargeBinary, nullable=False),
    Column("stored_at", _INSTANT, nullable=False, server_default=text("now()")),
)
Index("idempotency_key_by_age", idempotency_key.c.stored_at)

add_link_tables(metadata)

command_seq = Sequence("command_seq", metadata=metadata)
