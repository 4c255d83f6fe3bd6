"""One or more scheduler replicas in this process, with a peer that sends them frames and takes what they fire."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import scheduler_pb2_grpc, timer_pb2
from prometheus_client import CollectorRegistry
from sqlalchemy import MetaData

from libs.ids import new_id
from libs.jetstream import Bus
from libs.links.frames import Addressed
from libs.links.receiver import Applied, IncomingFrame, Receiver
from libs.links.schema import add_link_tables
from libs.links.sender import Sender
from libs.postgres import Database, Transaction
from libs.rpc import build_server
from libs.rpc_client import connect
from libs.service import Runtime, Service
from libs.settings import AuthSettings, GrpcSettings, LinkSettings
from libs.sharding import shard_of
from libs.wire import to_timestamp
from services.scheduler.app import RECEIVERS, build
from services.scheduler.settings import SchedulerSettings
from tests.support.clock import ManualClock
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.schemas import create_tables

START = datetime(2013, 7, 1, 12, tzinfo=UTC)
SHARDS = 16  # So many that no replica goes without, whatever the names of its rivals.
LINKS = LinkSettings(sweep_interval=timedelta(seconds=0.1), republish_after=timedelta(seconds=1))


@dataclass
class Peer:
    """A service that sends to the scheduler and keeps what comes back, in order of arrival."""

    db: Database
    sender: Sender
    tenant: str = "acme"
    notifications: list[link_pb2.Notification] = field(default_factory=list)
    traces: list[bytes] = field(default_factory=list)
    has_news: asyncio.Condition = field(default_factory=asyncio.Condition)
    sequence: int = 0
    arrived_at: list[datetime] = field(default_factory=list)

    def timer(self, entity: str, due_at: datetime, *, text: str = "{}", **more: Any) -> link_pb2.Entry:
        """A one-shot timer that notifies."""
        schedule = link_pb2.ScheduleTimer(
            id=more.pop("id", new_id()).bytes,
            entity=entity,
            due_time=to_timestamp(due_at),
            accept_time=to_timestamp(START),
            target=link_pb2.TimerTarget(
                notification=timer_pb2.NotificationContent(type="test", subscribers=["s"], payload=text)
            ),
            **more,
        )
        return self.entry(schedule_timer=schedule)

    def entry(self, *, sequence: int | None = None, **kind: Any) -> link_pb2.Entry:
        """An entry with the next sequence, or the given one."""
        self.sequence += 1
        return link_pb2.Entry(tenant=self.tenant, sequence=self.sequence if sequence is None else sequence, **kind)

    def cancel(self, entity: str, *, sequence: int | None = None, **selector: Any) -> link_pb2.Entry:
        """A cancel by entity."""
        cancel = link_pb2.CancelTimers(
            selector=link_pb2.TimerSelector(entity=entity, **selector), cause="a test says so"
        )
        return self.entry(sequence=sequence, cancel_timers=cancel)

    async def send(self, *entries: link_pb2.Entry, timeout: float = 10) -> list[link_pb2.EntryResult]:
        """Send entries and wait until they are applied; the results, one per entry."""
        addressed = [
            Addressed(receiver="scheduler", entry=one, partition=shard_of(one.tenant, _entity_of(one), SHARDS))
            for one in entries
        ]
        frames, positions = self.sender.pack(addressed)
        async with self.db.transaction() as tx:
            await self.sender.insert(tx, frames)
        receipts = await self.sender.wait(frames, timedelta(seconds=timeout))
        assert len(receipts) == len(frames), "not all frames were applied in time"
        return [
            next(
                (r for r in receipts[place.frame_id].results if r.index == place.index),
                link_pb2.EntryResult(index=place.index),
            )
            for place in positions
        ]

    async def received(self, count: int, *, timeout: float = 10) -> list[link_pb2.Notification]:
        """Wait until `count` notifications have come."""
        async with asyncio.timeout(timeout), self.has_news:
            await self.has_news.wait_for(lambda: len(self.notifications) >= count)
        return self.notifications

    async def apply(self, tx: Transaction, frames: Sequence[IncomingFrame]) -> Applied:
        """Keep what was fired."""
        async with self.has_news:
            for one in frames:
                self.notifications += [entry.notification for entry in one.frame.entries]
                self.traces += [replace(one, points={}).trace_of(entry) for entry in one.frame.entries]
                self.arrived_at += [datetime.now(UTC)] * len(one.frame.entries)
            self.has_news.notify_all()
        return Applied()


def _entity_of(entry: link_pb2.Entry) -> str:
    command = getattr(entry, str(entry.WhichOneof("kind")))
    return str(command.selector.entity if hasattr(command, "selector") else command.entity)


class SchedulerWorld:
    """Replicas, a peer, a clock that jumps."""

    def __init__(self, url: str, open_database: OpenDatabase, open_bus: OpenBus, nats_url: str | None = None) -> None:
        self.clock = ManualClock(START)
        self._url = url
        self._nats_url = nats_url
        self._open_database = open_database
        self._open_bus = open_bus
        self.peer: Peer
        self.replicas: dict[str, tuple[Service, list[asyncio.Task[None]]]] = {}
        self.db: Database

    async def start_peer(self) -> None:
        """Create the tables, and start the peer (it is both intake and digest)."""
        await asyncio.to_thread(create_tables, self._url, "scheduler")
        self.db = await self._open_database("scheduler", self._url)
        db = await self._open_database("digest", self._url)
        links = MetaData()
        add_link_tables(links)
        async with db.engine.begin() as conn:
            await conn.run_sync(links.create_all)
        bus = await self._open_bus("peer", self._nats_url)
        sender = Sender(db=db, bus=bus, service="digest", replica="peer", receivers=["scheduler"], settings=LINKS)
        self.peer = Peer(db=db, sender=sender)
        receiver = Receiver(
            db=db, bus=bus, service="digest", apply=self.peer.apply, publish=sender.publish, settings=LINKS
        )
        self._run("peer", None, [sender.run(), receiver.run()])

    async def start(self, replica: str, **settings: object) -> None:
        """Start a replica."""
        db, bus = await self._open_database("scheduler", self._url), await self._open_bus(replica, self._nats_url)
        sender = Sender(db=db, bus=bus, service="scheduler", replica=replica, receivers=RECEIVERS, settings=LINKS)
        runtime = Runtime(
            service="scheduler",
            replica=replica,
            db=db,
            bus=bus,
            clock=self.clock,
            sender=sender,
            shards=SHARDS,
            links=LINKS,
        )
        own = SchedulerSettings().model_copy(update={"lease_ttl": timedelta(seconds=1), **settings})
        service = await build(runtime, cast(Any, SimpleNamespace(scheduler=own)))
        self._run(replica, service, [sender.run(), *(loop() for loop in service.loops.values())])

    def _run(self, name: str, service: Any, coroutines: Sequence[Any]) -> None:
        self.replicas[name] = (service, [asyncio.create_task(one) for one in coroutines])

    async def stop(self, replica: str) -> None:
        """Stop a replica gracefully: loops close in reverse order."""
        _, tasks = self.replicas.pop(replica)
        for task in reversed(tasks):
            task.cancel()
            while not task.done():
                await asyncio.wait([task], timeout=1)
                for lost in asyncio.all_tasks():
                    if lost.cancelling():  # `asyncio.wait_for` loses a cancellation now and then, before 3.12.
                        lost.cancel()

    async def holders(self) -> dict[int, str | None]:
        """Who holds which shard."""
        async with self.db.read() as tx:
            return dict(await (await tx.raw.execute("SELECT shard, holder FROM shard")).fetchall())

    async def until_held(self, *replicas: str, timeout: float = 15) -> dict[int, str]:
        """Wait until all shards are held, by exactly these replicas (or those whose names contain these words)."""
        async with asyncio.timeout(timeout):
            while True:
                held = {shard: holder for shard, holder in (await self.holders()).items() if holder is not None}
                names = {next((one for one in replicas if one in holder), holder) for holder in held.values()}
                if len(held) == SHARDS and names == set(replicas):
                    return held
                await asyncio.sleep(0.02)

    async def open_bus(self) -> Bus:
        """A connection of the test's own."""
        return await self._open_bus("test", self._nats_url)

    async def until_confirmed(self, *, timeout: float = 20) -> None:
        """Wait until the scheduler has nothing under way any more: what is to come twice has come."""
        async with asyncio.timeout(timeout):
            while True:
                async with self.db.read() as tx:
                    cursor = await tx.raw.execute(
                        "SELECT (SELECT count(*) FROM outbox) + (SELECT count(*) FROM event_outbox)"
                    )
                    row = await cursor.fetchone()
                if row == (0,):
                    return
                await asyncio.sleep(0.02)

    @asynccontextmanager
    async def stub(self, tenant: str = "acme") -> AsyncIterator[Any]:
        """A client of the first replica's gRPC API."""
        service, _ = next(one for name, one in self.replicas.items() if name != "peer")
        server = build_server(
            GrpcSettings(), auth=AuthSettings(), servicers=service.servicers, registry=CollectorRegistry()
        )
        async with server, connect(server.address, tenant=tenant) as channel:
            yield scheduler_pb2_grpc.SchedulerServiceStub(channel)

    async def stored(self, timer_id: UUID) -> tuple[Any, ...] | None:
        """(state, last error or note) of a timer."""
        async with self.db.read() as tx:
            query = "SELECT state, coalesce(last_error, note) FROM timer WHERE id = %s"
            cursor = await tx.raw.execute(query, (timer_id,))
            return await cursor.fetchone()


@asynccontextmanager
async def scheduler_world(
    url: str, open_database: OpenDatabase, open_bus: OpenBus, nats_url: str | None = None
) -> AsyncIterator[SchedulerWorld]:
    """A world with a peer and no replica yet; everything is stopped at the end."""
    world = SchedulerWorld(url, open_database, open_bus, nats_url)
    async with AsyncExitStack() as stack:
        await world.start_peer()

        async def stop_all() -> None:
            for name in list(world.replicas):
                await world.stop(name)

        stack.push_async_callback(stop_all)
        yield world
