"""The table of events that JetStream has not acknowledged yet. As libs.links.outbox; waits are the database's clock."""

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from psycopg.types.json import Jsonb

from libs.postgres import Transaction, copy_rows
from services.scheduler.events import EventBacklog, OutgoingEvent

_COLUMNS = ("id", "tenant", "subject", "payload", "headers")
_TYPES = ("uuid", "text", "text", "bytea", "jsonb")

# The subquery is an array, computed once: in a join the planner may run it again and again, each time locking others.
_TAKE_DUE = """
    UPDATE event_outbox SET published_at = clock_timestamp(), sweeps = sweeps + 1 WHERE id = ANY(ARRAY(
        SELECT id FROM event_outbox
        WHERE published_at + least(%(longest)s, %(first)s * power(2, least(sweeps, 20))) <= clock_timestamp()
        ORDER BY id LIMIT %(limit)s FOR UPDATE SKIP LOCKED))
    RETURNING id, tenant, subject, payload, headers"""

# Rows are locked in order, here and in `confirm`, so that replicas do not deadlock.
_HURRY = """
    UPDATE event_outbox SET sweeps = 0 WHERE id = ANY(ARRAY(
        SELECT id FROM event_outbox WHERE sweeps > 0 ORDER BY id FOR UPDATE))"""
_CONFIRM = """
    DELETE FROM event_outbox WHERE id = ANY(ARRAY(
        SELECT id FROM event_outbox WHERE id = ANY(%s) ORDER BY id FOR UPDATE))"""


class EventStore:
    """Table `event_outbox`."""

    async def insert(self, tx: Transaction, events: Sequence[OutgoingEvent]) -> None:
        """Write events in the transaction that fires their timers. UniqueViolation when one is there already."""
        rows = [(e.id, e.tenant, e.subject, e.payload, Jsonb(e.headers)) for e in events]
        if len(rows) == 1:  # COPY costs two round trips more than INSERT.
            await tx.raw.execute(
                "INSERT INTO event_outbox (id, tenant, subject, payload, headers) VALUES (%s, %s, %s, %s, %s)", rows[0]
            )
        elif rows:
            await copy_rows(tx, "event_outbox", _COLUMNS, rows, types=_TYPES)

    async def take_due(
        self, tx: Transaction, *, first: timedelta, longest: timedelta, limit: int
    ) -> Sequence[OutgoingEvent]:
        """Events without an acknowledgement for `first`; each then waits twice as long each time, up to `longest`."""
        await tx.raw.execute("SET LOCAL synchronous_commit = off")
        cursor = await tx.raw.execute(_TAKE_DUE, {"first": first, "longest": longest, "limit": limit})
        return [
            OutgoingEvent(id=i, tenant=tenant, subject=subject, payload=payload, headers=headers)
            for i, tenant, subject, payload, headers in await cursor.fetchall()
        ]

    async def hurry(self, tx: Transaction) -> None:
        """Have no event wait longer than `first` any more; for when the stream was lost or the broker away.

        Those published less than that ago may be under way: made due here, each replica would publish them once more.
        """
        await tx.raw.execute(_HURRY)

    async def confirm(self, tx: Transaction, event_ids: Sequence[UUID]) -> None:
        """Forget events that JetStream has; those already gone are no error."""
        # A lost confirmation costs one more publication, so it need not wait for the disk.
        await tx.raw.execute("SET LOCAL synchronous_commit = off")
        await tx.raw.execute(_CONFIRM, (list(event_ids),))

    async def backlog(self, tx: Transaction) -> EventBacklog:
        """What is unacknowledged now, exactly."""
        cursor = await tx.raw.execute(
            "SELECT count(*), coalesce(extract(epoch FROM clock_timestamp() - min(created_at))::float8, 0)"
            " FROM event_outbox"
        )
        row = await cursor.fetchone()
        assert row is not None
        return EventBacklog(events=row[0], oldest_s=row[1])
