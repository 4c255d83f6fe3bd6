"""Intake in this process, with its gRPC server, between two peers that stand in for the scheduler and digest."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import grpc
from carillon.intake.v1 import intake_pb2, intake_pb2_grpc
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from prometheus_client import CollectorRegistry
from sqlalchemy import MetaData

from libs.jetstream import Bus
from libs.links.frames import Addressed
from libs.links.receiver import Applied, IncomingFrame, Receiver
from libs.links.schema import add_link_tables
from libs.links.sender import Sender
from libs.postgres import Database, Transaction
from libs.rpc import RpcServer, build_server
from libs.rpc_client import connect
from libs.service import Runtime
from libs.settings import AuthSettings, GrpcSettings, LinkSettings
from libs.wire import to_timestamp
from services.intake.app import build
from services.intake.settings import IntakeSettings
from tests.support.clock import ManualClock
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.schemas import create_tables

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)
TENANT = "default"
TABLES = ("request", "response", "idempotency", "item_providers", "outbox")
LINKS = LinkSettings(sweep_interval=timedelta(seconds=0.1), republish_after=timedelta(seconds=1))

Results = Callable[[int, link_pb2.Entry], link_pb2.EntryResult | None]


def no_results(_index: int, _entry: link_pb2.Entry) -> None:
    """A peer that has nothing to say."""


@dataclass
class Peer:
    """A receiver that keeps the entries it is sent, in order of arrival, and answers each with `results`."""

    name: str
    db: Database
    sender: Sender
    receiver: Receiver | None = None
    entries: list[link_pb2.Entry] = field(default_factory=list)
    partitions: list[int] = field(default_factory=list)
    results: Results = no_results
    has_news: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def apply(self, _: Transaction, frames: Sequence[IncomingFrame]) -> Applied:
        """Keep what came."""
        results = {}
        async with self.has_news:
            for one in frames:
                self.entries += one.frame.entries
                self.partitions += [one.frame.partition] * len(one.frame.entries)
                said = [self.results(index, entry) for index, entry in enumerate(one.frame.entries)]
                results[one.id] = [result for result in said if result is not None]
            self.has_news.notify_all()
        return Applied(results=results)

    async def received(self, count: int) -> list[link_pb2.Entry]:
        """Wait until `count` entries have come; all that have."""
        async with asyncio.timeout(10), self.has_news:
            await self.has_news.wait_for(lambda: len(self.entries) >= count)
        return self.entries

    async def send(self, *entries: link_pb2.Entry) -> list[link_pb2.EntryResult]:
        """Send entries to intake and wait until they are applied; their results."""
        frames, _ = self.sender.pack([Addressed(receiver="intake", entry=one) for one in entries])
        async with self.db.transaction() as tx:
            await self.sender.insert(tx, frames)
        receipts = await self.sender.wait(frames, timedelta(seconds=10))
        assert len(receipts) == len(frames), "not all frames were applied in time"
        return [result for receipt in receipts.values() for result in receipt.results]


class IntakeWorld:
    """One replica of intake; `stub` calls it, `digest` and `scheduler` are what it sends to."""

    def __init__(self, *, db: Database, sender: Sender, scheduler: Peer, digest: Peer) -> None:
        self.clock = ManualClock(NOW)
        self.db = db
        self.sender = sender
        self.scheduler = scheduler
        self.digest = digest
        self.address = ""
        self.channel: grpc.aio.Channel
        self.stub: Any

    async def count(self, table: str) -> int:
        """Rows of a table, uncommitted ones aside."""
        async with self.db.read() as tx:
            row = await (await tx.raw.execute(f"SELECT count(*) FROM {table}")).fetchone()
        assert row is not None
        return int(row[0])

    async def stored(self) -> dict[str, int]:
        """Rows per table, of those that have any."""
        counts = {table: await self.count(table) for table in TABLES}
        return {table: count for table, count in counts.items() if count}

    async def rows(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """What a query gives."""
        async with self.db.read() as tx:
            return await (await tx.raw.execute(statement, parameters)).fetchall()

    async def execute(self, statement: str, *parameters: object) -> None:
        """Change something behind intake's back."""
        async with self.db.transaction() as tx:
            await tx.raw.execute(statement, parameters)


