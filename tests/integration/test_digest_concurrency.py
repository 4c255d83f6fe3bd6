"""Several replicas of digest at once over one Postgres: nothing lost, nothing twice, nobody waits crosswise."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, suppress
from datetime import timedelta
from uuid import UUID

import pytest
from carillon.link.v1 import link_pb2

from libs.errors import Unavailable
from libs.links.frames import OutgoingFrame
from libs.postgres import Transaction
from libs.wire import to_timestamp
from services.digest.rendering_jobs import Message
from tests.integration.digest_rig import START, HandClock, Rig, migrate, replica
from tests.support.fixtures import OpenDatabase

SUBSCRIBERS = [f"s{number:02}" for number in range(50)]
WORKERS = 8
FRAMES = 12


@pytest.fixture
async def rigs(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[list[Rig]]:
    """Four replicas; 50 subscribers who hear by webhook when their batch is triggered."""
    migrate(postgres_url)
    clock = HandClock()
    async with AsyncExitStack() as stack:
        found = [await stack.enter_async_context(replica(postgres_url, open_database, clock=clock)) for _ in range(4)]
        await found[0].put_external("batch", "batch")
        await found[0].put_type(default_cadence="batch", default_channel=2)
        for name in SUBSCRIBERS:
            await found[0].put_subscriber(name, webhook_url=f"https://example.com/{name}")
        yield found


async def insert(rig: Rig, worker: int) -> None:
    """Tell all subscribers, in an order of this worker's own, frame by frame."""
    turned = SUBSCRIBERS[worker * 6 :] + SUBSCRIBERS[: worker * 6]
    for number in range(FRAMES):
        entries = [rig.notification(*turned[at : at + 5], entity=f"w{worker}/{number}") for at in range(0, 50, 5)]
        await until_applied(rig, *entries)


async def until_applied(rig: Rig, *entries: link_pb2.Entry) -> None:
    """Apply entries as a receiver does: what found its windows closing over and over comes again."""
    while True:
        with suppress(Unavailable):
            await rig.apply(*entries)
            return


async def close_again_and_again(rig: Rig, first: int, step: int, until: asyncio.Event) -> None:
    """Trigger and render until told to stop."""
    number = first
    while not until.is_set():
        await rig.apply(rig.trigger("batch", START + timedelta(microseconds=number)))
        await rig.close()
        number += step


def told(deliveries: Sequence[link_pb2.Delivery]) -> Counter[tuple[str, str]]:
    """How often each subscriber was told of each notification."""
    return Counter(
        (delivery.subscriber, item["notification_id"])
        for delivery in deliveries
        for item in json.loads(delivery.json)["items"]
    )


async def deadlocks(rig: Rig) -> int:
    """How many this database has had to break."""
    async with rig.db.read() as tx:
        row = await (
            await tx.raw.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        ).fetchone()
        assert row is not None
        return int(row[0])


@pytest.mark.timeout(180)
async def test_no_item_is_lost_or_told_twice_while_windows_close(rigs: list[Rig]) -> None:
    """INV-6, INV-7: eight workers insert for the same 50 subscribers while two replicas trigger and render."""
    before, done = await deadlocks(rigs[0]), asyncio.Event()
    async with asyncio.TaskGroup() as closers:
        for number in (0, 1):
            closers.create_task(close_again_and_again(rigs[number], number, 2, done))
        async with asyncio.TaskGroup() as inserters:
            for worker in range(WORKERS):
                inserters.create_task(insert(rigs[worker % len(rigs)], worker))
        done.set()
    await rigs[0].apply(rigs[0].trigger("batch", START + timedelta(days=1)))
    await rigs[0].close()
    expected = WORKERS * FRAMES * len(SUBSCRIBERS)
    assert await rigs[0].ledger() == {("digested", ""): expected}
    deliveries = await rigs[0].deliveries()
    assert len(deliveries) > len(SUBSCRIBERS), "no window closed while items came: this proved nothing"
    counts = told(deliveries)
    assert (len(counts), set(counts.values())) == (expected, {1})
    assert await deadlocks(rigs[0]) == before


@pytest.mark.timeout(180)
async def test_a_cancel_amid_inserts_and_closes_leaves_nothing_behind(rigs: list[Rig]) -> None:
    """INV-4: once it has returned, nothing accepted before is pending or in a later digest, and the counts add up."""
    done = asyncio.Event()
    frames = [
        [rigs[0].notification(*SUBSCRIBERS[:20], entity="N1", sequence=sequence) for sequence in range(at, at + 5)]
        for at in range(1, 101, 5)
    ]

    async def insert_some(rig: Rig, mine: Sequence[list[link_pb2.Entry]]) -> None:
        for entries in mine:
            await rig.apply(*entries)

    async def cancel() -> tuple[link_pb2.EntryResult, int]:
        result = await rigs[3].result(rigs[3].cancel("N1", sequence=101))
        return result, len(told(await rigs[3].deliveries()))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(close_again_and_again(rigs[0], 0, 1, done))
        async with asyncio.TaskGroup() as inserters:
            for number in range(2):
                inserters.create_task(insert_some(rigs[1 + number], frames[number::2]))
            cancelling = inserters.create_task(cancel())
        done.set()
    result, told_then = await cancelling
    await rigs[0].apply(rigs[0].trigger("batch", START + timedelta(days=1)))
    await rigs[0].close()
    ledger = await rigs[0].ledger()
    assert ledger.keys() <= {("cancelled", ""), ("digested", "")}
    assert sum(ledger.values()) == 100 * 20
    assert result.already_left == ledger.get(("digested", ""), 0)
    assert len(told(await rigs[0].deliveries())) == told_then == result.already_left


