"""INV-1 to INV-4 on real processes: three replicas under load, while everything they stand on is taken from them.

5,000 timers in about half a minute; with CARILLON_TEST_TIMERS=50000 in the environment ten times as many, in a little
more. The peer at the other end of the links is this process; see tests/support/durable_peer.py.
"""

import asyncio
import logging
import os
import random
import signal
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

from local.servers import NatsServer, PostgresServer
from tests.support.durable_peer import DurablePeer
from tests.support.link_world import until
from tests.support.scheduler_fleet import Fleet
from tests.support.scheduler_load import Load

TIMERS = int(os.environ.get("CARILLON_TEST_TIMERS", "5000"))
LASTS = timedelta(seconds=20)
SHARDS = 16
TTL = timedelta(seconds=2)
PROGRESS = 100
"""Timers that must come between two accidents, so that each strikes a scheduler that works."""
RECOVERY_TIMEOUT_S = 30
QUIET_TIMEOUT_S = 60


@pytest.mark.timeout(600)
async def test_every_timer_fires_once_and_none_after_its_cancel_whatever_is_taken_away(
    private_postgres: PostgresServer, private_nats: NatsServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The busiest replica killed, one paused, JetStream's store deleted, Postgres restarted and crashed: no trace."""
    caplog.set_level(logging.ERROR, logger="libs")  # Every retry of the peer is logged, and they are many.
    places = {"url": private_postgres.url, "nats_url": private_nats.url}
    async with (
        Fleet.assembled(**places, directory=tmp_path, shards=SHARDS, ttl=TTL) as fleet,
        DurablePeer.connect(**places, shards=SHARDS) as peer,
    ):
        await fleet.start(3)
        await fleet.until_held(fleet.replicas)
        load = Load(peer, timers=TIMERS, lasts=LASTS, rng=random.Random(3))
        await load.prepare()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load.run())
            await _kill_the_busiest(fleet, peer)
            await _pause_one(fleet, peer)
            for accident in (private_nats.wipe, private_postgres.restart, lambda: _crash(private_postgres)):
                await _strike(accident, fleet, peer)
            load.end()
        wrong = [*await _unsettled(fleet), *load.books.differences(await peer.received(), await fleet.rows())]
        wrong += [*await fleet.dead_frames(), *fleet.ended()]
        if wrong:
            pytest.fail("\n".join(["Otherwise than it must be:", *wrong]))
        assert any(one.changed for one in load.books.cancels), "no cancel was in time for anything"
        assert any(one.changed != len(one.timer_ids) for one in load.books.cancels), "no cancel came amid firing"


async def _kill_the_busiest(fleet: Fleet, peer: DurablePeer) -> None:
    """Kill -9 and a successor; the others have its shards when its leases have run out."""
    await _until_it_fires(peer)
    await fleet.kill(await fleet.busiest())
    await fleet.start(1)
    await fleet.until_held(fleet.replicas)
    await _until_it_fires(peer)


async def _pause_one(fleet: Fleet, peer: DurablePeer) -> None:
    """SIGSTOP for three leases (INV-3): what it was about to write when it goes on is refused."""
    paused, *others = fleet.replicas
    held, refused = await fleet.epochs(paused), await fleet.refused_writes(paused)
    paused.signal(signal.SIGSTOP)
    paused_s = asyncio.get_running_loop().time()
    epochs = await fleet.until_held(others)
    assert held
    assert all(epochs[shard] > epoch for shard, epoch in held.items())
    await _until_it_fires(peer)
    left_s = paused_s + 3 * TTL.total_seconds() - asyncio.get_running_loop().time()
    await asyncio.sleep(max(0.0, left_s))  # What is tested is the passing of real time.
    paused.signal(signal.SIGCONT)

    async def is_refused() -> bool:
        with suppress(OSError):  # It has much to catch up on.
            return await fleet.refused_writes(paused) > refused
        return False

    await until(is_refused, timeout_s=RECOVERY_TIMEOUT_S)
    await fleet.until_held(fleet.replicas)
    await _until_it_fires(peer)


async def _strike(accident: Callable[[], None], fleet: Fleet, peer: DurablePeer) -> None:
    """An accident of Postgres or NATS; every replica lives through it and works again."""
    await asyncio.to_thread(accident)
    await fleet.until_held(fleet.replicas)
    await _until_it_fires(peer)


def _crash(postgres: PostgresServer) -> None:
    postgres.kill()
    postgres.start()


async def _until_it_fires(peer: DurablePeer) -> None:
    """Wait until `PROGRESS` more notifications have come."""
    first: int | None = None

    async def has_progressed() -> bool:
        nonlocal first
        count = await peer.count_received()
        first = count if first is None else first
        return count >= first + PROGRESS

    await until(has_progressed, timeout_s=RECOVERY_TIMEOUT_S)


async def _unsettled(fleet: Fleet) -> list[str]:
    """Wait until nothing is under way, so that nothing can come any more; otherwise says what still is."""
    now: tuple[int, int, int] | None = None

    async def is_quiet() -> bool:
        nonlocal now
        now = await fleet.under_way()
        return not any(now)

    try:
        await until(is_quiet, timeout_s=QUIET_TIMEOUT_S)
    except TimeoutError:
        return [f"(timers waiting, the scheduler's unconfirmed frames, the peer's) is {now} after {QUIET_TIMEOUT_S} s"]
    return []
