"""The three link tables that every service schema has."""

from sqlalchemy import BigInteger, Column, Integer, LargeBinary, MetaData, SmallInteger, Table, Text, text
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP, UUID

_NOW = text("clock_timestamp()")
_INSTANT = TIMESTAMP(timezone=True)


def add_link_tables(metadata: MetaData) -> None:
    """Add `outbox`, `inbox` and `dead_frame` to a service's tables; its first migration creates them with the rest."""
    Table(
        "outbox",
        metadata,
        Column("frame_id", UUID(as_uuid=True), primary_key=True),
        Column("receiver", Text, nullable=False),
        Column("partition", Integer, nullable=False),
        Column("payload", LargeBinary, nullable=False),
        Column("headers", JSONB, nullable=False),
        Column("entries", Integer, nullable=False),
        Column("created_at", _INSTANT, nullable=False, server_default=_NOW),
        Column("publishes", Integer, nullable=False, server_default=text("0")),
        # Not indexed: it changes with every sweep, and the table is short (rows live until their receipt).
        Column("next_publish_at", _INSTANT, nullable=False),
        postgresql_with={"fillfactor": "70", "autovacuum_vacuum_scale_factor": "0.02"},
    )
    Table(
        "inbox",
        metadata,
        Column("frame_id", UUID(as_uuid=True), primary_key=True),
        Column("verdict", SmallInteger, nullable=False),  # link.v1.FrameVerdict
        Column("results", LargeBinary),  # Serialized link.v1.Receipt; null when there was nothing to say.
        Column("received_at", _INSTANT, nullable=False, server_default=_NOW),
    )
    Table(
        "dead_frame",
        metadata,
        Column("frame_id", UUID(as_uuid=True), primary_key=True),
        Column("sender", Text, nullable=False),
        Column("partition", Integer, nullable=False),
        Column("payload", LargeBinary, nullable=False),
        Column("entries", Integer, nullable=False),
        Column("reason", Text, nullable=False),
        Column("deliveries", BigInteger, nullable=False),
        Column("buried_at", _INSTANT, nullable=False, server_default=_NOW),
    )
