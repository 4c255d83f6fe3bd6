"""Whether two replicas of every service, on the same machine, do as much as one of each."""

import asyncio
import statistics
from contextlib import AsyncExitStack

import grpc
from carillon.digest.v1 import digest_pb2 as digest
from carillon.digest.v1.digest_pb2_grpc import DigestServiceStub
from carillon.intake.v1 import intake_pb2 as intake
from carillon.intake.v1.intake_pb2_grpc import IntakeServiceStub
from carillon.scheduler.v1 import timer_pb2 as timer

from libs.rpc_client import connect
from local.stack import Stack
from tests.bench.machine import cpu_s
from tests.bench.report import Figure, at_least
from tests.bench.rig import Rig, Stopwatch, query
from tests.support.link_world import until

_CALL = 500
_CALLERS = 8
_PEOPLE = 500
_PATIENCE_S = 300


async def replicas(rig: Rig) -> list[Figure]:
    """Notifications a second, from the first call until the last delivery is on record."""
    rounds, count = rig.pick(3, 1), rig.pick(30_000, 10_000)
    rates: dict[int, list[float]] = {1: [], 2: []}
    costs: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for many in (1, 2) if number % 2 == 0 else (2, 1):
            rate, cost_us = await _measured(rig, many, count, f"{number}-{many}")
            rig.say(f"{many} of each: {rate:,.0f} notifications/s, {cost_us:,.0f} µs of processor time each")
            rates[many].append(rate)
            costs[many].append(cost_us)
    one, two = statistics.median(rates[1]), statistics.median(rates[2])
    return [
        Figure(
            figure="two of each service beside one of each",
            value=two / one,
            unit="×",
            target=at_least(1.0),
            how=f"{count:,} notifications in calls of {_CALL}, {_CALLERS} callers, told at once through the channel "
            f"`log`, until the last delivery is on record: {one:,.0f}/s with one of each, {two:,.0f}/s with two, "
            f"median of {rounds} runs in turn. Postgres, NATS, the services and the callers share this machine's "
            "processors: beside other work two processes are given more of these than one.",
        ),
        Figure(
            figure="processor time per notification, two of each beside one",
            value=statistics.median(costs[2]) / statistics.median(costs[1]),
            unit="×",
            how=f"Of all services, Postgres and NATS: {statistics.median(costs[1]):,.0f} µs with one of each, "
            f"{statistics.median(costs[2]):,.0f} µs with two. What sharing costs, whatever else the machine does.",
        ),
    ]


async def _measured(rig: Rig, many: int, count: int, name: str) -> tuple[float, float]:
    stack = Stack(rig.directory / name, replicas=many, env={"CARILLON_SHARDS": str(rig.shards)})
    async with AsyncExitStack() as exits:
        exits.push_async_callback(asyncio.to_thread, stack.stop)
        await asyncio.to_thread(stack.start)
        await _put_catalog(stack)
        addresses = ",".join(stack.grpc("intake", n) for n in range(many))
        channel = await exits.enter_async_context(connect(f"ipv4:{addresses}", is_many=True))
        await _tell(channel, _CALL * _CALLERS)
        await _until_sent(stack, _CALL * _CALLERS)  # Warm by now.
        before_s, watch = _spent_s(stack), Stopwatch()
        await _tell(channel, count)
        await _until_sent(stack, count + _CALL * _CALLERS)
        return count / watch.elapsed_s, (_spent_s(stack) - before_s) / count * 1e6


def _spent_s(stack: Stack) -> float:
    """Processor time of all that serves."""
    pids = [replica.process.pid for replica in stack.replicas.values()]
    assert stack.postgres is not None
    assert stack.nats is not None
    return sum(cpu_s(pid) for pid in (*pids, stack.postgres.pid, stack.nats.pid) if pid is not None)


async def _put_catalog(stack: Stack) -> None:
    kind = digest.NotificationType(
        id="order", name="Order", default_cadence="immediate", default_channel=digest.CHANNEL_LOG
    )
    people = [digest.Subscriber(id=f"p{n}", zone="UTC", email=f"p{n}@example.com") for n in range(_PEOPLE)]
    async with connect(stack.grpc("digest")) as channel:
        stub = DigestServiceStub(channel)
        await stub.PutNotificationType(digest.PutNotificationTypeRequest(notification_type=kind))
        await stub.PutSubscribers(digest.PutSubscribersRequest(subscribers=people))


async def _tell(channel: grpc.aio.Channel, count: int) -> None:
    stub = IntakeServiceStub(channel)
    waiting = iter(range(0, count, _CALL))

    async def caller() -> None:
        for start in waiting:
            some = [
                intake.Notification(
                    content=timer.NotificationContent(
                        type="order", subscribers=[f"p{n % _PEOPLE}"], payload='{"title": "An order"}'
                    )
                )
                for n in range(start, start + _CALL)
            ]
            request = intake.NotifyRequest(notifications=some, wait_for=intake.WAIT_FOR_ACCEPTED)
            await stub.Notify(request, timeout=60)

    await asyncio.gather(*(caller() for _ in range(_CALLERS)))


async def _until_sent(stack: Stack, count: int) -> None:
    async def are_sent() -> bool:
        rows = await query(stack, "SELECT count(*) FROM digest.delivery WHERE outcome = 'sent'")
        return int(rows[0][0]) >= count

    await until(are_sent, timeout_s=_PATIENCE_S)
