"""What the scheduler's API reads, and timelines, which belong to no shard."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import ColumnElement, and_, or_, select, tuple_

from libs.postgres import Database, Transaction
from services.scheduler.queries import Place, ShardSummary, TimerFilter
from services.scheduler.store_rows import COLUMNS, timeline_of, timer_of
from services.scheduler.store_schema import shard as shard_table
from services.scheduler.store_schema import timer as timer_table
from services.scheduler.timelines import Step, Timeline, steps_to_json
from services.scheduler.timer import State, Timer

_COUNTED = 10_000
"""Waiting timers of a shard are counted exactly up to here; a count of millions would cost seconds."""


class QueryStore:
    """Read-only questions; a timer behind its shard's watermark is given as FIRED."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def timer(self, tenant: str, timer_id: UUID) -> Timer | None:
        """The timer, if the tenant has it."""
        return next(iter(await self.timers_by(tenant, "id", timer_id)), None)

    async def timers_by(self, tenant: str, column: str, value: UUID) -> list[Timer]:
        """Timers of a tenant with this id, schedule_id or run_id (`column`), in firing order; at most 1,000."""
        async with self._db.read() as tx:
            condition = and_(timer_table.c.tenant == tenant, timer_table.c[column] == value)
            return await self._select(tx, condition, limit=1_000)

    async def timers(self, wanted: TimerFilter, *, after: Place | None, limit: int) -> list[Timer]:
        """At most `limit` timers in (shard, fire_at, id) order; those of one entity all live in one shard."""
        columns = timer_table.c
        conditions: list[ColumnElement[bool]] = [columns.tenant == wanted.tenant]
        if wanted.entity:
            conditions.append(columns.entity == wanted.entity)
        if wanted.type:
            conditions.append(columns.type == wanted.type)
        if wanted.from_at is not None:
            conditions.append(columns.fire_at >= wanted.from_at)
        if wanted.until_at is not None:
            conditions.append(columns.fire_at < wanted.until_at)
        if wanted.states:
            conditions.append(_in_states(wanted.states))
        if after is not None:
            place = tuple_(columns.shard, columns.fire_at, columns.id)
            conditions.append(place > (after.shard, after.fire_at, after.timer_id))
        async with self._db.read() as tx:
            return await self._select(tx, and_(*conditions), limit=limit)

    async def _select(self, tx: Transaction, condition: ColumnElement[bool], *, limit: int) -> list[Timer]:
        columns = timer_table.c
        query = (
            select(*(columns[name] for name in COLUMNS), _has_fired().label("has_fired"))
            .join(shard_table, shard_table.c.shard == columns.shard)
            .where(condition)
            .order_by(columns.shard, columns.fire_at, columns.id)
            .limit(limit)
        )
        return [timer_of(tuple(row[:-1]), has_fired=row[-1]) for row in await tx.conn.execute(query)]

    async def shards(self, tenant: str, now: datetime) -> list[ShardSummary]:
        """All shards, ascending, with the tenant's waiting timers in each."""
        async with self._db.read() as tx:
            cursor = await tx.raw.execute(
                "SELECT shard.shard, coalesce(holder, ''), epoch, lease_until, watermark_at, pending, due"
                " FROM shard, LATERAL (SELECT count(*) AS pending, count(*) FILTER (WHERE fire_at <= %(now)s) AS due"
                " FROM (SELECT fire_at FROM timer WHERE timer.shard = shard.shard AND tenant = %(tenant)s"
                " AND state = %(scheduled)s AND (fire_at, id) > (watermark_at, watermark_id)"
                " LIMIT %(counted)s) AS waiting) AS counted ORDER BY shard.shard",
                {"now": now, "tenant": tenant, "scheduled": int(State.SCHEDULED), "counted": _COUNTED},
            )
            rows = await cursor.fetchall()
        return [
            ShardSummary(
                number=number,
                holder=holder,
                epoch=epoch,
                lease_until=lease_until,
                watermark_at=watermark_at,
                pending=pending,
                due=due,
            )
            for number, holder, epoch, lease_until, watermark_at, pending, due in rows
        ]

    async def put_timeline(
        self, tenant: str, name: str, description: str, steps: tuple[Step, ...], now: datetime
    ) -> Timeline:
        """Store a timeline as its next version, unless it is the same as the newest; returns what is stored."""
        stored_steps = steps_to_json(steps)
        async with self._db.transaction() as tx:
            # Two callers at once must not both become version 2.
            lock = f"timeline\x1f{tenant}\x1f{name}"
            await tx.raw.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (lock,))
            cursor = await tx.raw.execute(
                "SELECT version, description, steps, created_at, steps = %s::jsonb FROM timeline"
                " WHERE tenant = %s AND name = %s ORDER BY version DESC LIMIT 1",
                (stored_steps, tenant, name),
            )
            newest = await cursor.fetchone()
            if newest is not None and newest[4] and newest[1] == description:
                return timeline_of((name, *newest[:4]))
            version = newest[0] + 1 if newest else 1
            await tx.raw.execute(
                "INSERT INTO timeline (tenant, name, version, description, steps, created_at)"
                " VALUES (%s, %s, %s, %s, %s::jsonb, %s)",
                (tenant, name, version, description, stored_steps, now),
            )
        return Timeline(name=name, version=version, description=description, steps=steps, created_at=now)

    async def timelines(self, tenant: str, name: str, *, after: tuple[str, int] | None, limit: int) -> list[Timeline]:
        """Versions of one timeline, or the newest of each; by name, then version descending."""
        newest = "" if name else "DISTINCT ON (name)"
        after_name, after_version = after or ("", 0)
        async with self._db.read() as tx:
            cursor = await tx.raw.execute(
                f"SELECT {newest} name, version, description, steps, created_at FROM timeline"  # noqa: S608
                " WHERE tenant = %(tenant)s AND (%(name)s = '' OR name = %(name)s)"
                " AND (%(first)s OR name > %(after)s"
                " OR (%(name)s <> '' AND name = %(after)s AND version < %(version)s))"
                " ORDER BY name, version DESC LIMIT %(limit)s",
                {
                    "tenant": tenant,
                    "name": name,
                    "first": after is None,
                    "after": after_name,
                    "version": after_version,
                    "limit": limit,
                },
            )
            return [timeline_of(row) for row in await cursor.fetchall()]


def _has_fired() -> ColumnElement[bool]:
    return and_(
        timer_table.c.state == int(State.SCHEDULED),
        tuple_(timer_table.c.fire_at, timer_table.c.id)
        <= tuple_(shard_table.c.watermark_at, shard_table.c.watermark_id),
    )


def _in_states(states: frozenset[State]) -> ColumnElement[bool]:
    stored = [int(state) for state in states - {State.FIRED, State.SCHEDULED}]
    conditions: list[ColumnElement[bool]] = [timer_table.c.state.in_(stored)]
    if State.FIRED in states:
        conditions.append(_has_fired())
    if State.SCHEDULED in states:
        conditions.append(and_(timer_table.c.state == int(State.SCHEDULED), ~_has_fired()))
    return or_(*conditions)
