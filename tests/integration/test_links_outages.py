"""INV-1, INV-2: NATS loses its disk, NATS goes away, Postgres goes away, all under load."""

import asyncio
import signal
from datetime import timedelta
from pathlib import Path

import pytest
from nats.aio.client import Client

from libs.links.frames import stream_name
from local.servers import NatsServer, PostgresServer
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.link_process import RECEIVER, commit_numbers
from tests.support.link_world import LinkWorld, make_world, running, until


async def reached(world: LinkWorld, numbers: int) -> None:
    """Wait until so many numbers have been applied."""

    async def have_been_applied() -> bool:
        return await world.applied_numbers() >= numbers

    await until(have_been_applied, timeout_s=30)


@pytest.mark.timeout(120)
async def test_jetstreams_store_may_be_deleted_under_load(
    open_database: OpenDatabase, postgres_url: str, private_nats: NatsServer, tmp_path: Path
) -> None:
    """50,000 entries through one link, the broker killed and its disk emptied twice: each entry is applied once."""
    world = await make_world(open_database, postgres_url, private_nats.url, tmp_path)
    async with world.process("receiver") as receiver, world.process("sender", count=50_000, per_frame=100):
        for numbers in (5_000, 20_000):
            await reached(world, numbers)
            receiver.signal(signal.SIGSTOP)  # So that the stream is full of frames when it goes.
            await until(lambda: _has_backlog(world, 50))
            await asyncio.to_thread(private_nats.wipe)
            receiver.signal(signal.SIGCONT)
        await world.expect_all_once(50_000, timeout_s=60)


async def _has_backlog(world: LinkWorld, frames: int) -> bool:
    return await world.unconfirmed() >= frames


async def test_a_deleted_stream_is_made_again_and_filled_from_the_outbox(
    open_database: OpenDatabase, postgres_url: str, nats_url: str, tmp_path: Path
) -> None:
    """Somebody's mistake with the admin tool, while frames are in the stream; no connection is lost."""
    world = await make_world(open_database, postgres_url, nats_url, tmp_path)
    admin = Client()
    await admin.connect(nats_url)
    try:
        async with world.process("sender", count=6_000, per_frame=20), world.process("receiver"):
            await reached(world, 1_000)
            assert await admin.jetstream().delete_stream(stream_name(RECEIVER))
            await reached(world, 3_000)
            assert await admin.jetstream().delete_stream(stream_name(RECEIVER))
            await world.expect_all_once(6_000)
    finally:
        await admin.close()


async def test_without_nats_commands_are_durable_and_go_out_when_it_is_back(
    open_database: OpenDatabase, open_bus: OpenBus, postgres_url: str, private_nats: NatsServer, tmp_path: Path
) -> None:
    """At once, however long the next sweep of each frame had been put off."""
    world = await make_world(open_database, postgres_url, private_nats.url, tmp_path)
    far_off = timedelta(minutes=10)
    sender_bus = await open_bus("sender", private_nats.url)
    sender = world.sender(sender_bus, republish_after=far_off, republish_max=far_off)
    receiver = world.receiver(await open_bus("receiver", private_nats.url))
    async with running(sender.run(), receiver.run()):
        await world.send(sender, [0])
        await world.expect_all_once(1)
        await asyncio.to_thread(private_nats.stop)

        async def has_noticed() -> bool:
            return not sender_bus.is_connected

        await until(has_noticed)
        for n in range(1, 50):
            await world.send(sender, [n])
        await commit_numbers(world.sender_db, sender, [50])  # And one whose process died before publishing.
        assert await world.unconfirmed() == 50
        await asyncio.to_thread(private_nats.start)
        await world.expect_all_once(51)


@pytest.mark.timeout(120)
async def test_postgres_may_restart_and_crash_under_load(
    open_database: OpenDatabase, private_postgres: PostgresServer, nats_url: str, tmp_path: Path
) -> None:
    """A clean restart, then a crash: nothing lost or doubled, no frame put aside for it."""
    world = await make_world(open_database, private_postgres.url, nats_url, tmp_path)
    async with world.process("receiver") as receiver, world.process("sender", count=10_000, per_frame=20) as sender:
        await reached(world, 1_000)
        await asyncio.to_thread(private_postgres.restart)
        await reached(world, 5_000)
        await asyncio.to_thread(private_postgres.kill)
        await asyncio.to_thread(private_postgres.start)
        await world.expect_all_once(10_000, timeout_s=60)
        assert receiver.is_running
        assert sender.is_running
    assert await world.dead() == 0
