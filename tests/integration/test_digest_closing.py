"""The closing loop when there is too much: a link that is full, templates that are slow, digests that are large."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence

import pytest
from carillon.digest.v1 import digest_pb2 as pb
from carillon.scheduler.v1 import timer_pb2

from libs.errors import ResourceExhausted
from libs.settings import LinkSettings
from services.digest import store_rendering
from services.digest.rendering_jobs import Job, Rendered
from tests.integration.digest_rig import Rig, migrate, replica
from tests.support.fixtures import OpenDatabase


@pytest.fixture
async def rig(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[Rig]:
    """A replica with a type, a batch and a subscriber."""
    migrate(postgres_url)
    async with replica(postgres_url, open_database) as rig:
        await rig.put_type()
        await rig.put_external()
        await rig.put_subscriber()
        yield rig


def fill_link(rig: Rig, frames: int) -> None:
    """Have its sender believe that the link to the dispatcher holds so many frames."""
    rig.closing._post._sender._unconfirmed["dispatcher"] = frames  # type: ignore[attr-defined]


async def test_inv9_nothing_is_rendered_while_the_link_to_the_dispatcher_is_full(rig: Rig) -> None:
    """What closes stays in its window, where a cancel finds it; the rest leaves when there is room again."""
    await rig.apply(rig.notification("ann", entity="N1"), rig.notification("ann", entity="N2"))
    fill_link(rig, LinkSettings().max_unconfirmed_frames)
    with pytest.raises(ResourceExhausted):
        await rig.closing.close_once()
    assert await rig.ledger() == {("pending", ""): 2}
    assert (await rig.result(rig.cancel("N1"))).changed == 1
    fill_link(rig, 0)
    await rig.close()
    assert await rig.ledger() == {("cancelled", ""): 1, ("sent_alone", ""): 1}


async def test_the_loop_outlives_a_link_that_is_full(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It rests, however often it is woken, and closes what has waited when there is room."""
    post, asked, rested, published = rig.closing._post, 0, asyncio.Event(), asyncio.Event()

    def check_room() -> None:
        nonlocal asked
        asked += 1
        if not rested.is_set():
            raise ResourceExhausted(retry_after=None)

    monkeypatch.setattr("services.digest.loops._rest_while_full", rested.wait)
    monkeypatch.setattr(post, "check_room", check_room)
    monkeypatch.setattr(post, "publish", lambda _frames: published.set())
    running = asyncio.create_task(rig.closing.run())
    await rig.apply(rig.notification("ann"))
    rig.closing._wake.set()
    await rig.items()
    assert asked == 1
    rested.set()
    async with asyncio.timeout(10):
        await published.wait()
    running.cancel()
    assert await rig.ledger() == {("sent_alone", ""): 1}


class _Slow:
    """A press that has time for one job each time."""

    def __init__(self, rig: Rig) -> None:
        self._press = rig.closing._press

    async def render(self, jobs: Sequence[Job]) -> list[Rendered]:
        return await self._press.render(jobs[:1])


async def test_what_there_was_no_time_for_is_as_if_it_had_not_been_claimed(rig: Rig) -> None:
    """It waits in its window, can be cancelled, and is next."""
    for entity in ("N1", "N2", "N3"):
        await rig.apply(rig.notification("ann", entity=entity))
    rig.closing._press = _Slow(rig)
    assert await rig.closing.close_once() == 1
    assert await rig.ledger() == {("pending", ""): 2, ("sent_alone", ""): 1}
    (first,) = await rig.deliveries()
    cancelled = "N2" if "N1" in first.text else "N1"
    assert (await rig.result(rig.cancel(cancelled))).changed == 1
    assert await rig.close() == 2
    assert await rig.ledger() == {("cancelled", ""): 1, ("sent_alone", ""): 2}
    assert [cancelled in one.text for one in await rig.deliveries()] == [False, False]


