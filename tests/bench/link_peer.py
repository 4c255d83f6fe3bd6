"""A service reduced to its links: it sends frames to the scheduler as intake does, and takes what fires as digest does.

It stores nothing, so that on a small machine it takes little from what is measured. What it leaves out is the sender's
outbox and the receiver's tables; a figure that needs them runs the real service. Frames are packed as intake packs them
for calls of 500 schedules. Times of arrival are JetStream's own: when the frame was stored for its receiver.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Self

from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2

from libs.ids import new_id
from libs.jetstream import Bus, Message
from libs.links.frames import Addressed, OutgoingFrame, all_subjects, pack, stream_name
from libs.settings import NatsSettings
from libs.sharding import shard_of
from libs.wire import to_timestamp
from tests.bench.link_sender import LinkSender, until
from tests.bench.stand_in import StandIn

TENANT = "bench"
ENTITIES = 200_000
CALL = 500
"""Schedules per call of intake, whose frames are imitated."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PAYLOAD = '{"order": "2013-000417", "customer": "Ann Example", "amount": "129.00 EUR"}'


@dataclass(frozen=True, slots=True, kw_only=True)
class _Landed:
    """A frame of fired timers, and when JetStream had it (ns since 1970)."""

    at_ns: int
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Firing:
    """One timer that fired, its due time and when its frame was in JetStream, both in ns since 1970."""

    timer_id: bytes
    entity: str
    due_ns: int
    at_ns: int

    @property
    def lateness_s(self) -> float:
        """From due to stored for its receiver; the commit lies between."""
        return (self.at_ns - self.due_ns) / 1e9


class LinkPeer:
    """Both ends of the scheduler's links. `keeps`: whether the frames that land are kept for `firings`."""

    def __init__(self, bus: Bus, *, shards: int, keeps: bool) -> None:
        self._bus = bus
        self._shards = shards
        self._keeps = keeps
        self._sequence = 0
        self._landed: list[_Landed] = []
        self._digest = StandIn(bus, "digest", self._keep)
        self._news = self._digest.news
        self._sender = LinkSender(bus, "intake", self._news)

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, nats_url: str, *, shards: int, keeps: bool = True, stream_replicas: int = 1
    ) -> AsyncIterator[Self]:
        """Listening, until the block ends. `nats_url`: one address or several, comma separated."""
        settings = NatsSettings(url=tuple(nats_url.split(",")), stream_replicas=stream_replicas)
        bus = await Bus.connect(settings, "bench")
        peer = cls(bus, shards=shards, keeps=keeps)
        try:
            await bus.ensure_stream(stream_name("scheduler"), [all_subjects("scheduler")])
            await peer._sender.listen()
            async with peer._digest.running():
                yield peer
        finally:
            await bus.close()

    @property
    def fired(self) -> int:
        """Timers that have landed here."""
        return self._digest.entries

    @property
    def last_at_ns(self) -> int:
        """When the last of them did, ns since 1970."""
        return self._digest.last_at_ns

    # Sending

    def frames(self, count: int, due_at: Callable[[int], datetime]) -> list[OutgoingFrame]:
        """Frames that schedule `count` timers for random entities; `due_at` gives the due time of the nth."""
        entries = (self._entry(due_at(number)) for number in range(count))
        return [frame for call in _calls(entries) for frame in pack("intake", call, {})[0]]

    def publish(self, frames: Sequence[OutgoingFrame]) -> "asyncio.Future[list[None]]":
        """See LinkSender."""
        return self._sender.publish(frames)

    async def send(self, frames: Sequence[OutgoingFrame], *, timeout: timedelta) -> None:
        """See LinkSender."""
        await self._sender.send(frames, timeout=timeout)

    async def until_confirmed(self, *, timeout: timedelta) -> None:
        """See LinkSender."""
        await self._sender.until_confirmed(timeout=timeout)

    def _entry(self, due_at: datetime) -> Addressed:
        self._sequence += 1
        entity = entity_name(random.randrange(ENTITIES))
        schedule = link_pb2.ScheduleTimer(
            id=new_id().bytes,
            entity=entity,
            type="reminder",
            due_time=to_timestamp(due_at),
            accept_time=to_timestamp(datetime.now(UTC)),
            target=link_pb2.TimerTarget(
                notification=timer_pb2.NotificationContent(
                    type="bench/reminder", subscribers=["customer-417"], payload=_PAYLOAD
                )
            ),
        )
        return Addressed(
            receiver="scheduler",
            entry=link_pb2.Entry(tenant=TENANT, sequence=self._sequence, schedule_timer=schedule),
            partition=shard_of(TENANT, entity, self._shards),
        )

    # Receiving

    async def until_fired(self, count: int, *, timeout: timedelta) -> None:
        """Wait until `count` timers have landed here since the start. Raises NotInTime."""
        told = lambda: f"{self.fired:,} of {count:,} timers landed"  # noqa: E731
        await until(lambda: self.fired >= count, self._news, timeout, told)

    def firings(self) -> list[Firing]:
        """Everything that has landed, and forget it."""
        landed, self._landed = self._landed, []
        return [
            Firing(
                timer_id=entry.notification.timer_id,
                entity=entry.notification.entity,
                due_ns=entry.notification.occur_time.ToNanoseconds(),
                at_ns=one.at_ns,
            )
            for one in landed
            for entry in link_pb2.Frame.FromString(one.payload).entries
        ]

    def _keep(self, _frame: link_pb2.Frame, message: Message) -> None:
        if self._keeps:
            self._landed.append(_Landed(at_ns=stored_at_ns(message), payload=message.data))


def entity_name(number: int) -> str:
    """The nth of the entities that all timers are spread over."""
    return f"order/{number}"


def to_ns(at: datetime) -> int:
    """ns since 1970, exact to the microsecond."""
    return (at - _EPOCH) // timedelta(microseconds=1) * 1_000


def _calls(addressed: Iterable[Addressed]) -> Iterator[list[Addressed]]:
    waiting = iter(addressed)
    while call := list(islice(waiting, CALL)):
        yield call


def stored_at_ns(message: Message) -> int:
    """When JetStream had a message, ns since 1970."""
    # $JS.ACK.[<domain>.<account>.]<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<timestamp>.<pending>[.…]
    tokens = message.reply.split(".")
    return int(tokens[7] if len(tokens) == 9 else tokens[9])
