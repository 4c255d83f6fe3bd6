"""What closes windows and empties them: timers, batch triggers, cancels, changes of zone, deleted subscribers.

Locks are taken in one order everywhere, so that nobody waits crosswise: entities (advisory), then windows by id (all
rolling ones after the others), then their items. Whoever changes an item that waits holds its window; so a renderer
and a cancel never see half of each other.

Entities' locks: an expansion holds those of its notifications shared, a cancel its own exclusively. So a cancel waits
for the expansions under way and sees their items, and those that come later see its tombstone (INV-4). They are
hashed to a few buckets, because a frame may hold a thousand entities and Postgres's lock table is small.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

from libs.ids import new_id
from libs.postgres import Transaction
from libs.sharding import shard_of
from libs.trace_points import NOWHERE
from services.digest import store_history
from services.digest.boundaries import Boundaries
from services.digest.commands import (
    Cancel,
    Cancelled,
    Close,
    Notification,
    Outcome,
    Trigger,
    Triggered,
    WindowTimer,
    Woken,
)
from services.digest.store_expansion import local_rule

_BUCKETS = 64
_TRIES = 5
_TRIGGERED_AT_ONCE = 50_000
_LOCK_CLASS = 0x0C41  # Ours among the advisory locks of this database.

_LOCK = """
    SELECT CASE WHEN is_exclusive THEN pg_advisory_xact_lock(%s, bucket)::text
        ELSE pg_advisory_xact_lock_shared(%s, bucket)::text END
    FROM unnest(%s::int[], %s::boolean[]) AS wanted (bucket, is_exclusive)"""

_MATCHING = """
    SELECT c.number, i.tenant, i.notification_id, i.subscriber, i.choice, i.state, i.window_id
    FROM unnest(%(tenants)s::text[], %(entities)s::text[], %(types)s::text[], %(timers)s::text[], %(timelines)s::text[],
        %(sequences)s::bigint[]) WITH ORDINALITY AS c (tenant, entity, type, timer_ids, timeline, sequence, number)
    JOIN notification n ON n.tenant = c.tenant AND n.entity = c.entity AND n.entity <> ''
        AND n.sequence < c.sequence AND c.type IN ('', n.type, n.timer_type) AND c.timeline IN ('', n.timeline)
        AND (c.timer_ids = '{}' OR c.timer_ids::uuid[] && ARRAY[n.timer_id, n.schedule_id])
    JOIN item i ON i.tenant = n.tenant AND i.notification_id = n.id"""

# What is locked is seen as it is by then: false, if a window closed while its lock was waited for.
_LOCK_MATCHING = (
    "WITH matching AS MATERIALIZED ("  # noqa: S608 - put together from constants.
    + _MATCHING
    + """), locked AS MATERIALIZED (
        SELECT FROM digest_window w
        WHERE (w.tenant, w.id) IN (SELECT tenant, window_id FROM matching WHERE state = 1) AND w.state < 3
        ORDER BY w.kind = 4, w.id FOR NO KEY UPDATE OF w)
    SELECT (SELECT count(*) FROM locked) = (SELECT count(DISTINCT window_id) FROM matching WHERE state = 1)"""
)

_CANCEL = (
    "WITH matching AS MATERIALIZED ("  # noqa: S608 - put together from constants.
    + _MATCHING
    + """), gone AS (
        UPDATE item i SET state = 5, changed_at = %(now)s
        FROM (SELECT DISTINCT tenant, notification_id, subscriber, choice FROM matching WHERE state = 1) AS m
        WHERE i.tenant = m.tenant AND i.notification_id = m.notification_id AND i.subscriber = m.subscriber
        AND i.choice = m.choice AND i.state = 1
        RETURNING i.tenant, i.notification_id, i.subscriber, i.choice)
    SELECT number,
        count(*) FILTER (WHERE state = 1 AND is_first AND EXISTS (
            SELECT FROM gone g WHERE g.tenant = m.tenant AND g.notification_id = m.notification_id
            AND g.subscriber = m.subscriber AND g.choice = m.choice)),
        count(*) FILTER (WHERE state IN (2, 3))
    FROM (SELECT *, number = min(number) OVER (PARTITION BY tenant, notification_id, subscriber, choice) AS is_first
        FROM matching) AS m
    GROUP BY number"""
)

# An array, because how many ids are below one the planner can only guess, and guesses most of the table.
_FORGET = """
    DELETE FROM tombstone WHERE id = ANY (ARRAY(
        SELECT id FROM (SELECT id, recorded_at FROM tombstone ORDER BY id LIMIT %s) AS oldest
        WHERE recorded_at < clock_timestamp() - %s))"""

_BURY = """
    INSERT INTO tombstone (tenant, entity, type, timer_ids, timeline, sequence)
    SELECT tenant, entity, type, timer_ids::uuid[], timeline, sequence
    FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::bigint[])
        AS c (tenant, entity, type, timer_ids, timeline, sequence)"""

# The due time that counts is the one the window has once it is locked. A rolling one that is due later asks again.
_CLOSE = """
    WITH woken AS MATERIALIZED (
        SELECT w.tenant, w.id, w.kind, w.is_held, w.due_at, c.due_at AS asked_at, c.trace
        FROM digest_window w
        JOIN unnest(%s::text[], %s::uuid[], %s::timestamptz[], %s::bytea[]) AS c (tenant, id, due_at, trace)
            ON w.tenant = c.tenant AND w.id = c.id
        WHERE w.state = 1 OR w.state = 2 AND w.is_held ORDER BY w.kind = 4, w.id FOR NO KEY UPDATE OF w
    ), closing AS (
        UPDATE digest_window w SET state = 2, is_held = false, trace = coalesce(d.trace, w.trace) FROM woken d
        WHERE w.tenant = d.tenant AND w.id = d.id AND d.due_at <= d.asked_at
        RETURNING d.kind = 3 AND NOT d.is_held AS is_of_batch
    ), again AS (
        SELECT DISTINCT ON (tenant, id) tenant, id, due_at, trace FROM woken
        WHERE kind = 4 AND due_at > asked_at AND NOT is_held)
    SELECT total.windows, again.* FROM (SELECT count(*) AS windows FROM closing WHERE is_of_batch) AS total
    LEFT JOIN again ON true"""

# Some at a time: what closes a million windows at once takes longer than a statement may.
_TRIGGER = """
    WITH due AS MATERIALIZED (
        SELECT tenant, id FROM digest_window
        WHERE tenant = %(tenant)s AND batch = %(batch)s AND batch <> '' AND state = 1 AND opened_at <= %(end)s
        ORDER BY id LIMIT %(most)s FOR NO KEY UPDATE
    ), closing AS (
        UPDATE digest_window w SET state = 2, trace = coalesce(%(trace)s, w.trace) FROM due
        WHERE w.tenant = due.tenant AND w.id = due.id AND w.state = 1
        RETURNING 1)
    UPDATE batch_run SET windows = windows + (SELECT count(*) FROM closing)
    WHERE tenant = %(tenant)s AND batch = %(batch)s AND window_end_at = %(end)s
    RETURNING windows"""

_OPEN_ALIGNED = """
    SELECT w.id, w.subscriber, w.cadence, w.channel, w.format, w.style, w.rule, w.due_at
    FROM digest_window w
    WHERE w.tenant = %s AND w.subscriber = ANY (%s) AND w.state = 1 AND w.kind = 2 ORDER BY w.id FOR NO KEY UPDATE"""

# Away first, because the unique index is checked row by row: a window may move to where another one is about to leave.
_LEAVE = """
    UPDATE digest_window w SET slot_at = timestamptz 'epoch' + m.number * interval '1 microsecond'
    FROM unnest(%s::uuid[]) WITH ORDINALITY AS m (id, number) WHERE w.tenant = %s AND w.id = m.id"""
_ARRIVE = """
    UPDATE digest_window w SET slot_at = m.due_at, due_at = m.due_at
    FROM unnest(%s::uuid[], %s::timestamptz[]) AS m (id, due_at) WHERE w.tenant = %s AND w.id = m.id"""

# All that are not closed are locked, because open ones may be moved next: one order for both. None, if none is held.
_RELEASE = """
    WITH theirs AS MATERIALIZED (
        SELECT tenant, id, is_held FROM digest_window
        WHERE tenant = %(tenant)s AND subscriber = ANY (%(subscribers)s) AND state < 3 AND EXISTS (
            SELECT FROM digest_window
            WHERE tenant = %(tenant)s AND subscriber = ANY (%(subscribers)s) AND state = 2 AND is_held)
        ORDER BY kind = 4, id FOR NO KEY UPDATE)
    UPDATE digest_window w SET is_held = false FROM theirs t WHERE w.tenant = t.tenant AND w.id = t.id AND t.is_held"""

_SUPPRESS = """
    UPDATE item SET state = 4, reason = 'subscriber_deleted', changed_at = %(now)s
    WHERE tenant = %(tenant)s AND state = 1 AND window_id IN (
        SELECT id FROM digest_window WHERE tenant = %(tenant)s AND subscriber = %(subscriber)s AND state < 3
        ORDER BY kind = 4, id FOR NO KEY UPDATE)"""


async def lock_entities(tx: Transaction, notifications: Sequence[Notification], cancels: Sequence[Cancel]) -> None:
    """Take the entities' locks for this transaction: shared for notifications, exclusive for cancels."""
    modes = {_bucket(one.tenant, one.entity): False for one in notifications if one.entity}
    modes |= {_bucket(one.tenant, one.entity): True for one in cancels}
    if modes:
        wanted = sorted(modes)
        await tx.raw.execute(_LOCK, (_LOCK_CLASS, _LOCK_CLASS, wanted, [modes[bucket] for bucket in wanted]))


