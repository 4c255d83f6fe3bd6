"""libs.links against real Postgres and NATS: duplicates, reordering, lost receipts, several replicas."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest
from carillon.link.v1 import link_pb2

from libs.errors import ResourceExhausted
from libs.jetstream import Bus
from libs.links import outbox
from libs.links import sender as links_sender
from libs.links.frames import REPLY_HEADER, OutgoingFrame, subject_of
from libs.links.incoming import IncomingFrame
from libs.links.receiver import Applied
from libs.links.sender import PUBLISHERS
from libs.postgres import Transaction
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.link_process import RECEIVER, commit_numbers, count, numbered
from tests.support.link_world import LinkWorld, make_world, running, until

LONG = timedelta(seconds=15)


@pytest.fixture
async def world(open_database: OpenDatabase, postgres_url: str, nats_url: str, tmp_path: Path) -> LinkWorld:
    """Both ends, not running."""
    return await make_world(open_database, postgres_url, nats_url, tmp_path)


class Mailman:
    """A Broker between a sender and the bus that can lose things, or be stuck while its gate is closed."""

    def __init__(self, bus: Bus, *, loses_messages: int = 0, loses_receipts: int = 0) -> None:
        self._bus = bus
        self.loses_messages = loses_messages
        self.loses_receipts = loses_receipts
        self.msg_ids: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def publish(self, subject: str, payload: bytes, *, headers: Mapping[str, str], msg_id: str) -> None:
        """See Bus."""
        self.msg_ids.append(msg_id)
        await self.gate.wait()
        if self.loses_messages:
            self.loses_messages -= 1
            return
        await self._bus.publish(subject, payload, headers=headers, msg_id=msg_id)

    async def ensure_stream(self, name: str, subjects: Sequence[str]) -> bool:
        """See Bus."""
        return await self._bus.ensure_stream(name, subjects)

    async def subscribe(self, subject: str, callback: Callable[[bytes], Awaitable[None]]) -> None:
        """See Bus."""

        async def deliver(payload: bytes) -> None:
            if self.loses_receipts:
                self.loses_receipts -= 1
                return
            await callback(payload)

        await self._bus.subscribe(subject, deliver)


async def deliver(bus: Bus, frame: OutgoingFrame, msg_id: str, reply_to: str = "") -> None:
    """Put a frame into the stream by hand."""
    headers = {REPLY_HEADER: reply_to} if reply_to else {}
    await bus.publish(subject_of(RECEIVER, frame.partition), frame.payload, headers=headers, msg_id=msg_id)


async def receipts_at(bus: Bus, subject: str) -> "asyncio.Queue[link_pb2.Receipt]":
    """What arrives for a replica of the sender."""
    arrived: asyncio.Queue[link_pb2.Receipt] = asyncio.Queue()

    async def on_receipts(payload: bytes) -> None:
        for receipt in link_pb2.Receipts.FromString(payload).receipts:
            arrived.put_nowait(receipt)

    await bus.subscribe(subject, on_receipts)
    return arrived


async def test_a_frame_is_applied_and_its_receipt_says_what_came_of_it(world: LinkWorld, open_bus: OpenBus) -> None:
    """The caller that waits gets a result per entry; the outbox is empty then or soon."""
    sender, receiver = world.sender(await open_bus()), world.receiver(await open_bus())
    async with running(sender.run(), receiver.run()):
        frames = await commit_numbers(world.sender_db, sender, range(3))
        receipts = await sender.wait(frames, LONG)
        (receipt,) = receipts.values()
        assert receipt.verdict == link_pb2.FRAME_VERDICT_APPLIED
        assert [(one.index, one.changed) for one in receipt.results] == [(0, 0), (1, 1), (2, 2)]
        await world.expect_all_once(3)


async def test_who_does_not_wait_long_enough_gets_nothing_and_loses_nothing(
    world: LinkWorld, open_bus: OpenBus
) -> None:
    """Without a receiver no receipt comes; the frame waits for it."""
    sender = world.sender(await open_bus())
    async with running(sender.run()):
        frames = await commit_numbers(world.sender_db, sender, range(3))
        assert await sender.wait(frames, timedelta(milliseconds=50)) == {}
        assert await sender.wait(frames, timedelta(0)) == {}
        assert await world.unconfirmed() == 1
        async with running(world.receiver(await open_bus()).run()):
            await world.expect_all_once(3)


async def test_a_stopping_receiver_hands_back_the_frames_in_hand(world: LinkWorld, open_bus: OpenBus) -> None:
    """Or in every rolling restart some would wait for a sweep, or for JetStream's own patience of half a minute."""
    is_applying = asyncio.Event()

    async def apply(tx: Transaction, frames: Sequence[IncomingFrame]) -> Applied:
        is_applying.set()
        await asyncio.Event().wait()
        return await count(tx, frames)

    sender = world.sender(await open_bus(), republish_after=timedelta(minutes=1))
    await sender.ensure_streams()
    stopping = asyncio.create_task(world.receiver(await open_bus(), apply).run())
    async with running(sender.run()):
        for number in range(8):
            await world.send(sender, [number])
        async with asyncio.timeout(10):
            await is_applying.wait()
        stopping.cancel()
        with suppress(asyncio.CancelledError):
            await stopping
        async with running(world.receiver(await open_bus()).run()):
            await world.expect_all_once(8)


