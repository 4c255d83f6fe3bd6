"""Deliveries as they come in and are asked about. SQL only; every function runs in the caller's tx."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Row, Select, and_, case, func, select, tuple_

from libs.postgres import Transaction
from libs.trace_points import Point
from libs.wire import After
from services.dispatcher.addresses import destination_of
from services.dispatcher.delivery import Delivery, Priority, State, lane_of
from services.dispatcher.records import AttemptRecord, Content, DeliveryRecord
from services.dispatcher.store import attempt as attempt_table
from services.dispatcher.store import delivery as delivery_table
from services.dispatcher.store import queue as queue_table

Key = tuple[str, UUID]

# Arrays go in binary: as text psycopg escapes each quote of each body in Python, which takes a millisecond for a few KB
# of JSON or HTML while nothing else runs. In the order of the key, so that two replicas with the same deliveries wait
# for each other instead of deadlocking.
_ADD = """
    WITH added AS (
        INSERT INTO delivery (tenant, id, digest_id, subscriber, channel, address, lane, destination, list_id,
            subject, html, text, json, expires_at, priority, trace, created_at, fresh_since, state)
        SELECT tenant, id, digest_id, subscriber, channel, address, lane, destination, list_id, subject, html, text,
            json, expires_at, priority, trace, %(now)s, %(now)s, %(pending)s
        FROM unnest(%(tenant)b::text[], %(id)b::uuid[], %(digest_id)b::uuid[], %(subscriber)b::text[],
                %(channel)b::text[], %(address)b::text[], %(lane)b::text[], %(destination)b::text[],
                %(subject)b::text[], %(html)b::text[], %(text)b::text[], %(json)b::text[],
                %(expires_at)b::timestamptz[], %(priority)b::smallint[], %(list_id)b::text[], %(trace)b::bytea[])
                AS given (tenant, id, digest_id, subscriber, channel, address, lane, destination, subject, html, text,
                json, expires_at, priority, list_id, trace)
        ORDER BY tenant, id
        ON CONFLICT DO NOTHING
        RETURNING tenant, id, lane, priority, destination)
    INSERT INTO queue (tenant, delivery_id, lane, priority, destination)
    SELECT tenant, id, lane, priority, destination FROM added
    RETURNING tenant, delivery_id"""

# A delivery that is already queued, or not waiting for a retry any more, needs none.
_MAKE_DUE = """
    INSERT INTO queue (tenant, delivery_id, lane, priority, destination, trace)
    SELECT delivery.tenant, delivery.id, lane, priority, destination, due.trace
    FROM unnest(%(tenants)b::text[], %(ids)b::uuid[], %(traces)b::bytea[]) AS due (tenant, id, trace)
    JOIN delivery ON delivery.tenant = due.tenant AND delivery.id = due.id
    WHERE state = %(retrying)s
    ORDER BY delivery.tenant, delivery.id
    ON CONFLICT DO NOTHING"""

FORGOTTEN_AT_ONCE = 5_000

# Only what has ended has `ended_at`, which changes and is in no index: those that came later cannot have ended before.
_FORGET = """
    WITH old AS (
        SELECT ctid FROM delivery WHERE created_at < %(before)s AND ended_at < %(before)s
        ORDER BY tenant, created_at, id LIMIT %(limit)s FOR UPDATE SKIP LOCKED),
    gone AS (DELETE FROM delivery WHERE ctid = ANY(ARRAY(SELECT ctid FROM old)) RETURNING tenant, id),
    attempts AS (DELETE FROM attempt USING gone WHERE attempt.tenant = gone.tenant AND attempt.delivery_id = gone.id)
    SELECT count(*) FROM gone"""

# What is not under way and may not be claimed yet is parked.
_PARKED = case((and_(queue_table.c.attempt == 0, queue_table.c.claimable_at > func.now()), queue_table.c.claimable_at))
_RECORD = (
    *(delivery_table.c[name] for name in DeliveryRecord.__slots__ if name != "parked_until"),
    _PARKED.label("parked_until"),
)

_QUEUED = {State.PENDING, State.SENDING}
_UNSENT = {State.RETRYING, State.DEAD, State.SUPPRESSED, State.HELD, State.EXPIRED}


class DeliveryStore:
    """Deliveries and attempts in Postgres."""

    async def add(self, tx: Transaction, deliveries: Sequence[Delivery], *, now: datetime) -> set[Key]:
        """Take deliveries in; one whose id is known already changes nothing. Returns the new ones."""
        if not deliveries:
            return set()
        columns: dict[str, list[Any]] = {
            name: [getattr(one, name) for one in deliveries] for name in Delivery.__slots__
        }
        columns["priority"] = [int(one.priority) for one in deliveries]
        columns["trace"] = [one.trace or None for one in deliveries]
        columns["lane"] = [lane_of(one.channel) for one in deliveries]
        columns["destination"] = [destination_of(one.channel, one.address) for one in deliveries]
        cursor = await tx.raw.execute(_ADD, columns | {"now": now, "pending": State.PENDING})
        return {(tenant, delivery_id) for tenant, delivery_id in await cursor.fetchall()}

    async def make_due(self, tx: Transaction, retries: Mapping[Key, Point]) -> int:
        """Queue deliveries that wait for a retry, with what brought them back; returns how many did."""
        if not retries:
            return 0
        parameters: dict[str, list[Any]] = {
            "tenants": [tenant for tenant, _ in retries],
            "ids": [delivery_id for _, delivery_id in retries],
            "traces": [trace or None for trace in retries.values()],
        }
        cursor = await tx.raw.execute(_MAKE_DUE, parameters | {"retrying": State.RETRYING}, prepare=False)
        return cursor.rowcount

    async def forget(self, tx: Transaction, *, before: datetime, limit: int) -> int:
        """Delete at most `limit` deliveries that ended before, with their attempts; returns how many.

        What is being redriven is passed over, and what another replica deletes.
        """
        # What is lost with a crash is deleted again.
        await tx.raw.execute("SET LOCAL synchronous_commit = off")
        # In the order of the index: sorting would read all that is due for each transaction.
        await tx.raw.execute("SET LOCAL enable_sort = off")
        cursor = await tx.raw.execute(_FORGET, {"before": before, "limit": limit}, prepare=False)
        row = await cursor.fetchone()
        assert row is not None
        return int(row[0])

    async def next_sequence(self, tx: Transaction) -> int:
        """The next number in the order of this service's commands."""
        row = await (await tx.raw.execute("SELECT nextval('command_seq')")).fetchone()
        assert row is not None
        return int(row[0])

    async def get(self, tx: Transaction, tenant: str, delivery_id: UUID) -> DeliveryRecord | None:
        """One delivery."""
        query = select_records(tenant).where(delivery_table.c.id == delivery_id)
        row = (await tx.conn.execute(query)).one_or_none()
        return None if row is None else record_of(row)

    async def content(self, tx: Transaction, tenant: str, delivery_id: UUID) -> Content | None:
        """What one delivery says."""
        table = delivery_table.c
        query = select(table.html, table.text, table.json).where(table.tenant == tenant, table.id == delivery_id)
        row = (await tx.conn.execute(query)).one_or_none()
        return None if row is None else Content(html=row.html, text=row.text, json=row.json)

    async def page(
        self,
        tx: Transaction,
        tenant: str,
        *,
        subscriber: str,
        digest_id: UUID | None,
        states: Sequence[State],
        after: After | None,
        limit: int,
    ) -> list[DeliveryRecord]:
        """Deliveries, newest first; empty filters match all."""
        table = delivery_table.c
        query = select_records(tenant).order_by(table.created_at.desc(), table.id.desc()).limit(limit)
        if subscriber:
            query = query.where(table.subscriber == subscriber)
        if digest_id is not None:
            query = query.where(table.digest_id == digest_id)
        if after is not None:
            query = query.where(tuple_(table.created_at, table.id) < after)
        queries = [query.where(*conditions) for conditions in _in_states(states)] if states else [query]
        # By id, because what moves on between two of them is found twice.
        found = {row.id: record_of(row) for one in queries for row in await tx.conn.execute(one)}
        return sorted(found.values(), key=lambda one: (one.created_at, one.id), reverse=True)[:limit]

    async def of_id(self, tx: Transaction, tenant: str, id_: UUID, *, limit: int) -> list[DeliveryRecord]:
        """The delivery with this id, or the deliveries of the digest with this id, oldest first."""
        table = delivery_table.c
        one = await self.get(tx, tenant, id_)
        if one is not None:
            return [one]
        query = select_records(tenant).where(table.digest_id == id_).order_by(table.created_at, table.id).limit(limit)
        return [record_of(row) for row in await tx.conn.execute(query)]

    async def attempts(
        self, tx: Transaction, tenant: str, delivery_ids: Sequence[UUID], *, limit: int
    ) -> list[AttemptRecord]:
        """Attempts of these deliveries, in order of delivery and number."""
        table = attempt_table.c
        query = (
            select(*(table[name] for name in AttemptRecord.__slots__))
            .where(table.tenant == tenant, table.delivery_id.in_(delivery_ids))
            .order_by(table.delivery_id, table.number)
            .limit(limit)
        )
        return [AttemptRecord(**row._mapping) for row in await tx.conn.execute(query)]


def _in_states(states: Sequence[State]) -> Iterator[list[ColumnElement[bool]]]:
    """What to look for, each time by what it has in common, where that is in an index: the state itself is in none."""
    for group, common in (
        (_QUEUED, [queue_table.c.delivery_id.is_not(None)]),
        (_UNSENT, [delivery_table.c.reason != ""]),
        ({State.SENT}, []),
    ):
        if wanted := [int(state) for state in states if state in group]:
            yield [*common, delivery_table.c.state.in_(wanted)]


def select_records(tenant: str) -> Select[Any]:
    """Deliveries of a tenant, as `record_of` reads them."""
    queued = and_(queue_table.c.tenant == delivery_table.c.tenant, queue_table.c.delivery_id == delivery_table.c.id)
    rows = delivery_table.outerjoin(queue_table, queued)
    return select(*_RECORD).select_from(rows).where(delivery_table.c.tenant == tenant)


def record_of(row: Row[Any]) -> DeliveryRecord:
    """A row of `select_records`."""
    return DeliveryRecord(**{**row._mapping, "state": State(row.state), "priority": Priority(row.priority)})
