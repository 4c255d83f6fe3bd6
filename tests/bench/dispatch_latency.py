"""How long from a call until its webhook is received, through all four services, when nothing else goes on."""

import asyncio
import time
from typing import Any

import grpc
from carillon.digest.v1 import digest_pb2, digest_pb2_grpc
from carillon.intake.v1 import intake_pb2, intake_pb2_grpc
from carillon.scheduler.v1 import timer_pb2

from local.stack import Stack
from tests.bench.dispatch_sinks import Sink, http_sink
from tests.bench.dispatch_speed import TENANT
from tests.bench.report import Figure, at_most
from tests.bench.rig import Rig, percentile

_METADATA = (("carillon-tenant", TENANT),)
_TYPE = "bench/order-paid"
_WARM = 30
_PAUSE_S = 0.05
"""Between two calls, so that each finds the system idle; not a divisor of any interval in it."""


async def end_to_end(rig: Rig) -> list[Figure]:
    """Milliseconds from Notify, one at a time, to the webhook."""
    count, sink = rig.pick(500, 100), Sink()
    async with http_sink(sink) as (url,), rig.stack(["intake", "scheduler", "digest", "dispatcher"]) as stack:
        await _subscribe(stack, url)
        rig.say(f"notifying {count} times, one after the other")
        took_ms = []
        async with grpc.aio.insecure_channel(stack.grpc("intake")) as channel:
            stub = intake_pb2_grpc.IntakeServiceStub(channel)
            for n in range(_WARM + count):
                took = await _one(stub, sink, n)
                if n >= _WARM:
                    took_ms.append(took)
                await asyncio.sleep(_PAUSE_S * (1 + n % 7 / 10))
    how = (
        f"{count} calls of Notify with one notification each, one after the other with pauses, to a subscriber who has "
        f"it at once by webhook; from before the call until the request is at its receiver on this machine. All four "
        f"services with default settings, one process each."
    )
    figures = [("p50", 0.5, 30), ("p99", 0.99, 100)]
    return [
        Figure(
            figure=f"Notify to webhook, idle, {name}",
            value=percentile(took_ms, share),
            unit="ms",
            target=at_most(limit),
            how=how,
        )
        for name, share, limit in figures
    ]


async def _one(stub: Any, sink: Sink, number: int) -> float:
    before = len(sink.came_at_ns)
    sink.news.clear()
    told = intake_pb2.Notification(
        content=timer_pb2.NotificationContent(type=_TYPE, subscribers=["ann"], payload='{"title": "Order paid"}'),
        entity=f"order/{number}",
    )
    began_ns = time.time_ns()
    await stub.Notify(
        intake_pb2.NotifyRequest(notifications=[told], wait_for=intake_pb2.WAIT_FOR_ACCEPTED), metadata=_METADATA
    )
    async with asyncio.timeout(30):
        while len(sink.came_at_ns) == before:
            await sink.news.wait()
            sink.news.clear()
    return (list(sink.came_at_ns.values())[-1] - began_ns) / 1e6


async def _subscribe(stack: Stack, url: str) -> None:
    async with grpc.aio.insecure_channel(stack.grpc("digest")) as channel:
        stub = digest_pb2_grpc.DigestServiceStub(channel)
        kind = digest_pb2.NotificationType(id=_TYPE, name="Order paid")
        ann = digest_pb2.Subscriber(id="ann", webhook_url=url)
        choice = digest_pb2.Choice(cadence="immediate", channel=digest_pb2.CHANNEL_WEBHOOK)
        wanted = digest_pb2.Subscription(id="all", subscriber="ann", type=_TYPE, choices=[choice])
        put_type = digest_pb2.PutNotificationTypeRequest(notification_type=kind)
        await stub.PutNotificationType(put_type, metadata=_METADATA)
        await stub.PutSubscribers(digest_pb2.PutSubscribersRequest(subscribers=[ann]), metadata=_METADATA)
        await stub.PutSubscriptions(digest_pb2.PutSubscriptionsRequest(subscriptions=[wanted]), metadata=_METADATA)
