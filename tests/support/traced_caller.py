"""A tenant that calls a stack with traces of its own, and finds what came of them at the collector."""

import secrets
from collections.abc import Callable, Mapping
from typing import Any

import grpc
from carillon.digest.v1 import digest_pb2, digest_pb2_grpc
from carillon.intake.v1 import intake_pb2, intake_pb2_grpc
from carillon.scheduler.v1 import timer_pb2
from google.protobuf.duration_pb2 import Duration

from local.stack import Stack
from tests.e2e.conftest import token_of
from tests.support.link_world import until
from tests.support.otlp import Collector, Seen

TENANT = "shop"
BATCH = "traced-batch"
TO_DIGEST, TO_DISPATCHER, TO_SCHEDULER = (f"carillon.link.{one}" for one in ("digest", "dispatcher", "scheduler"))

# What must be in no span: who is written to, what is said, and what proves who calls.
SECRET_WORDS = ("xanthippe", "hush-hush", "the-token-of", "/hooks/")
ADDRESS, PAYLOAD = "xanthippe@traces.example", '{"said": "hush-hush"}'


class Caller:
    """A tenant that traces its own calls; it keeps their spans to itself."""

    def __init__(self, stack: Stack, collector: Collector, channels: Mapping[str, grpc.aio.Channel]) -> None:
        self.stack, self.collector = stack, collector
        self.intake: Any = intake_pb2_grpc.IntakeServiceStub(channels["intake"])
        self.digest: Any = digest_pb2_grpc.DigestServiceStub(channels["digest"])

    async def call(self, method: Any, request: Any, *, is_sampled: bool = True) -> str:
        """Make a call; returns the id of its trace."""
        trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
        STRANGERS.add((trace_id, span_id))
        metadata = (
            ("authorization", f"Bearer {token_of(TENANT)}"),
            ("traceparent", f"00-{trace_id}-{span_id}-{int(is_sampled):02}"),
        )
        await method(request, metadata=metadata, timeout=30)
        return trace_id

    async def put_subscriber(self, name: str, *, type_id: str, cadence: str = "immediate", hook: str = "") -> None:
        """Somebody who has a type by mail, or by webhook at `hook`."""
        call, stub = self.call, self.digest
        kind = digest_pb2.NotificationType(id=type_id, name=type_id)
        who = digest_pb2.Subscriber(id=name, email=ADDRESS, webhook_url=f"{self.stack.mailbox_url}/hooks/{hook}")
        channel = digest_pb2.CHANNEL_WEBHOOK if hook else digest_pb2.CHANNEL_EMAIL
        choice = digest_pb2.Choice(cadence=cadence, channel=channel)
        wanted = digest_pb2.Subscription(id=name, subscriber=name, type=type_id, choices=[choice])
        await call(stub.PutNotificationType, digest_pb2.PutNotificationTypeRequest(notification_type=kind))
        await call(stub.PutSubscribers, digest_pb2.PutSubscribersRequest(subscribers=[who]))
        await call(stub.PutSubscriptions, digest_pb2.PutSubscriptionsRequest(subscriptions=[wanted]))

    async def notify(self, name: str, *, type_id: str, is_sampled: bool = True) -> str:
        """Tell somebody something; returns the id of the call's trace."""
        one = intake_pb2.Notification(content=_content(type_id, name), entity="account/7")
        request = intake_pb2.NotifyRequest(notifications=[one])
        return await self.call(self.intake.Notify, request, is_sampled=is_sampled)

    async def schedule(self, name: str, *, type_id: str, after: Duration) -> str:
        """Have somebody told later; returns the id of the call's trace."""
        target = timer_pb2.Target(notification=_content(type_id, name))
        schedule = intake_pb2.Schedule(entity="account/7", after=after, target=target)
        return await self.call(self.intake.Schedule, intake_pb2.ScheduleRequest(schedules=[schedule]))

    async def found(self, look: Callable[[], Seen | None]) -> Seen:
        """A span, once it has come."""

        async def looked() -> list[Seen]:
            return [one] if (one := look()) else []

        (one,) = await until(looked, timeout_s=30)
        return one

    async def span(self, trace_id: str, service: str, name: str, **attributes: object) -> Seen:
        """The span of that name in a trace, with these attributes (dots written as __)."""
        wanted = {key.replace("__", "."): value for key, value in attributes.items()}

        def look() -> Seen | None:
            return next(
                (
                    one
                    for one in self.collector.trace(trace_id)
                    if (one.service, one.name) == (f"carillon-{service}", name)
                    and wanted.items() <= one.attributes.items()
                ),
                None,
            )

        return await self.found(look)

    async def linked_to(self, cause: Seen, service: str, name: str) -> Seen:
        """The span that begins a new trace because of another."""

        def look() -> Seen | None:
            return next(
                (
                    one
                    for one in self.collector.all()
                    if (one.service, one.name) == (f"carillon-{service}", name) and cause.point in one.links
                ),
                None,
            )

        return await self.found(look)


STRANGERS: set[tuple[str, str]] = set()


def _content(type_id: str, subscriber: str) -> timer_pb2.NotificationContent:
    return timer_pb2.NotificationContent(type=type_id, subscribers=[subscriber], payload=PAYLOAD)
