"""Digest's three neighbours reduced to their links: intake tells it what happened, the scheduler wakes its windows, the
dispatcher takes what it has rendered.

They store nothing, so that on a small machine they take little from what is measured. Frames are packed as intake packs
them for calls of 500 notifications. The catalog is put through digest's own API. Windows close when a benchmark
says so, by the timers that digest has asked for: their time is half a day ahead, so none closes by itself.
"""

import json
import random
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Self

import grpc
from carillon.digest.v1 import digest_pb2, digest_pb2_grpc
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2

from libs.ids import new_id
from libs.jetstream import Bus, Message
from libs.links.frames import Addressed, OutgoingFrame, all_subjects, pack, stream_name
from libs.settings import NatsSettings
from libs.wire import to_timestamp
from local.stack import Stack
from tests.bench.link_sender import LinkSender, until
from tests.bench.stand_in import StandIn

TENANT = "bench"
CALL = 500
"""Notifications per call of intake, whose frames are imitated."""
TYPES = ("order-created", "order-paid", "order-shipped")

_PUT = 1_000
_METADATA = (("carillon-tenant", TENANT),)


@dataclass(slots=True)
class DigestPeer:
    """Everything around one digest service."""

    stack: Stack
    sender: LinkSender
    scheduler: StandIn
    dispatcher: StandIn
    timers: list[link_pb2.CloseWindow] = field(default_factory=list)
    """What digest wants to be told, as the scheduler would."""
    sequence: int = 0

    @classmethod
    @asynccontextmanager
    async def connect(cls, stack: Stack) -> AsyncIterator[Self]:
        """Listening, until the block ends."""
        timers: list[link_pb2.CloseWindow] = []

        def keep(frame: link_pb2.Frame, _message: Message) -> None:
            timers.extend(entry.schedule_timer.target.close_window for entry in frame.entries)

        async with AsyncExitStack() as exits:
            bus = await Bus.connect(NatsSettings(url=(stack.nats_url,)), "bench")
            exits.push_async_callback(bus.close)
            scheduler, dispatcher = StandIn(bus, "scheduler", keep), StandIn(bus, "dispatcher")
            sender = LinkSender(bus, "intake", scheduler.news)
            await bus.ensure_stream(stream_name("digest"), [all_subjects("digest")])
            await sender.listen()
            await exits.enter_async_context(scheduler.running())
            await exits.enter_async_context(dispatcher.running())
            yield cls(stack=stack, sender=sender, scheduler=scheduler, dispatcher=dispatcher, timers=timers)

    # The catalog

    async def put_catalog(self, subscribers: int, *, topic: str = "") -> None:
        """Types, a daily cadence, and subscribers who are told of all types once a day by email."""
        hour = (datetime.now(UTC).hour + 12) % 24
        daily = digest_pb2.Cadence(
            id="daily", name="Daily summary", aligned=digest_pb2.AlignedCadence(cron=f"0 {hour} * * *")
        )
        choice = digest_pb2.Choice(cadence="daily", channel=digest_pb2.CHANNEL_EMAIL)
        async with grpc.aio.insecure_channel(self.stack.grpc("digest")) as channel:
            stub = digest_pb2_grpc.DigestServiceStub(channel)
            await stub.PutCadence(digest_pb2.PutCadenceRequest(cadence=daily), metadata=_METADATA)
            for one in TYPES:
                kind = digest_pb2.NotificationType(id=f"bench/{one}", name=one.replace("-", " ").capitalize())
                await stub.PutNotificationType(
                    digest_pb2.PutNotificationTypeRequest(notification_type=kind), metadata=_METADATA
                )
            for first in range(0, subscribers, _PUT):
                numbers = range(first, min(first + _PUT, subscribers))
                people = [digest_pb2.Subscriber(id=name(n), email=f"{name(n)}@example.com") for n in numbers]
                await stub.PutSubscribers(digest_pb2.PutSubscribersRequest(subscribers=people), metadata=_METADATA)
                wanted = [
                    digest_pb2.Subscription(
                        id=f"of-{name(n)}", subscriber=name(n), type="bench/*", topic=topic, choices=[choice]
                    )
                    for n in numbers
                ]
                await stub.PutSubscriptions(
                    digest_pb2.PutSubscriptionsRequest(subscriptions=wanted), metadata=_METADATA
                )

    # Intake

    def notifications(self, subscribers: Iterable[str]) -> list[OutgoingFrame]:
        """Frames of one notification for each of `subscribers`."""
        entries = (self._notification(subscribers=[one]) for one in subscribers)
        return [frame for call in _calls(entries) for frame in pack("intake", call, {})[0]]

    def topical(self, topic: str) -> list[OutgoingFrame]:
        """One frame with one notification to a topic."""
        return pack("intake", [self._notification(topics=[topic])], {})[0]

    def _notification(self, *, subscribers: Sequence[str] = (), topics: Sequence[str] = ()) -> Addressed:
        self.sequence += 1
        number = random.randrange(1_000_000)
        content = timer_pb2.NotificationContent(
            type=f"bench/{TYPES[number % len(TYPES)]}", payload=payload(number), subscribers=subscribers, topics=topics
        )
        notification = link_pb2.Notification(
            id=new_id().bytes,
            content=content,
            entity=f"order/{number}",
            occur_time=to_timestamp(datetime.now(UTC)),
        )
        return Addressed(
            receiver="digest", entry=link_pb2.Entry(tenant=TENANT, sequence=self.sequence, notification=notification)
        )

    # The scheduler

    async def until_timers(self, count: int, *, timeout: timedelta) -> None:
        """Wait until digest has asked for so many timers since the start. Raises NotInTime."""
        told = lambda: f"{len(self.timers):,} of {count:,} timers asked for"  # noqa: E731
        await until(lambda: len(self.timers) >= count, self.scheduler.news, timeout, told)

    def wake(self) -> list[OutgoingFrame]:
        """Frames as the scheduler sends when all those timers fire."""
        entries = (
            Addressed(receiver="digest", entry=link_pb2.Entry(tenant=TENANT, close_window=one)) for one in self.timers
        )
        return [frame for call in _calls(entries) for frame in pack("intake", call, {})[0]]

    # The dispatcher

    async def until_delivered(self, count: int, *, timeout: timedelta) -> None:
        """Wait until so many deliveries have landed at the dispatcher since the start. Raises NotInTime."""
        told = lambda: f"{self.dispatcher.entries:,} of {count:,} deliveries landed"  # noqa: E731
        await until(lambda: self.dispatcher.entries >= count, self.dispatcher.news, timeout, told)


def name(number: int) -> str:
    """The nth subscriber."""
    return f"customer-{number}"


def payload(number: int) -> str:
    """A payload as business services send them."""
    amount = f"{number % 50_000 / 100:.2f} EUR"
    return json.dumps({"title": f"Order 2013-{number:06}", "customer": "Ann Example", "amount": amount, "items": 3})


def _calls(addressed: Iterable[Addressed]) -> Iterator[list[Addressed]]:
    waiting = iter(addressed)
    while call := list(islice(waiting, CALL)):
        yield call
