"""How many items a second intake makes durable, in calls of 500."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta

import grpc
from carillon.intake.v1 import intake_pb2
from carillon.scheduler.v1 import timer_pb2

from libs.wire import to_timestamp
from local.stack import Stack
from tests.bench.link_peer import CALL, ENTITIES, entity_name
from tests.bench.report import Figure, at_least
from tests.bench.rig import Rig, Spending, Stopwatch, query
from tests.bench.stand_in import StandIn

_CALLERS = 8
_SERVICE = "/carillon.intake.v1.IntakeService"
_ASKED = 60_000


async def notify(rig: Rig) -> list[Figure]:
    """Notifications a second through the gRPC API, until they are durable."""
    return [await _measured(rig, "Notify", _notify_call, "notifications")]


async def schedule(rig: Rig) -> list[Figure]:
    """Timers a second through the gRPC API, until they are durable."""
    return [await _measured(rig, "Schedule", _schedule_call, "timers")]


async def _measured(rig: Rig, method: str, make: Callable[[], bytes], noun: str) -> Figure:
    count = rig.pick(400_000, 60_000)
    async with AsyncExitStack() as exits:
        stack = await exits.enter_async_context(rig.stack(["intake"]))
        for receiver in ("scheduler", "digest"):
            await exits.enter_async_context(StandIn.connect(stack.nats_url, receiver))
        calls = [make() for _ in range(count // CALL)]
        rig.say(f"{count:,} {noun} in calls of {CALL}")
        spending = Spending(stack, "intake")
        took_s = await call_all(stack, method, calls)
        spent = spending.told(count, noun.removesuffix("s"))
        [(kept,)] = await query(stack, "SELECT coalesce(sum(entries), 0) FROM intake.outbox")
    return Figure(
        figure=f"{method} in calls of {CALL}, durable",
        value=count / took_s,
        unit=f"{noun}/s",
        target=at_least(_ASKED),
        how=f"{count:,} {noun} in calls of {CALL} with WAIT_FOR_ACCEPTED, {_CALLERS} callers on one connection, one "
        f"intake, {rig.shards} shards; requests serialised beforehand. Each call is answered after its commit. "
        f"Stand-ins take the frames in the receivers' place and receipt them at once; {kept:,} {noun} were "
        f"unconfirmed at the end. {spent}",
    )


async def call_all(stack: Stack, method: str, calls: Sequence[bytes]) -> float:
    """Seconds for all calls, after two that warm up. Raises RuntimeError unless every item is accepted."""
    async with grpc.aio.insecure_channel(stack.grpc("intake")) as channel:
        call: Callable[..., Awaitable[bytes]] = channel.unary_unary(f"{_SERVICE}/{method}")
        for one in calls[:2]:
            await call(one, timeout=60)
        waiting, answers = iter(calls), list[bytes]()

        async def caller() -> None:
            answers.extend([await call(one, timeout=60) for one in waiting])

        watch = Stopwatch()
        await asyncio.gather(*(caller() for _ in range(_CALLERS)))
        took_s = watch.elapsed_s
    read = intake_pb2.NotifyResponse.FromString  # The same fields as the other methods' answers.
    accepted = sum(not one.HasField("error") for answer in answers for one in read(answer).results)
    if accepted != len(calls) * CALL:
        raise RuntimeError(f"expected {len(calls) * CALL:,} items to be accepted, found {accepted:,}")
    return took_s


def _notify_call() -> bytes:
    notifications = [
        intake_pb2.Notification(content=_content("flight.delayed"), entity=entity_name(random.randrange(ENTITIES)))
        for _ in range(CALL)
    ]
    return intake_pb2.NotifyRequest(
        notifications=notifications, wait_for=intake_pb2.WAIT_FOR_ACCEPTED
    ).SerializeToString()


def _schedule_call() -> bytes:
    due_time = to_timestamp(datetime.now(UTC) + timedelta(days=1))
    target = timer_pb2.Target(notification=_content("bench/reminder"))
    schedules = [
        intake_pb2.Schedule(
            entity=entity_name(random.randrange(ENTITIES)), type="reminder", at_time=due_time, target=target
        )
        for _ in range(CALL)
    ]
    return intake_pb2.ScheduleRequest(schedules=schedules, wait_for=intake_pb2.WAIT_FOR_ACCEPTED).SerializeToString()


def _content(kind: str) -> timer_pb2.NotificationContent:
    return timer_pb2.NotificationContent(
        type=kind, subscribers=["customer-417"], payload='{"order": "2013-000417", "amount": "129.00 EUR"}'
    )
