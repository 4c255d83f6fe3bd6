"""What Postgres tells about windows, digests and single items. Reads only; the ledger is store_ledger's."""

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from libs.postgres import Transaction
from services.digest.catalog import Channel, ItemState, Priority, WindowKind, WindowState
from services.digest.store_ledger import ledger as ledger
from services.digest.views import (
    DeliveryView,
    DigestView,
    ItemView,
    WindowBacklog,
    WindowView,
    notifications_near,
)

_WINDOWS = """
    SELECT w.tenant, w.id, w.subscriber, w.cadence, w.channel, w.kind, w.priority, w.state, w.opened_at, w.due_at,
        w.closed_at, w.batch, w.is_held, w.state = 2 AND coalesce(w.asked_until > clock_timestamp(), false),
        w.latest_at, w.full_at,
        (SELECT count(*) FROM item i WHERE i.window_id = w.id AND i.tenant = w.tenant AND i.state = 1)
    FROM digest_window w WHERE w.tenant = %(tenant)s"""

_OPEN_WINDOWS = """
    SELECT kind, count(*), min(due_at), min(opened_at), min(opened_at + (due_at - opened_at) / 2)
    FROM digest_window WHERE state = 1 GROUP BY kind"""
# Each from an index of its own.
_CLOSING_WINDOWS = "SELECT count(*), min(due_at) FROM digest_window WHERE state = 2 AND NOT is_held"
_HELD_WINDOWS = "SELECT count(*), min(due_at) FROM digest_window WHERE state = 2 AND is_held"

_DIGESTS = """
    SELECT d.id, d.subscriber, d.cadence, d.channel, d.subject, d.closed_at, d.item_count, d.template_error
    FROM digest d WHERE d.tenant = %(tenant)s"""

_ITEMS = """
    SELECT i.notification_id, i.subscriber, i.choice, n.type, n.entity, n.payload, n.occurred_at, i.state, i.reason,
        i.window_id, i.changed_at
    FROM item i JOIN notification n ON n.tenant = i.tenant AND n.id = i.notification_id
    WHERE i.tenant = %(tenant)s"""


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


async def get_windows(tx: Transaction, tenant: str, ids: Sequence[UUID]) -> list[WindowView]:
    """Those of these windows that exist, in any order."""
    cursor = await tx.raw.execute(f"{_WINDOWS} AND w.id = ANY (%(ids)s)", {"tenant": tenant, "ids": list(ids)})
    return [_window(row) for row in await cursor.fetchall()]


async def get_window(tx: Transaction, tenant: str, window_id: UUID) -> WindowView | None:
    """One window, or None."""
    return next(iter(await get_windows(tx, tenant, [window_id])), None)


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


async def get_digests(tx: Transaction, tenant: str, ids: Sequence[UUID]) -> list[DigestView]:
    """Those of these digests that exist, in any order."""
    cursor = await tx.raw.execute(f"{_DIGESTS} AND d.id = ANY (%(ids)s)", {"tenant": tenant, "ids": list(ids)})
    return await _with_deliveries(tx, tenant, await cursor.fetchall())


async def get_digest(tx: Transaction, tenant: str, digest_id: UUID) -> DigestView | None:
    """One digest, or None."""
    return next(iter(await get_digests(tx, tenant, [digest_id])), None)


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


async def items_in(tx: Transaction, tenant: str, window_id: UUID) -> list[tuple[ItemState, str, int]]:
    """How many items whose rows name the window are in which state, for which reason."""
    cursor = await tx.raw.execute(
        "SELECT state, reason, count(*) FROM item WHERE tenant = %s AND window_id = %s GROUP BY 1, 2 ORDER BY 1, 2",
        (tenant, window_id),
    )
    return [(ItemState(state), reason, count) for state, reason, count in await cursor.fetchall()]


async def items_of(tx: Transaction, tenant: str, notification_ids: Sequence[UUID], *, limit: int) -> list[ItemView]:
    """What became of notifications, by their ids, subscriber and choice."""
    query = f"{_ITEMS} AND n.id = ANY (%(ids)s) ORDER BY n.id, i.subscriber, i.choice LIMIT %(limit)s"
    values = {"tenant": tenant, "ids": list(notification_ids), "limit": limit}
    return [_item(row) for row in await (await tx.raw.execute(query, values)).fetchall()]


async def items_near(tx: Transaction, tenant: str, item: UUID, *, limit: int) -> list[ItemView]:
    """Items among which the one with this public id is, if there is one; see views.item_id."""
    low, high = notifications_near(item)
    query = f"{_ITEMS} AND n.id BETWEEN %(low)s AND %(high)s LIMIT %(limit)s"
    values = {"tenant": tenant, "low": low, "high": high, "limit": limit}
    return [_item(row) for row in await (await tx.raw.execute(query, values)).fetchall()]


async def backlog(tx: Transaction) -> WindowBacklog:
    """Of all tenants; looks at every window that is not closed."""
    open_ones = await (await tx.raw.execute(_OPEN_WINDOWS)).fetchall()
    of_batches = (times for kind, _, _, *times in open_ones if kind == WindowKind.EXTERNAL)
    opened_at, halfway_at = next(of_batches, (None, None))
    ((closing, closing_due_at),) = await (await tx.raw.execute(_CLOSING_WINDOWS)).fetchall()
    ((held, held_due_at),) = await (await tx.raw.execute(_HELD_WINDOWS)).fetchall()
    return WindowBacklog(
        open={WindowKind(kind): count for kind, count, *_ in open_ones},
        open_due_at=min((due_at for _, _, due_at, *_ in open_ones), default=None),
        batch_opened_at=opened_at,
        batch_halfway_at=halfway_at,
        closing=closing,
        closing_due_at=closing_due_at,
        held=held,
        held_due_at=held_due_at,
    )


def _window(row: tuple[Any, ...]) -> WindowView:
    tenant, one_id, subscriber, cadence, channel, kind, priority, state, opened_at, due_at, closed_at, *rest = row
    batch, is_held, is_asked_about, latest_at, full_at, items = rest
    return WindowView(
        tenant=tenant,
        id=one_id,
        subscriber=subscriber,
        cadence=cadence,
        channel=Channel(channel),
        kind=WindowKind(kind),
        priority=Priority(priority),
        state=WindowState(state),
        opened_at=opened_at,
        due_at=due_at,
        closed_at=closed_at,
        items=items,
        batch=batch,
        is_held=is_held,
        is_asked_about=is_asked_about,
        latest_at=latest_at,
        full_at=full_at,
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
