"""A whole stack with two replicas of each service behind a name, under a steady load, to be restarted one by one.

Timers fire at even distances as events; callers call all four services through gRPC's own balancing, without any
repetition of their own. What comes of it is exact: every call, every event, every mail.
"""

import asyncio
import itertools
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self
from urllib.request import urlopen

import grpc
from carillon.digest.v1 import digest_pb2 as digest
from carillon.digest.v1.digest_pb2_grpc import DigestServiceStub
from carillon.dispatcher.v1 import dispatcher_pb2 as dispatcher
from carillon.dispatcher.v1.dispatcher_pb2_grpc import DispatcherServiceStub
from carillon.intake.v1 import intake_pb2 as intake
from carillon.intake.v1.intake_pb2_grpc import IntakeServiceStub
from carillon.scheduler.v1 import scheduler_pb2 as scheduler
from carillon.scheduler.v1 import timer_pb2 as timer
from carillon.scheduler.v1.scheduler_pb2_grpc import SchedulerServiceStub

from libs.jetstream import Bus, Message
from libs.rpc_client import connect
from libs.settings import NatsSettings
from libs.wire import to_timestamp
from local.stack import SERVICES, Stack
from tests.bench.link_peer import stored_at_ns
from tests.bench.rig import query, until_held
from tests.support.link_world import until

