"""Closing windows: claimed, read, and closed in one transaction that also hands their messages over (INV-7).

A claimed window is locked until the end of the transaction and takes no items any more, so the items read are the
items that are marked; a cancel that comes meanwhile waits, and finds them gone. Replicas skip each other's claims. A
process that dies has changed nothing: its windows are claimed again.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from libs.ids import new_id
from libs.postgres import Transaction
from libs.trace_points import NOWHERE
from services.digest import metrics, store_history
from services.digest.catalog import Channel, Priority, WindowKind
from services.digest.rendering_jobs import Line, Source
from services.digest.store_subscribers import subscriber_of
from services.digest.templates import TemplateKey, wanted_ids
from services.digest.windows import Closed, ClosingWindow

MOST_ITEMS: Final = 50_000
"""Of one digest, which is in memory as a whole (INV-9): of a window that has more, several digests are made."""

# Not in the order in which others lock windows, by id; but who skips what is locked waits for nobody.
_CLAIM = """
    SELECT tenant, id FROM digest_window
    WHERE state = 2 AND NOT is_held AND coalesce(asked_until <= clock_timestamp(), true)
    ORDER BY priority DESC, id LIMIT %s FOR NO KEY UPDATE SKIP LOCKED"""

# These are waited for: whoever set them aside may not have committed yet. In everybody's order, see store_windows.
_CLAIM_THESE = """
    SELECT tenant, id FROM digest_window WHERE tenant = ANY (%s) AND id = ANY (%s) AND state = 2 AND NOT is_held
    ORDER BY kind = 4, id FOR NO KEY UPDATE"""

# Only where the items read show that there is something to expire: for each of them, it would cost a second join.
_EXPIRE = """
    UPDATE item i SET state = 6, changed_at = %(now)s FROM notification n
    WHERE i.window_id = ANY (%(ids)s) AND i.state = 1 AND n.tenant = i.tenant AND n.id = i.notification_id
    AND n.expires_at <= %(now)s"""

_COUNT = "SELECT window_id, count(*) FROM item WHERE window_id = ANY (%s) AND state = 1 GROUP BY window_id"

_READ = """
    SELECT w.tenant, w.id, w.kind, w.priority, w.subscriber, w.cadence, coalesce(k.name, ''), w.channel, w.format,
        w.style, w.trace, s.id, s.zone, s.locale, s.email, s.webhook_url, s.apprise_url,
        s.quiet_hours
    FROM digest_window w
    LEFT JOIN subscriber s ON s.tenant = w.tenant AND s.id = w.subscriber
    LEFT JOIN cadence k ON k.tenant = w.tenant AND k.id = w.cadence
    WHERE w.tenant = ANY (%s) AND w.id = ANY (%s) ORDER BY w.priority DESC, w.id"""

_ITEMS = """
    SELECT i.window_id, n.id::text, n.type, coalesce(t.name, n.type), n.entity, n.group_key, n.occurred_at, n.payload,
        coalesce(t.is_mandatory, false), nullif(t.formatting_service, ''), n.expires_at
    FROM item i
    JOIN notification n ON n.tenant = i.tenant AND n.id = i.notification_id
    LEFT JOIN notification_type t ON t.tenant = n.tenant AND t.id = n.type
    WHERE i.window_id = ANY (%(ids)s) AND i.state = 1"""

_BEFORE = """
    AND NOT EXISTS (
        SELECT FROM unnest(%(large)s::uuid[], %(rest_from)s::uuid[]) AS large (id, rest_from)
        WHERE i.window_id = large.id AND i.notification_id >= large.rest_from)"""

_IN_ORDER = " ORDER BY i.window_id, n.type, n.group_key, n.occurred_at, n.id"

_REST_FROM = "SELECT notification_id FROM item WHERE window_id = %s AND state = 1 ORDER BY 1 OFFSET %s LIMIT 1"

_PART_OFF = """
    INSERT INTO digest_window (tenant, id, subscriber, cadence, channel, format, style, kind, priority, rule, batch,
        slot_at, opened_at, due_at, state, trace)
    SELECT tenant, %(part)s, subscriber, cadence, channel, format, style, kind, priority, rule, batch,
        slot_at, opened_at, due_at, state, trace FROM digest_window WHERE tenant = %(tenant)s AND id = %(id)s"""
_MOVE = """
    UPDATE item SET window_id = %(part)s
    WHERE window_id = %(id)s AND state = 1 AND notification_id < %(rest_from)s"""

# By windows with one verdict: an array is looked up in the index one by one, a join would be at the mercy of a guess.
_MARK_ITEMS = """
    UPDATE item SET state = %s, reason = %s, changed_at = %s WHERE window_id = ANY (%s) AND state = 1"""

_CLOSE = "UPDATE digest_window SET state = 3, closed_at = %s WHERE tenant = ANY (%s) AND id = ANY (%s)"

_PUT_DIGESTS = """
    INSERT INTO digest (tenant, id, subscriber, cadence, channel, format, style, address, subject, closed_at,
        item_count, parts, template_error)
    SELECT tenant, id, subscriber, cadence, channel, format, style, address, subject, %s, item_count, parts, error
    FROM unnest(%s::text[], %s::uuid[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[],
        %s::text[], %s::int[], %s::int[], %s::text[])
        AS d (tenant, id, subscriber, cadence, channel, format, style, address, subject, item_count, parts, error)"""

_PUT_DELIVERIES = """
    INSERT INTO delivery (tenant, digest_id, part, id, outcome, reason)
    SELECT tenant, digest_id, part, id, 'pending', ''
    FROM unnest(%s::text[], %s::uuid[], %s::int[], %s::uuid[]) AS d (tenant, digest_id, part, id)"""


async def claim(tx: Transaction, *, most_windows: int, most_items: int, now: datetime) -> list[ClosingWindow]:
    """Lock closing windows for this transaction, the most urgent first, then the oldest, and read them in that order.

    At most `most_windows`, and no more than hold `most_items` items together, but always one if there is one, of which
    at most MOST_ITEMS are read. Items whose time is over are marked expired and left out.
    """
    tenants = {one_id: tenant for tenant, one_id in await (await tx.raw.execute(_CLAIM, (most_windows,))).fetchall()}
    if not tenants:
        return []
    ids = list(tenants)
    counts = await _counts(tx, ids)
    taken: list[UUID] = []
    room = min(most_items, MOST_ITEMS)
    for window_id in ids:
        room -= counts.get(window_id, 0)
        if taken and room < 0:
            break
        taken.append(window_id)
    return await _claimed(tx, {one_id: tenants[one_id] for one_id in taken}, counts, now)


async def claim_these(
    tx: Transaction, tenants: Collection[str], ids: Sequence[UUID], *, now: datetime
) -> list[ClosingWindow]:
    """The same for those of these windows that are still closing, however many items they have together."""
    found = await (await tx.raw.execute(_CLAIM_THESE, (list(tenants), list(ids)))).fetchall()
    taken = {one_id: tenant for tenant, one_id in found}
    return await _claimed(tx, taken, await _counts(tx, list(taken)), now) if taken else []


async def _claimed(
    tx: Transaction, taken: Mapping[UUID, str], counts: Mapping[UUID, int], now: datetime
) -> list[ClosingWindow]:
    rest_from = await _rest_from(tx, taken, counts)
    rows = await _item_rows(tx, list(taken), rest_from)
    if expired := {row[0] for row in rows if not _is_in_time(row, now)}:
        gone = await tx.raw.execute(_EXPIRE, {"ids": list(expired), "now": now})
        metrics.items_of("expired", "").inc(gone.rowcount)
        rows = [row for row in rows if _is_in_time(row, now)]
    windows = await _windows(tx, set(taken.values()), list(taken), rows)
    return [replace(one, rest_from=rest_from.get(one.id)) for one in windows] if rest_from else windows


async def part_off(tx: Transaction, window: ClosingWindow) -> ClosingWindow:
    """The items read of a claimed window that has more, as a window of their own; the rest stays where it is, closing.

    To be finished in the same transaction: a cancel that waits for the old window would not lock the new one.
    """
    part = replace(window, id=new_id(), rest_from=None)
    values = {"part": part.id, "tenant": window.tenant, "id": window.id, "rest_from": window.rest_from}
    await tx.raw.execute(_PART_OFF, values)
    await tx.raw.execute(_MOVE, values)
    return part


async def read_windows(
    tx: Transaction, tenants: Collection[str], ids: Sequence[UUID], *, now: datetime
) -> list[ClosingWindow]:
    """Windows of these tenants with what would go out now, in the order in which it is shown; others are left out.

    Of each at most MOST_ITEMS.
    """
    rows = await _item_rows(tx, ids, await _rest_from(tx, ids, await _counts(tx, ids)))
    return await _windows(tx, tenants, ids, [row for row in rows if _is_in_time(row, now)])


def _is_in_time(row: tuple[Any, ...], now: datetime) -> bool:
    return row[-1] is None or row[-1] > now


async def _counts(tx: Transaction, ids: Sequence[UUID]) -> dict[UUID, int]:
    return dict(await (await tx.raw.execute(_COUNT, (list(ids),))).fetchall())


async def _rest_from(tx: Transaction, ids: Iterable[UUID], counts: Mapping[UUID, int]) -> dict[UUID, UUID]:
    """Of windows with more than MOST_ITEMS, the notification from which on they are not read: the newer ones."""
    found: dict[UUID, UUID] = {}
    for one_id in ids:
        if counts.get(one_id, 0) > MOST_ITEMS:
            row = await (await tx.raw.execute(_REST_FROM, (one_id, MOST_ITEMS))).fetchone()
            if row is not None:
                found[one_id] = row[0]
    return found


async def _item_rows(tx: Transaction, ids: Sequence[UUID], rest_from: Mapping[UUID, UUID]) -> list[tuple[Any, ...]]:
    query = _ITEMS + (_BEFORE if rest_from else "") + _IN_ORDER
    values = {"ids": list(ids), "large": list(rest_from), "rest_from": list(rest_from.values())}
    return await (await tx.raw.execute(query, values)).fetchall()


async def _windows(
    tx: Transaction, tenants: Collection[str], ids: Sequence[UUID], items: Iterable[tuple[Any, ...]]
) -> list[ClosingWindow]:
    lines: defaultdict[UUID, list[Line]] = defaultdict(list)
    expiries: dict[UUID, datetime] = {}
    mandatory: set[UUID] = set()
    services: defaultdict[UUID, dict[str, str]] = defaultdict(dict)
    for window_id, one_id, kind, name, entity, group, occurred, payload, is_mandatory, service, expires in items:
        lines[window_id].append(Line(one_id, kind, name, entity, group, occurred.isoformat(), payload))
        if is_mandatory:
            mandatory.add(window_id)
        if service:
            services[window_id][kind] = service
        if expires is not None:
            expiries[window_id] = expires
    rows = await (await tx.raw.execute(_READ, (list(tenants), list(ids)))).fetchall()
    return [
        _window(
            row,
            lines[row[1]],
            expiries.get(row[1]),
            is_mandatory=row[1] in mandatory,
            services=services.get(row[1], {}),
        )
        for row in rows
    ]


def _window(
    row: tuple[Any, ...],
    lines: Sequence[Line],
    expires_at: datetime | None,
    *,
    is_mandatory: bool,
    services: Mapping[str, str],
) -> ClosingWindow:
    tenant, window_id, kind, priority, subscriber_id, cadence, name, channel, text_format, style, trace, *subscriber = (
        row
    )
    return ClosingWindow(
        tenant=tenant,
        id=window_id,
        kind=WindowKind(kind),
        priority=Priority(priority),
        subscriber_id=subscriber_id,
        subscriber=None if subscriber[0] is None else subscriber_of(*subscriber),
        cadence=cadence,
        cadence_name=name,
        channel=Channel(channel),
        format=text_format,
        style=style,
        lines=lines,
        # A digest is worth sending for its other items; one sent alone is not.
        expires_at=expires_at if kind == WindowKind.ALONE else None,
        is_mandatory=is_mandatory,
        services=services,
        trace=trace or NOWHERE,
    )


async def hold(tx: Transaction, held: Mapping[UUID, datetime], tenants: Collection[str]) -> None:
    """Leave claimed windows alone until these times; the caller asks for their timers in the same transaction."""
    await tx.raw.execute(
        "UPDATE digest_window w SET is_held = true, due_at = h.due_at"
        " FROM unnest(%s::uuid[], %s::timestamptz[]) AS h (id, due_at) WHERE w.tenant = ANY (%s) AND w.id = h.id",
        (list(held), list(held.values()), list(tenants)),
    )


async def templates_for(
    tx: Transaction, windows: Sequence[ClosingWindow]
) -> Mapping[str, Mapping[TemplateKey, Source]]:
    """Per tenant, every template of its own that one of the windows may use."""
    wanted = {(w.tenant, one) for w in windows for one in wanted_ids({line.type for line in w.lines}, w.cadence)}
    found: defaultdict[str, dict[TemplateKey, Source]] = defaultdict(dict)
    if wanted:
        tenants, ids = zip(*sorted(wanted), strict=True)
        cursor = await tx.raw.execute(
            "SELECT t.tenant, t.id, t.format, t.style, t.locale, t.subject, t.body FROM template t"
            " JOIN unnest(%s::text[], %s::text[]) AS w (tenant, id) USING (tenant, id)",
            (list(tenants), list(ids)),
        )
        for tenant, one_id, text_format, style, locale, subject, body in await cursor.fetchall():
            spoken = f", {locale}" if locale else ""
            found[tenant][one_id, text_format, style, locale] = Source(
                f"{one_id} ({text_format}, {style}{spoken})", subject, body
            )
    return found


async def finish(tx: Transaction, closed: Sequence[Closed], *, now: datetime) -> None:
    """Mark the windows' items, close the windows, and remember the digests; the messages are the caller's to send."""
    marked: defaultdict[tuple[int, str], list[UUID]] = defaultdict(list)
    for one in closed:
        if one.state is not None:
            marked[one.state.value, one.reason].append(one.window.id)
    for (state, reason), ids in marked.items():
        await tx.raw.execute(_MARK_ITEMS, (state, reason, now, ids))
    tenants = {one.window.tenant for one in closed}
    await tx.raw.execute(_CLOSE, (now, list(tenants), [one.window.id for one in closed]))
    await store_history.windows_ended(tx, [(one.window.tenant, one.window.id) for one in closed], now=now)
    digests = [one for one in closed if one.is_digest]
    if digests:
        columns = zip(*(_digest_row(one) for one in digests), strict=True)
        await tx.raw.execute(_PUT_DIGESTS, (now, *map(list, columns)))
    deliveries = [
        (message.tenant, message.digest_id, part, message.delivery_id)
        for one in digests
        for part, message in enumerate(one.messages, start=1)
    ]
    if deliveries:
        await tx.raw.execute(_PUT_DELIVERIES, tuple(map(list, zip(*deliveries, strict=True))))


def _digest_row(one: Closed) -> tuple[object, ...]:
    window = one.window
    return (
        *(window.tenant, window.id, window.subscriber_id, window.cadence, window.channel.value, window.format),
        *(window.style, one.address, one.subject, len(window.lines), len(one.messages), one.template_error),
    )
