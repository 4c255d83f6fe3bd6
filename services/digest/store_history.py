"""Forgetting what went out or ended long ago (INV-9), while the ledger goes on adding up (INV-6).

Nothing on the hot tables tells how old a row is: an index on what changes would end their HOT updates, and one on what
does not would make every notification dearer. Instead whatever ends is written down once for many: one row of `ended`
names the windows that one transaction closed, or the notifications of one fetch of which something was settled at
once, and says when to look at them again: after the shortest retention of the tenant's types. Who looks then deletes
the items whose own retention is over, and puts the row off until the next of its items' is.

A notification goes with its last item, a window and its digest with theirs. Two replicas may be at two items of one
notification, so notifications are locked, in the order of their ids, before their items are deleted: the later one
sees that none is left.

A retention that is made shorter therefore counts for what ends from then on; what ended before is looked at when it was
to be. One that is made longer counts at once.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from libs.postgres import Transaction
from services.digest.catalog import DEFAULT_RETENTION

_ROWS_AT_ONCE = 50

# How long a tenant keeps what it keeps shortest; of types that are gone, what they had is kept for the default.
_SHORTEST = """
    least(%(default)s, (SELECT min(t.retention) FROM notification_type t WHERE t.tenant = one.tenant))"""

_WINDOWS_ENDED = f"""
    INSERT INTO ended (tenant, ended_at, due_at, window_ids, notification_ids)
    SELECT one.tenant, %(now)s, %(now)s + {_SHORTEST}, array_agg(one.id), '{{}}'
    FROM unnest(%(tenants)s::text[], %(ids)s::uuid[]) AS one (tenant, id) GROUP BY one.tenant"""  # noqa: S608 - a constant.

_SETTLED_AT_ONCE = f"""
    INSERT INTO ended (tenant, ended_at, due_at, window_ids, notification_ids)
    SELECT one.tenant, %(now)s, %(now)s + {_SHORTEST}, '{{}}', array_agg(one.id)
    FROM (SELECT tenant, notification_id AS id, row_number() OVER () / 1000 AS page
        FROM (SELECT DISTINCT tenant, notification_id FROM expansion WHERE state <> 1) AS settled) AS one
    GROUP BY one.tenant, one.page"""  # noqa: S608 - a constant.

_CLAIM = "SELECT id FROM ended WHERE due_at <= %s ORDER BY due_at LIMIT %s FOR UPDATE SKIP LOCKED"

# What was settled at once has no window; it may carry the id of one that was never opened.
_MEMBERS = """
    SELECT found.ended_id, found.place, found.tenant, found.notification_id,
        found.ended_at + coalesce(t.retention, %(default)s) AS over_at
    FROM (
        SELECT e.id AS ended_id, e.ended_at, i.ctid AS place, i.tenant, i.notification_id, i.state
        FROM ended e CROSS JOIN unnest(e.window_ids) AS closed (id)
        JOIN item i ON i.window_id = closed.id AND i.tenant = e.tenant
        WHERE e.id = ANY (%(claimed)s)
        UNION ALL
        SELECT e.id, e.ended_at, i.ctid, i.tenant, i.notification_id, i.state
        FROM ended e CROSS JOIN unnest(e.notification_ids) AS settled (id)
        JOIN item i ON i.tenant = e.tenant AND i.notification_id = settled.id
        LEFT JOIN digest_window w ON w.tenant = i.tenant AND w.id = i.window_id
        WHERE e.id = ANY (%(claimed)s) AND w.id IS NULL
    ) AS found
    JOIN notification n ON n.tenant = found.tenant AND n.id = found.notification_id
    LEFT JOIN notification_type t ON t.tenant = n.tenant AND t.id = n.type
    WHERE found.state <> 1"""

_OVER = f"""
    SELECT place::text, tenant, notification_id FROM ({_MEMBERS}) AS member
    WHERE over_at <= %(now)s LIMIT %(limit)s"""  # noqa: S608 - a constant.

_LOCK_NOTIFICATIONS = """
    SELECT FROM notification WHERE (tenant, id) IN (SELECT * FROM unnest(%s::text[], %s::uuid[]))
    ORDER BY tenant, id FOR UPDATE"""

_FORGET_NOTIFICATIONS = """
    DELETE FROM notification n WHERE (tenant, id) IN (SELECT * FROM unnest(%s::text[], %s::uuid[]))
    AND NOT EXISTS (SELECT FROM item i WHERE i.tenant = n.tenant AND i.notification_id = n.id)"""

# Of those that stay; what the ledger compares must not go down by itself.
_COUNT_DOWN = """
    UPDATE notification n SET items = n.items - gone.items
    FROM unnest(%s::text[], %s::uuid[], %s::int[]) AS gone (tenant, id, items)
    WHERE n.tenant = gone.tenant AND n.id = gone.id"""

_FORGET_WINDOWS = """
    WITH bare AS MATERIALIZED (
        SELECT e.tenant, closed.id FROM ended e CROSS JOIN unnest(e.window_ids) AS closed (id)
        WHERE e.id = ANY (%(claimed)s)
        AND NOT EXISTS (SELECT FROM item i WHERE i.window_id = closed.id AND i.tenant = e.tenant)
    ), parts AS (
        DELETE FROM delivery d USING bare WHERE d.tenant = bare.tenant AND d.digest_id = bare.id
    ), digests AS (
        DELETE FROM digest d USING bare WHERE d.tenant = bare.tenant AND d.id = bare.id RETURNING 1
    ), windows AS (
        DELETE FROM digest_window w USING bare WHERE w.tenant = bare.tenant AND w.id = bare.id AND w.state = 3
        RETURNING 1)
    SELECT (SELECT count(*) FROM digests), (SELECT count(*) FROM windows)"""

_PUT_OFF = f"""
    WITH remaining AS (SELECT ended_id, min(over_at) AS due_at FROM ({_MEMBERS}) AS member GROUP BY ended_id),
    done AS (
        DELETE FROM ended WHERE id = ANY (%(claimed)s) AND id NOT IN (SELECT ended_id FROM remaining))
    UPDATE ended SET due_at = remaining.due_at FROM remaining WHERE ended.id = remaining.ended_id"""  # noqa: S608 - a constant.

_FORGET_RUNS = """
    DELETE FROM batch_run WHERE (tenant, batch, window_end_at) IN (
        SELECT tenant, batch, window_end_at FROM batch_run WHERE ran_at <= %s
        ORDER BY ran_at LIMIT %s FOR UPDATE SKIP LOCKED)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """What one transaction deleted; `is_all` when nothing else was due."""

    items: int = 0
    notifications: int = 0
    windows: int = 0
    digests: int = 0
    is_all: bool = True