async def test_when_there_is_no_time_for_all_the_most_urgent_are_rendered(rig: Rig) -> None:
    """Of one batch, too: however many came before."""
    await rig.apply(rig.notification("ann", entity="N1"))
    await rig.apply(rig.notification("ann", entity="N2", priority=timer_pb2.PRIORITY_HIGH))
    rig.closing._press = _Slow(rig)
    assert await rig.closing.close_once() == 1
    assert ["N2" in one.text for one in await rig.deliveries()] == [True]


async def test_inv9_of_a_window_with_very_many_items_several_digests_are_made(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest items first, each in one digest (INV-7); what has not been rendered yet can be cancelled."""
    monkeypatch.setattr(store_rendering, "MOST_ITEMS", 3)
    await fill(rig, "N1", "N2", "N3", "N4", "N5", "N6", "N7")
    assert await rig.closing.close_once() == 1
    assert await rig.ledger() == {("digested", ""): 3, ("pending", ""): 4}
    assert (await rig.result(rig.cancel("N7"))).changed == 1
    assert (await rig.result(rig.cancel("N1"))).already_left == 1
    assert await rig.close() == 1
    assert await rig.ledger() == {("digested", ""): 6, ("cancelled", ""): 1}
    told = [re.findall("N[0-9]", one.text) for one in await rig.deliveries()]
    assert told == [["N1", "N2", "N3"], ["N4", "N5", "N6"]]
    digests = (await rig.call("ListDigests")).digests
    assert sorted(one.item_count for one in digests) == [3, 3]
    for one in digests:
        assert len((await rig.call("GetDigest", id=one.id)).items) == 3


async def test_inv4_a_cancel_that_waits_for_a_large_window_finds_what_is_left_in_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits while the first part is rendered; what that took has left, the rest is cancelled."""
    monkeypatch.setattr(store_rendering, "MOST_ITEMS", 2)
    press, cancelling = rig.closing._press, list[asyncio.Task[Sequence[int]]]()

    async def cancel() -> Sequence[int]:
        results = [await rig.result(rig.cancel(entity)) for entity in ("N2", "N3")]
        return [one.changed for one in results]

    class Press:
        async def render(self, jobs: Sequence[Job]) -> list[Rendered]:
            cancelling.append(asyncio.create_task(cancel()))
            await until_waited_for(rig)
            return await press.render(jobs)

    await fill(rig, "N1", "N2", "N3", "N4")
    rig.closing._press = Press()
    assert await rig.closing.close_once() == 1
    assert await cancelling[0] == [0, 1]
    rig.closing._press = press
    await rig.close()
    assert await rig.ledger() == {("digested", ""): 3, ("cancelled", ""): 1}
    assert [re.findall("N[0-9]", one.text) for one in await rig.deliveries()] == [["N1", "N2"], ["N4"]]


async def test_a_preview_of_a_window_with_very_many_items_shows_the_first_digest(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads no more than rendering does."""
    monkeypatch.setattr(store_rendering, "MOST_ITEMS", 3)
    await fill(rig, "N1", "N2", "N3", "N4", triggered=False)
    (window,) = await rig.windows()
    preview = await rig.call("PreviewDigest", window_id=window.id)
    assert preview.item_count == 3
    assert re.findall("N[0-9]", preview.text) == ["N1", "N2", "N3"]


async def fill(rig: Rig, *entities: str, triggered: bool = True) -> None:
    """A window with an item for each, in this order."""
    await rig.subscribe("ann", "rebooking", channel=pb.CHANNEL_EMAIL, format=pb.FORMAT_TEXT)
    for entity in entities:
        await rig.apply(rig.notification("ann", entity=entity))
    if triggered:
        await rig.apply(rig.trigger("rebooking", rig.clock.at))


async def until_waited_for(rig: Rig) -> None:
    """Until somebody waits for somebody's lock."""
    async with asyncio.timeout(10):
        while True:
            async with rig.db.transaction() as tx:
                cursor = await tx.raw.execute(
                    "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
                )
                if await cursor.fetchall():
                    return