def _bucket(tenant: str, entity: str) -> int:
    return shard_of(tenant, entity, _BUCKETS)


async def cancel(tx: Transaction, cancels: Sequence[Cancel], *, now: datetime) -> list[Cancelled]:
    """Take matching items out of windows and leave tombstones (INV-4); one answer per cancel, in order.

    An item that several cancels match counts for the first. The caller holds their entities' locks.
    """
    arrays = {
        "tenants": [one.tenant for one in cancels],
        "entities": [one.entity for one in cancels],
        "types": [one.type for one in cancels],
        "timers": ["{" + ",".join(map(str, one.timer_ids)) + "}" for one in cancels],
        "timelines": [one.timeline for one in cancels],
        "sequences": [one.sequence for one in cancels],
    }
    await tx.raw.execute(_BURY, tuple(arrays.values()))
    await _lock_matching(tx, arrays)
    rows = await (await tx.raw.execute(_CANCEL, arrays | {"now": now})).fetchall()
    hits = {number: Cancelled(items=items, already_left=left) for number, items, left in rows}
    return [hits.get(number, Cancelled()) for number in range(1, len(cancels) + 1)]


async def _lock_matching(tx: Transaction, arrays: Mapping[str, object]) -> None:
    """Lock the windows that matching items wait in, also those they were moved to while locks were waited for.

    These are the only locks out of order. To let all go first would keep it, but then a cancel might never get through
    a herd that is closing; who waits crosswise with it comes again. And no more tries than a few: an item that waits
    in a closed window, which the ledger would tell, must not keep a cancel from being applied.
    """
    for _ in range(_TRIES):
        if await (await tx.raw.execute(_LOCK_MATCHING, arrays)).fetchone() == (True,):
            return


