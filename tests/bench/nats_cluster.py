"""Publishing frames, and timers from arrival to firing, on one NATS server and on a cluster of three, side by side.

The three share this machine's processors and disk, so what is measured is the work of replication. What is not: a
network between them, and disks of their own. Ratios within one run are what counts.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from libs.ids import new_id
from libs.jetstream import Bus
from libs.settings import NatsSettings
from local.servers import NatsServer
from tests.bench.link_peer import LinkPeer
from tests.bench.machine import own_cpu_s
from tests.bench.report import Figure
from tests.bench.rig import Rig
from tests.support.nats_cluster import NatsCluster

_PUBLISHERS = 32  # As libs.links.sender.
_FRAMES = {"a call's (0.5 KB)": 512, "half a thousand entries' (100 KB)": 100_000, "the largest (512 KiB)": 512 * 1024}
_ENOUGH_BYTES = 120_000_000
_ROUNDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setup:
    """How NATS is set up. `sync`: JetStream's sync_interval; 2m is its default."""

    replicas: int
    sync: str
    servers: int = 0

    @property
    def name(self) -> str:
        """For the table."""
        many = f"three servers, R{self.replicas}" if self.servers == 3 else "one server, R1"
        return f"{many}, sync {self.sync}"


_BASE = _Setup(replicas=1, sync="always", servers=1)
_SETUPS = (
    _BASE,
    _Setup(replicas=1, sync="2m", servers=1),
    _Setup(replicas=3, sync="always", servers=3),
    _Setup(replicas=3, sync="2m", servers=3),
)


@contextmanager
def _nats(directory: Path, setup: _Setup) -> Iterator[tuple[tuple[str, ...], Sequence[int]]]:
    """Addresses and process ids of fresh servers."""
    if setup.servers == 1:
        with NatsServer(directory, sync=setup.sync) as server:
            yield (server.url,), [server.pid or 0]
        return
    with NatsCluster(directory, sync=setup.sync) as cluster:
        yield cluster.urls, [server.pid or 0 for server in cluster.servers]


@asynccontextmanager
async def _running(rig: Rig, name: str, setup: _Setup) -> AsyncIterator[tuple[tuple[str, ...], Sequence[int]]]:
    directory = rig.directory / name
    await asyncio.to_thread(directory.mkdir)
    servers = _nats(directory, setup)
    started = await asyncio.to_thread(servers.__enter__)
    try:
        yield started
    finally:
        await asyncio.to_thread(servers.__exit__, None, None, None)


# Publishing


async def publish(rig: Rig) -> list[Figure]:
    """Frames a second that JetStream has stored, as many under way as a sender has."""
    found: dict[tuple[str, _Setup], list[tuple[float, float, float]]] = {}
    for round_number in range(rig.pick(_ROUNDS, 1)):
        for place, setup in enumerate(_SETUPS):
            async with _running(rig, f"publish-{round_number}-{place}", setup) as (urls, pids):
                bus = await Bus.connect(NatsSettings(url=urls, stream_replicas=setup.replicas), "bench")
                try:
                    await bus.ensure_stream("BENCH", ["bench.*"])
                    for kind, size in _FRAMES.items():
                        frames = min(rig.pick(4_000, 1_000), _ENOUGH_BYTES // size)
                        measured = await _published(bus, pids, size, frames)
                        found.setdefault((kind, setup), []).append(measured)
                        rig.say(f"{setup.name}, {kind}: {measured[0]:,.0f} frames/s")
                finally:
                    await bus.close()
    return [_figure(kind, setup, found) for kind in _FRAMES for setup in _SETUPS]


async def _published(bus: Bus, pids: Sequence[int], size: int, frames: int) -> tuple[float, float, float]:
    """Frames/s, the median time of one alone in ms, the servers' processor time per frame in µs."""
    body = os.urandom(size)
    alone: list[float] = []
    for _ in range(30):
        began_s = time.perf_counter()
        await bus.publish("bench.1", body, msg_id=str(new_id()))
        alone.append((time.perf_counter() - began_s) * 1e3)
    waiting = iter(range(frames))
    before_s, began_s = sum(map(own_cpu_s, pids)), time.perf_counter()

    async def publisher() -> None:
        for _ in waiting:
            await bus.publish("bench.1", body, msg_id=str(new_id()), timeout=timedelta(seconds=30))

    await asyncio.gather(*(publisher() for _ in range(_PUBLISHERS)))
    took_s = time.perf_counter() - began_s
    cpu_us = (sum(map(own_cpu_s, pids)) - before_s) / frames * 1e6
    return frames / took_s, sorted(alone)[len(alone) // 2], cpu_us


def _figure(kind: str, setup: _Setup, found: dict[tuple[str, _Setup], list[tuple[float, float, float]]]) -> Figure:
    rate, alone_ms, cpu_us = map(max, zip(*found[kind, setup], strict=True))
    base = max(one[0] for one in found[kind, _BASE])
    return Figure(
        figure=f"{kind} frames, {setup.name}",
        value=rate,
        unit="frames/s",
        how=f"{rate / base:.2f} of one server with sync always. One alone is stored after {alone_ms:.1f} ms. NATS "
        f"spends {cpu_us:,.0f} µs of processor time per frame. {_PUBLISHERS} under way, through libs.jetstream.",
    )


# The end-to-end effect


async def timers(rig: Rig) -> list[Figure]:
    """Timers a second from being sent as frames to having fired into another stream, through a real scheduler."""
    figures: list[Figure] = []
    base = 0.0
    for setup in (_BASE, _SETUPS[2]):
        count = rig.pick(40_000, 10_000)
        async with _running(rig, f"timers-{setup.replicas}", setup) as (urls, _):
            rate, late_ms = await _fired(rig, urls, setup, count)
        base = base or rate
        figures.append(
            Figure(
                figure=f"timers sent, stored and fired, {setup.name}",
                value=rate,
                unit="timers/s",
                how=f"{rate / base:.2f} of one server. {count:,} timers in frames of 500, due at once, through one "
                f"scheduler with {rig.shards} shards on Postgres with fsync. A timer alone lands {late_ms:.0f} ms "
                "after it was due (median of 200).",
            )
        )
    return figures


async def _fired(rig: Rig, urls: tuple[str, ...], setup: _Setup, count: int) -> tuple[float, float]:
    os.environ["CARILLON_NATS_URL"] = ",".join(urls)  # Then the stack uses these, and starts none.
    try:
        env = {"CARILLON_NATS_STREAM_REPLICAS": str(setup.replicas)}
        async with (
            rig.stack(env=env) as stack,
            LinkPeer.connect(stack.nats_url, shards=rig.shards, stream_replicas=setup.replicas) as peer,
        ):
            due_at = datetime.now(UTC)
            frames = peer.frames(count, lambda _: due_at)
            began_s = time.perf_counter()
            await peer.send(frames, timeout=timedelta(seconds=120))
            await peer.until_fired(count, timeout=timedelta(seconds=120))
            rate = count / (time.perf_counter() - began_s)
            peer.firings()
            first = datetime.now(UTC) + timedelta(seconds=2)
            frames = peer.frames(200, lambda number: first + number * timedelta(milliseconds=50))
            await peer.send(frames, timeout=timedelta(seconds=30))
            await peer.until_fired(count + 200, timeout=timedelta(seconds=60))
            late_ms = sorted(one.lateness_s * 1e3 for one in peer.firings())
            return rate, late_ms[len(late_ms) // 2]
    finally:
        del os.environ["CARILLON_NATS_URL"]
