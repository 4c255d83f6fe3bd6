"""NATS's own message schedules (ADR-51): a message with a header is published again, at its time, to its target.

Measured twice: with `sync_interval: always`, where as here what was acknowledged is on the disk, and with the default,
where the last two minutes are lost with the power.
"""

import asyncio
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, StreamConfig

from local.processes import Process, accepts_connections, free_port
from local.servers import HOST, NatsServer
from tests.bench.link_peer import to_ns
from tests.bench.peers import Measured, due_after, numbers_until, until_due

if TYPE_CHECKING:
    from tests.bench.rig import Rig

_PUBLISHERS = 256
_STREAM = "SCHEDULES"


class _Server(Protocol):
    @property
    def url(self) -> str: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...


class _UnsyncedServer:
    """A NATS server with its default: fsync every two minutes."""

    def __init__(self, directory: Path) -> None:
        self._port = free_port(HOST)
        self.url = f"nats://{HOST}:{self._port}"
        binary = str(Path(sys.executable).with_name("nats-server"))
        where = ["-a", HOST, "-p", str(self._port), "-js", "-sd", str(directory / "nats")]
        self._process = Process("nats-server", [binary, *where], log=directory / "nats.log")

    def start(self) -> None:
        """Start, and return when it accepts connections."""
        self._process.start()
        self._process.wait_until(lambda: accepts_connections(HOST, self._port), timeout_s=30)

    def stop(self) -> None:
        """Stop cleanly."""
        self._process.stop()


async def measure(rig: "Rig", directory: Path) -> Measured:
    """With `sync_interval: always`."""
    return await _measure(NatsServer(directory), rig.pick(30_000, 5_000), due_after(rig, 30, 8), "always")


async def measure_unsynced(rig: "Rig", directory: Path) -> Measured:
    """With the default `sync_interval`."""
    return await _measure(_UnsyncedServer(directory), rig.pick(100_000, 20_000), due_after(rig, 20, 8), "2m (default)")


async def _measure(server: _Server, most: int, due_at: datetime, sync_interval: str) -> Measured:
    try:
        await asyncio.to_thread(server.start)
        client = await nats.connect(server.url)
        try:
            return await _herd(client, most, due_at, sync_interval)
        finally:
            await client.close()
    finally:
        await asyncio.to_thread(server.stop)


async def _herd(client: Client, most: int, due_at: datetime, sync_interval: str) -> Measured:
    jetstream = client.jetstream()
    config = StreamConfig(name=_STREAM, subjects=["schedule.*", "fired.*"], allow_msg_schedules=True)
    await jetstream.add_stream(config)
    headers = {"Nats-Schedule": f"@at {due_at:%Y-%m-%dT%H:%M:%SZ}", "Nats-Schedule-Target": "fired.reminder"}
    numbers = numbers_until(due_at, most)
    stored: list[int] = []

    async def publish() -> None:
        for number in numbers:
            await jetstream.publish(f"schedule.{number}", b'{"order": "2013-000417"}', headers=headers, timeout=30)
            stored.append(number)

    began_s = time.perf_counter()
    await asyncio.gather(*(publish() for _ in range(_PUBLISHERS)))
    stored_s = time.perf_counter() - began_s
    landed = 0
    have_all = asyncio.Event()

    async def land(_: Msg) -> None:
        nonlocal landed
        landed += 1
        if landed >= len(stored):
            have_all.set()

    await jetstream.subscribe(
        "fired.*",
        stream=_STREAM,
        cb=land,
        config=ConsumerConfig(ack_policy=AckPolicy.NONE),
        pending_msgs_limit=-1,
        pending_bytes_limit=-1,
    )
    await until_due(due_at)
    await have_all.wait()
    took_s = (time.time_ns() - to_ns(due_at)) / 1e9
    version = client.connected_server_version
    return Measured(
        version=f"{version.major}.{version.minor}.{version.patch}",
        count=len(stored),
        stored_s=stored_s,
        took_s=took_s,
        how=f"one message each in a file stream with sync_interval {sync_interval}, {_PUBLISHERS} publications at "
        "once; pushed to a consumer that acknowledges nothing.",
    )
