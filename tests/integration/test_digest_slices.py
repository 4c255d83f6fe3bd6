"""What is too much for one statement: the same comes of it, some at a time."""

from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any, LiteralString, cast

import pytest
from carillon.digest.v1 import digest_pb2 as pb
from carillon.link.v1 import link_pb2

from libs.ids import new_id
from libs.links.receiver import IncomingFrame
from libs.postgres import Transaction
from services.digest import store_expansion, store_slices, store_windows
from services.digest.commands import Notification
from services.digest.store_arrivals import count_items
from services.digest.store_slices import TooManyItems
from tests.integration.digest_rig import START, Rig, migrate, replica
from tests.support.fixtures import OpenDatabase

CADENCES = ("daily", "rebooking", "rolling", "immediate", "off")
LISTENERS = len(CADENCES) + 1
SLICE = 2 * LISTENERS + 1


@pytest.fixture
async def rig(postgres_url: str, open_database: OpenDatabase, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    """A replica whose slices hold two notifications; to a topic listen subscribers of all kinds, one with a filter."""
    migrate(postgres_url)
    monkeypatch.setattr(store_slices, "SLICE_ITEMS", SLICE)
    async with replica(postgres_url, open_database) as rig:
        for tenant in ("other", "acme"):
            rig.tenant = tenant
            await put_catalog(rig)
        yield rig


async def put_catalog(rig: Rig) -> None:
    """Subscribers named after their cadences."""
    await rig.put_type()
    await rig.put_daily()
    await rig.put_external()
    await rig.put_rolling(duration=timedelta(hours=1), maximum_items=4)
    for cadence in CADENCES:
        await rig.put_subscriber(cadence)
        await rig.subscribe(cadence, cadence, topic="UA")
    await rig.put_subscriber("choosy")
    await rig.subscribe("choosy", "daily", topic="UA", filter="payload.number > 3")


def told(rig: Rig) -> list[link_pb2.Entry]:
    """Seven notifications to the topic, and one to a subscriber."""
    return [
        *(rig.notification(topics=["UA"], payload={"number": number}) for number in range(7)),
        rig.notification("daily"),
    ]


async def rows(rig: Rig, statement: LiteralString) -> list[tuple[Any, ...]]:
    """What a query about a tenant returns."""
    async with rig.db.read() as tx:
        return await (await tx.raw.execute(statement, {"tenant": rig.tenant})).fetchall()


async def outcome(rig: Rig) -> list[list[tuple[Any, ...]]]:
    """Everything that a tenant's notifications have become, without ids."""
    items = await rows(
        rig,
        "SELECT subscriber, choice, state, reason, count(*) FROM item WHERE tenant = %(tenant)s"
        " GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4",
    )
    windows = await rows(
        rig,
        "SELECT w.subscriber, w.kind, w.state, w.placed, count(*) FROM digest_window w"
        " JOIN item i ON i.window_id = w.id AND i.state = 1 WHERE w.tenant = %(tenant)s"
        " GROUP BY w.tenant, w.id ORDER BY 1, 2, 3, 4, 5",
    )
    return [items, windows, await rows(rig, "SELECT items FROM notification WHERE tenant = %(tenant)s ORDER BY 1")]


async def timers(rig: Rig) -> int:
    """How many have been asked for by a tenant's windows."""
    return sum(entry.tenant == rig.tenant for entry in await rig.outgoing("scheduler"))


@pytest.fixture
def expanded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many notifications each slice had, as they come."""
    found: list[int] = []

    async def counting(tx: Transaction, notifications: Sequence[Notification], items: int) -> None:
        found.append(len(notifications))
        await count_items(tx, notifications, items)

    monkeypatch.setattr(store_expansion, "count_items", counting)
    return found


async def test_a_frame_of_too_many_items_is_expanded_in_slices_to_the_same_effect(
    rig: Rig, expanded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items, windows (rolling ones that fill up, too), what they count, timers; INV-6."""
    await rig.apply(*told(rig))
    assert expanded == [3, 2, 2, 1]  # The one that is told directly comes first.
    sliced, asked = await outcome(rig), await timers(rig)
    await rig.ledger()
    monkeypatch.setattr(store_slices, "SLICE_ITEMS", 1_000)
    expanded.clear()
    rig.tenant = "other"
    await rig.apply(*told(rig))
    assert expanded == [8]
    assert sliced == await outcome(rig)
    assert asked == await timers(rig)
    assert (await rig.ledger())["suppressed", "filter"] == 4


async def test_frames_of_too_many_items_together_come_alone(rig: Rig) -> None:
    """Each in a transaction of its own, so that none is longer than it must be; nothing stays of the first try."""
    frames = [
        IncomingFrame(id=new_id(), frame=link_pb2.Frame(id=new_id().bytes, entries=entries), message=cast(Any, None))
        for entries in (told(rig)[:1], told(rig)[:2])
    ]
    with pytest.raises(TooManyItems):
        async with rig.db.transaction() as tx:
            await rig.inlet.apply(tx, frames)
    assert await rows(rig, "SELECT FROM notification") == []
    for frame in frames:
        async with rig.db.transaction() as tx:
            await rig.inlet.apply(tx, [frame])
    assert await rows(rig, "SELECT count(*) FROM item") == [(3 * LISTENERS,)]


async def test_frames_that_fit_together_share_a_transaction(rig: Rig) -> None:
    """As nearly all do."""
    entries = told(rig)[:2]
    frames = [
        IncomingFrame(id=new_id(), frame=link_pb2.Frame(id=new_id().bytes, entries=[one]), message=cast(Any, None))
        for one in entries
    ]
    async with rig.db.transaction() as tx:
        await rig.inlet.apply(tx, frames)
    assert await rows(rig, "SELECT count(*) FROM item") == [(2 * LISTENERS,)]


@pytest.mark.parametrize("windows", [0, 3, 4, 7])
async def test_a_trigger_closes_some_windows_at_a_time_until_all_are(
    rig: Rig, windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says how many there were, also where the last statement finds none."""
    monkeypatch.setattr(store_windows, "_TRIGGERED_AT_ONCE", 2)
    await rig.put_type(default_cadence="rebooking")
    for number in range(windows):
        await rig.put_subscriber(f"s{number}")
        await rig.apply(rig.notification(f"s{number}"))
    result = await rig.result(rig.trigger("rebooking", START))
    assert (result.changed, result.is_repeated) == (windows, False)
    assert len(await rig.windows(pb.WINDOW_STATE_CLOSING)) == windows
    assert await rows(rig, "SELECT windows FROM batch_run") == [(windows,)]
