"""Several replicas: who holds the shards, and what happens when one joins, leaves, dies or stands still."""

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest

from libs.ids import new_id
from libs.postgres import Database, Transaction
from libs.wire import from_timestamp
from local.servers import PostgresServer
from services.scheduler import metrics
from services.scheduler.needs import Needs
from services.scheduler.store import TurnStore
from services.scheduler.store_leases import LeaseStore
from services.scheduler.store_queries import QueryStore
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.scheduler_process import SchedulerProcess
from tests.support.scheduler_world import SHARDS, START, SchedulerWorld, scheduler_world

TTL = timedelta(seconds=2)
SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)


@pytest.fixture
async def world(postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus) -> AsyncIterator[SchedulerWorld]:
    """A world without a replica."""
    async with scheduler_world(postgres_url, open_database, open_bus) as it:
        yield it


async def epochs(world: SchedulerWorld) -> dict[int, int]:
    """The epoch of each shard."""
    async with world.db.read() as tx:
        return dict(await (await tx.raw.execute("SELECT shard, epoch FROM shard")).fetchall())


async def test_a_replica_that_joins_takes_its_share_and_moves_no_other_shard(world: SchedulerWorld) -> None:
    """Two replicas share; what the first keeps, it keeps under its epoch."""
    await world.start("a")
    before = await world.until_held("a")
    epochs_before = await epochs(world)
    await world.start("b")
    after = await world.until_held("a", "b")
    epochs_after = await epochs(world)
    moved = {shard for shard in before if before[shard] != after[shard]}
    assert {shard for shard in before if epochs_before[shard] != epochs_after[shard]} == moved
    assert 0 < len(moved) < SHARDS


async def test_a_replica_that_leaves_hands_over_within_a_moment(world: SchedulerWorld) -> None:
    """The leases would run for a minute; the successor has the shards, and fires, well within a second."""
    ttl = timedelta(minutes=1)
    await world.start("a", lease_ttl=ttl)
    await world.until_held("a")
    await world.start("b", lease_ttl=ttl)
    await world.until_held("a", "b")
    await world.peer.send(*(world.peer.timer(f"e{n}", START + MINUTE) for n in range(20)))
    loop = asyncio.get_running_loop()
    await world.stop("a")
    left_s = loop.time()
    await world.until_held("b", timeout=5)
    assert loop.time() - left_s < 0.5
    world.clock.advance(MINUTE)
    assert len(await world.peer.received(20, timeout=5)) == 20


async def test_inv3_a_former_owner_changes_nothing_under_its_old_epoch(world: SchedulerWorld) -> None:
    """The shard is taken over from under a replica; its turn writes nothing, and is counted."""
    await world.start("a", lease_ttl=timedelta(minutes=5))
    await world.until_held("a")
    await world.peer.send(*(world.peer.timer(f"e{n}", START + MINUTE) for n in range(20)))
    began_at = datetime.now(UTC)
    async with world.db.transaction() as tx:
        await tx.raw.execute(
            "UPDATE shard SET epoch = epoch + 1, holder = 'z', lease_until = clock_timestamp() + interval '2 s'"
        )
    fenced = metrics.FENCED._value.get()
    world.clock.advance(MINUTE)
    # When z's leases have run out, the timers fire after all, once.
    assert len(await world.peer.received(20)) == 20
    assert metrics.FENCED._value.get() > fenced
    assert world.peer.arrived_at[0] - began_at > 1.9 * SECOND


async def test_inv3_the_fence_holds_until_the_transaction_ends(world: SchedulerWorld) -> None:
    """While a turn is open nobody takes its shard, however old the lease; the others are taken all the same."""
    store = LeaseStore(world.db, replica="b", ttl=SECOND)
    await store.ensure_shards(SHARDS)
    await store.take([1])
    async with world.db.transaction() as tx:
        held = await TurnStore(replica="b").fence(tx, {1: 1, 2: 7}, longest_pause=SECOND)
        assert held == {1}
        assert {grant.shard for grant in await store.take(range(SHARDS))} == set(range(SHARDS)) - {1}
    assert {grant.shard for grant in await store.take([1])} == {1}


