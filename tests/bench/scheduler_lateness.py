"""How soon: firing under a steady load, and cancelling."""

import asyncio
import random
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import grpc
from carillon.intake.v1 import intake_pb2, intake_pb2_grpc
from carillon.scheduler.v1 import timer_pb2

from libs.wire import to_timestamp
from tests.bench.link_peer import LinkPeer, to_ns
from tests.bench.pending import far_ahead, preload
from tests.bench.report import Figure, at_most
from tests.bench.rig import Rig, percentile

_RATE = 1_000
_TICK = timedelta(milliseconds=100)
_AHEAD = timedelta(seconds=5)
_WARM = timedelta(seconds=5)
_CANCEL_RATE = 200
_CANCEL_WARM_S = 2
_CALL = 500


async def steady(rig: Rig) -> list[Figure]:
    """Lateness while 1,000 timers a second come and go, with millions waiting."""
    pending, seconds = rig.pick(2_000_000, 100_000), rig.pick(60, 15)
    async with rig.stack() as stack, LinkPeer.connect(stack.nats_url, shards=rig.shards) as peer:
        await preload(stack, peer, [far_ahead(pending)], shards=rig.shards, say=rig.say)
        rig.say(f"{_RATE:,} timers a second for {seconds} s")
        began_at = datetime.now(UTC)
        count = await _feed(peer, began_at, seconds)
        await peer.until_confirmed(timeout=timedelta(seconds=30))
        await peer.until_fired(count, timeout=timedelta(seconds=30))
        from_ns = to_ns(began_at + _AHEAD + _WARM)
        late_ms = [one.lateness_s * 1000 for one in peer.firings() if one.due_ns >= from_ns]
    how = (
        f"{_RATE:,} timers/s arrive in frames every {_TICK / timedelta(milliseconds=1):.0f} ms, due {_AHEAD.seconds} s "
        f"later at even distances, and fire, for {seconds} s, while {pending:,} wait. From due to in JetStream for the "
        f"receiver, so the commit and one publication. {len(late_ms):,} timers after {_WARM.seconds} s of warming up; "
        f"the latest {max(late_ms):.0f} ms."
    )
    return [
        Figure(figure=f"steady, lateness {name}", value=value, unit="ms", target=at_most(limit), how=how)
        for name, value, limit in (("p50", percentile(late_ms, 0.5), 15), ("p99", percentile(late_ms, 0.99), 100))
    ]


async def _feed(peer: LinkPeer, began_at: datetime, seconds: int) -> int:
    """Send a tick's timers every tick; returns how many in all."""
    per_tick = round(_RATE * _TICK.total_seconds())
    ticks = round(seconds / _TICK.total_seconds())
    under_way: set[asyncio.Future[list[None]]] = set()
    for tick in range(ticks):
        tick_at = began_at + tick * _TICK
        await asyncio.sleep(max(0.0, (tick_at - datetime.now(UTC)).total_seconds()))
        first_at = tick_at + _AHEAD
        sending = peer.publish(peer.frames(per_tick, lambda n, first=first_at: first + n * _TICK / per_tick))  # type: ignore[misc]
        under_way.add(sending)
        sending.add_done_callback(under_way.discard)
    await asyncio.gather(*under_way)
    return per_tick * ticks


async def cancel(rig: Rig) -> list[Figure]:
    """Round trip of Cancel by entity through intake, until scheduler and digest have applied it."""
    seconds = rig.pick(30, 8)
    async with rig.stack(["intake", "scheduler", "digest"]) as stack:
        entities = [f"order/{number}" for number in range(_CANCEL_RATE * (seconds + _CANCEL_WARM_S))]
        random.shuffle(entities)
        async with grpc.aio.insecure_channel(stack.grpc("intake")) as channel:
            stub = intake_pb2_grpc.IntakeServiceStub(channel)
            rig.say(f"scheduling {len(entities):,} timers, then cancelling {_CANCEL_RATE} entities a second")
            await _schedule(stub, entities)
            took_ms = await _cancel_all(stub, entities)
    return [
        Figure(
            figure=f"cancel by entity, round trip {name} at {_CANCEL_RATE}/s",
            value=percentile(took_ms, share),
            unit="ms",
            target=None if limit is None else at_most(limit),
            how=f"{len(took_ms):,} entities with one waiting timer each, cancelled at even distances with "
            f"WAIT_FOR_APPLIED: intake, scheduler and digest are real and have all committed when the answer comes. "
            f"From when the call was to be made, whether or not the one before has been answered. "
            f"The longest took {max(took_ms):.0f} ms.",
        )
        for name, share, limit in (("p50", 0.5, None), ("p99", 0.99, 50))
    ]


async def _schedule(stub: "intake_pb2_grpc.IntakeServiceAsyncStub", entities: Sequence[str]) -> None:
    at_time = to_timestamp(datetime.now(UTC) + timedelta(days=1))
    content = timer_pb2.NotificationContent(type="bench/reminder", subscribers=["customer-417"], payload="{}")
    for first in range(0, len(entities), _CALL):
        schedules = [
            intake_pb2.Schedule(entity=entity, at_time=at_time, target=timer_pb2.Target(notification=content))
            for entity in entities[first : first + _CALL]
        ]
        request = intake_pb2.ScheduleRequest(schedules=schedules, wait_for=intake_pb2.WAIT_FOR_APPLIED)
        answer = await stub.Schedule(request, timeout=60)
        if not answer.is_applied:
            raise RuntimeError("a schedule was not applied within its time")


async def _cancel_all(stub: "intake_pb2_grpc.IntakeServiceAsyncStub", entities: Sequence[str]) -> list[float]:
    """Milliseconds per call, without those of warming up."""
    began_s = time.perf_counter() + 0.1

    async def one(number: int, entity: str) -> float:
        due_s = began_s + number / _CANCEL_RATE
        await asyncio.sleep(due_s - time.perf_counter())
        selector = intake_pb2.Selector(entity=intake_pb2.EntitySelector(entity=entity))
        request = intake_pb2.CancelRequest(selector=selector, cause="bench", wait_for=intake_pb2.WAIT_FOR_APPLIED)
        answer = await stub.Cancel(request, timeout=30)
        if not answer.is_applied or answer.timers != 1:
            raise RuntimeError(f"a cancel changed {answer.timers} timers (applied: {answer.is_applied}), not 1")
        return (time.perf_counter() - due_s) * 1000

    took_ms = await asyncio.gather(*(one(number, entity) for number, entity in enumerate(entities)))
    return took_ms[_CANCEL_RATE * _CANCEL_WARM_S :]
