"""What a turn of the shards reads and writes, in the turn's one transaction.

`fence` comes first in every transaction (INV-3): it locks the rows of the shards, in order, and says which of them are
still ours. From then until the commit nobody can raise their epochs; a former owner that wakes up finds another epoch
and changes nothing. The lock also makes a takeover wait for an owner's transaction that is already committing.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from uuid import UUID

from psycopg.types.json import Jsonb

from libs.postgres import Transaction, copy_rows
from services.scheduler.commands import Changes, Entity, Known, Needs, Selection, Tombstone
from services.scheduler.store_rows import COLUMNS, SELECT, TYPES, row_of, timeline_of, timer_of
from services.scheduler.timelines import Timeline
from services.scheduler.timer import Mark, State, Timer, origin_of

_SCHEDULED = int(State.SCHEDULED)
_MILLISECOND = timedelta(milliseconds=1)
_LONGEST_STATEMENT = timedelta(seconds=10)
_KEPT_TIMELINES = 1_000

_TOMBSTONE_COLUMNS = ("tenant", "entity", "sequence", "shard", "origin", "type", "ids", "timeline", "cause")
_TOMBSTONE_TYPES = ("text", "text", "int8", "int4", "text", "text", "uuid[]", "text", "text")

# Waiting timers of entities. The watermark decides what has fired, so it is joined in (a shard's own row).
_WAITING = f"""{SELECT} JOIN shard USING (shard)
    JOIN unnest(%s::text[], %s::text[]) AS asked (tenant, entity) USING (tenant, entity)
    WHERE timer.state IN ({int(State.SCHEDULED)}, {int(State.PAUSED)})
      AND (timer.fire_at, timer.id) > (shard.watermark_at, shard.watermark_id)
    ORDER BY timer.fire_at, timer.id"""

_PAGES = f"""
    SELECT page.* FROM unnest(%s::int[], %s::timestamptz[], %s::uuid[]) AS asked (shard, after_at, after_id),
    LATERAL ({SELECT} WHERE timer.shard = asked.shard AND (timer.fire_at, timer.id) > (asked.after_at, asked.after_id)
        AND timer.state = {_SCHEDULED} ORDER BY timer.fire_at, timer.id LIMIT %s) AS page
    ORDER BY page.shard, page.fire_at, page.id"""  # noqa: S608 - constants of this package.


class TurnStore:
    """The statements of a turn. Timelines never change once stored, so versions seen are kept."""

    def __init__(self) -> None:
        self._timelines: dict[tuple[str, str, int], Timeline] = {}

    async def fence(self, tx: Transaction, epochs: Mapping[int, int], *, longest_pause: timedelta) -> set[int]:
        """Lock the shards that we hold in these epochs until the end of the transaction, and return them.

        `longest_pause`: Postgres ends the transaction when this process stands still in it for longer (in the middle
        of a COPY: for as long as a statement may take); otherwise a stopped process would keep its successors waiting
        at these locks.
        """
        cursor = await tx.raw.execute(
            "SELECT shard, set_config('idle_in_transaction_session_timeout', %s, true),"
            " set_config('statement_timeout', %s, true) FROM shard"
            " JOIN unnest(%s::int[], %s::bigint[]) AS ours (shard, epoch) USING (shard, epoch)"
            " ORDER BY shard FOR NO KEY UPDATE OF shard",
            (
                f"{longest_pause // _MILLISECOND}ms",
                f"{max(2 * longest_pause, _LONGEST_STATEMENT) // _MILLISECOND}ms",
                list(epochs),
                list(epochs.values()),
            ),
        )
        return {row[0] for row in await cursor.fetchall()}

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
                "SELECT tenant, entity, facts FROM facts"
                " JOIN unnest(%s::text[], %s::text[]) AS asked (tenant, entity) USING (tenant, entity)",
                _columns(needs.facts),
            )
            known.facts = {(tenant, entity): facts for tenant, entity, facts in await cursor.fetchall()}
        if needs.newest_timelines:
            known.newest_timelines = await self._newest_timelines(tx, needs.newest_timelines)
        if needs.timelines:
            known.timelines = await self._versions(tx, needs.timelines)
        return known

    async def _existing(self, tx: Transaction, needs: Needs) -> set[UUID]:
        cursor = await tx.raw.execute(
            "SELECT id FROM timer WHERE id = ANY(%(ids)s) UNION SELECT run_id FROM timer WHERE run_id = ANY(%(runs)s)"
            " UNION SELECT schedule_id FROM timer WHERE schedule_id = ANY(%(ids)s) AND schedule_id <> id",
            {"ids": list(needs.ids), "runs": list(needs.runs)},
        )
        return {row[0] for row in await cursor.fetchall()}

    async def _tombstones(self, tx: Transaction, entities: set[Entity]) -> dict[Entity, list[Tombstone]]:
        cursor = await tx.raw.execute(
            "SELECT tenant, entity, sequence, type, ids, timeline, cause FROM tombstone"
            " JOIN unnest(%s::text[], %s::text[]) AS asked (tenant, entity) USING (tenant, entity)",
            _columns(entities),
        )
        found: dict[Entity, list[Tombstone]] = {}
        for tenant, entity, sequence, type_, ids, timeline, cause in await cursor.fetchall():
            selection = Selection(type=type_, ids=frozenset(ids), timeline=timeline)
            found.setdefault((tenant, entity), []).append(
                Tombstone(tenant=tenant, entity=entity, sequence=sequence, selection=selection, cause=cause)
            )
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
        await self._write_states(tx, changes)
        await self._write_tombstones(tx, changes)
        await self._write_facts(tx, changes, now)
        if marks := {one.shard: one.watermark for one in changes if one.watermark is not None}:
            await tx.raw.execute(
                "UPDATE shard SET watermark_at = new.at, watermark_id = new.id"
                " FROM unnest(%s::int[], %s::timestamptz[], %s::uuid[]) AS new (shard, at, id)"
                " WHERE shard.shard = new.shard",
                (list(marks), [mark.at for mark in marks.values()], [mark.id for mark in marks.values()]),
            )

    async def _write_states(self, tx: Transaction, changes: Sequence[Changes]) -> None:
        states = [state for one in changes for state in one.states.values()]
        if states:
            await tx.raw.execute(
                "UPDATE timer SET state = new.state, decided_at = new.at, note = new.note"
                " FROM unnest(%s::uuid[], %s::smallint[], %s::timestamptz[], %s::text[]) AS new (id, state, at, note)"
                " WHERE timer.id = new.id",
                (
                    [state.timer_id for state in states],
                    [int(state.state) for state in states],
                    [state.decided_at for state in states],
                    [state.note for state in states],
                ),
            )

    async def _write_tombstones(self, tx: Transaction, changes: Sequence[Changes]) -> None:
        rows = [
            (
                stone.tenant,
                stone.entity,
                stone.sequence,
                one.shard,
                origin_of(stone.entity),
                stone.selection.type,
                list(stone.selection.ids),
                stone.selection.timeline,
                stone.cause,
            )
            for one in changes
            for stone in one.tombstones
        ]
        if rows:
            await copy_rows(tx, "tombstone", _TOMBSTONE_COLUMNS, rows, types=_TOMBSTONE_TYPES)

    async def _write_facts(self, tx: Transaction, changes: Sequence[Changes], now: datetime) -> None:
        rows = [(*key, one.shard, Jsonb(facts), now) for one in changes for key, facts in one.facts.items()]
        if rows:
            async with tx.raw.cursor() as cursor:
                await cursor.executemany(
                    "INSERT INTO facts (tenant, entity, shard, facts, changed_at) VALUES (%s, %s, %s, %s, %s)"
                    " ON CONFLICT (tenant, entity) DO UPDATE SET"
                    " facts = EXCLUDED.facts, changed_at = EXCLUDED.changed_at",
                    rows,
                )


def _columns(pairs: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    pairs = list(pairs)
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
