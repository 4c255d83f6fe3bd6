"""How many timers a second: accepted, applied, fired."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta

import grpc
from carillon.intake.v1 import intake_pb2
from carillon.scheduler.v1 import timer_pb2

from libs.wire import to_timestamp
from local.stack import Stack
from tests.bench import peers
from tests.bench.link_peer import CALL, ENTITIES, LinkPeer, entity_name, to_ns
from tests.bench.report import RATIO, Figure, at_least, formatted
from tests.bench.rig import Rig, Spending, Stopwatch, count_timers, query
from tests.bench.stand_in import StandIn

_CALLERS = 8
_LONG = timedelta(minutes=3)
_DAY = timedelta(days=1)
_SCHEDULE = "/carillon.intake.v1.IntakeService/Schedule"


async def accepted(rig: Rig) -> list[Figure]:
    """Timers a second through intake's gRPC API, until they are durable."""
    count = rig.pick(200_000, 30_000)
    async with rig.stack(["intake"]) as stack, StandIn.connect(stack.nats_url, "scheduler"):
        rig.say(f"scheduling {count:,} timers in calls of {CALL}")
        spending = Spending(stack, "intake")
        took_s = await _schedule_all(stack, count)
        spent = spending.told(count)
        [(kept,)] = await query(stack, "SELECT coalesce(sum(entries), 0) FROM intake.outbox")
    alone = Figure(
        figure="schedule accepted",
        value=count / took_s,
        unit="timers/s",
        target=at_least(60_000),
        how=f"{count:,} timers in calls of {CALL} with WAIT_FOR_ACCEPTED, {_CALLERS} callers on one connection, one "
        f"intake; requests serialised beforehand. Each call is answered after its commit. A stand-in takes the "
        f"frames in the scheduler's place and receipts them at once; {kept:,} timers were unconfirmed at the end. "
        f"{spent}",
    )
    async with rig.stack(["intake", "scheduler"]) as stack:
        rig.say(f"scheduling {count:,} timers with the scheduler behind it")
        watch = Stopwatch()
        took_s = await _schedule_all(stack, count)
        async with asyncio.timeout(_LONG.total_seconds()):
            while True:
                if await count_timers(stack) >= count + 2 * CALL:
                    break
                await asyncio.sleep(0.1)
        applied_s = watch.elapsed_s
    return [
        alone,
        Figure(
            figure="schedule accepted while the scheduler applies",
            value=count / took_s,
            unit="timers/s",
            how=f"The same with the real scheduler, which shares the processors: {count:,} timers were in its table "
            f"after {applied_s:.1f} s, {formatted(count / applied_s)} timers/s from the caller to the timer table.",
        ),
    ]