async def close(tx: Transaction, closes: Sequence[Close]) -> Woken:
    """Begin to close windows whose timers have fired; says which of them now want to be woken later.

    Those closed before are left alone, and so are those moved to a later time. Further items move rolling windows
    without asking for a timer each time, so that is done here; a timer that comes twice asks for the same one.
    """
    rows = await (
        await tx.raw.execute(
            _CLOSE,
            (
                *([one.tenant for one in closes], [one.window_id for one in closes], [one.due_at for one in closes]),
                [one.trace or None for one in closes],
            ),
        )
    ).fetchall()
    again = [
        WindowTimer(tenant=tenant, window_id=window_id, due_at=due, trace=trace or NOWHERE)
        for _, tenant, window_id, due, trace in rows
        if tenant
    ]
    return Woken(again=again, batch_windows=rows[0][0])


async def trigger(tx: Transaction, run: Trigger, *, now: datetime) -> Triggered:
    """Begin to close a batch's windows, once per (batch, end of the logical window)."""
    cursor = await tx.raw.execute(
        "INSERT INTO batch_run (tenant, batch, window_end_at, window_start_at, ran_at, windows)"
        " VALUES (%s, %s, %s, %s, %s, 0) ON CONFLICT DO NOTHING",
        (run.tenant, run.batch, run.end_at, run.start_at, now),
    )
    if not cursor.rowcount:
        return Triggered(is_repeated=True)
    given = {"tenant": run.tenant, "batch": run.batch, "end": run.end_at, "trace": run.trace or None}
    windows, before = 0, -_TRIGGERED_AT_ONCE
    while windows - before >= _TRIGGERED_AT_ONCE:
        row = await (await tx.raw.execute(_TRIGGER, given | {"most": _TRIGGERED_AT_ONCE})).fetchone()
        assert row is not None
        before, windows = windows, row[0]
    return Triggered(windows=windows)