@asynccontextmanager
async def intake_world(
    url: str,
    open_database: OpenDatabase,
    open_bus: OpenBus,
    *,
    peers_run: bool = True,
    auth: AuthSettings | None = None,
    links: LinkSettings = LINKS,
    **settings: object,
) -> AsyncIterator[IntakeWorld]:
    """Intake on an empty database. With `peers_run` false nobody takes its frames."""
    migrate(url)
    async with AsyncExitStack() as stack:
        db, bus = await open_database("intake"), await open_bus("intake")
        sender = Sender(
            db=db, bus=bus, service="intake", replica="a", receivers=["scheduler", "digest"], settings=links
        )
        scheduler = await _peer("scheduler", open_database, bus)
        digest = await _peer("digest", open_database, bus)
        world = IntakeWorld(db=db, sender=sender, scheduler=scheduler, digest=digest)
        runtime = Runtime(
            service="intake", replica="a", db=db, bus=bus, clock=world.clock, sender=sender, shards=8, links=links
        )
        own = IntakeSettings().model_copy(update=settings)
        service = await build(runtime, cast(Any, SimpleNamespace(intake=own)))
        assert service.apply is not None
        receiver = Receiver(
            db=db, bus=bus, service="intake", apply=service.apply, publish=sender.publish, settings=links
        )
        loops = [sender.run(), receiver.run(), scheduler.sender.run(), digest.sender.run(), service.loops["measure"]()]
        if peers_run:
            loops += [one.receiver.run() for one in (scheduler, digest) if one.receiver is not None]
        for one in (sender, scheduler.sender):
            await one.ensure_streams()  # Or the first frame would wait for a sweep.
        await stack.enter_async_context(_running(loops))
        server = build_server(
            GrpcSettings(drain_timeout=timedelta(seconds=1)),
            auth=auth or AuthSettings(),
            servicers=service.servicers,
            registry=CollectorRegistry(),
        )
        running: RpcServer = await stack.enter_async_context(server)
        world.address = running.address
        world.channel = await stack.enter_async_context(connect(running.address))
        world.stub = intake_pb2_grpc.IntakeServiceStub(world.channel)
        await _warm_up(world, peers_run=peers_run)
        yield world


def migrate(url: str) -> None:
    """Bring the schema `intake` up."""
    create_tables(url, "intake")


async def _peer(name: str, open_database: OpenDatabase, bus: Bus) -> Peer:
    db = await open_database(name)
    tables = MetaData()
    add_link_tables(tables)
    async with db.engine.begin() as conn:
        await conn.run_sync(tables.create_all)
    sender = Sender(db=db, bus=bus, service=name, replica="p", receivers=["intake"], settings=LINKS)
    peer = Peer(name=name, db=db, sender=sender)
    peer.receiver = Receiver(db=db, bus=bus, service=name, apply=peer.apply, publish=sender.publish, settings=LINKS)
    return peer


async def _warm_up(world: IntakeWorld, *, peers_run: bool) -> None:
    """Send a frame over every link: what starts late must neither slow a test down nor be cancelled half made."""
    await world.scheduler.send(link_pb2.Entry(tenant="nobody", request_due=link_pb2.RequestDue(request_id=bytes(16))))
    if peers_run:
        entry = link_pb2.Entry(tenant="nobody")
        frames, _ = world.sender.pack([Addressed(receiver=one, entry=entry) for one in ("scheduler", "digest")])
        async with world.db.transaction() as tx:
            await world.sender.insert(tx, frames)
        await world.sender.wait(frames, timedelta(seconds=10))
        for peer in (world.scheduler, world.digest):
            peer.entries.clear()
            peer.partitions.clear()


@asynccontextmanager
async def _running(loops: Sequence[Any]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(one) for one in loops]
    try:
        yield
    finally:
        for task in reversed(tasks):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def assert_all_refused(results: Sequence[Any], name: str, wrong: Sequence[tuple[Any, str, str]]) -> None:
    """Every item, (item, field, why), has its own INVALID_ARGUMENT that names its own field."""
    assert len(results) == len(wrong)
    for index, (result, (_, path, why)) in enumerate(zip(results, wrong, strict=True)):
        assert not result.id
        assert (result.error.code, result.error.field) == (3, f"{name}[{index}].{path}")
        assert result.error.message.startswith(f"{path} {why}")


def days(count: float) -> Timestamp:
    """An instant so many days from now."""
    return to_timestamp(NOW + timedelta(days=count))


def content(**more: Any) -> timer_pb2.NotificationContent:
    """A notification's content that is as it should be."""
    fields: dict[str, Any] = {"type": "shop.sale", "subscribers": ["anna"], "payload": '{"sum": 3}'}
    return timer_pb2.NotificationContent(**(fields | more))


def notification(**more: Any) -> intake_pb2.Notification:
    """A notification that is as it should be."""
    fields: dict[str, Any] = {"content": content(), "entity": "shop-1"}
    return intake_pb2.Notification(**(fields | more))


def schedule(**more: Any) -> intake_pb2.Schedule:
    """A schedule that lacks only its time."""
    fields: dict[str, Any] = {"entity": "shop-1", "target": timer_pb2.Target(notification=content())}
    return intake_pb2.Schedule(**(fields | more))


def event(**more: Any) -> timer_pb2.Target:
    """A target that tells a business service, which reports within an hour."""
    fields: dict[str, Any] = {"type": "trial.over", "payload": '{"sum": 3}', "report_within": Duration(seconds=3_600)}
    return timer_pb2.Target(event=timer_pb2.EventContent(**(fields | more)))


def request(**more: Any) -> intake_pb2.Request:
    """A request that is as it should be."""
    fields: dict[str, Any] = {"batch": "deals", "customer": "carl", "item": "lamp", "providers": ["paul", "petra"]}
    return intake_pb2.Request(**(fields | {"payload": '{"count": 2}'} | more))
