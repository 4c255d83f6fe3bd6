"""INV-1, INV-6 and INV-7 on real processes: windows that are all due at once, and accidents while they close.

2,000 windows, unless CARILLON_TEST_WINDOWS says otherwise. An accident must strike in the middle, however fast the
machine: a table is locked, so every process that closes windows stops within its transaction, at a place chosen here;
then one is killed or paused, and the lock let go.
"""

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from carillon.digest.v1 import digest_pb2, digest_pb2_grpc
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2
from psycopg import sql

from libs.ids import new_id
from libs.test_clock import let_test_clock_run
from libs.wire import to_timestamp
from local.stack import Stack
from tests.support.keeping_dispatcher import KeepingDispatcher
from tests.support.link_world import until

WINDOWS = int(os.environ.get("CARILLON_TEST_WINDOWS", "2000"))
BATCH = 10
"""Windows closed in one transaction: few, so that there is always much left to close."""
START = datetime(2026, 3, 2, 12, tzinfo=UTC)
DUE = datetime(2026, 3, 3, 8, tzinfo=UTC)
JUMP = 1_000_000.0
PATIENCE_S = 60
TENANT = "acme"

_ENV = {
    "CARILLON_DIGEST_RENDER_WINDOWS": str(BATCH),
    "CARILLON_DIGEST_RENDER_WORKERS": "1",
    "CARILLON_LINK_REPUBLISH_AFTER": "1s",
    # A locked table is waited for as long as the test keeps it, so nobody is between two tries when it strikes.
    "CARILLON_POSTGRES_LOCK_TIMEOUT": "0s",
    "CARILLON_POSTGRES_STATEMENT_TIMEOUT": "0s",
    # What a paused process holds, it holds for so long.
    "CARILLON_POSTGRES_IDLE_IN_TRANSACTION_TIMEOUT": "3s",
}
_OPEN, _CLOSED = 1, 3
_STUCK = """
    SELECT count(*) FROM pg_stat_activity JOIN pg_locks USING (pid)
    WHERE relation = %s::regclass AND NOT granted AND query ~ %s"""
_STANDING_STILL = """
    SELECT count(*) FROM pg_stat_activity
    WHERE application_name = 'carillon-digest' AND state = 'idle in transaction' AND query LIKE %s
    AND state_change < clock_timestamp() - interval '1 s'"""
# In one snapshot: a frame that has come and is not confirmed counts at its sender.
_UNDER_WAY = f"""
    SELECT (SELECT count(*) FROM digest.digest_window WHERE state <> {_CLOSED}),
        (SELECT count(*) FROM digest.delivery WHERE outcome = 'pending'), (SELECT count(*) FROM scheduler.outbox),
        (SELECT count(*) FROM digest.outbox), (SELECT count(*) FROM dispatcher.outbox)"""
_DEAD = """
    SELECT frame_id, reason FROM scheduler.dead_frame UNION ALL SELECT frame_id, reason FROM digest.dead_frame
    UNION ALL SELECT frame_id, reason FROM dispatcher.dead_frame"""


