"""Which traces windows belong to. Asked only where something is traced: otherwise nothing here runs."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from uuid import UUID

from msgspec.structs import replace

from libs.postgres import Transaction
from libs.trace_points import NOWHERE, Point
from services.digest.commands import Notification, WindowTimer

# Of what is sent alone the window does not wait: it goes on in the trace of its notification.
_MARK_ALONE = """
    UPDATE digest_window w SET trace = n.trace
    FROM expansion e JOIN notification n ON n.tenant = e.tenant AND n.id = e.notification_id
    WHERE e.state = 1 AND e.kind = 1 AND n.trace IS NOT NULL AND w.tenant = e.tenant AND w.id = e.window_id"""

_FIRST = """
    SELECT DISTINCT ON (e.window_id) e.window_id, n.trace
    FROM expansion e JOIN notification n ON n.tenant = e.tenant AND n.id = e.notification_id
    WHERE e.state = 1 AND e.window_id = ANY (%s) AND n.trace IS NOT NULL
    ORDER BY e.window_id, e.occurred_at, n.id"""

_CAUSES = """
    SELECT i.window_id, n.trace, min(n.occurred_at)
    FROM item i JOIN notification n ON n.tenant = i.tenant AND n.id = i.notification_id
    WHERE i.window_id = ANY (%s) AND i.state = 1 AND n.trace IS NOT NULL
    GROUP BY 1, 2 ORDER BY 1, 3"""


async def mark_alone(tx: Transaction, fresh: Iterable[Notification]) -> None:
    """Have the windows of what is sent alone know what caused it; the scratch table says which they are."""
    if any(one.trace for one in fresh):
        await tx.raw.execute(_MARK_ALONE, prepare=False)


async def traced(
    tx: Transaction, timers: Sequence[WindowTimer], fresh: Sequence[Notification]
) -> Sequence[WindowTimer]:
    """Timers with what caused them: the first of its items that is traced has opened a window."""
    traces = {one.trace for one in fresh}
    if not timers or traces == {NOWHERE}:
        return timers
    if len(traces) == 1:
        return [replace(timer, trace=fresh[0].trace) for timer in timers]
    cursor = await tx.raw.execute(_FIRST, ([timer.window_id for timer in timers],), prepare=False)
    first: dict[UUID, Point] = dict(await cursor.fetchall())
    return [replace(timer, trace=first.get(timer.window_id, NOWHERE)) for timer in timers]


async def causes(tx: Transaction, window_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[Point]]:
    """What caused the pending items of windows, each once, in the order in which the items happened."""
    found: defaultdict[UUID, list[Point]] = defaultdict(list)
    for window_id, trace, _ in await (await tx.raw.execute(_CAUSES, (list(window_ids),), prepare=False)).fetchall():
        found[window_id].append(trace)
    return found
