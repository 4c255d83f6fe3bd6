"""Intake's tables. Ids are UUIDv7, so that inserts stay on the right-hand edge of their indexes.

Indexes have no column that changes: `request.state` and `responses` are updated in place (HOT). But for `closed_at`,
which changes once: without an index, finding the few requests that wait takes reading all there ever were.
"""

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Sequence,
    SmallInteger,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP, UUID

from libs.links.schema import add_link_tables

metadata = MetaData()
add_link_tables(metadata)

_INSTANT = TIMESTAMP(timezone=True)
_UUID = UUID(as_uuid=True)

command_seq = Sequence("command_seq", metadata=metadata, data_type=BigInteger)

idempotency = Table(
    "idempotency",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("method", Text, nullable=False),
    Column("fingerprint", LargeBinary, nullable=False),
    # The serialized answer. Null only within the transaction that claims the key.
    Column("response", LargeBinary),
    Column("created_at", _INSTANT, nullable=False, server_default=text("clock_timestamp()")),
    Index("idempotency_created_at", "created_at"),
    postgresql_with={"fillfactor": "60"},
)

request = Table(
    "request",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("id", _UUID, primary_key=True),
    Column("batch", Text, nullable=False),
    Column("customer", Text, nullable=False),
    Column("item", Text, nullable=False),
    Column("providers", ARRAY(Text), nullable=False),
    Column("payload", Text, nullable=False),
    Column("submitted_at", _INSTANT, nullable=False),
    Column("answer_by", _INSTANT, nullable=False),
    Column("state", SmallInteger, nullable=False),
    Column("responses", Integer, nullable=False),
    Column("closed_at", _INSTANT),
    # Why it was withdrawn.
    Column("cause", Text, nullable=False, server_default=""),
    Index("request_batch", "tenant", "batch", "id"),
    Index("request_customer", "tenant", "customer", "id"),
    Index("request_item", "tenant", "item", "id"),
    Index("request_waiting", "tenant", "id", postgresql_where=text("closed_at IS NULL")),
    # For forgetting, with those that were withdrawn before.
    Index("request_answer_by", "answer_by"),
    postgresql_with={"fillfactor": "80"},
)

response = Table(
    "response",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("id", _UUID, primary_key=True),
    Column("request_id", _UUID, nullable=False),
    Column("provider", Text, nullable=False),
    Column("payload", Text, nullable=False),
    Column("received_at", _INSTANT, nullable=False),
    Index("response_request", "tenant", "request_id", "id"),
)

item_providers = Table(
    "item_providers",
    metadata,
    Column("tenant", Text, primary_key=True),
    # An item's id, or a pattern with * at its end.
    Column("item", Text, primary_key=True),
    Column("providers", ARRAY(Text), nullable=False),
)
