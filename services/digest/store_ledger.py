"""Whether everything is where it must be (INV-6), of one tenant at once or of all of them range by range. Reads only.

Every transaction leaves these true, and every statement here sees one snapshot; so what it finds is missing indeed,
however much else goes on:

- a notification has as many items as its row says, at least one; expanding counts them, forgetting counts them down;
- an item has its notification; what waits has a window that is still to close; what went out has its digest;
- a digest has as many deliveries as it has parts.

What it cannot see is a notification that vanished together with all its items: nothing is left that would name it.
"""

from collections import Counter
from typing import Any
from uuid import UUID

from libs.postgres import Transaction
from services.digest.catalog import ItemState
from services.digest.views import Gap, Kept, Ledger, OutcomeCount

_EXAMPLES = 10

# {items} and {notifications} say which rows; the counts of a notification's items are then compared with its own.
_ITEM_GAPS = """
    WITH held AS MATERIALIZED (
        SELECT i.tenant, i.notification_id, count(*) AS items,
            count(*) FILTER (WHERE i.state = 1 AND w.id IS NULL) AS no_window,
            count(*) FILTER (WHERE i.state IN (2, 3) AND d.id IS NULL) AS no_digest
        FROM item i
        LEFT JOIN digest_window w ON i.state = 1 AND w.tenant = i.tenant AND w.id = i.window_id AND w.state < 3
        LEFT JOIN digest d ON i.state IN (2, 3) AND d.tenant = i.tenant AND d.id = i.window_id
        WHERE {items} GROUP BY 1, 2
    ), compared AS (
        SELECT coalesce(n.id, h.notification_id) AS id, n.id IS NOT NULL AS is_known, coalesce(h.items, 0) AS held,
            greatest(coalesce(n.items, h.items), 1) AS made, h.no_window, h.no_digest
        FROM (SELECT tenant, id, items FROM notification n WHERE {notifications}) AS n
        FULL JOIN held h ON h.tenant = n.tenant AND h.notification_id = n.id
    )
    SELECT kind, sum(gap.items), (array_agg(id ORDER BY id))[:%(examples)s]
    FROM (SELECT * FROM compared WHERE NOT is_known OR made <> held OR no_window > 0 OR no_digest > 0) AS odd
    CROSS JOIN LATERAL (VALUES
        ('item_missing', CASE WHEN is_known THEN made - held END),
        ('item_unexpected', CASE WHEN is_known THEN held - made END),
        ('notification_missing', CASE WHEN NOT is_known THEN held END),
        ('window_missing', no_window), ('digest_missing', no_digest)) AS gap (kind, items)
    WHERE gap.items > 0 GROUP BY kind ORDER BY kind"""

_DELIVERY_GAPS = """
    SELECT 'delivery_missing', sum(abs(parts - found)), (array_agg(id ORDER BY id))[:%(examples)s]
    FROM (SELECT d.id, d.parts, (
            SELECT count(*) FROM delivery v WHERE v.tenant = d.tenant AND v.digest_id = d.id) AS found
        FROM digest d WHERE {digests}) AS compared
    WHERE parts <> found HAVING count(*) > 0"""

_STATES = "SELECT state, count(*) FROM item i WHERE {items} GROUP BY state"
_NOTIFICATIONS = "SELECT count(*) FROM notification n WHERE {notifications}"

_TENANTS = "{0}.tenant = %(tenant)s"
_AFTER = "({0}.tenant, {0}.{1}) > (%(after_tenant)s, %(after_id)s)"
_RANGE = _AFTER + " AND ({0}.tenant, {0}.{1}) <= (%(until_tenant)s, %(until_id)s)"

# The end of a range holds at most so many items, or notifications, and the items of one notification.
_END = """
    SELECT tenant, id FROM (
        (SELECT tenant, notification_id AS id FROM item
         WHERE (tenant, notification_id) > (%(after_tenant)s, %(after_id)s)
         ORDER BY tenant, notification_id OFFSET %(rows)s LIMIT 1)
        UNION ALL
        (SELECT tenant, id FROM notification WHERE (tenant, id) > (%(after_tenant)s, %(after_id)s)
         ORDER BY tenant, id OFFSET %(rows)s LIMIT 1)) AS either
    ORDER BY tenant, id LIMIT 1"""
_DIGESTS_END = """
    SELECT tenant, id FROM digest WHERE (tenant, id) > (%(after_tenant)s, %(after_id)s)
    ORDER BY tenant, id OFFSET %(rows)s LIMIT 1"""

_COUNTS = "SELECT state, reason, count(*) FROM item WHERE tenant = %(tenant)s GROUP BY 1, 2 ORDER BY 1, 2"

