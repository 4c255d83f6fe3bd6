"""What goes wrong: bad frames, timers that cannot fire, Postgres restarted, JetStream wiped."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2

from libs.ids import derived_id, new_id
from libs.links import metrics, receiver
from libs.links.frames import REPLY_HEADER, Addressed, OutgoingFrame, subject_of
from libs.links.receiver import MAX_FAILURES
from libs.links.sender import Sender
from libs.postgres import Transaction
from libs.sharding import shard_of
from local.servers import NatsServer, PostgresServer
from services.scheduler.commands import Changes
from services.scheduler.shard import Shard
from services.scheduler.store import TurnStore
from services.scheduler.timer import Timer
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.scheduler_world import SHARDS, START, SchedulerWorld, scheduler_world

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)


@pytest.fixture
async def world(postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus) -> AsyncIterator[SchedulerWorld]:
    """A world with one replica."""
    async with scheduler_world(postgres_url, open_database, open_bus) as it:
        await it.start("a")
        await it.until_held("a")
        yield it


async def _dead(world: SchedulerWorld, count: int) -> list[tuple[UUID, str]]:
    """Wait until `count` frames are dead; (id, reason) of each."""
    async with asyncio.timeout(20):
        while True:
            async with world.db.read() as tx:
                cursor = await tx.raw.execute("SELECT frame_id, reason FROM dead_frame ORDER BY frame_id")
                rows = await cursor.fetchall()
            if len(rows) >= count:
                return [(row[0], row[1]) for row in rows]
            await asyncio.sleep(0.02)


async def _post(world: SchedulerWorld, entry: link_pb2.Entry, partition: int) -> UUID:
    """Send one entry in a frame of its own, without waiting."""
    frames, _ = world.peer.sender.pack([Addressed(receiver="scheduler", entry=entry, partition=partition)])
    async with world.peer.db.transaction() as tx:
        await world.peer.sender.insert(tx, frames)
    world.peer.sender.publish(frames)
    return frames[0].id


def _shard(entity: str) -> int:
    return shard_of("acme", entity, SHARDS)


async def test_a_frame_that_cannot_be_understood_is_put_aside_and_its_shard_goes_on(world: SchedulerWorld) -> None:
    """A kind nobody knows, a year 10000, facts a mile deep, no time at all, the wrong shard: each says why."""
    peer = world.peer
    far = peer.timer("e", START)
    far.schedule_timer.due_time.seconds = 1 << 40
    never = peer.timer("e", START)
    never.schedule_timer.ClearField("due_time")
    bad = {
        "kind": peer.entry(close_window=link_pb2.CloseWindow(window_id=b"x")),
        "Overflow": far,
        "Recursion": peer.entry(put_facts=link_pb2.PutFacts(entity="e", facts="[" * 100_000)),
        "neither when": never,
    }
    ids = {await _post(world, entry, _shard("e")): word for word, entry in bad.items()}
    ids[await _post(world, peer.timer("e", START), (_shard("e") + 1) % SHARDS)] = "CARILLON_SHARDS"
    dead = dict(await _dead(world, 5))
    assert all(word in dead[frame_id] for frame_id, word in ids.items()), dead
    await peer.send(peer.timer("e", START))
    assert len(await peer.received(1)) == 1


async def test_a_frame_whose_command_raises_is_buried_alone_and_its_siblings_are_applied(
    world: SchedulerWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its siblings of the same turn are applied once; it is tried a few times and then put aside with the error."""
    handle = Shard.handle

    def raising(self: Shard, commands: Sequence[Any], *rest: Any) -> None:
        if any(command.entity == "bad" for command in commands):
            raise RuntimeError("nobody foresaw this")
        handle(self, commands, *rest)

    monkeypatch.setattr(Shard, "handle", raising)
    metrics.know(receivers=(), senders=["digest"])
    deferred = metrics.come_from("digest").deferred_frames
    before = deferred._value.get()
    siblings = [f"e{n}" for n in range(40)] + [f"x{n}" for n in range(1000) if _shard(f"x{n}") == _shard("bad")][:10]
    bad_id = await _post(world, world.peer.timer("bad", START), _shard("bad"))
    for entity in siblings:
        await _post(world, world.peer.timer(entity, START), _shard(entity))
    world.clock.advance(SECOND)
    got = await world.peer.received(50, timeout=20)
    assert Counter(one.entity for one in got) == Counter(siblings)
    assert await _dead(world, 1) == [(bad_id, "RuntimeError: nobody foresaw this")]
    assert deferred._value.get() - before == MAX_FAILURES - 1  # Of the bad one only.