async def windows_ended(tx: Transaction, windows: Sequence[tuple[str, UUID]], *, now: datetime) -> None:
    """Write down that windows, as (tenant, id), have closed. Whoever closes one must say so, or it is kept for ever."""
    if windows:
        tenants, ids = zip(*windows, strict=True)
        values = {"now": now, "default": DEFAULT_RETENTION, "tenants": list(tenants), "ids": list(ids)}
        await tx.raw.execute(_WINDOWS_ENDED, values)


async def settled_at_once(tx: Transaction, *, now: datetime) -> None:
    """Write down the notifications of the expansion under way of which something is suppressed, cancelled, expired."""
    await tx.raw.execute(_SETTLED_AT_ONCE, {"now": now, "default": DEFAULT_RETENTION})


async def forget(tx: Transaction, *, now: datetime, limit: int) -> Forgotten:
    """Delete at most `limit` items that are over, and what goes with them; replicas skip each other's rows."""
    # What is lost with a crash is deleted again.
    await tx.raw.execute("SET LOCAL synchronous_commit = off")
    claimed = [row[0] for row in await (await tx.raw.execute(_CLAIM, (now, _ROWS_AT_ONCE))).fetchall()]
    if not claimed:
        return Forgotten()
    values = {"claimed": claimed, "default": DEFAULT_RETENTION, "now": now, "limit": limit}
    over = await (await tx.raw.execute(_OVER, values)).fetchall()
    gone = Counter((tenant, one_id) for _, tenant, one_id in over)
    named = [[tenant for tenant, _ in gone], [one_id for _, one_id in gone]]
    await tx.raw.execute(_LOCK_NOTIFICATIONS, named)
    items = await tx.raw.execute("DELETE FROM item WHERE ctid = ANY (%s::tid[])", ([row[0] for row in over],))
    notifications = await tx.raw.execute(_FORGET_NOTIFICATIONS, named)
    if notifications.rowcount < len(gone):
        await tx.raw.execute(_COUNT_DOWN, [*named, list(gone.values())])
    digests = windows = 0
    if len(over) < limit:
        row = await (await tx.raw.execute(_FORGET_WINDOWS, values)).fetchone()
        assert row is not None
        digests, windows = row
        await tx.raw.execute(_PUT_OFF, values)
    return Forgotten(
        items=items.rowcount, notifications=notifications.rowcount, windows=windows, digests=digests, is_all=False
    )


async def forget_batch_runs(tx: Transaction, *, before: datetime, limit: int) -> int:
    """Delete at most `limit` runs of batches that ran up to `before`; returns how many."""
    return (await tx.raw.execute(_FORGET_RUNS, (before, limit))).rowcount
