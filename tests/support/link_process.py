"""One end of a link as a process that kills itself at a named step.

    python -m tests.support.link_process '{"role": "sender", "die_at": "after commit", "die_on": 3, …}'

The links know nothing of it: the wrappers below stand between them and Postgres and NATS. SIGKILL is not to be caught,
so nothing is flushed, rolled back or closed. `die_on` is which time the step kills, from 1.

| sender's steps    | it dies …                                                                     |
|-------------------|-------------------------------------------------------------------------------|
| before commit     | with state change and frame written and not committed                         |
| after commit      | before it publishes                                                           |
| after publish     | JetStream has the frame, the receipt is to come                               |
| after receipt     | the receipt has come, nothing was done about it                               |
| before delete     | the frame's deletion is written and not committed                             |
| after delete      | the frame's deletion is committed                                             |

| receiver's steps  | it dies …                                                                     |
|-------------------|-------------------------------------------------------------------------------|
| before commit     | with effects and inbox row written and not committed                          |
| after commit      | before the ack                                                                |
| after ack         | JetStream has the ack, the receipt is to come                                 |
| after receipt     | the receipt is sent                                                           |
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import Any, cast

import uvloop
from carillon.link.v1 import link_pb2
from pydantic import SecretStr

from libs.errors import Unavailable
from libs.jetstream import Bus
from libs.links.frames import Addressed, OutgoingFrame, stream_name
from libs.links.receiver import Applied, IncomingFrame, Receiver
from libs.links.sender import Sender
from libs.postgres import Database, Transaction
from libs.settings import LinkSettings, NatsSettings, PostgresSettings

SENDER = "intake"
RECEIVER = "digest"
SENDER_STEPS = ("before commit", "after commit", "after publish", "after receipt", "before delete", "after delete")
RECEIVER_STEPS = ("before commit", "after commit", "after ack", "after receipt")


def link_settings(**overrides: object) -> LinkSettings:
    """Settings that make up for what was lost within a moment."""
    quick = {
        "sweep_interval": timedelta(milliseconds=50),
        "republish_after": timedelta(milliseconds=300),
        "republish_max": timedelta(seconds=1),
    }
    return LinkSettings().model_copy(update=quick | overrides)


def numbered(numbers: Sequence[int]) -> list[Addressed]:
    """One entry per number."""
    return [Addressed(receiver=RECEIVER, entry=link_pb2.Entry(tenant="acme", sequence=n)) for n in numbers]


async def commit_numbers(db: Database, sender: Sender, numbers: Sequence[int]) -> list[OutgoingFrame]:
    """The sender's state change, with its frames, in one transaction."""
    frames, _ = sender.pack(numbered(numbers))
    async with db.transaction() as tx:
        await tx.raw.execute("INSERT INTO sent SELECT unnest(%s::int[])", (list(numbers),))
        await sender.insert(tx, frames)
    return frames


def numbers_of(frames: Sequence[IncomingFrame]) -> list[int]:
    """What is in frames."""
    return [entry.sequence for one in frames for entry in one.frame.entries]


async def count(tx: Transaction, frames: Sequence[IncomingFrame]) -> Applied:
    """The receiver's state change: one more application of each number. Answers each entry with its number."""
    await tx.raw.execute(
        "INSERT INTO applied SELECT n, 1 FROM unnest(%s::int[]) AS n"
        " ON CONFLICT (n) DO UPDATE SET times = applied.times + 1",
        (numbers_of(frames),),
    )
    return Applied(
        results={
            one.id: [
                link_pb2.EntryResult(index=index, changed=entry.sequence)
                for index, entry in enumerate(one.frame.entries)
            ]
            for one in frames
        }
    )


async def scalar(db: Database, query: str, *parameters: object) -> Any:
    """One value."""
    async with db.read() as tx:
        row = await (await tx.raw.execute(query, parameters)).fetchone()
    assert row is not None
    return row[0]