async def test_a_frame_that_postgres_refuses_is_buried_alone(world: SchedulerWorld) -> None:
    """The same UUIDv7 twice, which no service does: the first is applied, the second put aside."""
    entry = world.peer.timer("e", START + MINUTE)
    await world.peer.send(entry)
    second = await _post(world, entry, _shard("e"))
    ((buried, reason),) = await _dead(world, 1)
    assert buried == second
    assert "timer_pkey" in reason
    world.clock.advance(MINUTE)
    assert len(await world.peer.received(1)) == 1


async def test_a_timer_that_cannot_be_sent_fails_and_its_siblings_fire(world: SchedulerWorld) -> None:
    """An event without a type, which intake would have refused: there is no subject for it."""
    bad = world.peer.timer("e", START + MINUTE, id=(bad_id := new_id()))
    bad.schedule_timer.target.CopyFrom(link_pb2.TimerTarget(event=timer_pb2.EventContent()))
    await world.peer.send(bad, *(world.peer.timer("e", START + MINUTE) for _ in range(5)))
    world.clock.advance(MINUTE)
    assert len(await world.peer.received(5)) == 5
    state, note = await world.stored(bad_id) or (0, "")
    assert state == 8
    assert "cannot be sent" in note


async def test_a_timer_whose_firing_cannot_be_written_is_found_and_fails_alone(
    world: SchedulerWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The turn fails with a thousand timers, then with half, … until the one that does it is alone."""
    write = TurnStore.write
    bad_id = new_id()

    async def refusing(self: TurnStore, tx: Transaction, changes: Sequence[Changes], now: datetime) -> None:
        if any(timer.id == bad_id for one in changes for timer in one.fired):
            raise RuntimeError("cannot be written")
        await write(self, tx, changes, now)

    monkeypatch.setattr(TurnStore, "write", refusing)
    await world.peer.send(
        *(world.peer.timer(f"e{n}", START + MINUTE, id=bad_id if n == 77 else new_id()) for n in range(200))
    )
    world.clock.advance(MINUTE)
    got = await world.peer.received(199, timeout=30)
    assert len({one.timer_id for one in got}) == 199
    world.clock.advance(SECOND)
    await world.peer.send(world.peer.timer("e77", START))  # In the shard of the bad one, and after it.
    await world.peer.received(200)
    assert await world.stored(bad_id) == (8, "RuntimeError: cannot be written")


def _work(seconds: float) -> None:
    until_s = time.thread_time() + seconds
    while time.thread_time() < until_s:
        pass


async def test_timers_that_are_slow_to_decide_fire_in_turns_that_end_in_time(
    world: SchedulerWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once they take two leases; Postgres ends such a turn, and the next ones are as small as they must be."""
    fire = Shard.fire

    def slow(self: Shard, timers: Sequence[Timer], *rest: Any) -> None:
        _work(0.02 * len(timers))
        fire(self, timers, *rest)

    monkeypatch.setattr(Shard, "fire", slow)
    await world.peer.send(*(world.peer.timer("e", START + MINUTE) for _ in range(100)))
    world.clock.advance(MINUTE)
    assert len({one.timer_id for one in await world.peer.received(100, timeout=40)}) == 100


async def test_a_frame_that_takes_longer_than_a_lease_is_put_aside(
    world: SchedulerWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Postgres ends its transaction each time; it does not hold up its shard for ever."""
    handle = Shard.handle

    def slow(self: Shard, commands: Sequence[Any], *rest: Any) -> None:
        _work(1.2 * any(command.entity == "slow" for command in commands))
        handle(self, commands, *rest)

    monkeypatch.setattr(Shard, "handle", slow)
    monkeypatch.setattr(receiver, "MAX_FAILURES", 2)
    slow_id = await _post(world, world.peer.timer("slow", START), _shard("slow"))
    [(dead_id, reason)] = await _dead(world, 1)
    assert dead_id == slow_id
    assert "deciding took 1." in reason


async def test_inv2_the_watermark_and_what_fired_are_one_transaction(
    world: SchedulerWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn that fails after everything was written and before its commit fires nothing and moves nothing."""
    insert = Sender.insert
    failures = 3

    async def failing(self: Sender, tx: Transaction, frames: Sequence[OutgoingFrame]) -> None:
        nonlocal failures
        await insert(self, tx, frames)
        if failures and any(frame.receiver == "digest" for frame in frames):
            failures -= 1
            raise ConnectionError("Postgres is away")

    await world.peer.send(*(world.peer.timer(f"e{n}", START + MINUTE) for n in range(50)))
    monkeypatch.setattr(Sender, "insert", failing)
    world.clock.advance(MINUTE)
    await world.peer.received(50)
    world.clock.advance(MINUTE)
    await world.peer.send(world.peer.timer("last", START))
    got = await world.peer.received(51)
    await world.until_confirmed()
    assert Counter(one.entity for one in got) == Counter([*(f"e{n}" for n in range(50)), "last"])
    assert failures == 0


async def test_inv2_a_derived_id_sent_twice_fires_once(world: SchedulerWorld) -> None:
    """In two frames, the second after the first has fired."""
    again = world.peer.timer("e", START, id=derived_id("x"))
    await world.peer.send(again)
    await world.peer.received(1)
    (result,) = await world.peer.send(again)
    assert result.changed == 0
    await world.peer.send(world.peer.timer("f", START))
    assert [one.entity for one in await world.peer.received(2)] == ["e", "f"]


async def test_inv2_a_frame_that_comes_again_has_no_effects_and_the_same_receipt(world: SchedulerWorld) -> None:
    """A cancel, published twice under two message ids; in between a timer is scheduled that it must not hit."""
    peer = world.peer
    await peer.send(*(peer.timer("e", START + MINUTE) for _ in range(2)))
    frames, _ = peer.sender.pack(
        [Addressed(receiver="scheduler", entry=peer.cancel("e", sequence=1_000), partition=_shard("e"))]
    )
    async with peer.db.transaction() as tx:
        await peer.sender.insert(tx, frames)
    first = await peer.sender.wait(frames, 10 * SECOND)
    await peer.send(peer.timer("e", START + MINUTE))
    bus = await world.open_bus()
    again = asyncio.get_running_loop().create_future()

    async def on_receipt(payload: bytes) -> None:
        again.set_result(link_pb2.Receipts.FromString(payload).receipts[0])

    await bus.subscribe("carillon.receipt.test", on_receipt)
    headers = {REPLY_HEADER: "carillon.receipt.test"}
    subject = subject_of("scheduler", _shard("e"))
    await bus.publish(subject, frames[0].payload, headers=headers, msg_id="again")
    async with asyncio.timeout(10):
        assert await again == first[frames[0].id]
    assert first[frames[0].id].results[0].changed == 2
    async with world.db.read() as tx:
        row = await (await tx.raw.execute("SELECT count(*) FROM tombstone")).fetchone()
    assert row == (1,)


async def test_inv9_nothing_fires_while_a_link_is_full(world: SchedulerWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timers wait in their table; commands are still obeyed; all fire when there is room again."""
    service, _ = world.replicas["a"]
    engine = service.loops["engine"].__self__  # type: ignore[attr-defined]
    limit = engine._sender._settings
    monkeypatch.setattr(engine._sender, "_settings", limit.model_copy(update={"max_unconfirmed_frames": 0}))
    engine.measure()
    (result,) = await world.peer.send(world.peer.timer("e", START))
    assert not result.error_code
    assert world.peer.notifications == []
    monkeypatch.setattr(engine._sender, "_settings", limit)
    assert len(await world.peer.received(1)) == 1


@pytest.mark.timeout(120)
async def test_inv2_each_timer_fires_once_through_a_restart_of_postgres_and_a_wipe_of_jetstream(
    private_postgres: PostgresServer, private_nats: NatsServer, open_database: OpenDatabase, open_bus: OpenBus
) -> None:
    """5,000 timers; Postgres crashes and JetStream's store is deleted while they are scheduled and while they fire."""
    async with scheduler_world(private_postgres.url, open_database, open_bus, private_nats.url) as world:
        for replica in "ab":
            await world.start(replica)
        await world.until_held("a", "b")
        ids = [new_id() for _ in range(5_000)]
        for part in range(5):
            entries = [
                world.peer.timer(f"e{n}", START + n % 50 * SECOND, id=ids[n])
                for n in range(part * 1_000, part * 1_000 + 1_000)
            ]
            for entry in entries[::250]:
                await _post(world, entry, _shard(entry.schedule_timer.entity))
            rest = [entry for n, entry in enumerate(entries) if n % 250]
            sending = asyncio.create_task(world.peer.send(*rest, timeout=60))
            if part == 2:
                await asyncio.to_thread(private_nats.wipe)
            await sending
            world.clock.advance(8 * SECOND)
        await world.peer.received(500, timeout=60)
        await asyncio.to_thread(private_postgres.kill)
        await asyncio.to_thread(private_postgres.start)
        world.clock.advance(8 * SECOND)
        await asyncio.to_thread(private_nats.wipe)
        world.clock.advance(MINUTE)
        got = await world.peer.received(5_000, timeout=60)
        await world.until_confirmed()
        assert Counter(one.timer_id for one in got) == Counter(timer_id.bytes for timer_id in ids)
