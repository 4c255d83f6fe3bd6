"""What Postgres tells about windows, digests, single items and the whole ledger. Reads only."""

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from libs.postgres import Transaction
from services.digest.catalog import Channel, ItemState, WindowState
from services.digest.views import (
    DeliveryView,
    DigestView,
    ItemView,
    Ledger,
    NotificationView,
    OutcomeCount,
    WindowView,
    notifications_near,
)

_WINDOWS = """
    SELECT w.tenant, w.id, w.subscriber, w.cadence, w.channel, w.state, w.opened_at, w.due_at, w.closed_at,
        (SELECT count(*) FROM item i WHERE i.window_id = w.id AND i.tenant = w.tenant AND i.state = 1)
    FROM digest_window w WHERE w.tenant = %(tenant)s"""

_DIGESTS = """
    SELECT d.id, d.subscriber, d.cadence, d.channel, d.subject, d.closed_at, d.item_count, d.template_error
    FROM digest d WHERE d.tenant = %(tenant)s"""

_ITEMS = """
    SELECT i.notification_id, i.subscriber, i.choice, n.type, n.entity, n.payload, n.occurred_at, i.state, i.reason,
        i.window_id, i.changed_at
    FROM item i JOIN notification n ON n.tenant = i.tenant AND n.id = i.notification_id
    WHERE i.tenant = %(tenant)s"""

_UNACCOUNTED = """
    SELECT
        (SELECT count(*) FROM notification n WHERE n.tenant = %(tenant)s AND NOT EXISTS (
            SELECT FROM item i WHERE i.tenant = n.tenant AND i.notification_id = n.id))
        + (SELECT count(*) FROM item i WHERE i.tenant = %(tenant)s AND i.state = 1 AND NOT EXISTS (
            SELECT FROM digest_window w WHERE w.tenant = i.tenant AND w.id = i.window_id AND w.state < 3))
        + (SELECT count(*) FROM item i WHERE i.tenant = %(tenant)s AND i.state IN (2, 3) AND NOT EXISTS (
            SELECT FROM digest d WHERE d.tenant = i.tenant AND d.id = i.window_id))"""

_OUTCOMES = """
    SELECT outcome, count(*), sum(item_count), sum(parts) FROM (
        SELECT d.item_count, d.parts, CASE
            WHEN d.parts = 0 OR bool_or(v.outcome NOT IN ('pending', 'sent')) THEN 'failed'
            WHEN bool_or(v.outcome = 'pending') THEN 'pending' ELSE 'sent' END AS outcome
        FROM digest d LEFT JOIN delivery v ON v.tenant = d.tenant AND v.digest_id = d.id
        WHERE d.tenant = %(tenant)s GROUP BY d.tenant, d.id) AS each
    GROUP BY outcome ORDER BY outcome"""


async def list_windows(
    tx: Transaction,
    tenant: str,
    *,
    subscriber: str = "",
    cadence: str = "",
    states: Sequence[WindowState] = (),
    after: UUID | None = None,
    limit: int,
) -> list[WindowView]:
    """A page of windows by id, which is by age; empty filters match everything."""
    query = _WINDOWS + (
        " AND (%(subscriber)s = '' OR w.subscriber = %(subscriber)s) AND (%(cadence)s = '' OR w.cadence = %(cadence)s)"
        " AND (%(states)s::int[] = '{}' OR w.state = ANY (%(states)s))"
        " AND (%(after)s::uuid IS NULL OR w.id > %(after)s)"
        " ORDER BY w.id LIMIT %(limit)s"
    )
    values = {
        "tenant": tenant,
        "subscriber": subscriber,
        "cadence": cadence,
        "states": [int(state) for state in states],
        "after": after,
        "limit": limit,
    }
    # Planned anew each time: which of the filters is there decides about the index.
    rows = await (await tx.raw.execute(query, values, prepare=False)).fetchall()
    return [_window(row) for row in rows]


