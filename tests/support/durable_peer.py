"""A service at the scheduler's links that survives what its test does to Postgres and NATS.

It sends commands as intake does and takes notifications as digest does. What it sends and what it has got are in tables
of the schema `digest`: `sent` has a row per batch, written with the batch's frames, so that a commit in doubt is never
repeated; `received` has a row per notification, without a key, so that one that came in two frames is there twice.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Self
from uuid import UUID

import psycopg
from carillon.link.v1 import link_pb2
from pydantic import SecretStr
from sqlalchemy import MetaData

from libs.jetstream import Bus
from libs.links.frames import Addressed
from libs.links.receiver import Applied, IncomingFrame, Receiver
from libs.links.schema import add_link_tables
from libs.links.sender import Sender
from libs.postgres import Database, Transaction, copy_rows
from libs.settings import LinkSettings, NatsSettings, PostgresSettings
from libs.sharding import shard_of
from libs.wire import from_timestamp
from tests.support.link_world import running, until

TENANT = "acme"
_SCHEMA = "digest"
_COLUMNS = ("timer_id", "schedule_id", "entity", "due_at")
_TYPES = ("uuid", "uuid", "text", "timestamptz")
_LINKS = LinkSettings(
    sweep_interval=timedelta(seconds=0.2),
    republish_after=timedelta(seconds=1),
    republish_max=timedelta(seconds=5),
    receipt_timeout=timedelta(minutes=5),
)
_COMMIT_TIMEOUT_S = 60


class NotApplied(Exception):
    """Frames had no receipt in time, or were put aside by their receiver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """One notification that came and was committed; `due_at` is when its timer was due."""

    timer_id: UUID
    schedule_id: UUID
    entity: str
    due_at: datetime


class DurablePeer:
    """Sends to the scheduler and keeps what comes back. `sequence` orders commands, as intake's does."""

    def __init__(self, *, db: Database, sender: Sender, shards: int) -> None:
        self.db = db
        self._sender = sender
        self._shards = shards
        self._sequence = 0
        self._seen: Counter[str] = Counter()
        self._news = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def connect(cls, *, url: str, nats_url: str, shards: int) -> AsyncIterator[Self]:
        """At work until the block ends."""
        db = await _database(url)
        try:
            bus = await Bus.connect(NatsSettings(url=(nats_url,)), "peer")
            try:
                sender = Sender(
                    db=db, bus=bus, service=_SCHEMA, replica="peer", receivers=["scheduler"], settings=_LINKS
                )
                peer = cls(db=db, sender=sender, shards=shards)
                receiver = Receiver(
                    db=db, bus=bus, service=_SCHEMA, apply=peer._apply, publish=sender.publish, settings=_LINKS
                )
                async with running(sender.run(), receiver.run()):
                    yield peer
            finally:
                await bus.close()
        finally:
            await db.close()

    # Sending

    def next_sequence(self) -> int:
        """The sequence of a command accepted now."""
        self._sequence += 1
        return self._sequence

    async def send(self, entries: Iterable[link_pb2.Entry], *, timeout: timedelta) -> list[link_pb2.EntryResult]:
        """Commit entries, and wait until the scheduler has applied them; one result per entry.

        Goes on through outages of Postgres and NATS. Raises NotApplied, naming the frames.
        """
        addressed = [
            Addressed(receiver="scheduler", entry=entry, partition=shard_of(TENANT, _entity_of(entry), self._shards))
            for entry in entries
        ]
        frames, positions = self._sender.pack(addressed)

        async def is_committed() -> bool:
            async with self.db.transaction() as tx:
                cursor = await tx.raw.execute(
                    "INSERT INTO sent (batch) VALUES (%s) ON CONFLICT DO NOTHING", (frames[0].id,)
                )
                if cursor.rowcount:  # Otherwise the commit of an earlier attempt came through after all.
                    await self._sender.insert(tx, frames)
            return True

        await until(is_committed, timeout_s=_COMMIT_TIMEOUT_S)
        receipts = await self._sender.wait(frames, timeout)
        if silent := [f"{frame.id} for {frame.partition}" for frame in frames if frame.id not in receipts]:
            raise NotApplied(f"{len(silent)} frames had no receipt after {timeout}: {', '.join(silent[:5])}")
        if dead := [one.reason for one in receipts.values() if one.verdict != link_pb2.FRAME_VERDICT_APPLIED]:
            raise NotApplied(f"{len(dead)} frames were put aside: {', '.join(dead[:5])}")
        results = {(frame_id, one.index): one for frame_id, receipt in receipts.items() for one in receipt.results}
        return [results.get((at.frame_id, at.index), link_pb2.EntryResult(index=at.index)) for at in positions]

    # Receiving

    async def until_seen(self, entity: str, count: int) -> None:
        """Wait until so many notifications of an entity have come. A commit in doubt is not seen: give it a timeout."""
        while self._seen[entity] < count:
            await self._news.wait()

    async def count_received(self) -> int:
        """Notifications so far. Raises Unavailable while Postgres is away."""
        async with self.db.read() as tx:
            row = await (await tx.raw.execute("SELECT count(*) FROM received")).fetchone()
        assert row is not None
        return int(row[0])

    async def received(self) -> list[Received]:
        """All notifications, in no order."""
        async with self.db.read() as tx:
            cursor = await tx.raw.execute("SELECT timer_id, schedule_id, entity, due_at FROM received")
            return [
                Received(timer_id=timer_id, schedule_id=schedule_id, entity=entity, due_at=due_at)
                for timer_id, schedule_id, entity, due_at in await cursor.fetchall()
            ]

    async def _apply(self, tx: Transaction, frames: Sequence[IncomingFrame]) -> Applied:
        told = [entry.notification for one in frames for entry in one.frame.entries]
        rows = [
            (UUID(bytes=one.timer_id), UUID(bytes=one.schedule_id), one.entity, from_timestamp(one.occur_time))
            for one in told
        ]
        await copy_rows(tx, "received", _COLUMNS, rows, types=_TYPES)
        return Applied(on_commit=partial(self._see, Counter(one.entity for one in told)))

    def _see(self, entities: Counter[str]) -> None:
        self._seen.update(entities)
        news, self._news = self._news, asyncio.Event()
        news.set()


async def _database(url: str) -> Database:
    async with await psycopg.AsyncConnection.connect(url) as connection:
        await connection.execute(f"CREATE SCHEMA {_SCHEMA}")
    db = await Database.connect(PostgresSettings(url=SecretStr(url)), _SCHEMA)
    links = MetaData()
    add_link_tables(links)
    async with db.transaction() as tx:
        await tx.conn.run_sync(links.create_all)
        await tx.raw.execute("CREATE TABLE sent (batch uuid PRIMARY KEY)")
        await tx.raw.execute(
            "CREATE TABLE received (timer_id uuid NOT NULL, schedule_id uuid NOT NULL, entity text NOT NULL,"
            " due_at timestamptz NOT NULL)"
        )
    return db


def _entity_of(entry: link_pb2.Entry) -> str:
    command = getattr(entry, str(entry.WhichOneof("kind")))
    return str(command.selector.entity if hasattr(command, "selector") else command.entity)