_OUTCOMES = """
    SELECT outcome, count(*), sum(item_count), sum(parts) FROM (
        SELECT d.item_count, d.parts, CASE
            WHEN d.parts = 0 OR bool_or(v.outcome NOT IN ('pending', 'sent')) THEN 'failed'
            WHEN bool_or(v.outcome = 'pending') THEN 'pending' ELSE 'sent' END AS outcome
        FROM digest d LEFT JOIN delivery v ON v.tenant = d.tenant AND v.digest_id = d.id
        WHERE d.tenant = %(tenant)s GROUP BY d.tenant, d.id) AS each
    GROUP BY outcome ORDER BY outcome"""

_DELIVERIES = "SELECT outcome, count(*) FROM delivery WHERE tenant = %(tenant)s GROUP BY 1 ORDER BY 1"

_LONGEST_PENDING = """
    SELECT v.id FROM delivery v JOIN digest d ON d.tenant = v.tenant AND d.id = v.digest_id
    WHERE v.tenant = %(tenant)s AND v.outcome = 'pending' ORDER BY d.closed_at, v.digest_id, v.part LIMIT 100"""

Place = tuple[str, UUID]
"""A tenant and an id: where a range ended."""

BEGINNING: Place = ("", UUID(int=0))


async def ledger(tx: Transaction, tenant: str) -> Ledger:
    """Add up everything of a tenant, in one snapshot; the transaction must not have read anything before."""
    await tx.raw.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    values = {"tenant": tenant}
    counts = await _rows(tx, _COUNTS, values)
    outcomes = await _rows(tx, _OUTCOMES, values)
    ((notifications,),) = await _rows(tx, "SELECT count(*) FROM notification WHERE tenant = %(tenant)s", values)
    items, told = _TENANTS.format("i"), _TENANTS.format("n")
    return Ledger(
        notifications=notifications,
        items=[(ItemState(state), reason, count) for state, reason, count in counts],
        digests=[OutcomeCount(outcome=o, digests=d, items=i, deliveries=p) for o, d, i, p in outcomes],
        deliveries=[(outcome, count) for outcome, count in await _rows(tx, _DELIVERIES, values)],
        longest_pending=[one_id for (one_id,) in await _rows(tx, _LONGEST_PENDING, values)],
        gaps=[
            *await _gaps(tx, _ITEM_GAPS.format(items=items, notifications=told), values),
            *await _gaps(tx, _DELIVERY_GAPS.format(digests=_TENANTS.format("d")), values),
        ],
    )


async def item_gaps(tx: Transaction, after: Place, *, rows: int) -> tuple[list[Gap], Kept, Place | None]:
    """What is missing among the notifications after a place, of any tenant, what is there, and up to which place.

    Looks at `rows` items and one notification's more. None: there is nothing after these.
    """
    values, end = await _range(tx, _END, after, rows)
    place = _RANGE if end else _AFTER
    items, told = place.format("i", "notification_id"), place.format("n", "id")
    gaps = await _gaps(tx, _ITEM_GAPS.format(items=items, notifications=told), values)
    ((notifications,),) = await _rows(tx, _NOTIFICATIONS.format(notifications=told), values)
    states = {ItemState(state): count for state, count in await _rows(tx, _STATES.format(items=items), values)}
    return gaps, Kept(notifications=notifications, items=Counter(states)), end


async def delivery_gaps(tx: Transaction, after: Place, *, rows: int) -> tuple[list[Gap], Kept, Place | None]:
    """As `item_gaps`, among `rows` digests; these are not counted."""
    values, end = await _range(tx, _DIGESTS_END, after, rows)
    place = (_RANGE if end else _AFTER).format("d", "id")
    return await _gaps(tx, _DELIVERY_GAPS.format(digests=place), values), Kept(), end


async def _range(tx: Transaction, query: str, after: Place, rows: int) -> tuple[dict[str, object], Place | None]:
    values: dict[str, object] = {"after_tenant": after[0], "after_id": after[1], "rows": rows}
    # A range looks like one row to the planner, which then may think nothing of scanning a table for each of its items.
    await tx.raw.execute("SET LOCAL enable_seqscan = off")
    found = await _rows(tx, query, values)
    if not found:
        return values, None
    ((tenant, one_id),) = found
    return values | {"until_tenant": tenant, "until_id": one_id}, (tenant, one_id)


async def _gaps(tx: Transaction, query: str, values: dict[str, Any]) -> list[Gap]:
    rows = await _rows(tx, query, values | {"examples": _EXAMPLES})
    return [Gap(kind=kind, count=int(count), ids=ids) for kind, count, ids in rows]


async def _rows(tx: Transaction, query: str, values: dict[str, Any]) -> list[tuple[Any, ...]]:
    # Planned anew each time: how much a range or a tenant holds decides about the joins.
    return await (await tx.raw.execute(query, values, prepare=False)).fetchall()