async def get_window(tx: Transaction, tenant: str, window_id: UUID) -> WindowView | None:
    """One window, or None."""
    row = await (await tx.raw.execute(f"{_WINDOWS} AND w.id = %(id)s", {"tenant": tenant, "id": window_id})).fetchone()
    return None if row is None else _window(row)


async def list_digests(
    tx: Transaction,
    tenant: str,
    *,
    subscriber: str = "",
    cadence: str = "",
    after: tuple[datetime, UUID] | None = None,
    limit: int,
) -> list[DigestView]:
    """A page of digests, newest first; `after` is the closing time and id of the last one before."""
    query = _DIGESTS + (
        " AND (%(subscriber)s = '' OR d.subscriber = %(subscriber)s) AND (%(cadence)s = '' OR d.cadence = %(cadence)s)"
        " AND (%(id)s::uuid IS NULL OR (d.closed_at, d.id) < (%(at)s::timestamptz, %(id)s))"
        " ORDER BY d.closed_at DESC, d.id DESC LIMIT %(limit)s"
    )
    at, one_id = after or (None, None)
    values = {
        "tenant": tenant,
        "subscriber": subscriber,
        "cadence": cadence,
        "at": at,
        "id": one_id,
        "limit": limit,
    }
    rows = await (await tx.raw.execute(query, values, prepare=False)).fetchall()
    return await _with_deliveries(tx, tenant, rows)


async def get_digest(tx: Transaction, tenant: str, digest_id: UUID) -> DigestView | None:
    """One digest, or None."""
    rows = await (await tx.raw.execute(f"{_DIGESTS} AND d.id = %(id)s", {"tenant": tenant, "id": digest_id})).fetchall()
    return next(iter(await _with_deliveries(tx, tenant, rows)), None)


async def _with_deliveries(tx: Transaction, tenant: str, rows: Sequence[tuple[Any, ...]]) -> list[DigestView]:
    cursor = await tx.raw.execute(
        "SELECT digest_id, id, outcome, reason, ended_at FROM delivery WHERE tenant = %s AND digest_id = ANY (%s)"
        " ORDER BY digest_id, part",
        (tenant, [row[0] for row in rows]),
    )
    deliveries: defaultdict[UUID, list[DeliveryView]] = defaultdict(list)
    for digest_id, one_id, outcome, reason, ended_at in await cursor.fetchall():
        deliveries[digest_id].append(DeliveryView(id=one_id, outcome=outcome, reason=reason, ended_at=ended_at))
    return [
        DigestView(
            id=one_id,
            subscriber=subscriber,
            cadence=cadence,
            channel=Channel(channel),
            subject=subject,
            closed_at=closed_at,
            item_count=item_count,
            template_error=template_error,
            deliveries=deliveries[one_id],
        )
        for one_id, subscriber, cadence, channel, subject, closed_at, item_count, template_error in rows
    ]


async def items_of_window(tx: Transaction, tenant: str, window_id: UUID, *, limit: int) -> list[ItemView]:
    """Items whose rows name the window and which left with it, in the order in which the digest shows them."""
    query = _ITEMS + (
        " AND i.window_id = %(id)s AND i.state IN (2, 3, 7)"
        " ORDER BY n.type, n.group_key, n.occurred_at, n.id LIMIT %(limit)s"
    )
    rows = await (await tx.raw.execute(query, {"tenant": tenant, "id": window_id, "limit": limit})).fetchall()
    return [_item(row) for row in rows]


async def items_of_notification(tx: Transaction, tenant: str, notification_id: UUID, *, limit: int) -> list[ItemView]:
    """What became of a notification, by subscriber and choice."""
    query = f"{_ITEMS} AND n.id = %(id)s ORDER BY i.subscriber, i.choice LIMIT %(limit)s"
    rows = await (await tx.raw.execute(query, {"tenant": tenant, "id": notification_id, "limit": limit})).fetchall()
    return [_item(row) for row in rows]


