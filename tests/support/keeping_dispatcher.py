"""A dispatcher that keeps what it is handed and says that it was sent; it also tells digest things, as intake does.

Everything is in tables of the schema `dispatcher`, so it lives through what its test does to NATS. `received` has a row
per delivery that came, without a key: one that came in two frames is there twice.
"""

import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
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
from tests.support.link_world import running

_SCHEMA = "dispatcher"
_COLUMNS = ("delivery_id", "digest_id", "subscriber", "message")
_TYPES = ("uuid", "uuid", "text", "text")
_LINKS = LinkSettings(
    sweep_interval=timedelta(seconds=0.2), republish_after=timedelta(seconds=1), republish_max=timedelta(seconds=5)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What came, as often as it came: deliveries and digests by id, (subscriber, notification id) by content."""

    deliveries: Counter[UUID]
    digests: Counter[UUID]
    items: Counter[tuple[str, str]]


class KeepingDispatcher:
    """`db` is the schema it keeps everything in."""

    def __init__(self, *, db: Database, sender: Sender) -> None:
        self.db = db
        self._sender = sender

    @classmethod
    @asynccontextmanager
    async def connect(cls, *, url: str, nats_url: str) -> AsyncIterator[Self]:
        """At work until the block ends."""
        db = await _database(url)
        try:
            bus = await Bus.connect(NatsSettings(url=(nats_url,)), "keeping-dispatcher")
            try:
                sender = Sender(
                    db=db, bus=bus, service=_SCHEMA, replica="keeping", receivers=["digest"], settings=_LINKS
                )
                one = cls(db=db, sender=sender)
                receiver = Receiver(
                    db=db, bus=bus, service=_SCHEMA, apply=one._apply, publish=sender.publish, settings=_LINKS
                )
                async with running(sender.run(), receiver.run()):
                    yield one
            finally:
                await bus.close()
        finally:
            await db.close()

    async def tell(self, entries: Iterable[link_pb2.Entry], *, timeout: timedelta) -> None:
        """Commit entries for digest and wait until it has applied them; asserts that it has, in time."""
        frames, _ = self._sender.pack(Addressed(receiver="digest", entry=entry) for entry in entries)
        async with self.db.transaction() as tx:
            await self._sender.insert(tx, frames)
        receipts = await self._sender.wait(frames, timeout)
        assert len(receipts) == len(frames), "digest has not applied all frames in time"
        assert {one.verdict for one in receipts.values()} == {link_pb2.FRAME_VERDICT_APPLIED}

    async def told(self) -> Told:
        """Everything that has come so far."""
        async with self.db.read() as tx:
            rows = await (await tx.raw.execute("SELECT * FROM received")).fetchall()
        return Told(
            deliveries=Counter(row[0] for row in rows),
            digests=Counter(row[1] for row in rows),
            items=Counter(
                (subscriber, item["notification_id"])
                for _, _, subscriber, message in rows
                for item in json.loads(message)["items"]
            ),
        )

    async def _apply(self, tx: Transaction, frames: Sequence[IncomingFrame]) -> Applied:
        entries = [entry for one in frames for entry in one.frame.entries]
        rows = [
            (UUID(bytes=one.id), UUID(bytes=one.digest_id), one.subscriber, one.json)
            for one in (entry.delivery for entry in entries)
        ]
        await copy_rows(tx, "received", _COLUMNS, rows, types=_TYPES)
        outgoing, _ = self._sender.pack(Addressed(receiver="digest", entry=_is_sent(entry)) for entry in entries)
        await self._sender.insert(tx, outgoing)
        return Applied(outgoing=outgoing)


def _is_sent(entry: link_pb2.Entry) -> link_pb2.Entry:
    outcome = link_pb2.DeliveryOutcome(
        delivery_id=entry.delivery.id, digest_id=entry.delivery.digest_id, outcome="sent"
    )
    return link_pb2.Entry(tenant=entry.tenant, sequence=entry.sequence, delivery_outcome=outcome)


async def _database(url: str) -> Database:
    async with await psycopg.AsyncConnection.connect(url) as connection:
        await connection.execute(f"CREATE SCHEMA {_SCHEMA}")
    db = await Database.connect(PostgresSettings(url=SecretStr(url)), _SCHEMA)
    links = MetaData()
    add_link_tables(links)
    async with db.transaction() as tx:
        await tx.conn.run_sync(links.create_all)
        await tx.raw.execute(
            "CREATE TABLE received (delivery_id uuid NOT NULL, digest_id uuid NOT NULL, subscriber text NOT NULL,"
            " message text NOT NULL)"
        )
    return db