async def test_a_stopping_sender_publishes_what_it_has_committed(world: LinkWorld, open_bus: OpenBus) -> None:
    """Or in every rolling restart some frames would wait for another replica's sweep, for seconds."""
    mailman = Mailman(await open_bus())
    mailman.gate.clear()
    sender = world.sender(mailman, republish_after=timedelta(minutes=1))
    await sender.ensure_streams()
    async with running(world.receiver(await open_bus()).run()):
        task = asyncio.create_task(sender.run())
        for number in range(PUBLISHERS + 8):  # Some under way, some in the queue.
            await world.send(sender, [number])

        async def are_under_way() -> bool:
            return len(mailman.msg_ids) == PUBLISHERS

        await until(are_under_way)
        task.cancel()
        mailman.gate.set()
        with suppress(asyncio.CancelledError):
            await task
        assert len(mailman.msg_ids) == PUBLISHERS + 8

        async def are_applied() -> bool:
            return await world.applied_numbers() == PUBLISHERS + 8

        await until(are_applied)


async def test_a_stopping_sender_does_not_wait_for_a_broker_that_is_away(
    world: LinkWorld, open_bus: OpenBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends all the same, and the frames are another's."""
    monkeypatch.setattr(links_sender, "_FINISH_S", 0.1)
    mailman = Mailman(await open_bus())
    mailman.gate.clear()
    sender = world.sender(mailman)
    task = asyncio.create_task(sender.run())
    await world.send(sender, [0])
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.done()
    assert await world.unconfirmed() == 1


async def test_a_rolled_back_change_sends_nothing(world: LinkWorld, open_bus: OpenBus) -> None:
    """State and frame are one transaction."""
    sender = world.sender(await open_bus())
    await commit_numbers(world.sender_db, sender, [1])
    with pytest.raises(Exception, match="duplicate key"):
        await commit_numbers(world.sender_db, sender, [1])
    assert await world.unconfirmed() == 1


async def test_a_frame_that_comes_again_has_no_effects_and_the_same_receipt(
    world: LinkWorld, open_bus: OpenBus, bus: Bus
) -> None:
    """Also much later, in other company, and to another replica of the sender."""
    sender, receiver = world.sender(await open_bus()), world.receiver(await open_bus())
    async with running(receiver.run()):
        first, second = [await commit_numbers(world.sender_db, sender, [n, n + 1]) for n in (10, 20)]
        arrived = await receipts_at(bus, "carillon.receipt.intake.other")
        await sender.ensure_streams()
        await deliver(bus, first[0], "a", "carillon.receipt.intake.other")
        original = await asyncio.wait_for(arrived.get(), 10)
        for n, one in enumerate([first[0], second[0], first[0], first[0]]):
            await deliver(bus, one, f"again {n}", "carillon.receipt.intake.other")
        later = [await asyncio.wait_for(arrived.get(), 10) for _ in range(2)]
    assert original.frame_id == first[0].id.bytes
    assert [one.changed for one in original.results] == [10, 11]
    assert all(one == original for one in later if one.frame_id == original.frame_id)
    assert await world.applied() == {10: 1, 11: 1, 20: 1, 21: 1}


async def test_frames_may_overtake_each_other(world: LinkWorld, open_bus: OpenBus, bus: Bus) -> None:
    """Delivered backwards, with copies in between, all are applied once."""
    sender, receiver = world.sender(await open_bus()), world.receiver(await open_bus())
    await sender.ensure_streams()
    frames = [(await commit_numbers(world.sender_db, sender, [n]))[0] for n in range(10)]
    for round_number in range(3):
        for frame in reversed(frames):
            await deliver(bus, frame, f"{frame.id} {round_number}")
    async with running(sender.run(), receiver.run()):
        await world.expect_all_once(10)


async def test_two_copies_in_the_hands_of_two_replicas_are_applied_once(
    world: LinkWorld, open_bus: OpenBus, bus: Bus
) -> None:
    """The second waits at the inbox's key until the first has committed."""
    sender = world.sender(await open_bus())
    receivers = [world.receiver(await open_bus(), fetch_frames=1) for _ in range(3)]
    await sender.ensure_streams()
    frames = [(await commit_numbers(world.sender_db, sender, [n]))[0] for n in range(30)]
    async with running(sender.run(), *(one.run() for one in receivers)):
        for frame in frames:
            await asyncio.gather(*(deliver(bus, frame, f"{frame.id} {copy}") for copy in range(6)))
        await world.expect_all_once(30)


async def test_a_lost_receipt_is_asked_for_again_by_sending_again(world: LinkWorld, open_bus: OpenBus) -> None:
    """Applied once, confirmed in the end."""
    mailman = Mailman(await open_bus(), loses_receipts=3)
    sender, receiver = world.sender(mailman), world.receiver(await open_bus())
    async with running(sender.run(), receiver.run()):
        await world.send(sender, range(5))
        await world.expect_all_once(5)
    assert mailman.loses_receipts == 0


async def test_a_lost_message_is_sent_again_under_another_message_id(world: LinkWorld, open_bus: OpenBus) -> None:
    """Under the same one JetStream's duplicate window could swallow it for two minutes."""
    mailman = Mailman(await open_bus(), loses_messages=2)
    sender, receiver = world.sender(mailman), world.receiver(await open_bus())
    async with running(sender.run(), receiver.run()):
        (frame,) = await world.send(sender, range(5))
        await world.expect_all_once(5)
    assert mailman.msg_ids[:3] == [str(frame.id), f"{frame.id}:1", f"{frame.id}:2"]


async def test_an_acked_message_without_receipt_is_sent_again_within_the_duplicate_window(
    world: LinkWorld, open_bus: OpenBus, bus: Bus
) -> None:
    """JetStream has known the frame's id; the frame comes through to the receiver all the same."""
    sender, receiver = world.sender(await open_bus()), world.receiver(await open_bus())
    await sender.ensure_streams()
    (frame,) = await commit_numbers(world.sender_db, sender, [0])
    await deliver(bus, frame, str(frame.id))  # No reply subject: the receipt is lost for good.
    async with running(sender.run(), receiver.run()):
        await world.expect_all_once(1)


async def test_another_replica_sends_what_a_dead_one_left(world: LinkWorld, open_bus: OpenBus) -> None:
    """Committed and never published; and published, with the receipt going to the dead one's subject."""
    dead, receiver = world.sender(await open_bus(), replica="dead"), world.receiver(await open_bus())
    await commit_numbers(world.sender_db, dead, [0, 1])
    async with running(receiver.run(), world.sender(await open_bus(), replica="living").run()):
        await world.expect_all_once(2)


async def test_sweepers_of_several_replicas_take_different_frames(world: LinkWorld, open_bus: OpenBus) -> None:
    """Each frame is taken by one of them, and then not due for a while."""
    sender = world.sender(await open_bus(), republish_after=timedelta(0))
    for n in range(100):
        await commit_numbers(world.sender_db, sender, [n])

    async def take() -> list[UUID]:
        async with world.sender_db.transaction() as tx:
            due = await outbox.take_due(tx, first=timedelta(minutes=1), longest=timedelta(hours=1), limit=30)
        return [one.frame.id for one in due]

    taken = await asyncio.gather(*(take() for _ in range(5)))
    assert max(map(len, taken)) <= 30
    rest = [await take() for _ in range(5)]
    everything = [frame_id for part in [*taken, *rest] for frame_id in part]
    assert len(everything) == len(set(everything)) == 100


async def test_waits_between_sweeps_double_up_to_a_limit(world: LinkWorld, open_bus: OpenBus) -> None:
    """Three quarters at least of 1, 2, 4, 5, 5 seconds."""
    sender = world.sender(await open_bus(), republish_after=timedelta(0))
    await commit_numbers(world.sender_db, sender, [0])
    waits = []
    for _ in range(5):
        async with world.sender_db.transaction() as tx:
            await tx.raw.execute("UPDATE outbox SET next_publish_at = clock_timestamp()")
        async with world.sender_db.transaction() as tx:
            (due,) = await outbox.take_due(tx, first=timedelta(seconds=1), longest=timedelta(seconds=5), limit=9)
            cursor = await tx.raw.execute("SELECT extract(epoch FROM next_publish_at - clock_timestamp()) FROM outbox")
            row = await cursor.fetchone()
            assert row is not None
            waits.append((due.publishes, float(row[0])))
    assert [publishes for publishes, _ in waits] == [1, 2, 3, 4, 5]
    for (_, wait_s), full_s in zip(waits, (1, 2, 4, 5, 5), strict=True):
        assert full_s * 0.75 - 0.1 < wait_s <= full_s


async def test_confirming_and_sweeping_the_same_frames_is_no_deadlock(world: LinkWorld, open_bus: OpenBus) -> None:
    """Receipts come while the sweeper has their frames in hand, on several replicas at once."""
    senders = [world.sender(await open_bus(), replica=str(n), republish_after=timedelta(0)) for n in range(3)]
    frames = [(await commit_numbers(world.sender_db, senders[0], [n]))[0] for n in range(300)]

    async def confirm(part: list[OutgoingFrame]) -> int:
        async with world.sender_db.transaction() as tx:
            return (await outbox.confirm(tx, [one.id for one in part])).total()

    async def take() -> None:
        async with world.sender_db.transaction() as tx:
            await outbox.take_due(tx, first=timedelta(0), longest=timedelta(0), limit=200)

    async def all_due() -> None:
        async with world.sender_db.transaction() as tx:
            await outbox.make_all_due(tx, RECEIVER)

    halves = [frames[:200], frames[100:][::-1], frames[::3], frames[::-1]]
    confirmed = await asyncio.gather(
        *(confirm(half) for half in halves), *(take() for _ in range(6)), *(all_due() for _ in range(3))
    )
    assert sum(found or 0 for found in confirmed) == 300
    assert await world.unconfirmed() == 0


async def test_a_full_link_refuses_what_comes_next(world: LinkWorld, open_bus: OpenBus) -> None:
    """INV-9: with a delay, and only while it is full."""
    sender = world.sender(await open_bus(), max_unconfirmed_frames=2)
    await sender.measure_once()
    sender.check_room([RECEIVER])
    for n in range(2):
        await commit_numbers(world.sender_db, sender, [n])
    await sender.measure_once()
    with pytest.raises(ResourceExhausted) as caught:
        sender.check_room([RECEIVER])
    assert caught.value.retry_after is not None
    async with running(sender.run(), world.receiver(await open_bus()).run()):
        await world.expect_all_once(2)
    await sender.measure_once()
    sender.check_room([RECEIVER])


async def test_garbage_on_the_receipt_subject_harms_nothing(world: LinkWorld, open_bus: OpenBus, bus: Bus) -> None:
    """Whoever can publish there can confirm frames, but not stop us."""
    sender, receiver = world.sender(await open_bus()), world.receiver(await open_bus())
    async with running(sender.run(), receiver.run()):
        await world.send(sender, [0])
        for payload in (b"\xff\xffgarbage", b"", link_pb2.Receipts(receipts=[link_pb2.Receipt()]).SerializeToString()):
            await bus.send("carillon.receipt.intake.one", payload)
        await world.send(sender, [1])
        await world.expect_all_once(2)


async def test_a_thousand_frames_of_one_entry_share_transactions(world: LinkWorld, open_bus: OpenBus) -> None:
    """Small frames are cheap: many are applied, confirmed and swept at once."""
    sender, receiver = world.sender(await open_bus()), world.receiver(await open_bus())
    async with running(sender.run(), receiver.run()):
        for start in range(0, 1_000, 100):
            packed = [frame for n in range(start, start + 100) for frame in sender.pack(numbered([n]))[0]]
            async with world.sender_db.transaction() as tx:
                await tx.raw.execute("INSERT INTO sent SELECT generate_series(%s::int, %s::int)", (start, start + 99))
                await sender.insert(tx, packed)
            sender.publish(packed)
        await world.expect_all_once(1_000)
