"""The dispatcher's ends of its links: deliveries and retries come in, outcomes and retry timers go out.

Nothing here knows SQL: what comes in is turned into nouns and handed to the store within the receiver's transaction.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Protocol
from uuid import UUID

from carillon.link.v1 import link_pb2

from libs.clock import Clock
from libs.ids import derived_id
from libs.links.frames import Addressed, OutgoingFrame
from libs.links.receiver import Applied, IncomingFrame, PoisonFrame
from libs.links.sender import Sender
from libs.postgres import Transaction
from libs.sharding import shard_of
from libs.trace_points import NOWHERE, Point
from libs.wire import from_timestamp, to_timestamp
from services.dispatcher import metrics
from services.dispatcher.delivery import TOLD, Delivery, Priority, State
from services.dispatcher.pipeline import Settlement

RETRY_TYPE = "carillon/retry_delivery"

_PRIORITIES = {int(priority): priority for priority in Priority}


class Deliveries(Protocol):
    """What the stream needs of the store."""

    async def add(self, tx: Transaction, deliveries: Sequence[Delivery], *, now: datetime) -> set[tuple[str, UUID]]: ...
    async def make_due(self, tx: Transaction, retries: Mapping[tuple[str, UUID], Point]) -> int: ...


class Sequences(Protocol):
    """Where the sequence of a command comes from."""

    async def next_sequence(self, tx: Transaction) -> int: ...


class Stream:
    """Applies what other services send."""

    def __init__(self, *, deliveries: Deliveries, clock: Clock, on_work: Callable[[], None]) -> None:
        """`on_work` is called after a commit that may have brought something to send."""
        self._deliveries = deliveries
        self._clock = clock
        self._on_work = on_work

    async def apply(self, tx: Transaction, frames: Sequence[IncomingFrame]) -> Applied:
        """See libs.links.receiver.Apply. Nothing to answer, nothing to send on."""
        deliveries: dict[tuple[str, UUID], Delivery] = {}
        retries: dict[tuple[str, UUID], Point] = {}
        for entry, trace in _traced(frames):
            match entry.WhichOneof("kind"):
                case "delivery":
                    delivery = _delivery(entry.tenant, entry.delivery, trace)
                    deliveries.setdefault(delivery.key, delivery)
                case "retry_delivery":
                    retries[entry.tenant, _id(entry.retry_delivery.delivery_id, "delivery_id")] = trace
                case kind:
                    raise PoisonFrame(f"the dispatcher does not know entries of kind {kind}")
        new = await self._deliveries.add(tx, list(deliveries.values()), now=self._clock.now())
        await self._deliveries.make_due(tx, retries)

        def on_commit() -> None:
            for key in new:
                metrics.accepted_of(metrics.channel_label(deliveries[key].channel)).inc()
            self._on_work()

        return Applied(on_commit=on_commit)


class Outcomes:
    """Tells digest what came of deliveries, and asks the scheduler for the next attempts."""

    def __init__(self, *, sender: Sender, sequences: Sequences, shards: int) -> None:
        self._sender = sender
        self._sequences = sequences
        self._shards = shards

    async def insert(self, tx: Transaction, settlements: Sequence[Settlement]) -> Sequence[OutgoingFrame]:
        """Write the frames in the transaction that settles; publish them after its commit."""
        retries = [one for one in settlements if one.state is State.RETRYING]
        told = [one for one in settlements if one.state in TOLD]
        if not retries and not told:
            return []
        sequence = await self._sequences.next_sequence(tx) if retries else 0
        entries = [*map(_outcome, told), *self._timers(retries, sequence)]
        frames, _ = self._sender.pack(entries)
        await self._sender.insert(tx, frames)
        return frames

    def publish(self, frames: Sequence[OutgoingFrame]) -> None:
        """After the commit."""
        self._sender.publish(frames)

    def _timers(self, retries: Iterable[Settlement], sequence: int) -> Iterable[Addressed]:
        for one in retries:
            assert one.retry_at is not None
            entity = retry_entity(one.delivery_id)
            timer = link_pb2.ScheduleTimer(
                id=retry_timer_id(one.delivery_id, one.number).bytes,
                entity=entity,
                type=RETRY_TYPE,
                due_time=to_timestamp(one.retry_at),
                target=link_pb2.TimerTarget(retry_delivery=link_pb2.RetryDelivery(delivery_id=one.delivery_id.bytes)),
                accept_time=to_timestamp(one.at),
            )
            yield Addressed(
                receiver="scheduler",
                partition=shard_of(one.tenant, entity, self._shards),
                entry=link_pb2.Entry(tenant=one.tenant, sequence=sequence, schedule_timer=timer),
                trace=one.trace,
            )


def retry_entity(delivery_id: UUID) -> str:
    """The reserved entity that a delivery's retry timers belong to."""
    return f"carillon:delivery:{delivery_id}"


def retry_timer_id(delivery_id: UUID, attempt: int) -> UUID:
    """The timer after this attempt; the same however often it is asked for."""
    return derived_id("retry-timer", delivery_id, attempt)


def _outcome(one: Settlement) -> Addressed:
    outcome = link_pb2.DeliveryOutcome(
        delivery_id=one.delivery_id.bytes,
        digest_id=one.digest_id.bytes,
        outcome=one.state.name.lower(),
        reason=one.reason.value,
        end_time=to_timestamp(one.at),
    )
    entry = link_pb2.Entry(tenant=one.tenant, delivery_outcome=outcome)
    return Addressed(receiver="digest", entry=entry, trace=one.trace)


def _traced(frames: Sequence[IncomingFrame]) -> Iterator[tuple[link_pb2.Entry, Point]]:
    """Entries, each with what caused it."""
    for frame in frames:
        is_traced = frame.is_traced
        for entry in frame.frame.entries:
            yield entry, frame.trace_of(entry) if is_traced else NOWHERE


def _delivery(tenant: str, message: link_pb2.Delivery, trace: Point) -> Delivery:
    return Delivery(
        tenant=tenant,
        id=_id(message.id, "id"),
        digest_id=_id(message.digest_id, "digest_id"),
        subscriber=_text(message.subscriber),
        channel=_text(message.channel),
        address=message.address.replace("\x00", "\ufffd"),
        subject=_text(message.subject),
        html=_text(message.html),
        text=_text(message.text),
        json=_text(message.json),
        expires_at=from_timestamp(message.expire_time) if message.HasField("expire_time") else None,
        # Unspecified is normal, and so is what only a newer sender knows.
        priority=_PRIORITIES.get(message.priority, Priority.NORMAL),
        list_id=_text(message.list_id),
        trace=trace,
    )


def _text(text: str) -> str:
    """Postgres stores every character but one."""
    return text.replace("\x00", "")


def _id(value: bytes, field: str) -> UUID:
    try:
        return UUID(bytes=value)
    except ValueError:
        raise PoisonFrame(f"a delivery's {field} has {len(value)} bytes instead of 16") from None