async def record_outcomes(tx: Transaction, outcomes: Sequence[Outcome]) -> None:
    """Keep what the dispatcher says became of deliveries; for one delivery what happened last counts."""
    by_time = sorted(outcomes, key=lambda one: one.ended_at or datetime.min.replace(tzinfo=UTC))
    latest = {(one.tenant, one.digest_id, one.delivery_id): one for one in by_time}
    rows = [latest[key] for key in sorted(latest)]
    await tx.raw.execute(
        "UPDATE delivery d SET outcome = o.outcome, reason = o.reason, ended_at = o.ended_at"
        " FROM unnest(%s::text[], %s::uuid[], %s::uuid[], %s::text[], %s::text[], %s::timestamptz[])"
        " AS o (tenant, digest_id, id, outcome, reason, ended_at)"
        " WHERE d.tenant = o.tenant AND d.digest_id = o.digest_id AND d.id = o.id"
        " AND (d.ended_at IS NULL OR o.ended_at >= d.ended_at)",
        (
            *([one.tenant for one in rows], [one.digest_id for one in rows], [one.delivery_id for one in rows]),
            *([one.outcome for one in rows], [one.reason for one in rows], [one.ended_at for one in rows]),
        ),
    )


async def move_windows(
    tx: Transaction, tenant: str, zones: Mapping[str, str], *, now: datetime, boundaries: Boundaries
) -> list[WindowTimer]:
    """Move subscribers' open aligned windows to the next boundary in their new zones; returns the timers to ask for.

    `zones` maps subscribers to zones. Windows with a zone of their own stay. Windows that fall together become one.
    """
    rows = await (await tx.raw.execute(_OPEN_ALIGNED, (tenant, list(zones)))).fetchall()
    kept: dict[tuple[object, ...], UUID] = {}
    moved: dict[UUID, datetime] = {}
    merged: dict[UUID, UUID] = {}
    for window_id, *key, rule, due in sorted(rows, key=lambda row: row[6] != ""):  # Those that stay come first.
        if rule:
            due = boundaries.after(local_rule(rule, zones[key[0]]), now) or due
        if (*key, due) in kept:
            merged[window_id] = kept[*key, due]
            continue
        kept[*key, due] = window_id
        if rule:
            moved[window_id] = due
    await _merge(tx, tenant, merged, now=now)
    await _move(tx, tenant, moved)
    return [
        WindowTimer(tenant=tenant, window_id=window_id, due_at=due, own_id=new_id()) for window_id, due in moved.items()
    ]


async def release_windows(tx: Transaction, tenant: str, subscribers: Sequence[str]) -> int:
    """Let what quiet hours hold be looked at again, since hours or zone may have changed; returns how many windows."""
    cursor = await tx.raw.execute(_RELEASE, {"tenant": tenant, "subscribers": list(subscribers)})
    return cursor.rowcount


async def _merge(tx: Transaction, tenant: str, merged: Mapping[UUID, UUID], *, now: datetime) -> None:
    if not merged:
        return
    await tx.raw.execute(
        "UPDATE item i SET window_id = m.target FROM unnest(%s::uuid[], %s::uuid[]) AS m (source, target)"
        " WHERE i.window_id = m.source AND i.tenant = %s",
        (list(merged), list(merged.values()), tenant),
    )
    await tx.raw.execute(
        "UPDATE digest_window SET state = 3, closed_at = %s WHERE tenant = %s AND id = ANY (%s)",
        (now, tenant, list(merged)),
    )
    await store_history.windows_ended(tx, [(tenant, window_id) for window_id in merged], now=now)


async def _move(tx: Transaction, tenant: str, moved: Mapping[UUID, datetime]) -> None:
    if moved:
        await tx.raw.execute(_LEAVE, (list(moved), tenant))
        await tx.raw.execute(_ARRIVE, (list(moved), list(moved.values()), tenant))


async def suppress_subscriber(tx: Transaction, tenant: str, subscriber: str, *, now: datetime) -> int:
    """Suppress what waits for a subscriber who is being deleted; its windows close empty in their time."""
    cursor = await tx.raw.execute(_SUPPRESS, {"tenant": tenant, "subscriber": subscriber, "now": now})
    return cursor.rowcount


async def forget_tombstones(tx: Transaction, retention: timedelta, *, limit: int) -> int:
    """Delete those of the `limit` oldest tombstones that no entry can meet any more; returns how many.

    Their ids are in the order of their ages, so nothing needs to look at all of them.
    """
    cursor = await tx.raw.execute(_FORGET, (limit, retention))
    return cursor.rowcount


async def next_sequence(tx: Transaction) -> int:
    """The number of what this transaction sends."""
    row = await (await tx.raw.execute("SELECT nextval('command_seq')")).fetchone()
    assert row is not None
    return int(row[0])