@pytest.mark.timeout(120)
async def test_replicas_share_the_closing_windows(rigs: list[Rig]) -> None:
    """Each window is rendered by exactly one of those that close at the same time."""
    await rigs[0].apply(rigs[0].notification(*SUBSCRIBERS))
    await rigs[0].apply(rigs[0].trigger("batch", START))
    closed = await asyncio.gather(*(rig.close() for rig in rigs))
    assert sum(closed) == len(SUBSCRIBERS)
    assert len(await rigs[0].deliveries()) == len(SUBSCRIBERS)


async def test_closing_that_fails_half_way_has_changed_nothing(rigs: list[Rig]) -> None:
    """A crash before the commit: windows, items and outbox are as before, and the next try does it all."""
    rig = rigs[0]
    await rig.apply(rig.notification(*SUBSCRIBERS))
    await rig.apply(rig.trigger("batch", START))
    post = rig.closing._post

    class Crash(Exception):
        """The process is gone."""

    class CrashingPost:
        def check_room(self) -> None: ...

        async def hand_over(self, tx: Transaction, messages: Sequence[Message]) -> list[OutgoingFrame]:
            await post.hand_over(tx, messages)
            raise Crash

        def publish(self, frames: Sequence[OutgoingFrame]) -> None:
            raise AssertionError("nothing was committed")

    rig.closing._post = CrashingPost()
    with pytest.raises(Crash):
        await rig.closing.close_once()
    assert await rig.deliveries() == []
    assert await rig.ledger() == {("pending", ""): len(SUBSCRIBERS)}
    rig.closing._post = post
    await rig.close()
    assert await rig.ledger() == {("digested", ""): len(SUBSCRIBERS)}
    assert len(await rig.deliveries()) == len(SUBSCRIBERS)


@pytest.mark.timeout(180)
async def test_rolling_windows_fill_and_close_without_a_loss_or_a_deadlock(rigs: list[Rig]) -> None:
    """INV-6, INV-7: two cadences at once, windows full, timed out and triggered, while six workers insert for them."""
    names = SUBSCRIBERS[:20]
    await rigs[0].put_rolling("rolling", duration=timedelta(hours=1), maximum_items=6, is_leading=True)
    for name in names:
        await rigs[0].subscribe(name, "rolling", "batch", channel=2)
    before, done = await deadlocks(rigs[0]), asyncio.Event()

    async def insert_some(rig: Rig, worker: int) -> None:
        for number in range(10):
            turned = names[worker * 3 :] + names[: worker * 3]
            entries = [rig.notification(*turned[at : at + 5], entity=f"w{worker}/{number}") for at in range(0, 20, 5)]
            await until_applied(rig, *entries)

    async def time_out(rig: Rig) -> None:
        late = to_timestamp(START + timedelta(days=1))
        while not done.is_set():
            windows = [UUID(window.id).bytes for window in await rig.windows()]
            closes = [link_pb2.CloseWindow(window_id=one, due_time=late) for one in reversed(windows)]
            await until_applied(rig, *[link_pb2.Entry(tenant="acme", close_window=one) for one in closes])
            await rig.close()

    async with asyncio.TaskGroup() as closers:
        closers.create_task(close_again_and_again(rigs[0], 0, 1, done))
        closers.create_task(time_out(rigs[1]))
        async with asyncio.TaskGroup() as inserters:
            for worker in range(6):
                inserters.create_task(insert_some(rigs[worker % len(rigs)], worker))
        done.set()
    done.clear()
    closing = asyncio.create_task(time_out(rigs[1]))
    await rigs[0].apply(rigs[0].trigger("batch", START + timedelta(days=1)))  # The last one came before the last item.
    while await rigs[0].windows(1, 2):
        await rigs[0].close()
    done.set()
    await closing
    ledger = await rigs[0].ledger()
    assert ledger.keys() == {("digested", ""), ("sent_alone", "")}
    assert sum(ledger.values()) == 6 * 10 * len(names) * 2
    counts = told(await rigs[0].deliveries())
    assert (len(counts), set(counts.values())) == (6 * 10 * len(names), {2})
    assert await deadlocks(rigs[0]) == before
