"""What the scheduler's API reads, and timelines, which belong to no shard.

A list of the whole tenant is merged from all shards: each gives its next page's worth in firing order, which is one
index scan, and the first of those are the page. Pages are limited in bytes as well, in Postgres: what does not fit
never gets here. So deep pages cost what the first one does, and large targets no memory. What the scan passes over is
read, though: other tenants' timers, and those that services set for themselves, as for every window that is open.
"""

from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    Column,
    ColumnElement,
    LargeBinary,
    Select,
    Subquery,
    Text,
    and_,
    cast,
    func,
    literal,
    not_,
    or_,
    select,
    true,
    tuple_,
)

from libs.postgres import Database
from services.scheduler.attempts import EndedAttempt
from services.scheduler.queries import About, Page, Place, ShardSummary, TimerFilter
from services.scheduler.store_rows import COLUMNS, steps_json, timeline_of, timer_of
from services.scheduler.store_schema import attempt, shard, timer
from services.scheduler.timelines import Step, Timeline
from services.scheduler.timer import HAS_TURN, INTERNAL_PREFIX, UNDER_WAY, State, Timer

_COUNTED = 10_000
"""Waiting timers of a shard are counted exactly up to here; a count of millions would cost seconds."""

_MOST_ATTEMPTS = 1_000
_MESSAGE_BYTES = 512
"""What a timer's message takes at most besides what `_SIZE` adds up: ids, instants, policies, tags."""