async def items_near(tx: Transaction, tenant: str, item: UUID, *, limit: int) -> list[ItemView]:
    """Items among which the one with this public id is, if there is one; see views.item_id."""
    low, high = notifications_near(item)
    query = f"{_ITEMS} AND n.id BETWEEN %(low)s AND %(high)s LIMIT %(limit)s"
    values = {"tenant": tenant, "low": low, "high": high, "limit": limit}
    return [_item(row) for row in await (await tx.raw.execute(query, values)).fetchall()]


async def get_notification(tx: Transaction, tenant: str, notification_id: UUID) -> NotificationView | None:
    """One notification, or None."""
    cursor = await tx.raw.execute(
        "SELECT id, type, entity, occurred_at, received_at, cardinality(subscribers), topics FROM notification"
        " WHERE tenant = %s AND id = %s",
        (tenant, notification_id),
    )
    row = await cursor.fetchone()
    if row is None:
        return None
    one_id, kind, entity, occurred_at, received_at, subscribers, topics = row
    return NotificationView(
        id=one_id,
        type=kind,
        entity=entity,
        occurred_at=occurred_at,
        received_at=received_at,
        subscribers=subscribers,
        topics=topics,
    )


async def ledger(tx: Transaction, tenant: str) -> Ledger:
    """Add everything up (INV-6), in one snapshot; the transaction must not have read anything before."""
    await tx.raw.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    values = {"tenant": tenant}
    counts = await tx.raw.execute(
        "SELECT state, reason, count(*) FROM item WHERE tenant = %(tenant)s GROUP BY 1, 2 ORDER BY 1, 2",
        values,
    )
    items = [(ItemState(state), reason, count) for state, reason, count in await counts.fetchall()]
    outcomes = await (await tx.raw.execute(_OUTCOMES, values)).fetchall()
    return Ledger(
        notifications=await _number(tx, "SELECT count(*) FROM notification WHERE tenant = %(tenant)s", values),
        items=items,
        digests=[OutcomeCount(outcome=o, digests=d, items=i, deliveries=p) for o, d, i, p in outcomes],
        unaccounted=await _number(tx, _UNACCOUNTED, values),
    )


async def backlog(tx: Transaction, *, now: datetime) -> tuple[int, int, timedelta]:
    """Of all tenants: open windows, closing windows, and how long past its due time the most overdue closing one is."""
    cursor = await tx.raw.execute(
        "SELECT (SELECT count(*) FROM digest_window WHERE state = 1), count(*), min(due_at)"
        " FROM digest_window WHERE state = 2 AND NOT is_held"
    )
    row = await cursor.fetchone()
    assert row is not None
    is_open, closing, oldest = row
    return is_open, closing, timedelta(0) if oldest is None else max(timedelta(0), now - oldest)


async def _number(tx: Transaction, query: str, values: dict[str, str]) -> int:
    row = await (await tx.raw.execute(query, values)).fetchone()
    assert row is not None
    return int(row[0])


def _window(row: tuple[Any, ...]) -> WindowView:
    tenant, one_id, subscriber, cadence, channel, state, opened_at, due_at, closed_at, items = row
    return WindowView(
        tenant=tenant,
        id=one_id,
        subscriber=subscriber,
        cadence=cadence,
        channel=Channel(channel),
        state=WindowState(state),
        opened_at=opened_at,
        due_at=due_at,
        closed_at=closed_at,
        items=items,
    )


def _item(row: tuple[Any, ...]) -> ItemView:
    notification_id, subscriber, choice, kind, entity, payload, occurred_at, state, reason, window_id, changed_at = row
    return ItemView(
        notification_id=notification_id,
        subscriber=subscriber,
        choice=choice,
        type=kind,
        entity=entity,
        payload=payload,
        occurred_at=occurred_at,
        state=ItemState(state),
        reason=reason,
        window_id=window_id,
        changed_at=changed_at,
    )
