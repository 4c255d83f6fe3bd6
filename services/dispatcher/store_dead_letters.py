"""Dead letters: deliveries that were given up or are held, until somebody sends them again. SQL only.

They are found by the index over `dead_letter_at`, which only they are in; what else a filter asks is looked up in them.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Select, func, select, tuple_

from libs.errors import FailedPrecondition, NotFound
from libs.postgres import Transaction
from libs.wire import After
from services.dispatcher.delivery import DEAD_LETTERS, State
from services.dispatcher.records import DeadLetterCount, DeadLetterFilter, DeliveryRecord
from services.dispatcher.store import delivery as delivery_table
from services.dispatcher.store_deliveries import record_of, select_records

_LOCK = "SELECT id, state FROM delivery WHERE tenant = %s AND id = ANY(%s) ORDER BY id FOR UPDATE"

_REDRIVE = """
    WITH risen AS (
        UPDATE delivery SET state = CASE WHEN attempts = 0 THEN %(pending)s ELSE %(retrying)s END, budget = attempts,
            fresh_since = %(now)s, ended_at = NULL, dead_letter_at = NULL, next_attempt_at = %(now)s,
            reason = CASE WHEN attempts = 0 THEN '' ELSE reason END
        WHERE tenant = %(tenant)s AND id = ANY(%(ids)s)
        RETURNING tenant, id, lane, priority, destination)
    INSERT INTO queue (tenant, delivery_id, lane, priority, destination)
    SELECT tenant, id, lane, priority, destination FROM risen"""


class DeadLetterStore:
    """Dead letters in Postgres."""

    async def total(self, tx: Transaction) -> int:
        """How many there are, of all tenants; for metrics."""
        row = await (await tx.raw.execute("SELECT count(*) FROM delivery WHERE dead_letter_at IS NOT NULL")).fetchone()
        assert row is not None
        return int(row[0])

    async def page(
        self, tx: Transaction, tenant: str, wanted: DeadLetterFilter, *, after: After | None, limit: int
    ) -> list[DeliveryRecord]:
        """Those given up last first."""
        table = delivery_table.c
        query = select_records(tenant).where(*_matching(wanted))
        query = query.order_by(table.dead_letter_at.desc(), table.id.desc()).limit(limit)
        if after is not None:
            query = query.where(tuple_(table.dead_letter_at, table.id) < after)
        return [record_of(row) for row in await tx.conn.execute(query)]

    async def counts(
        self, tx: Transaction, tenant: str, wanted: DeadLetterFilter, *, limit: int
    ) -> list[DeadLetterCount]:
        """By channel, state and reason, the largest first."""
        table = delivery_table.c
        group = (table.channel, table.state, table.reason)
        number = func.count().label("number")
        query: Select[Any] = (
            select(*group, number, func.min(table.dead_letter_at), func.max(table.dead_letter_at))
            .where(table.tenant == tenant, *_matching(wanted))
            .group_by(*group)
            .order_by(number.desc(), *group)
            .limit(limit)
        )
        return [
            DeadLetterCount(
                channel=channel, state=State(state), reason=reason, count=count, first_at=first_at, last_at=last_at
            )
            for channel, state, reason, count, first_at, last_at in await tx.conn.execute(query)
        ]

    async def redrive_matching(
        self, tx: Transaction, tenant: str, wanted: DeadLetterFilter, *, limit: int, now: datetime
    ) -> tuple[int, int]:
        """Queue again at most `limit` that match, those given up first; returns how many, and how many are left.

        What another call is redriving at the same time is passed over, and counts as left.
        """
        table = delivery_table.c
        query = (
            select(table.id)
            .where(table.tenant == tenant, *_matching(wanted))
            .order_by(table.dead_letter_at, table.id)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        ids = list((await tx.conn.execute(query)).scalars())
        if ids:
            await _redrive(tx, tenant, ids, now)
        left = select(func.count()).select_from(delivery_table).where(table.tenant == tenant, *_matching(wanted))
        return len(ids), (await tx.conn.execute(left)).scalar_one()

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
        await _redrive(tx, tenant, wanted, now)
        return len(wanted)


async def _redrive(tx: Transaction, tenant: str, ids: Sequence[UUID], now: datetime) -> None:
    parameters = {"tenant": tenant, "ids": ids, "now": now, "pending": State.PENDING, "retrying": State.RETRYING}
    await tx.raw.execute(_REDRIVE, parameters, prepare=False)


def _matching(wanted: DeadLetterFilter) -> list[ColumnElement[bool]]:
    table = delivery_table.c
    conditions: list[ColumnElement[bool]] = [table.dead_letter_at.is_not(None)]
    if wanted.channel:
        conditions.append(table.channel == wanted.channel)
    if wanted.reason:
        conditions.append(table.reason == wanted.reason)
    if wanted.subscriber:
        conditions.append(table.subscriber == wanted.subscriber)
    if wanted.since is not None:
        conditions.append(table.dead_letter_at >= wanted.since)
    if wanted.until is not None:
        conditions.append(table.dead_letter_at < wanted.until)
    if wanted.state is not None:
        conditions.append(table.state == int(wanted.state))
    return conditions


def _first(ids: Sequence[UUID], shown: int = 3) -> str:
    more = f" and {len(ids) - shown} more" if len(ids) > shown else ""
    return ", ".join(map(str, ids[:shown])) + more
