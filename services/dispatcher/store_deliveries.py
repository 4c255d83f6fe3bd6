"""Deliveries as they come in, are asked about, and are sent again. SQL only; every function runs in the caller's tx."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, Select, select, tuple_

from libs.errors import FailedPrecondition, NotFound
from libs.postgres import Transaction
from services.dispatcher.addresses import destination_of
from services.dispatcher.delivery import DEAD_LETTERS, Delivery, Priority, State, lane_of
from services.dispatcher.records import AttemptRecord, DeliveryRecord
from services.dispatcher.store import attempt as attempt_table
from services.dispatcher.store import delivery as delivery_table

Key = tuple[str, UUID]
After = tuple[datetime, UUID]

# In the order of the key, so that two replicas with the same deliveries wait for each other instead of deadlocking.
_ADD = """
    WITH added AS (
        INSERT INTO delivery (tenant, id, digest_id, subscriber, channel, address, lane, destination, subject, html,
            text, json, expires_at, priority, created_at, fresh_since, state)
        SELECT tenant, id, digest_id, subscriber, channel, address, lane, destination, subject, html, text, json,
            expires_at, priority, %(now)s, %(now)s, %(pending)s
        FROM unnest(%(tenant)s::text[], %(id)s::uuid[], %(digest_id)s::uuid[], %(subscriber)s::text[],
                %(channel)s::text[], %(address)s::text[], %(lane)s::text[], %(destination)s::text[],
                %(subject)s::text[], %(html)s::text[], %(text)s::text[], %(json)s::text[],
                %(expires_at)s::timestamptz[], %(priority)s::smallint[]) AS given (tenant, id, digest_id, subscriber,
                channel, address, lane, destination, subject, html, text, json, expires_at, priority)
        ORDER BY tenant, id
        ON CONFLICT DO NOTHING
        RETURNING tenant, id, lane, priority, destination)
    INSERT INTO queue (tenant, delivery_id, lane, priority, destination)
    SELECT tenant, id, lane, priority, destination FROM added
    RETURNING tenant, delivery_id"""

# A delivery that is already queued, or not waiting for a retry any more, needs none.
_MAKE_DUE = """
    INSERT INTO queue (tenant, delivery_id, lane, priority, destination)
    SELECT delivery.tenant, delivery.id, lane, priority, destination
    FROM unnest(%(tenants)s::text[], %(ids)s::uuid[]) AS due (tenant, id)
    JOIN delivery ON delivery.tenant = due.tenant AND delivery.id = due.id
    WHERE state = %(retrying)s
    ORDER BY delivery.tenant, delivery.id
    ON CONFLICT DO NOTHING"""

_LOCK = "SELECT id, state FROM delivery WHERE tenant = %s AND id = ANY(%s) ORDER BY id FOR UPDATE"

_REDRIVE = """
    WITH risen AS (
        UPDATE delivery SET state = CASE WHEN attempts = 0 THEN %(pending)s ELSE %(retrying)s END, budget = attempts,
            fresh_since = %(now)s, ended_at = NULL, dead_letter_at = NULL, next_attempt_at = %(now)s
        WHERE tenant = %(tenant)s AND id = ANY(%(ids)s)
        RETURNING tenant, id, lane, priority, destination)
    INSERT INTO queue (tenant, delivery_id, lane, priority, destination)
    SELECT tenant, id, lane, priority, destination FROM risen"""


_RECORD = tuple(delivery_table.c[name] for name in DeliveryRecord.__slots__)


class DeliveryStore:
    """Deliveries and attempts in Postgres."""

    async def add(self, tx: Transaction, deliveries: Sequence[Delivery], *, now: datetime) -> set[Key]:
        """Take deliveries in; one whose id is known already changes nothing. Returns the new ones."""
        if not deliveries:
            return set()
        columns: dict[str, list[Any]] = {
            name: [getattr(one, name) for one in deliveries] for name in Delivery.__slots__
        }
        columns["lane"] = [lane_of(one.channel) for one in deliveries]
        columns["destination"] = [destination_of(one.channel, one.address) for one in deliveries]
        cursor = await tx.raw.execute(_ADD, columns | {"now": now, "pending": State.PENDING})
        return {(tenant, delivery_id) for tenant, delivery_id in await cursor.fetchall()}

    async def make_due(self, tx: Transaction, keys: Sequence[Key]) -> int:
        """Queue deliveries that wait for a retry; returns how many did."""
        if not keys:
            return 0
        parameters = {"tenants": [key[0] for key in keys], "ids": [key[1] for key in keys]}
        cursor = await tx.raw.execute(_MAKE_DUE, parameters | {"retrying": State.RETRYING}, prepare=False)
        return cursor.rowcount

    async def next_sequence(self, tx: Transaction) -> int:
        """The next number in the order of this service's commands."""
        row = await (await tx.raw.execute("SELECT nextval('command_seq')")).fetchone()
        assert row is not None
        return int(row[0])

    async def redrive(self, tx: Transaction, tenant: str, ids: Sequence[UUID], *, now: datetime) -> int:
        """Queue dead or held deliveries again, with a fresh budget of attempts; all of them or none.

        Raises NotFound and FailedPrecondition, naming the first that are at fault.
        """
        wanted = sorted(set(ids))
        cursor = await tx.raw.execute(_LOCK, (tenant, wanted))
        found = {delivery_id: State(state) for delivery_id, state in await cursor.fetchall()}
        if missing := [one for one in wanted if one not in found]:
            raise NotFound(f"There is no delivery {_first(missing)}.", reason="DELIVERY_UNKNOWN")
        if wrong := [one for one, state in found.items() if state not in DEAD_LETTERS]:
            states = {str(one): found[one].name.lower() for one in wrong[:8]}
            raise FailedPrecondition(
                f"Only dead and held deliveries can be redriven, and these are neither: {_first(wrong)}.",
                reason="DELIVERY_NOT_DEAD",
                metadata=states,
            )
        parameters = {"tenant": tenant, "ids": wanted, "now": now, "pending": State.PENDING, "retrying": State.RETRYING}
        await tx.raw.execute(_REDRIVE, parameters)
        return len(wanted)

    async def get(self, tx: Transaction, tenant: str, delivery_id: UUID) -> DeliveryRecord | None:
        """One delivery."""
        query = _select(tenant).where(delivery_table.c.id == delivery_id)
        row = (await tx.conn.execute(query)).one_or_none()
        return None if row is None else _record(row)

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
        query = _select(tenant).order_by(table.created_at.desc(), table.id.desc()).limit(limit)
        if subscriber:
            query = query.where(table.subscriber == subscriber)
        if digest_id is not None:
            query = query.where(table.digest_id == digest_id)
        if states:
            query = query.where(table.state.in_([int(state) for state in states]))
        if after is not None:
            query = query.where(tuple_(table.created_at, table.id) < after)
        return [_record(row) for row in await tx.conn.execute(query)]

    async def dead_letters(
        self, tx: Transaction, tenant: str, *, after: After | None, limit: int
    ) -> list[DeliveryRecord]:
        """Dead and held deliveries, those given up last first."""
        table = delivery_table.c
        query = _select(tenant).where(table.dead_letter_at.is_not(None))
        query = query.order_by(table.dead_letter_at.desc(), table.id.desc()).limit(limit)
        if after is not None:
            query = query.where(tuple_(table.dead_letter_at, table.id) < after)
        return [_record(row) for row in await tx.conn.execute(query)]

    async def of_id(self, tx: Transaction, tenant: str, id_: UUID, *, limit: int) -> list[DeliveryRecord]:
        """The delivery with this id, or the deliveries of the digest with this id, oldest first."""
        table = delivery_table.c
        one = await self.get(tx, tenant, id_)
        if one is not None:
            return [one]
        query = _select(tenant).where(table.digest_id == id_).order_by(table.created_at, table.id).limit(limit)
        return [_record(row) for row in await tx.conn.execute(query)]

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


def _select(tenant: str) -> Select[Any]:
    return select(*_RECORD).where(delivery_table.c.tenant == tenant)


def _record(row: Row[Any]) -> DeliveryRecord:
    return DeliveryRecord(**{**row._mapping, "state": State(row.state), "priority": Priority(row.priority)})


def _first(ids: Sequence[UUID], shown: int = 3) -> str:
    more = f" and {len(ids) - shown} more" if len(ids) > shown else ""
    return ", ".join(map(str, ids[:shown])) + more
