"""INV-1 and INV-2 on three NATS servers with streams of three replicas: any one of them is killed, nothing is lost.

In test_links_outages one server loses everything, which must do no harm either (rule R1). Here it is about going on:
while two of three servers live, frames go through, and nothing has to be published again but what was on its way.
"""

import asyncio
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from libs.jetstream import Bus
from libs.links.frames import stream_name
from libs.settings import NatsSettings
from local.demo.flights import CSV
from local.demo.oracle import expect
from local.stack import PROJECT
from tests.support.fixtures import OpenDatabase
from tests.support.link_process import RECEIVER, scalar
from tests.support.link_world import LinkWorld, make_world, running, until
from tests.support.nats_cluster import NatsCluster, until_leader
from tests.support.servers import scratch_directory

STREAM = stream_name(RECEIVER)
FRAME_NUMBERS = 10
PROGRESS = 200
"""Numbers that must arrive between two accidents."""
ELECTION_S = 30
"""NATS takes 4 to 9 s to elect a stream's leader where the old one is gone without a word."""


@pytest.fixture
def nats_cluster() -> Iterator[NatsCluster]:
    """Three servers of this test's own."""
    with scratch_directory() as directory, NatsCluster(directory) as cluster:
        yield cluster


@asynccontextmanager
async def _bus(cluster: NatsCluster, name: str) -> AsyncIterator[Bus]:
    bus = await Bus.connect(NatsSettings(url=cluster.urls, stream_replicas=3), name)
    try:
        yield bus
    finally:
        await bus.close()


class _Load:
    """Sends numbers, ten to a frame, as fast as the frames before are confirmed."""

    def __init__(self, world: LinkWorld, bus: Bus) -> None:
        self._world = world
        self._sender = world.sender(bus)
        self.sent = 0

    async def run(self) -> None:
        async with running(self._sender.run()):
            for start in itertools.count(0, FRAME_NUMBERS):
                await self._world.send(self._sender, range(start, start + FRAME_NUMBERS))
                self.sent = start + FRAME_NUMBERS
                await asyncio.sleep(0.01)

    async def until_progress(self) -> None:
        """Wait until what is sent from now on arrives, and a good deal more of it."""
        wanted = self.sent + PROGRESS

        async def has_arrived() -> bool:
            return await self._world.applied_numbers() >= wanted

        await until(has_arrived, timeout_s=ELECTION_S)


@pytest.mark.timeout(300)
async def test_frames_go_through_whichever_server_is_killed(
    nats_cluster: NatsCluster,
    open_database: OpenDatabase,
    postgres_url: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """kill -9 of the stream's leader, of a follower, of the one all are connected to; the others carry on at once."""
    caplog.set_level(logging.INFO, logger="libs.jetstream")
    world = await make_world(open_database, postgres_url, nats_cluster.urls[0], tmp_path)
    async with _bus(nats_cluster, "sender") as sending, _bus(nats_cluster, "receiver") as receiving:
        load = _Load(world, sending)
        async with running(load.run(), world.receiver(receiving).run()):
            await load.until_progress()
            assert nats_cluster.replicas_of(STREAM) == 3
            for _ in nats_cluster.servers:
                victim = await until_leader(nats_cluster, STREAM)
                await _strike(nats_cluster, victim, load)
            leader = await until_leader(nats_cluster, STREAM)
            await _strike(nats_cluster, next(n for n in range(3) if n != leader), load)
        sender = world.sender(sending, replica="last")
        async with running(sender.run(), world.receiver(receiving).run()):
            await world.expect_all_once(await scalar(world.sender_db, "SELECT count(*) FROM sent"), timeout_s=60)
    assert await world.dead() == 0
    # Each bus finds it once; a stream that kept its frames is never taken for one that lost them.
    news = [one for one in caplog.records if one.message == "A stream is new."]
    assert len(news) <= 3, news


async def _strike(cluster: NatsCluster, victim: int, load: _Load) -> None:
    """Kill one server, see that frames go on without it, and have it back, up to date."""
    await asyncio.to_thread(cluster.servers[victim].kill)
    await load.until_progress()
    await asyncio.to_thread(cluster.servers[victim].start)
    await asyncio.to_thread(cluster.wait_until_whole)
    await load.until_progress()


async def test_streams_of_one_replica_become_streams_of_three(nats_cluster: NatsCluster) -> None:
    """With what is in them, when the first service comes that wants three."""
    settings = NatsSettings(url=nats_cluster.urls)
    before = await Bus.connect(settings, "before")
    await before.ensure_stream(STREAM, ["one.*"])
    await before.publish("one.1", b"kept")
    assert nats_cluster.replicas_of(STREAM) == 1
    await before.close()
    async with _bus(nats_cluster, "after") as after:
        await after.ensure_stream(STREAM, ["one.*"])

        async def are_three() -> bool:
            return nats_cluster.replicas_of(STREAM) == 3

        await until(are_three)
        await asyncio.to_thread(nats_cluster.wait_until_whole)
        await asyncio.to_thread(nats_cluster.servers[nats_cluster.leader_of(STREAM)].kill)
        await until_leader(nats_cluster, STREAM)
        messages = after.consume(
            STREAM, durable="d", filter_subject="one.*", batch=1, ack_wait=timedelta(seconds=30), max_ack_pending=1
        )
        assert [one.data for one in await anext(messages)] == [b"kept"]
        await messages.aclose()


@pytest.mark.timeout(240)
def test_the_demo_gives_the_same_numbers_while_a_leader_dies(nats_cluster: NatsCluster, tmp_path: Path) -> None:
    """All services on the cluster; the server that leads the scheduler's stream is killed and comes back."""
    command = [sys.executable, "-m", "local.demo", "--days", "1", "--directory", str(tmp_path / "demo")]
    ours = {"CARILLON_NATS_URL": ",".join(nats_cluster.urls), "CARILLON_NATS_STREAM_REPLICAS": "3"}
    happened = threading.Event()
    killing = threading.Thread(target=_kill_a_leader, args=(nats_cluster, tmp_path / "demo", happened), daemon=True)
    killing.start()
    demo = subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, timeout=220, check=False, env={**os.environ, **ours}
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert happened.is_set(), "the demo was over before anything was killed"
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert (report["differences"], report["unaccounted"]) == ([], 0)
    assert report["messages"] == len(expect(CSV, 1).messages)


def _kill_a_leader(cluster: NatsCluster, demo: Path, happened: threading.Event) -> None:
    """Once mails go out: so the streams are there, with frames under way."""
    while not any((demo / "mailbox" / "mails").glob("*/*.eml")):
        happened.wait(0.05)
    victim = cluster.servers[cluster.leader_of(stream_name("scheduler"))]
    victim.kill()
    happened.set()
    happened.wait()
    victim.start()