class QueryStore:
    """Read-only questions; a timer behind its shard's watermark is given as FIRED."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def timer(self, tenant: str, timer_id: UUID) -> Timer | None:
        """The timer, if the tenant has it."""
        query = _select_all().where(timer.c.tenant == tenant, timer.c.id == timer_id)
        return next(iter(await self._timers(query)), None)

    async def timers(self, wanted: TimerFilter, *, after: Place | None, limit: int, most_bytes: int) -> Page[Timer]:
        """The timers after a place: at most `limit`, and no more than take `most_bytes` as messages, but one always."""
        turns = _turns(_conditions(wanted, after), is_of_entity=bool(wanted.entity), limit=limit + 1)
        order = (turns.c.fire_at, turns.c.id)
        rows = (
            select(
                *(timer.c[name] for name in COLUMNS),
                turns.c.has_fired,
                func.row_number().over(order_by=order).label("number"),
                func.sum(_SIZE).over(order_by=order).label("bytes"),
                func.count().over().label("found"),
            )
            .join(turns, turns.c.id == timer.c.id)
            .subquery()
        )
        fits = or_(rows.c.number == 1, and_(rows.c.number <= limit, rows.c.bytes <= most_bytes))
        async with self._db.read() as tx:
            found = (await tx.conn.execute(select(rows).where(fits).order_by(rows.c.fire_at, rows.c.id))).all()
        width = len(COLUMNS)
        timers = [timer_of(tuple(row[:width]), has_fired=row.has_fired) for row in found]
        return Page(items=timers, is_last=not found or len(found) == found[0].found)

    async def timers_near(
        self, tenant: str, about: About, value: str | UUID, *, now: datetime, most: int
    ) -> list[Timer]:
        """Timers without their targets, in firing order: the last `most` up to now, and the next `most` after it."""
        conditions = [timer.c.tenant == tenant, timer.c[about] == value]
        if about == "schedule_id":
            conditions.append(timer.c.schedule_id != timer.c.id)  # What the index holds; one-shots are found by id.
        query = _select_all(without_target=True).where(*conditions).limit(most)
        past = query.where(timer.c.fire_at <= now).order_by(timer.c.fire_at.desc(), timer.c.id.desc())
        upcoming = query.where(timer.c.fire_at > now).order_by(timer.c.fire_at, timer.c.id)
        return [*reversed(await self._timers(past)), *await self._timers(upcoming)]

    async def _timers(self, query: Select[Any]) -> list[Timer]:
        async with self._db.read() as tx:
            return [timer_of(tuple(row[:-1]), has_fired=row[-1]) for row in await tx.conn.execute(query)]

    async def under_way(self, tenant: str, schedule_ids: Collection[UUID]) -> dict[UUID, list[UUID]]:
        """Per schedule its occurrences that others may have to wait for."""
        states = [int(state) for state in UNDER_WAY - {State.BUFFERED}]
        query = select(timer.c.schedule_id, timer.c.id).where(
            timer.c.tenant == tenant,
            timer.c.schedule_id.in_(schedule_ids),
            timer.c.schedule_id != timer.c.id,
            timer.c.state.in_(states),
        )
        found: dict[UUID, list[UUID]] = {}
        async with self._db.read() as tx:
            for schedule_id, timer_id in await tx.conn.execute(query.order_by(timer.c.id)):
                found.setdefault(schedule_id, []).append(timer_id)
        return found

    async def attempts(self, tenant: str, timer_ids: Collection[UUID]) -> dict[UUID, list[EndedAttempt]]:
        """Per timer its ended attempts, ascending; of all of them the last 1,000."""
        query = (
            select(attempt)
            .join(timer, timer.c.id == attempt.c.timer_id)
            .where(timer.c.tenant == tenant, attempt.c.timer_id.in_(timer_ids))
            .order_by(attempt.c.ended_at.desc(), attempt.c.number.desc())
            .limit(_MOST_ATTEMPTS)
        )
        found: dict[UUID, list[EndedAttempt]] = {}
        async with self._db.read() as tx:
            for row in reversed((await tx.conn.execute(query)).mappings().all()):
                one = EndedAttempt(**row)
                found.setdefault(one.timer_id, []).append(one)
        return {timer_id: sorted(ended, key=lambda one: one.number) for timer_id, ended in found.items()}

    async def shards(self, tenant: str, now: datetime) -> list[ShardSummary]:
        """All shards, ascending, with the tenant's waiting timers in each."""
        async with self._db.read() as tx:
            cursor = await tx.raw.execute(
                "SELECT shard.shard, coalesce(holder, ''), epoch, lease_until, watermark_at, pending, due, internal"
                " FROM shard, LATERAL (SELECT count(*) AS pending, count(*) FILTER (WHERE fire_at <= %(now)s) AS due,"
                " count(*) FILTER (WHERE starts_with(entity, %(internal)s)) AS internal"
                " FROM (SELECT fire_at, entity FROM timer WHERE timer.shard = shard.shard AND tenant = %(tenant)s"
                " AND state = ANY(%(states)s) AND (fire_at, id) > (watermark_at, watermark_id)"
                " ORDER BY fire_at, id LIMIT %(counted)s) AS waiting) AS counted ORDER BY shard.shard",
                {
                    "now": now,
                    "tenant": tenant,
                    "states": [int(state) for state in HAS_TURN],
                    "counted": _COUNTED,
                    "internal": INTERNAL_PREFIX,
                },
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
                pending_internal=internal,
            )
            for number, holder, epoch, lease_until, watermark_at, pending, due, internal in rows
        ]

    async def put_timeline(
        self, tenant: str, name: str, description: str, steps: tuple[Step, ...], now: datetime
    ) -> Timeline:
        """Store a timeline as its next version, unless it is the same as the newest; returns what is stored."""
        stored_steps = steps_json(steps)
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

    async def timelines(
        self, tenant: str, name: str, *, after: tuple[str, int] | None, limit: int, most_bytes: int
    ) -> Page[Timeline]:
        """Versions of one timeline, or the newest of each; by name, then version descending. Limited as `timers`."""
        newest = "" if name else "DISTINCT ON (name)"
        after_name, after_version = after or ("", 0)
        async with self._db.read() as tx:
            cursor = await tx.raw.execute(
                "SELECT name, version, description, steps, created_at, found FROM ("  # noqa: S608
                " SELECT *, count(*) OVER () AS found, row_number() OVER in_order AS number,"
                "  sum(octet_length(steps::text) + octet_length(description) + 512) OVER in_order AS bytes"
                f" FROM (SELECT {newest} * FROM timeline"
                "  WHERE tenant = %(tenant)s AND (%(name)s = '' OR name = %(name)s)"
                "  AND (%(first)s OR name > %(after)s"
                "  OR (%(name)s <> '' AND name = %(after)s AND version < %(version)s))"
                "  ORDER BY name, version DESC LIMIT %(limit)s + 1) AS listed"
                " WINDOW in_order AS (ORDER BY name, version DESC)) AS measured"
                " WHERE number = 1 OR (number <= %(limit)s AND bytes <= %(most_bytes)s) ORDER BY name, version DESC",
                {
                    "tenant": tenant,
                    "name": name,
                    "first": after is None,
                    "after": after_name,
                    "version": after_version,
                    "limit": limit,
                    "most_bytes": most_bytes,
                },
            )
            rows = await cursor.fetchall()
        return Page(items=[timeline_of(row[:5]) for row in rows], is_last=not rows or len(rows) == rows[0][5])


