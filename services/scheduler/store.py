"""What a turn of the shards reads and writes, in the turn's one transaction.

`fence` comes first in every transaction (INV-3): it locks the rows of the shards, in order, and says which of them are
still ours. From then until the commit nobody can raise their epochs; a former owner that wakes up finds another epoch,
or another holder, and changes nothing. The lock also makes a takeover wait for an owner's transaction that is already
committing.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from operator import attrgetter
from uuid import UUID

from psycopg.types.json import Jsonb

from libs.postgres import Transaction, copy_rows
from services.scheduler.commands import Changes, Entity, Tombstone
from services.scheduler.facts import Facts
from services.scheduler.needs import Known, Needs, Past, Range
from services.scheduler.orders import Action, Order, Selection
from services.scheduler.store_rows import COLUMNS, SELECT, TYPES, row_of, timeline_of, timer_of
from services.scheduler.timelines import Timeline
from services.scheduler.timer import HAS_TURN, Mark, State, Timer, origin_of

_MILLISECOND = timedelta(milliseconds=1)
_LONGEST_STATEMENT = timedelta(seconds=10)
_KEPT_TIMELINES = 1_000

_HAVE_TURN = ", ".join(str(int(state)) for state in sorted(HAS_TURN))

_TOMBSTONE_COLUMNS = (
    *("tenant", "entity", "sequence", "shard", "origin", "action", "type", "ids", "timeline", "cause", "due_at"),
)
_TOMBSTONE_TYPES = (
    *("text", "text", "int8", "int4", "text", "int2", "text", "uuid[]", "text", "text"),
    "timestamptz",
)

# Timers of entities that may still do something: what has a turn to come lies beyond the watermark, and the others are
# on hold. The history, which may be a thousand times as long, is not read: an index scan begins at the watermark of the
# shard, that any timer of the entity tells.
_WAITING = f"""
    SELECT waiting.* FROM unnest(%s::text[], %s::text[]) AS asked (tenant, entity),
    LATERAL (
        {SELECT} WHERE timer.tenant = asked.tenant AND timer.entity = asked.entity AND timer.is_on_hold
        UNION ALL (
        {SELECT}, (SELECT watermark_at, watermark_id FROM shard WHERE shard = (
            SELECT shard FROM timer WHERE tenant = asked.tenant AND entity = asked.entity LIMIT 1)) AS mark
        WHERE timer.tenant = asked.tenant AND timer.entity = asked.entity AND timer.state IN ({_HAVE_TURN})
          AND (timer.fire_at, timer.id) > (mark.watermark_at, mark.watermark_id) OFFSET 0)) AS waiting
    ORDER BY waiting.fire_at, waiting.id"""  # noqa: S608 - constants of this package.

_NEWEST = f"""
    SELECT newest.* FROM unnest(%s::uuid[]) AS asked (schedule_id),
    LATERAL ({SELECT} WHERE timer.schedule_id = asked.schedule_id AND timer.schedule_id <> timer.id
        AND timer.recurrence IS NOT NULL AND timer.nominal_at IS NOT NULL
        ORDER BY timer.nominal_at DESC LIMIT 1) AS newest"""  # noqa: S608

_SIBLINGS = f"{SELECT} WHERE timer.schedule_id = ANY(%s) AND timer.schedule_id <> timer.id AND timer.is_under_way"

_RANGES = f"""
    SELECT asked.number, timer.id, timer.nominal_at, timer.state IN ({int(State.SKIPPED)}, {int(State.EXPIRED)})
    FROM unnest(%s::int[], %s::uuid[], %s::timestamptz[], %s::timestamptz[])
        AS asked (number, schedule_id, after, until)
    JOIN timer ON timer.schedule_id = asked.schedule_id AND timer.schedule_id <> timer.id
        AND timer.nominal_at > asked.after AND timer.nominal_at <= asked.until"""  # noqa: S608

_PAGES = f"""
    SELECT page.* FROM unnest(%s::int[], %s::timestamptz[], %s::uuid[]) AS asked (shard, after_at, after_id),
    LATERAL ({SELECT} WHERE timer.shard = asked.shard AND (timer.fire_at, timer.id) > (asked.after_at, asked.after_id)
        AND timer.state IN ({_HAVE_TURN}) ORDER BY timer.fire_at, timer.id LIMIT %s) AS page
    ORDER BY page.shard, page.fire_at, page.id"""  # noqa: S608 - constants of this package.


_CHANGEABLE = (
    *("id", "state", "fire_at", "due_at", "asks", "holds", "attempts", "first_attempt_at", "last_error", "decided_at"),
    "note",
)
_changeable_of = attrgetter(*_CHANGEABLE[2:])
_ARRAYS = ", ".join(f"%s::{TYPES[COLUMNS.index(column)]}[]" for column in _CHANGEABLE)
_ASSIGNMENTS = ", ".join(f"{column} = new.{column}" for column in _CHANGEABLE[1:])


class TurnStore:
    """The statements of one replica's turns. Timelines never change once stored, so versions seen are kept."""

    def __init__(self, *, replica: str) -> None:
        self._replica = replica
        self._timelines: dict[tuple[str, str, int], Timeline] = {}
        self._server: datetime | None = None
        self._servers: dict[int, tuple[int, datetime]] = {}

    async def fence(self, tx: Transaction, epochs: Mapping[int, int], *, longest_pause: timedelta) -> set[int]:
        """Lock the shards that we hold in these epochs until the end of the transaction, and return them.

        `longest_pause`: Postgres ends the transaction when this process stands still in it for longer (in the middle
        of a COPY: for as long as a statement may take); otherwise a stopped process would keep its successors waiting
        at these locks.

        A shard that was ours on a server that has been started anew since, or on another one, is not any more: after a
        failover to a replica that lagged, the shard's memory would be ahead of its rows, and what it remembers to have
        fired would never fire again. It is taken anew, and read from what there is. Where the failover has lost a
        takeover as well, its epoch comes again: in another's hands the holder tells, in ours the server does, and costs
        one takeover more.
        """
        cursor = await tx.raw.execute(
            "SELECT shard, epoch, pg_postmaster_start_time(),"
            " set_config('idle_in_transaction_session_timeout', %s, true),"
            " set_config('statement_timeout', %s, true) FROM shard"
            " JOIN unnest(%s::int[], %s::bigint[]) AS ours (shard, epoch) USING (shard, epoch) WHERE holder = %s"
            " ORDER BY shard FOR NO KEY UPDATE OF shard",
            (
                f"{longest_pause // _MILLISECOND}ms",
                f"{max(2 * longest_pause, _LONGEST_STATEMENT) // _MILLISECOND}ms",
                list(epochs),
                list(epochs.values()),
                self._replica,
            ),
        )
        return {row[0] for row in await cursor.fetchall() if self._is_same_server(*row[:3])}

    def _is_same_server(self, shard: int, epoch: int, started_at: datetime) -> bool:
        """Whether the shard's transactions in this epoch were all on the server that was started then."""
        if started_at != self._server:
            self._timelines.clear()  # A version of the same number may be another one there.
            self._server = started_at
        known_epoch, known_started_at = self._servers.get(shard, (epoch, started_at))
        if known_epoch == epoch and known_started_at != started_at:
            return False
        self._servers[shard] = epoch, started_at
        return True

    async def pages(self, tx: Transaction, after: Mapping[int, Mark], limit: int) -> dict[int, list[Timer]]:
        """For each shard its next `limit` waiting timers after a mark, in firing order."""
        cursor = await tx.raw.execute(
            _PAGES, (list(after), [mark.at for mark in after.values()], [mark.id for mark in after.values()], limit)
        )
        pages: dict[int, list[Timer]] = {shard: [] for shard in after}
        for row in await cursor.fetchall():
            timer = timer_of(row)
            pages[timer.shard].append(timer)
        return pages

    async def load(self, tx: Transaction, needs: Needs) -> Known:
        """Read what is needed; asks nothing where nothing is needed."""
        known = Known()
        if needs.ids or needs.runs:
            known.ids = await self._existing(tx, needs)
        if needs.tombstones:
            known.tombstones = await self._tombstones(tx, needs.tombstones)
        if needs.waiting:
            cursor = await tx.raw.execute(_WAITING, _columns(needs.waiting))
            for timer in map(timer_of, await cursor.fetchall()):
                known.waiting.setdefault((timer.tenant, timer.entity), []).append(timer)
        if needs.facts:
            cursor = await tx.raw.execute(
                "SELECT tenant, entity, facts, base, recent FROM facts"
                " JOIN unnest(%s::text[], %s::text[]) AS asked (tenant, entity) USING (tenant, entity)",
                _columns(needs.facts),
            )
            for tenant, entity, now, base, recent in await cursor.fetchall():
                patches = tuple((sequence, patch) for sequence, patch in recent)
                known.facts[tenant, entity] = Facts(now=now, base=base, recent=patches)
        if needs.newest_timelines:
            known.newest_timelines = await self._newest_timelines(tx, needs.newest_timelines)
        if needs.timelines:
            known.timelines = await self._versions(tx, needs.timelines)
        await self._load_timers(tx, needs, known)
        return known

    async def _load_timers(self, tx: Transaction, needs: Needs, known: Known) -> None:
        if needs.timers:
            cursor = await tx.raw.execute(f"{SELECT} WHERE id = ANY(%s)", (list(needs.timers),))
            known.timers = {timer.id: timer for timer in map(timer_of, await cursor.fetchall())}
        if needs.schedules:
            cursor = await tx.raw.execute(_NEWEST, (list(needs.schedules),))
            known.schedules = {timer.schedule_id: timer for timer in map(timer_of, await cursor.fetchall())}
        if needs.ranges:
            known.ranges = await self._made_in(tx, list(needs.ranges))
        siblings = needs.siblings | {one.schedule_id for one in known.timers.values() if one.schedule_id != one.id}
        if siblings:
            cursor = await tx.raw.execute(_SIBLINGS, (list(siblings),))
            for timer in map(timer_of, await cursor.fetchall()):
                known.siblings.setdefault(timer.schedule_id, []).append(timer)

    async def _made_in(self, tx: Transaction, ranges: Sequence[Range]) -> dict[Range, list[Past]]:
        numbers = list(range(len(ranges)))
        cursor = await tx.raw.execute(_RANGES, (numbers, *(list(column) for column in zip(*ranges, strict=True))))
        made: dict[Range, list[Past]] = {}
        for number, timer_id, nominal_at, is_over in await cursor.fetchall():
            past = Past(timer_id=timer_id, nominal_at=nominal_at, is_over=is_over)
            made.setdefault(ranges[number], []).append(past)
        return made

    async def _existing(self, tx: Transaction, needs: Needs) -> set[UUID]:
        cursor = await tx.raw.execute(
            "SELECT id FROM timer WHERE id = ANY(%(ids)s) UNION SELECT run_id FROM timer WHERE run_id = ANY(%(runs)s)"
            " UNION SELECT schedule_id FROM timer WHERE schedule_id = ANY(%(ids)s) AND schedule_id <> id",
            {"ids": list(needs.ids), "runs": list(needs.runs)},
        )
        return {row[0] for row in await cursor.fetchall()}

    async def _tombstones(self, tx: Transaction, entities: set[Entity]) -> dict[Entity, list[Tombstone]]:
        cursor = await tx.raw.execute(
            "SELECT tenant, entity, sequence, action, type, ids, timeline, cause, due_at FROM tombstone"
            " JOIN unnest(%s::text[], %s::text[]) AS asked (tenant, entity) USING (tenant, entity)",
            _columns(entities),
        )
        found: dict[Entity, list[Tombstone]] = {}
        for tenant, entity, sequence, action, type_, ids, timeline, cause, due_at in await cursor.fetchall():
            selection = Selection(type=type_, ids=frozenset(ids), timeline=timeline)
            order = Order(action=Action(action), selection=selection, cause=cause, due_at=due_at)
            stone = Tombstone(tenant=tenant, entity=entity, sequence=sequence, order=order)
            found.setdefault((tenant, entity), []).append(stone)
        return found

    async def _newest_timelines(self, tx: Transaction, names: set[tuple[str, str]]) -> dict[tuple[str, str], Timeline]:
        cursor = await tx.raw.execute(
            "SELECT DISTINCT ON (tenant, name) tenant, name, version, description, steps, created_at FROM timeline"
            " JOIN unnest(%s::text[], %s::text[]) AS asked (tenant, name) USING (tenant, name)"
            " ORDER BY tenant, name, version DESC",
            _columns(names),
        )
        return {(row[0], row[1]): timeline_of(row[1:]) for row in await cursor.fetchall()}

    async def _versions(
        self, tx: Transaction, wanted: set[tuple[str, str, int]]
    ) -> dict[tuple[str, str, int], Timeline]:
        if len(self._timelines) > _KEPT_TIMELINES:
            self._timelines.clear()  # INV-9; what is still in use is read again.
        if missing := wanted - self._timelines.keys():
            cursor = await tx.raw.execute(
                "SELECT tenant, name, version, description, steps, created_at FROM timeline"
                " JOIN unnest(%s::text[], %s::text[], %s::int[]) AS asked (tenant, name, version)"
                " USING (tenant, name, version)",
                ([one[0] for one in missing], [one[1] for one in missing], [one[2] for one in missing]),
            )
            for row in await cursor.fetchall():
                self._timelines[(row[0], row[1], row[2])] = timeline_of(row[1:])
        return {one: self._timelines[one] for one in wanted if one in self._timelines}

    async def write(self, tx: Transaction, changes: Sequence[Changes], now: datetime) -> None:
        """Make a turn's decisions true; the caller's transaction also holds the frames they lead to."""
        inserts = [row_of(timer) for one in changes for timer in one.inserts.values()]
        if inserts:
            await copy_rows(tx, "timer", COLUMNS, inserts, types=TYPES)
        await self._write_updates(tx, [timer for one in changes for timer in one.updates.values()])
        if attempts := [one for part in changes for one in part.attempts]:
            await copy_rows(
                tx,
                "attempt",
                ("timer_id", "number", "started_at", "ended_at", "error"),
                [(one.timer_id, one.number, one.started_at, one.ended_at, one.error) for one in attempts],
                types=("uuid", "int2", "timestamptz", "timestamptz", "text"),
            )
        await self._write_tombstones(tx, changes)
        await self._write_facts(tx, changes, now)
        if marks := {one.shard: one.watermark for one in changes if one.watermark is not None}:
            await tx.raw.execute(
                "UPDATE shard SET watermark_at = new.at, watermark_id = new.id"
                " FROM unnest(%s::int[], %s::timestamptz[], %s::uuid[]) AS new (shard, at, id)"
                " WHERE shard.shard = new.shard",
                (list(marks), [mark.at for mark in marks.values()], [mark.id for mark in marks.values()]),
            )

    async def _write_updates(self, tx: Transaction, timers: Sequence[Timer]) -> None:
        """What can change of a timer. Where the firing time stays, no index changes, and the update is heap-only."""
        if timers:
            rows = ((timer.id, int(timer.state), *_changeable_of(timer)) for timer in timers)
            columns = [list(column) for column in zip(*rows, strict=True)]
            await tx.raw.execute(
                f"UPDATE timer SET {_ASSIGNMENTS} FROM unnest({_ARRAYS}) AS new ({', '.join(_CHANGEABLE)})"  # noqa: S608
                " WHERE timer.id = new.id",
                columns,
            )

    async def _write_tombstones(self, tx: Transaction, changes: Sequence[Changes]) -> None:
        rows = [
            (
                stone.tenant,
                stone.entity,
                stone.sequence,
                one.shard,
                origin_of(stone.entity),
                int(stone.order.action),
                stone.order.selection.type,
                list(stone.order.selection.ids),
                stone.order.selection.timeline,
                stone.order.cause,
                stone.order.due_at,
            )
            for one in changes
            for stone in one.tombstones
        ]
        if rows:
            await copy_rows(tx, "tombstone", _TOMBSTONE_COLUMNS, rows, types=_TOMBSTONE_TYPES)

    async def _write_facts(self, tx: Transaction, changes: Sequence[Changes], now: datetime) -> None:
        rows = [
            (*key, one.shard, Jsonb(facts.now), Jsonb(facts.base), Jsonb(facts.recent), now)
            for one in changes
            for key, facts in one.facts.items()
        ]
        if rows:
            async with tx.raw.cursor() as cursor:
                await cursor.executemany(
                    "INSERT INTO facts (tenant, entity, shard, facts, base, recent, changed_at)"
                    " VALUES (%s, %s, %s, %s, %s, %s, %s)"
                    " ON CONFLICT (tenant, entity) DO UPDATE SET"
                    " facts = EXCLUDED.facts, base = EXCLUDED.base, recent = EXCLUDED.recent,"
                    " changed_at = EXCLUDED.changed_at",
                    rows,
                )


def _columns(pairs: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    pairs = list(pairs)
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