class Fate:
    """Kills this process when it reaches a step often enough."""

    def __init__(self, die_at: str = "", die_on: int = 1) -> None:
        self._die_at = die_at
        self._left = die_on

    @property
    def is_mortal(self) -> bool:
        """Whether there is a step that kills."""
        return bool(self._die_at)

    def reach(self, step: str) -> None:
        """Maybe the end."""
        if step == self._die_at:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class MortalDatabase:
    """Reaches a step before and one after the commit of each transaction for which `counts` is true."""

    def __init__(self, db: Database, fate: Fate, *, before: str, after: str, counts: Callable[[], bool]) -> None:
        self._db = db
        self._fate = fate
        self._before = before
        self._after = after
        self._counts = counts

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """See Database."""
        async with self._db.transaction() as tx:
            yield tx
            does_count = self._counts()
            if does_count:
                self._fate.reach(self._before)
        if does_count:
            self._fate.reach(self._after)

    def read(self) -> AbstractAsyncContextManager[Transaction]:
        """See Database."""
        return self._db.read()


class MortalBus:
    """Reaches steps around what goes over NATS."""

    def __init__(self, bus: Bus, fate: Fate) -> None:
        self._bus = bus
        self._fate = fate
        self.receipts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    async def publish(self, subject: str, payload: bytes, *, headers: Mapping[str, str], msg_id: str) -> None:
        """See Bus."""
        await self._bus.publish(subject, payload, headers=headers, msg_id=msg_id)
        self._fate.reach("after publish")

    async def subscribe(self, subject: str, callback: Callable[[bytes], Awaitable[None]]) -> None:
        """See Bus."""

        async def on_receipt(payload: bytes) -> None:
            self.receipts += 1
            self._fate.reach("after receipt")
            await callback(payload)

        await self._bus.subscribe(subject, on_receipt)

    async def send(self, subject: str, payload: bytes) -> None:
        """See Bus."""
        await self._round_trip()
        self._fate.reach("after ack")
        await self._bus.send(subject, payload)
        await self._round_trip()
        self._fate.reach("after receipt")

    async def _round_trip(self) -> None:
        """What was sent before has left the client's buffer and been read by the server."""
        if self._fate.is_mortal:
            await self._bus.restore_stream(stream_name(RECEIVER))


async def send(options: dict[str, Any], db: Database, bus: MortalBus, fate: Fate) -> None:
    """Send numbers up to `count`, going on where the last process ended, and then stay."""
    confirming = MortalDatabase(db, fate, before="before delete", after="after delete", counts=lambda: bus.receipts > 0)
    sender = Sender(
        db=cast(Database, confirming),
        bus=bus,
        service=SENDER,
        replica=str(os.getpid()),
        receivers=[RECEIVER],
        settings=link_settings(),
    )
    writing = MortalDatabase(db, fate, before="before commit", after="after commit", counts=lambda: True)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(sender.run())
        first = 0
        while first < options["count"]:
            try:
                # What the last process committed, or this one without knowing, is not sent again.
                first = await scalar(db, "SELECT coalesce(max(n) + 1, 0) FROM sent")
                while first < options["count"]:
                    numbers = range(first, min(first + options["per_frame"], options["count"]))
                    sender.publish(await commit_numbers(cast(Database, writing), sender, numbers))
                    first = numbers.stop
            except Unavailable:
                await asyncio.sleep(0.05)  # Postgres is away.


async def receive(db: Database, bus: MortalBus, fate: Fate) -> None:
    """Count what comes."""
    has_applied = False

    async def apply(tx: Transaction, frames: Sequence[IncomingFrame]) -> Applied:
        nonlocal has_applied
        has_applied = True
        return await count(tx, frames)

    applying = MortalDatabase(db, fate, before="before commit", after="after commit", counts=lambda: has_applied)
    await Receiver(
        db=cast(Database, applying),
        bus=cast(Bus, bus),
        service=RECEIVER,
        apply=apply,
        publish=lambda _: None,
        settings=link_settings(fetch_frames=4),
    ).run()


async def main(options: dict[str, Any]) -> None:
    """Until killed."""
    role = options["role"]
    fate = Fate(options.get("die_at", ""), options.get("die_on", 1))
    postgres = PostgresSettings(url=SecretStr(options["postgres_url"]))
    db = await Database.connect(postgres, SENDER if role == "sender" else RECEIVER)
    # What JetStream lost without closing the connection, as with a deleted stream, is waited for this long.
    nats = NatsSettings(url=(options["nats_url"],), publish_timeout=timedelta(seconds=1))
    bus = MortalBus(await Bus.connect(nats, role), fate)
    if role == "sender":
        await send(options, db, bus, fate)
    else:
        await receive(db, bus, fate)


if __name__ == "__main__":
    uvloop.run(main(json.loads(sys.argv[1])))