class Herd:
    """All that is looked at and done while the windows close."""

    def __init__(
        self, *, stack: Stack, dispatcher: KeepingDispatcher, conn: psycopg.AsyncConnection[tuple[Any, ...]]
    ) -> None:
        self.stack, self.dispatcher, self._conn = stack, dispatcher, conn
        self.expected: Counter[tuple[str, str]] = Counter()

    @classmethod
    @asynccontextmanager
    async def gathered(cls, directory: Path) -> AsyncIterator["Herd"]:
        """Two replicas of digest, a scheduler, and windows that wait for the same moment."""
        services = {"scheduler": 1, "digest": 2}
        stack = Stack(directory, services=list(services), replicas=services, test_clock=START, env=_ENV)
        async with AsyncExitStack() as exits:
            exits.push_async_callback(asyncio.to_thread, stack.stop)
            await asyncio.to_thread(stack.start)
            dispatcher = await exits.enter_async_context(
                KeepingDispatcher.connect(url=stack.postgres_url, nats_url=stack.nats_url)
            )
            conn = await exits.enter_async_context(
                await psycopg.AsyncConnection.connect(stack.postgres_url, autocommit=True)
            )
            herd = cls(stack=stack, dispatcher=dispatcher, conn=conn)
            await herd._put_catalog()
            await dispatcher.tell(herd._notifications(), timeout=timedelta(seconds=PATIENCE_S))
            await until(herd._waits_for_its_moment, timeout_s=PATIENCE_S)
            yield herd

    async def let_the_moment_come(self) -> None:
        """Business time passes the moment at which all windows are due."""
        await let_test_clock_run(self._conn, until=DUE + timedelta(minutes=1), rate=JUMP)

    async def closed(self) -> int:
        """How many windows are closed."""
        return await self._count("SELECT count(*) FROM digest.digest_window WHERE state = %s", _CLOSED)

    async def until_closed(self, at_least: int) -> int:
        """Wait until so many windows are closed; how many are."""

        async def are_closed() -> int:
            closed = await self.closed()
            return closed if closed >= at_least else 0

        return await until(are_closed, timeout_s=PATIENCE_S)

    async def until_all_are_closing(self) -> None:
        """Wait until digest has heard of every window's timer."""

        async def are_closing() -> bool:
            return not await self._count("SELECT count(*) FROM digest.digest_window WHERE state = %s", _OPEN)

        await until(are_closing, timeout_s=PATIENCE_S)

    @asynccontextmanager
    async def locked(self, table: str) -> AsyncIterator[None]:
        """Nobody writes to the table until the block ends."""
        async with await psycopg.AsyncConnection.connect(self.stack.postgres_url) as conn:
            await conn.execute(sql.SQL("LOCK TABLE {} IN SHARE MODE").format(sql.Identifier(*table.split("."))))
            yield
            await conn.rollback()

    async def until_stuck(self, table: str, processes: int) -> None:
        """Wait until so many stand before a locked table, each within the transaction that closes windows."""

        async def are_stuck() -> bool:
            writes = rf'^\s*(INSERT INTO|COPY) "?{table.partition(".")[2]}"? '
            return await self._count(_STUCK, table, writes) == processes

        await until(are_stuck, timeout_s=PATIENCE_S)

    async def until_one_stands_still(self, statement: str) -> None:
        """Wait until one has been doing nothing for a second, since a statement in a transaction that is still open."""

        async def stands_still() -> bool:
            return await self._count(_STANDING_STILL, f"%{statement}%") == 1

        await until(stands_still, timeout_s=PATIENCE_S)

    async def unsettled(self) -> list[str]:
        """Wait until nothing is under way, so that nothing can come any more; otherwise says what still is."""
        now: tuple[int, ...] = ()

        async def is_quiet() -> bool:
            nonlocal now
            now = (await (await self._conn.execute(_UNDER_WAY)).fetchall())[0]
            return not any(now)

        try:
            await until(is_quiet, timeout_s=PATIENCE_S)
        except TimeoutError:
            return [f"(windows, deliveries, frames of scheduler, digest, dispatcher) under way: {now}"]
        return []

    async def differences(self) -> list[str]:
        """How what was told, and what digest says of it, differ from what must be; dead frames too."""
        told = await self.dispatcher.told()
        ledger = await self._ledger()
        figures = {
            "deliveries": (len(told.deliveries), WINDOWS),
            "deliveries that came again": (told.deliveries.total() - len(told.deliveries), 0),
            "digests": (len(told.digests), WINDOWS),
            "items missing": ((self.expected - told.items).total(), 0),
            "items too many": ((told.items - self.expected).total(), 0),
            "notifications in the ledger": (ledger.notifications, len(self.expected)),
            "items in the ledger": (
                [(one.state, one.items) for one in ledger.items],
                [(digest_pb2.ITEM_STATE_DIGESTED, len(self.expected))],
            ),
            "digests in the ledger": (
                [(one.outcome, one.digests, one.items, one.deliveries) for one in ledger.digests],
                [("sent", WINDOWS, len(self.expected), WINDOWS)],
            ),
            "unaccounted": (ledger.unaccounted, 0),
            "dead frames": (await (await self._conn.execute(_DEAD)).fetchall(), []),
        }
        return [f"{what}: {found}, not {wanted}" for what, (found, wanted) in figures.items() if found != wanted]

    async def _ledger(self) -> digest_pb2.GetLedgerResponse:
        async with self._calling() as stub:
            answer: digest_pb2.GetLedgerResponse = await stub.GetLedger(
                digest_pb2.GetLedgerRequest(), metadata=_METADATA
            )
            return answer

    @asynccontextmanager
    async def _calling(self) -> AsyncIterator[Any]:
        async with grpc.aio.insecure_channel(self.stack.grpc("digest")) as channel:
            yield digest_pb2_grpc.DigestServiceStub(channel)

    async def _put_catalog(self) -> None:
        daily = digest_pb2.Cadence(id="daily", aligned=digest_pb2.AlignedCadence(cron="0 8 * * *"))
        choice = digest_pb2.Choice(cadence="daily", channel=digest_pb2.CHANNEL_WEBHOOK, format=digest_pb2.FORMAT_JSON)
        kind = digest_pb2.NotificationType(id="order", name="Order")
        people = [digest_pb2.Subscriber(id=name, zone="UTC", webhook_url="https://example.com/") for name in _names()]
        wishes = [
            digest_pb2.Subscription(id=name, subscriber=name, type="order", choices=[choice]) for name in _names()
        ]
        async with self._calling() as stub:
            await stub.PutCadence(digest_pb2.PutCadenceRequest(cadence=daily), metadata=_METADATA)
            await stub.PutNotificationType(
                digest_pb2.PutNotificationTypeRequest(notification_type=kind), metadata=_METADATA
            )
            for first in range(0, WINDOWS, 1_000):
                some = slice(first, first + 1_000)
                await stub.PutSubscribers(
                    digest_pb2.PutSubscribersRequest(subscribers=people[some]), metadata=_METADATA
                )
                await stub.PutSubscriptions(
                    digest_pb2.PutSubscriptionsRequest(subscriptions=wishes[some]), metadata=_METADATA
                )

    def _notifications(self) -> Iterator[link_pb2.Entry]:
        """Three to seven for each subscriber."""
        for number, name in enumerate(_names()):
            for item in range(3 + number % 5):
                one_id = new_id()
                self.expected[name, str(one_id)] += 1
                content = timer_pb2.NotificationContent(
                    type="order", subscribers=[name], payload=json.dumps({"title": f"Item {item} of {name}"})
                )
                told = link_pb2.Notification(
                    id=one_id.bytes, content=content, entity=f"order/{number}", occur_time=to_timestamp(START)
                )
                yield link_pb2.Entry(tenant=TENANT, sequence=1, notification=told)

    async def _waits_for_its_moment(self) -> bool:
        """Every window is open, and the scheduler has confirmed its timer."""
        is_open = await self._count("SELECT count(*) FROM digest.digest_window WHERE state = %s", _OPEN)
        return is_open == WINDOWS and not await self._count("SELECT count(*) FROM digest.outbox")

    async def _count(self, statement: Any, *parameters: object) -> int:
        rows = await (await self._conn.execute(statement, parameters or None)).fetchall()
        return int(rows[0][0])