def _turns(conditions: Iterable[ColumnElement[bool]], *, is_of_entity: bool, limit: int) -> Subquery:
    """(id, fire_at, has_fired) of the first `limit` timers in firing order.

    An entity's timers are found by the entity. A tenant's are not sorted but merged: every shard gives its first ones.
    """
    turns = select(timer.c.id, timer.c.fire_at, _has_fired().label("has_fired")).where(
        timer.c.shard == shard.c.shard, *conditions
    )
    if is_of_entity:
        return turns.order_by(timer.c.fire_at, timer.c.id).limit(limit).subquery()
    of_shard = turns.correlate(shard).order_by(timer.c.fire_at, timer.c.id).limit(limit).lateral()
    merged = select(of_shard).select_from(shard.join(of_shard, true()))
    return merged.order_by(of_shard.c.fire_at, of_shard.c.id).limit(limit).subquery()


def _conditions(wanted: TimerFilter, after: Place | None) -> list[ColumnElement[bool]]:
    columns = timer.c
    conditions: list[ColumnElement[bool]] = [columns.tenant == wanted.tenant]
    if wanted.entity:
        conditions.append(columns.entity == wanted.entity)
    elif not wanted.is_internal_wanted:
        conditions.append(not_(func.starts_with(columns.entity, INTERNAL_PREFIX)))
    if wanted.type:
        conditions.append(columns.type == wanted.type)
    if wanted.from_at is not None:
        conditions.append(columns.fire_at >= wanted.from_at)
    if wanted.until_at is not None:
        conditions.append(columns.fire_at < wanted.until_at)
    if wanted.states:
        conditions.append(_is_in(wanted.states))
    if after is not None:
        conditions.append(tuple_(after.fire_at, after.timer_id) < _MARK)
    return conditions


def _select_all(*, without_target: bool = False) -> Select[Any]:
    """Timers as `timer_of` reads them, and whether they have fired."""

    def column(name: str) -> Column[Any] | ColumnElement[Any]:
        return literal(b"", LargeBinary) if without_target and name == "target" else timer.c[name]

    return select(*map(column, COLUMNS), _has_fired().label("has_fired")).join(shard, shard.c.shard == timer.c.shard)


_MARK = tuple_(timer.c.fire_at, timer.c.id)
_WATERMARK = tuple_(shard.c.watermark_at, shard.c.watermark_id)
_SIZE = sum(
    (
        func.coalesce(func.octet_length(part), 0)
        for part in (
            *(timer.c.target, timer.c.entity, timer.c.type, timer.c.condition, timer.c.note, timer.c.last_error),
            *(timer.c.step, cast(timer.c.recurrence, Text), cast(timer.c.asked, Text)),
        )
    ),
    literal(_MESSAGE_BYTES),
)
"""An upper bound of a timer's message, in bytes; as JSON everything is longer than in protobuf."""


def _has_fired() -> ColumnElement[bool]:
    return and_(timer.c.state == int(State.SCHEDULED), _MARK <= _WATERMARK)


def _is_in(states: frozenset[State]) -> ColumnElement[bool]:
    """What has a turn to come lies beyond the watermark: where only that is wanted, no index scan begins before it."""
    if states <= HAS_TURN:
        return and_(timer.c.state.in_([int(state) for state in states]), _MARK > _WATERMARK)
    alternatives: list[ColumnElement[bool]] = []
    if stored := [int(state) for state in states - {State.FIRED, State.SCHEDULED}]:
        alternatives.append(timer.c.state.in_(stored))
    if State.FIRED in states:
        alternatives.append(_has_fired())
    if State.SCHEDULED in states:
        alternatives.append(and_(timer.c.state == int(State.SCHEDULED), _MARK > _WATERMARK))
    return or_(*alternatives)