@pytest.mark.parametrize("is_takeover_lost", [False, True])
async def test_a_shard_is_taken_anew_on_a_server_that_was_started_since(
    private_postgres: PostgresServer, open_database: OpenDatabase, open_bus: OpenBus, is_takeover_lost: bool
) -> None:
    """It may be a replica that lagged, without what the shard remembers; the next epoch begins with what there is."""
    async with scheduler_world(private_postgres.url, open_database, open_bus) as world:
        leases, turns = LeaseStore(world.db, replica="a", ttl=MINUTE), TurnStore(replica="a")
        await leases.ensure_shards(SHARDS)

        async def held(epoch: int) -> set[int]:
            async with world.db.transaction() as tx:
                return await turns.fence(tx, {1: epoch}, longest_pause=SECOND)

        [grant] = await leases.take([1])
        assert await held(grant.epoch) == {1}
        await asyncio.to_thread(private_postgres.restart)
        assert await held(grant.epoch) == set()
        if is_takeover_lost:
            async with world.db.transaction() as tx:
                await tx.raw.execute("UPDATE shard SET holder = NULL, epoch = epoch - 1 WHERE shard = 1")
            [again] = await leases.take([1])
            assert again.epoch == grant.epoch
            assert await held(again.epoch) == set()  # It has had turns under that number on the other server.
        [grant] = await leases.take([1])
        assert await held(grant.epoch) == {1}


async def test_a_timeline_seen_on_another_server_is_read_again(
    private_postgres: PostgresServer, open_database: OpenDatabase, open_bus: OpenBus
) -> None:
    """The version of that number may be another one here, also for a shard that has had no turn there."""
    async with scheduler_world(private_postgres.url, open_database, open_bus) as world:
        leases, turns = LeaseStore(world.db, replica="a", ttl=MINUTE), TurnStore(replica="a")
        await leases.ensure_shards(SHARDS)
        await QueryStore(world.db).put_timeline("acme", "welcome", "there", (), START)

        async def description(shard: int) -> str:
            [grant] = await leases.take([shard])
            async with world.db.transaction() as tx:
                assert await turns.fence(tx, {shard: grant.epoch}, longest_pause=SECOND) == {shard}
                known = await turns.load(tx, Needs(timelines={("acme", "welcome", 1)}))
            return known.timelines["acme", "welcome", 1].description

        assert await description(1) == "there"
        await asyncio.to_thread(private_postgres.restart)
        async with world.db.transaction() as tx:
            await tx.raw.execute("UPDATE timeline SET description = 'here'")
        assert await description(2) == "here"