_METADATA = (("carillon-tenant", TENANT),)


def _names() -> list[str]:
    return [f"customer-{number}" for number in range(WINDOWS)]


@pytest.mark.timeout(600)
async def test_every_item_is_told_once_whatever_happens_while_windows_close(tmp_path: Path) -> None:
    """One replica killed, one paused in the middle of closing, JetStream's store deleted with frames in it: exact."""
    async with Herd.gathered(tmp_path / "stack") as herd:
        stack, nats = herd.stack, herd.stack.nats
        assert nats is not None
        async with herd.locked("digest.outbox"):
            await herd.let_the_moment_come()
            await herd.until_all_are_closing()
        async with herd.locked("dispatcher.received"):  # So frames stay in JetStream until its store is deleted.
            await herd.until_closed(WINDOWS // 10)
            async with herd.locked("digest.outbox"):
                # Both have marked items and closed windows, and are about to hand them over.
                await herd.until_stuck("digest.outbox", 2)
                await asyncio.to_thread(stack.kill, "digest", 0)
                await asyncio.to_thread(nats.kill)
                closed = await herd.closed()
            await herd.until_closed(closed + BATCH)  # With nobody to carry what they say.
        async with herd.locked("digest.digest"):
            assert await herd.closed() < WINDOWS
            await asyncio.to_thread(nats.wipe)
            await asyncio.to_thread(stack.restart, "digest", 0)
            await herd.until_stuck("digest.digest", 2)
            await asyncio.to_thread(stack.pause, "digest", 1)
            assert await herd.closed() < WINDOWS
        await herd.until_one_stands_still("INSERT INTO digest ")
        await herd.until_closed(WINDOWS)  # Those that the paused one holds too: Postgres ends its session.
        await asyncio.to_thread(stack.resume, "digest", 1)
        wrong = [*await herd.unsettled(), *await herd.differences()]
        await asyncio.to_thread(stack.raise_if_failed)
        if wrong:
            pytest.fail("\n".join(["Otherwise than it must be:", *wrong]))
