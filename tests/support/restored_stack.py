"""A whole stack that is told things, and whose Postgres goes back in time; see tests/chaos/test_restore.py.

Everybody is told by mail, one subscriber each, so that a mailbox's address says what a mail is about.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, LiteralString
from urllib.request import urlopen

import psycopg
from carillon.digest.v1 import digest_pb2 as digest
from carillon.digest.v1.digest_pb2_grpc import DigestServiceStub
from carillon.intake.v1 import intake_pb2 as intake
from carillon.intake.v1.intake_pb2_grpc import IntakeServiceStub
from carillon.scheduler.v1 import timer_pb2 as timer
from nats.aio.client import Client

from libs.links.frames import stream_name
from libs.rpc_client import connect
from libs.wire import to_timestamp
from local.stack import SERVICES, Stack
from tests.support.link_world import until

ALONE, GATHERED, BATCH = "alone", "gathered", "batch"
PATIENCE_S = 60

_UNDONE = """
    SELECT (SELECT count(*) FROM intake.outbox) + (SELECT count(*) FROM scheduler.outbox)
        + (SELECT count(*) FROM digest.outbox) + (SELECT count(*) FROM dispatcher.outbox)
        + (SELECT count(*) FROM digest.digest_window WHERE state = 2) + (SELECT count(*) FROM dispatcher.queue)"""
_GATHERED = """
    SELECT count(*) FROM digest.item JOIN digest.digest_window w ON w.id = window_id AND w.state = 1
    WHERE item.state = 1"""
_DEAD = """
    SELECT reason FROM intake.dead_frame UNION ALL SELECT reason FROM scheduler.dead_frame
    UNION ALL SELECT reason FROM digest.dead_frame UNION ALL SELECT reason FROM dispatcher.dead_frame"""


class RestoredStack:
    """All four services, and what can be done to them."""

    def __init__(self, stack: Stack, directory: Path) -> None:
        self.stack = stack
        self._copy = directory / "backup"
        self._known: set[str] = set()

    @classmethod
    @asynccontextmanager
    async def running(cls, directory: Path, env: Mapping[str, str]) -> AsyncIterator["RestoredStack"]:
        """Started, with a catalog: `ALONE` is told at once, `GATHERED` in a batch's digest."""
        stack = Stack(directory / "stack", env={"CARILLON_SHARDS": "2", **env})
        async with AsyncExitStack() as exits:
            exits.push_async_callback(asyncio.to_thread, stack.stop)
            await asyncio.to_thread(stack.start)
            one = cls(stack, directory)
            await one._put_catalog()
            yield one
            await asyncio.to_thread(stack.raise_if_failed)

    # What callers do

    async def schedule(
        self,
        name: str,
        due_at: datetime,
        *,
        kind: str = ALONE,
        entity: str = "",
        key: str = "",
        waits: bool = True,
    ) -> None:
        """Have `name` told at a time, once the digest of its kind goes out."""
        await self._put_subscriber(name)
        target = timer.Target(notification=_to(name, kind))
        one = intake.Schedule(entity=entity or name, type=kind, at_time=to_timestamp(due_at), target=target)
        request = intake.ScheduleRequest(schedules=[one], idempotency_key=key, wait_for=_waiting(waits))
        async with connect(self.stack.grpc("intake")) as channel:
            answer = await IntakeServiceStub(channel).Schedule(request, timeout=PATIENCE_S)
        assert not answer.results[0].HasField("error"), answer

    async def notify(self, name: str, kind: str = GATHERED) -> None:
        """Tell `name` something now."""
        await self._put_subscriber(name)
        request = intake.NotifyRequest(notifications=[intake.Notification(content=_to(name, kind), entity=name)])
        async with connect(self.stack.grpc("intake")) as channel:
            answer = await IntakeServiceStub(channel).Notify(request, timeout=PATIENCE_S)
        assert answer.is_applied

    async def cancel(self, entity: str, *, waits: bool = True) -> int:
        """Cancel everything of an entity; how many timers it met."""
        request = intake.CancelRequest(
            selector=intake.Selector(entity=intake.EntitySelector(entity=entity)), wait_for=_waiting(waits)
        )
        async with connect(self.stack.grpc("intake")) as channel:
            answer = await IntakeServiceStub(channel).Cancel(request, timeout=PATIENCE_S)
        assert answer.is_applied == waits
        return int(answer.timers)

    async def hasten(self, entity: str) -> int:
        """Have everything of an entity that waits be due now; how many timers."""
        request = intake.RescheduleRequest(
            selector=intake.Selector(entity=intake.EntitySelector(entity=entity)), at_time=to_timestamp(soon(0))
        )
        async with connect(self.stack.grpc("intake")) as channel:
            answer = await IntakeServiceStub(channel).Reschedule(request, timeout=PATIENCE_S)
        assert answer.is_applied
        return int(answer.timers)

    async def trigger(self) -> int:
        """Close the batch's windows; how many."""
        async with connect(self.stack.grpc("intake")) as channel:
            answer = await IntakeServiceStub(channel).TriggerBatch(
                intake.TriggerBatchRequest(batch=BATCH), timeout=PATIENCE_S
            )
        assert answer.is_applied
        return int(answer.windows)

    # What happens to it

    async def back_up(self, *, before: datetime) -> None:
        """Copy Postgres as it is now. The scheduler stands still meanwhile: what is due at `before` fires later."""
        assert self.stack.postgres is not None
        await self.rest()
        self.stack.pause("scheduler")
        assert soon(0) < before, "everything took longer than was foreseen"
        await asyncio.to_thread(self.stack.postgres.back_up, self._copy)
        self.stack.resume("scheduler")

    async def restore(self) -> None:
        """Have Postgres be as it was then, whoever is connected."""
        assert self.stack.postgres is not None
        await asyncio.to_thread(self.stack.postgres.restore, self._copy)

    async def stop_services(self) -> None:
        """kill -9 of all: the machine room is dark."""
        for service in SERVICES:
            await asyncio.to_thread(self.stack.kill, service)

    async def start_services(self) -> None:
        """Have all run again."""
        for service in SERVICES:
            await asyncio.to_thread(self.stack.restart, service)

    # What is seen

    async def rest(self) -> None:
        """Wait until nothing is under way; asserts that nothing was put aside."""

        async def is_at_rest() -> bool:
            return not (await self.rows(_UNDONE))[0][0]

        await until(is_at_rest, timeout_s=PATIENCE_S)
        assert await self.rows(_DEAD) == []

    async def until_told(self, names: Iterable[str], times: int = 1) -> None:
        """Wait until each of them was told so often."""

        async def are_told() -> bool:
            told = await self.told()
            return all(len(told.get(name, ())) >= times for name in names)

        try:
            await until(are_told, timeout_s=PATIENCE_S)
        except TimeoutError:
            raise AssertionError(
                f"{list(names)} were to be told {times} times; this was: {await self.told()}"
            ) from None

    async def until_gathered(self, items: int) -> None:
        """Wait until so many items are in windows that are open."""

        async def are_there() -> bool:
            return bool((await self.rows(_GATHERED))[0][0] == items)

        await until(are_there, timeout_s=PATIENCE_S)

    async def told(self) -> dict[str, list[str]]:
        """Who got mails: their Message-IDs, in order."""

        def look() -> Any:
            with urlopen(f"{self.stack.mailbox_url}/api/mails?limit=1000", timeout=10) as answer:
                return json.loads(answer.read())["mails"]

        told: defaultdict[str, list[str]] = defaultdict(list)
        for mail in await asyncio.to_thread(look):
            told[mail["recipients"][0].partition("@")[0]].append(mail["message_id"])
        return dict(told)

    async def unaccounted(self) -> int:
        """INV-6, by digest's ledger."""
        async with connect(self.stack.grpc("digest")) as channel:
            ledger = await DigestServiceStub(channel).GetLedger(digest.GetLedgerRequest(), timeout=PATIENCE_S)
        return int(ledger.unaccounted)

    async def messages(self, service: str) -> int:
        """How many messages JetStream holds for a service."""
        client = Client()
        await client.connect(self.stack.nats_url)
        try:
            return int((await client.jetstream().stream_info(stream_name(service))).state.messages)
        finally:
            await client.close()

    async def rows(self, statement: LiteralString) -> list[tuple[Any, ...]]:
        """What a statement returns."""
        async with await psycopg.AsyncConnection.connect(self.stack.postgres_url, autocommit=True) as connection:
            return await (await connection.execute(statement)).fetchall()

    # The catalog

    async def _put_catalog(self) -> None:
        cadence = digest.Cadence(id=BATCH, name="Batch", external=digest.ExternalCadence(batch=BATCH))
        async with connect(self.stack.grpc("digest")) as channel:
            stub = DigestServiceStub(channel)
            await stub.PutCadence(digest.PutCadenceRequest(cadence=cadence))
            for kind, cadence_id in ((ALONE, "immediate"), (GATHERED, BATCH)):
                stored = digest.NotificationType(
                    id=kind, name=kind, default_cadence=cadence_id, default_channel=digest.CHANNEL_EMAIL
                )
                await stub.PutNotificationType(digest.PutNotificationTypeRequest(notification_type=stored))

    async def _put_subscriber(self, name: str) -> None:
        if name in self._known:
            return
        self._known.add(name)
        one = digest.Subscriber(id=name, zone="UTC", email=f"{name}@example.com")
        async with connect(self.stack.grpc("digest")) as channel:
            await DigestServiceStub(channel).PutSubscribers(digest.PutSubscribersRequest(subscribers=[one]))

    async def know(self, names: Iterable[str]) -> None:
        """Put subscribers now, so that they are in the backup."""
        for name in names:
            await self._put_subscriber(name)


def soon(seconds: float) -> datetime:
    """So long from now."""
    return datetime.now(UTC) + timedelta(seconds=seconds)


def _to(name: str, kind: str = ALONE) -> timer.NotificationContent:
    return timer.NotificationContent(type=kind, subscribers=[name], payload=json.dumps({"title": name}))


def _waiting(waits: bool) -> intake.WaitFor.ValueType:
    return intake.WAIT_FOR_APPLIED if waits else intake.WAIT_FOR_ACCEPTED