SHARDS = 8
_CALL = 500
_CALLS_PER_S = 10
_SUBSCRIBER = "ann"
_PATIENCE_S = 60
_LOOK_S = 0.25  # Each look at a process' metrics costs it 20 ms, in which it does nothing else.
_METRIC = re.compile(r"^(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


@dataclass(slots=True, kw_only=True)
class Seen:
    """What came of the load. `late_s`: of each event, from due to stored; `taken_s`: until one has its share again."""

    calls: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    late_s: dict[str, float] = field(default_factory=dict)
    repeated: int = 0
    taken_s: dict[str, float] = field(default_factory=dict)


class RollingLoad:
    """The stack and its load."""

    def __init__(self, stack: Stack, bus: Bus, *, rate: int) -> None:
        self.stack = stack
        self.seen = Seen()
        self._bus = bus
        self._rate = rate
        self._due: list[datetime] = []
        self._channels = {name: connect(self._address(name), is_many=True) for name in SERVICES}
        self._is_over = False
        self._loops: list[asyncio.Task[None]] = []

    @classmethod
    @asynccontextmanager
    async def running(cls, directory: Path, *, rate: int, seconds: int) -> AsyncIterator[Self]:
        """Under load: `rate` timers a second are due for so many seconds from now."""
        env = {"CARILLON_SHARDS": str(SHARDS), "CARILLON_GRPC_DRAIN_DELAY": "1s"}
        stack = Stack(directory, replicas=2, env=env)
        async with AsyncExitStack() as exits:
            exits.push_async_callback(asyncio.to_thread, stack.stop)
            await asyncio.to_thread(stack.start)
            bus = await Bus.connect(NatsSettings(url=(stack.nats_url,)), "rolling")
            exits.push_async_callback(bus.close)
            one = cls(stack, bus, rate=rate)
            for channel in one._channels.values():
                await exits.enter_async_context(channel)
            await one._begin(seconds)
            exits.push_async_callback(one._end)
            yield one
            await asyncio.to_thread(stack.raise_if_failed)

    def _address(self, service: str) -> str:
        return "ipv4:" + ",".join(self.stack.grpc(service, number) for number in range(2))

    async def _begin(self, seconds: int) -> None:
        kind = digest.NotificationType(
            id="order", name="Order", default_cadence="immediate", default_channel=digest.CHANNEL_EMAIL
        )
        stub = DigestServiceStub(self._channels["digest"])
        await stub.PutNotificationType(digest.PutNotificationTypeRequest(notification_type=kind))
        ann = digest.Subscriber(id=_SUBSCRIBER, zone="UTC", email="ann@example.com")
        await stub.PutSubscribers(digest.PutSubscribersRequest(subscribers=[ann]))
        await until_held(self.stack, replicas=2, shards=SHARDS)
        await self._schedule(seconds)
        self._loops.append(asyncio.create_task(self._take_events()))
        self._loops += [asyncio.create_task(self._call(name, call)) for name, call in self._kinds_of_calls().items()]

    async def _schedule(self, seconds: int) -> None:
        count = self._rate * seconds
        first = datetime.now(UTC) + timedelta(seconds=2 + count / 3_000)
        self._due = [first + number * timedelta(seconds=1) / self._rate for number in range(count)]
        target = timer.Target(event=timer.EventContent(type="tick"))
        stub = IntakeServiceStub(self._channels["intake"])
        for start in range(0, count, _CALL):
            some = [
                intake.Schedule(entity=f"order/{start + n}", at_time=to_timestamp(at), target=target)
                for n, at in enumerate(self._due[start : start + _CALL])
            ]
            answer = await stub.Schedule(intake.ScheduleRequest(schedules=some), timeout=_PATIENCE_S)
            assert answer.is_applied

    @property
    def ends_at(self) -> datetime:
        """When the last timer is due."""
        return self._due[-1]

    # The load

    def _kinds_of_calls(self) -> dict[str, Callable[[int], Awaitable[Any]]]:
        notify = IntakeServiceStub(self._channels["intake"]).Notify
        content = timer.NotificationContent(type="order", subscribers=[_SUBSCRIBER], payload="{}")
        shards = SchedulerServiceStub(self._channels["scheduler"]).ListShards
        types = DigestServiceStub(self._channels["digest"]).ListNotificationTypes
        letters = DispatcherServiceStub(self._channels["dispatcher"]).CountDeadLetters
        told = intake.NotifyRequest(notifications=[intake.Notification(content=content)])
        return {
            "intake": lambda _: notify(told, timeout=_PATIENCE_S),
            "scheduler": lambda _: shards(scheduler.ListShardsRequest(), timeout=_PATIENCE_S),
            "digest": lambda _: types(digest.ListNotificationTypesRequest(), timeout=_PATIENCE_S),
            "dispatcher": lambda _: letters(dispatcher.CountDeadLettersRequest(), timeout=_PATIENCE_S),
        }

    async def _call(self, name: str, call: Callable[[int], Awaitable[Any]]) -> None:
        """At an even rate, whatever the calls before take."""
        under_way: set[asyncio.Task[None]] = set()
        for number in itertools.count():
            if self._is_over:
                break
            task = asyncio.create_task(self._call_once(name, call, number))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            await asyncio.sleep(1 / _CALLS_PER_S)
        if under_way:
            await asyncio.wait(under_way)

    async def _call_once(self, name: str, call: Callable[[int], Awaitable[Any]], number: int) -> None:
        try:
            await call(number)
            self.seen.calls[name] += 1
        except grpc.aio.AioRpcError as error:
            at = datetime.now(UTC).isoformat(timespec="milliseconds")
            self.seen.failed.append(f"{at} {name}: {error.code().name} {error.details()}")

    async def _take_events(self) -> None:
        consumer = self._bus.consume(
            "EVENTS",
            durable="rolling",
            filter_subject="carillon.events.>",
            batch=256,
            ack_wait=timedelta(seconds=30),
            max_ack_pending=4_096,
        )
        async for messages in consumer:
            for message in messages:
                self._take_event(message)
                await message.ack()

    def _take_event(self, message: Message) -> None:
        event = json.loads(message.data)
        due_ns = datetime.fromisoformat(event["time"]).timestamp() * 1e9
        self.seen.repeated += event["id"] in self.seen.late_s
        self.seen.late_s.setdefault(event["id"], (stored_at_ns(message) - due_ns) / 1e9)

    # What is done to it

    async def restart(self, service: str, number: int) -> None:
        """SIGTERM, start again, and wait until it has its share: of the calls, and of the shards."""
        assert await asyncio.to_thread(self.stack.terminate, service, number) == 0
        await asyncio.to_thread(self.stack.restart, service, number)
        began_s = asyncio.get_running_loop().time()

        async def is_called() -> bool:
            return await asyncio.to_thread(self._is_called, service, number)

        await until(is_called, timeout_s=_PATIENCE_S, every_s=_LOOK_S)
        if service == "scheduler":
            await until_held(self.stack, replicas=2, shards=SHARDS)
        self.seen.taken_s[f"{service} {number}"] = asyncio.get_running_loop().time() - began_s

    def _is_called(self, service: str, number: int) -> bool:
        with suppress(OSError), urlopen(f"{self.stack.http(service, number)}/metrics", timeout=5) as answer:
            found = _METRIC.findall(answer.read().decode())
            return any("rpc" in name and name.endswith("_count") and float(value) > 5 for name, value in found)
        return False

    async def finish(self) -> None:
        """Let the last timer fire and everything come to an end; raises TimeoutError when it does not."""
        await asyncio.sleep(max(0.0, (self.ends_at - datetime.now(UTC)).total_seconds()))

        async def have_fired() -> bool:
            return len(self.seen.late_s) == len(self._due)

        await until(have_fired, timeout_s=_PATIENCE_S)
        self._is_over = True
        await asyncio.gather(*self._loops[1:])
        await until(self._is_all_sent, timeout_s=_PATIENCE_S)

    async def _is_all_sent(self) -> bool:
        """At least what was answered: a call that failed may have been taken all the same."""
        rows = await query(self.stack, "SELECT count(*) FROM digest.delivery WHERE outcome = 'sent'")
        return int(rows[0][0]) >= self.seen.calls["intake"]

    async def _end(self) -> None:
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)


async def restart_all(load: RollingLoad) -> None:
    """Every process, one after the other; the scheduler's first, while timers are sure to fire."""
    for service in ("scheduler", *(name for name in SERVICES if name != "scheduler")):
        for number in range(2):
            await load.restart(service, number)