async def applied(rig: Rig) -> list[Figure]:
    """Timers a second from frames into the timer table."""
    count = rig.pick(200_000, 30_000)
    figures = [await _applied(rig, count, rig.shards, at_least(30_000).limit)]
    if rig.shards != 64:
        figures.append(await _applied(rig, count // 2, 64, None))
    return figures


async def _applied(rig: Rig, count: int, shards: int, minimum: float | None) -> Figure:
    async with rig.stack(shards=shards) as stack, LinkPeer.connect(stack.nats_url, shards=shards) as peer:
        await peer.send(peer.frames(4 * CALL, lambda _: datetime.now(UTC) + _DAY), timeout=_LONG)  # Warm.
        before = await count_timers(stack)
        frames = peer.frames(count, lambda _: datetime.now(UTC) + _DAY)
        rig.say(f"sending {count:,} timers in {len(frames):,} frames, {shards} shards")
        spending, watch = Spending(stack, "scheduler"), Stopwatch()
        await peer.send(frames, timeout=_LONG)
        took_s, spent = watch.elapsed_s, spending.told(count)
        _check(await count_timers(stack) - before, count)
    return Figure(
        figure="schedule applied" if minimum else f"schedule applied, {shards} shards",
        value=count / took_s,
        unit="timers/s",
        target=None if minimum is None else at_least(minimum),
        how=f"{count:,} timers in {len(frames):,} frames, as intake packs calls of {CALL} for {shards} shards; from "
        f"the first frame published to JetStream to the receipt of the last, which follows the commit. One scheduler. "
        f"{spent}",
    )


async def herd(rig: Rig) -> list[Figure]:
    """Timers a second when very many are due at the same instant, beside others who do the same."""
    count = rig.pick(100_000, 20_000)
    ours, spent = await _herd(rig, count)
    others = await peers.herds(rig)
    rates = {f"{one.name} {one.version}": one.rate for one in others if one.rate is not None}
    rate = Figure(
        figure="herd: due at one instant",
        value=ours,
        unit="timers/s",
        target=at_least(30_000),
        how=f"{count:,} timers due at one instant, scheduled through the link beforehand; from that instant until "
        f"the last of them is at its receiver, who receipts them. One scheduler, {rig.shards} shards. {spent}",
        peers=rates,
    )
    return [rate, *(_ratio(ours, one) for one in others)]


def _ratio(ours: float, other: peers.Herd) -> Figure:
    minimum = {peers.NATS: 2.0, peers.PROCRASTINATE: 50.0}.get(other.name)
    return Figure(
        figure=f"herd, against {other.name}",
        value=None if other.rate is None else ours / other.rate,
        unit=RATIO,
        target=None if minimum is None else at_least(minimum),
        how=other.how,
        peers={} if other.rate is None else {f"{other.name} {other.version}": other.rate},
    )


async def _herd(rig: Rig, count: int) -> tuple[float, str]:
    async with rig.stack() as stack, LinkPeer.connect(stack.nats_url, shards=rig.shards) as peer:
        due_at = datetime.now(UTC) + timedelta(seconds=8 + count / 5_000)
        await peer.send(peer.frames(count, lambda _: due_at), timeout=_LONG)
        left_s = (due_at - datetime.now(UTC)).total_seconds()
        if left_s < 1:
            raise RuntimeError("scheduling the herd took until it was due; this machine is too slow or too busy")
        rig.say(f"{count:,} timers are due in {left_s:.0f} s")
        spending = Spending(stack, "scheduler")
        await peer.until_fired(count, timeout=timedelta(seconds=left_s) + _LONG)
        spent = spending.told(count)
        took_s = (peer.last_at_ns - to_ns(due_at)) / 1e9
        _check(len({one.timer_id for one in peer.firings()}), count)
        _check(peer.fired, count)
    return count / took_s, spent


async def _schedule_all(stack: Stack, count: int) -> float:
    calls = [_call() for _ in range(count // CALL)]
    async with grpc.aio.insecure_channel(stack.grpc("intake")) as channel:
        schedule: Callable[..., Awaitable[bytes]] = channel.unary_unary(_SCHEDULE)
        answers = [await schedule(_call()) for _ in range(2)]  # Warm.
        waiting = iter(calls)

        async def caller() -> None:
            answers.extend([await schedule(call, timeout=60) for call in waiting])

        watch = Stopwatch()
        await asyncio.gather(*(caller() for _ in range(_CALLERS)))
        took_s = watch.elapsed_s
    results = (one for answer in answers for one in intake_pb2.ScheduleResponse.FromString(answer).results)
    _check(sum(not one.HasField("error") for one in results), count + 2 * CALL)
    return took_s


def _call() -> bytes:
    due_time = to_timestamp(datetime.now(UTC) + _DAY)
    content = timer_pb2.NotificationContent(
        type="bench/reminder", subscribers=["customer-417"], payload='{"order": "2013-000417", "amount": "129.00 EUR"}'
    )
    target = timer_pb2.Target(notification=content)
    schedules: Sequence[intake_pb2.Schedule] = [
        intake_pb2.Schedule(
            entity=entity_name(random.randrange(ENTITIES)), type="reminder", at_time=due_time, target=target
        )
        for _ in range(CALL)
    ]
    return intake_pb2.ScheduleRequest(schedules=schedules, wait_for=intake_pb2.WAIT_FOR_ACCEPTED).SerializeToString()


def _check(found: int, expected: int) -> None:
    if found != expected:
        raise RuntimeError(f"expected {expected:,} timers, found {found:,}")