class _StopsBeforeItCommits:
    """A database whose user does everything in a transaction but to end it."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self.has_stopped = asyncio.Event()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        async with self._db.transaction() as tx:
            yield tx
            self.has_stopped.set()
            await asyncio.sleep(5)


@pytest.mark.parametrize("stops_in", ["take", "renew", "release", "turn"])
async def test_inv3_a_process_that_stops_in_a_transaction_does_not_keep_its_shards(
    world: SchedulerWorld, stops_in: str
) -> None:
    """Postgres ends the transaction after a lease, and somebody else can take them."""
    before = LeaseStore(world.db, replica="a", ttl=SECOND)
    await before.ensure_shards(SHARDS)
    held = {grant.shard: grant.epoch for grant in await before.take(range(SHARDS))}
    db = _StopsBeforeItCommits(world.db)
    stopped = LeaseStore(cast(Database, db), replica="a", ttl=SECOND)

    async def stop() -> None:
        match stops_in:
            case "take":
                await stopped.take(range(SHARDS))
            case "renew":
                await stopped.renew(held)
            case "release":
                await stopped.release(held)
            case _:
                async with db.transaction() as tx:
                    await TurnStore(replica="a").fence(tx, held, longest_pause=SECOND)

    stopping = asyncio.create_task(stop())
    await db.has_stopped.wait()
    successor = LeaseStore(world.db, replica="b", ttl=SECOND)
    taken: set[int] = set()
    async with asyncio.timeout(3):
        while taken != held.keys():
            taken |= {grant.shard for grant in await successor.take(held.keys() - taken)}
    stopping.cancel()
    await asyncio.gather(stopping, return_exceptions=True)


async def test_a_replica_goes_on_after_a_moment_without_trust(world: SchedulerWorld) -> None:
    """It stands still while it cannot renew; when nobody took its shards, it keeps epochs and timers."""
    await world.start("a")
    await world.until_held("a")
    before = await epochs(world)
    await world.peer.send(world.peer.timer("e", START + MINUTE))
    async with world.db.transaction() as tx:
        await tx.raw.execute("LOCK TABLE member")  # No renewal ends while this is held.
        await asyncio.sleep(1.2)  # Longer than the lease: what is tested is the passing of real time.
        world.clock.advance(MINUTE)
        await asyncio.sleep(0.1)
        assert world.peer.notifications == []
    assert len(await world.peer.received(1)) == 1
    assert await epochs(world) == before


@pytest.fixture
def processes(tmp_path: Path, postgres_url: str, nats_url: str) -> Iterator[list[SchedulerProcess]]:
    """Two replicas as processes, not yet started."""
    both = [
        SchedulerProcess(name, tmp_path, url=postgres_url, nats_url=nats_url, shards=SHARDS, ttl=TTL) for name in "ab"
    ]
    yield both
    for one in both:
        one.kill()


async def _start(world: SchedulerWorld, processes: list[SchedulerProcess]) -> None:
    for one in processes:
        one.start()
    for one in processes:
        await asyncio.to_thread(one.wait_until, one.is_ready, timeout_s=30)
    await world.until_held(*(one.word for one in processes))


async def _schedule_a_stream(world: SchedulerWorld, *, count: int, every: timedelta) -> list[bytes]:
    """`count` timers on the real clock, from a moment from now."""
    begin = datetime.now(UTC) + 0.5 * SECOND
    ids = [new_id() for _ in range(count)]
    await world.peer.send(
        *(world.peer.timer(f"e{n}", begin + n * every, id=timer_id) for n, timer_id in enumerate(ids))
    )
    return [timer_id.bytes for timer_id in ids]


def _most_late(world: SchedulerWorld) -> timedelta:
    pairs = zip(world.peer.notifications, world.peer.arrived_at, strict=True)
    return max(arrived_at - from_timestamp(one.occur_time) for one, arrived_at in pairs)


async def test_inv2_a_killed_replica_is_succeeded_when_its_leases_run_out(
    world: SchedulerWorld, processes: list[SchedulerProcess]
) -> None:
    """Kill -9 of one of two, under a stream of timers: each fires once, and none waits for more than the leases."""
    await _start(world, processes)
    ids = await _schedule_a_stream(world, count=400, every=timedelta(milliseconds=10))
    await world.peer.received(50)
    processes[0].kill()
    got = await world.peer.received(400, timeout=20)
    await world.until_confirmed()
    assert Counter(one.timer_id for one in got) == Counter(ids)
    assert _most_late(world) < 3 * TTL  # How close to one TTL it comes is for a benchmark to say.
    assert set((await world.holders()).values()) == set((await world.until_held(processes[1].word)).values())


async def test_inv3_a_replica_paused_until_its_leases_are_gone_changes_nothing_afterwards(
    world: SchedulerWorld, processes: list[SchedulerProcess]
) -> None:
    """SIGSTOP, SIGCONT: its shards had passed to the other one; it notices, counts it, and every timer fires once.

    `make chaos` leaves one paused for three leases.
    """
    await _start(world, processes)
    ids = await _schedule_a_stream(world, count=500, every=timedelta(milliseconds=10))
    await world.peer.received(50)
    processes[0].signal(signal.SIGSTOP)
    held = await world.until_held(processes[1].word)
    await world.peer.received(len(world.peer.notifications) + 50)
    processes[0].signal(signal.SIGCONT)
    got = await world.peer.received(500, timeout=20)
    await world.until_held(*(one.word for one in processes))
    await world.until_confirmed()
    assert Counter(one.timer_id for one in got) == Counter(ids)
    assert _most_late(world) < 3 * TTL  # How close to one TTL it comes is for a benchmark to say.
    assert len(set(held.values())) == 1
    assert processes[0].metric("carillon_scheduler_fenced_writes_total") >= 1
