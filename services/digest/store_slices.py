"""How many notifications are expanded by the same statements: as many as become SLICE_ITEMS items.

A thousand notifications to a topic of ten thousand are ten million items. Postgres ends a statement after
`statement_timeout`, and what takes too long takes too long again; so what is more than a slice is expanded slice after
slice, in one transaction still. A notification is not divided: one to a topic of a million is a slice of its own.
"""

from collections.abc import Mapping, Sequence

from services.digest.commands import Notification
from services.digest.store_filters import Statements

SLICE_ITEMS = 50_000
"""Of these no statement takes much more than a second, also of those told directly who have a few choices each."""

# At most; whether their types fit is decided later. Not counted any further than one slice.
_LISTENERS = """
    SELECT t.tenant, t.topic, (
        SELECT count(*) FROM (
            SELECT FROM choice c WHERE c.tenant = t.tenant AND c.topic = t.topic LIMIT %(most)s) AS listening)
    FROM unnest(%(tenants)s::text[], %(topics)s::text[]) AS t (tenant, topic)"""


class TooManyItems(Exception):
    """Frames that share a transaction would become more items than a slice: each must come alone."""


async def slices(run: Statements, fresh: Sequence[Notification]) -> list[list[Notification]]:
    """Notifications in slices; one slice nearly always, in the order in which they came then."""
    if len(fresh) == 1:
        return [list(fresh)]
    topics = sorted({(one.tenant, topic) for one in fresh for topic in one.topics})
    listeners: dict[tuple[str, str], int] = {}
    if topics:
        tenants, names = map(list, zip(*topics, strict=True))
        rows = await (await run(_LISTENERS, tenants=tenants, topics=names, most=SLICE_ITEMS)).fetchall()
        listeners = {(tenant, topic): count for tenant, topic, count in rows}
    return sliced(fresh, listeners, most=SLICE_ITEMS)


def sliced(
    notifications: Sequence[Notification], listeners: Mapping[tuple[str, str], int], *, most: int
) -> list[list[Notification]]:
    """Notifications in slices of `most` items or one notification, given how many listen to each topic. Pure.

    Where there are several slices they are in the order of topics: so those who share windows come together, and two
    transactions that open the same ones seldom wait for each other crosswise.
    """
    sizes = [len(one.subscribers) + sum(listeners[one.tenant, topic] for topic in one.topics) for one in notifications]
    if sum(sizes) <= most:
        return [list(notifications)]
    found: list[list[Notification]] = []
    room = 0
    for one, size in sorted(zip(notifications, sizes, strict=True), key=_topics_of):
        if not found or size > room:
            found.append([])
            room = most
        found[-1].append(one)
        room -= size
    return found


def _topics_of(sized: tuple[Notification, int]) -> tuple[str, Sequence[str]]:
    return sized[0].tenant, sized[0].topics
