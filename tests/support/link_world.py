"""Two services that only count: one sends numbers, the other counts how often each was applied.

`sent` (schema `intake`) has a row per number the sender committed, `applied` (schema `digest`) a row per number the
receiver applied, with how many times. Whatever happens in between, in the end both must hold the same numbers, each
applied once, and the outbox must be empty.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import MetaData

from libs.errors import Unavailable
from libs.jetstream import Bus
from libs.links.frames import OutgoingFrame
from libs.links.receiver import Apply, Receiver
from libs.links.schema import add_link_tables
from libs.links.sender import Broker, Sender
from libs.postgres import Database
from local.processes import Process
from tests.support.fixtures import OpenDatabase
from tests.support.link_process import RECEIVER, SENDER, commit_numbers, count, link_settings, scalar

ROOT = Path(__file__).parents[2]

Found = TypeVar("Found")


async def create_tables(sender_db: Database, receiver_db: Database) -> None:
    """The link tables of both, and what they count in."""
    for db, own in ((sender_db, "sent (n int PRIMARY KEY)"), (receiver_db, "applied (n int PRIMARY KEY, times int)")):
        metadata = MetaData()
        add_link_tables(metadata)
        async with db.transaction() as tx:
            await tx.conn.run_sync(metadata.create_all)
            await tx.raw.execute(f"CREATE TABLE {own}")


async def until(condition: Callable[[], Awaitable[Found]], *, timeout_s: float = 20, every_s: float = 0.02) -> Found:
    """Look until the condition holds, over restarts of Postgres; TimeoutError when it does not in time."""
    async with asyncio.timeout(timeout_s):
        while True:
            with suppress(Unavailable):
                if found := await condition():
                    return found
            await asyncio.sleep(every_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkWorld:
    """Both databases and where the servers are."""

    sender_db: Database
    receiver_db: Database
    postgres_url: str
    nats_url: str
    directory: Path

    def sender(self, bus: Broker, *, replica: str = "one", **overrides: object) -> Sender:
        """A replica of the sender; it does nothing by itself."""
        return Sender(
            db=self.sender_db,
            bus=bus,
            service=SENDER,
            replica=replica,
            receivers=[RECEIVER],
            settings=link_settings(**overrides),
        )

    def receiver(self, bus: Bus, apply: Apply = count, **overrides: object) -> Receiver:
        """A replica of the receiver; it does nothing by itself."""
        return Receiver(
            db=self.receiver_db,
            bus=bus,
            service=RECEIVER,
            apply=apply,
            publish=lambda _: None,
            settings=link_settings(**overrides),
        )

    async def send(self, sender: Sender, numbers: Sequence[int]) -> list[OutgoingFrame]:
        """Commit numbers and publish them."""
        frames = await commit_numbers(self.sender_db, sender, numbers)
        sender.publish(frames)
        return frames

    async def unconfirmed(self) -> int:
        """Frames without a receipt."""
        return int(await scalar(self.sender_db, "SELECT count(*) FROM outbox"))

    async def applied(self) -> dict[int, int]:
        """How often each number was applied."""
        async with self.receiver_db.read() as tx:
            return dict(await (await tx.raw.execute("SELECT n, times FROM applied")).fetchall())

    async def applied_numbers(self) -> int:
        """How many numbers were applied so far."""
        return int(await scalar(self.receiver_db, "SELECT count(*) FROM applied"))

    async def dead(self) -> int:
        """Frames put aside."""
        return int(await scalar(self.receiver_db, "SELECT count(*) FROM dead_frame"))

    async def expect_all_once(self, numbers: int, *, timeout_s: float = 20) -> None:
        """Wait until all of 0 … numbers - 1 are sent and confirmed; then each must have been applied once."""

        async def are_sent() -> bool:
            return int(await scalar(self.sender_db, "SELECT count(*) FROM sent")) == numbers

        async def are_confirmed() -> bool:
            return await self.unconfirmed() == 0

        await until(are_sent, timeout_s=timeout_s)
        await until(are_confirmed, timeout_s=timeout_s)
        assert await self.applied() == dict.fromkeys(range(numbers), 1)

    @asynccontextmanager
    async def process(self, role: str, **options: object) -> AsyncIterator[Process]:
        """A process of its own: `sender` or `receiver`; see tests.support.link_process for the options."""
        told = {"role": role, "postgres_url": self.postgres_url, "nats_url": self.nats_url, **options}
        child = Process(
            role,
            [sys.executable, "-m", "tests.support.link_process", json.dumps(told)],
            log=self.directory / f"{role}.log",
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
        )
        child.start()
        try:
            yield child
        finally:
            await asyncio.to_thread(child.kill)


async def killed(child: Process) -> None:
    """Wait until a process has killed itself."""

    async def has_ended() -> bool:
        return not child.is_running

    await until(has_ended)
    assert child.exit_status == -9, child.log_tail()


async def make_world(open_database: OpenDatabase, postgres_url: str, nats_url: str, directory: Path) -> LinkWorld:
    """Both services' tables in a fresh database."""
    sender_db = await open_database(SENDER, postgres_url)
    receiver_db = await open_database(RECEIVER, postgres_url)
    await create_tables(sender_db, receiver_db)
    return LinkWorld(
        sender_db=sender_db,
        receiver_db=receiver_db,
        postgres_url=postgres_url,
        nats_url=nats_url,
        directory=directory,
    )


@asynccontextmanager
async def running(*loops: Any) -> AsyncIterator[None]:
    """Sender.run() and Receiver.run() and the like, until the block ends; what they raise comes out."""
    tasks = [asyncio.ensure_future(loop) for loop in loops]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
