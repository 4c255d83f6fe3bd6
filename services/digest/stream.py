"""The digest service on its links: frames in, timers and deliveries out.

Within one fetch notifications come first, then cancels, then what closes windows: so a cancel or a trigger hits all
that came with it. Order between a cancel and what it cancels is decided by their sequences, not by their places.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol
from uuid import UUID

from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2

from libs.clock import Clock
from libs.ids import id_of
from libs.links.frames import Addressed, Encoded, OutgoingFrame
from libs.links.receiver import Applied, IncomingFrame, PoisonFrame
from libs.links.sender import Sender
from libs.postgres import Transaction
from libs.sharding import shard_of
from libs.trace_points import NOWHERE, Point
from libs.wire import from_timestamp, to_timestamp
from services.digest import metrics
from services.digest.boundaries import Boundaries
from services.digest.catalog import Priority
from services.digest.commands import (
    Cancel,
    Cancelled,
    Close,
    Expanded,
    Notification,
    Outcome,
    Trigger,
    Triggered,
    WindowTimer,
    Woken,
)
from services.digest.payload_schemas import PayloadSchemas
from services.digest.rendering_jobs import Message
from services.digest.stream_stencil import Stencil

Place = tuple[UUID, int]
"""A frame's id and an entry's index in it."""

_PRIORITIES = {int(priority): priority for priority in Priority}


class ExpansionStore(Protocol):
    """See store_expansion."""

    async def expand(
        self,
        tx: Transaction,
        notifications: Sequence[Notification],
        *,
        now: datetime,
        boundaries: Boundaries,
        schemas: PayloadSchemas,
        is_group: bool,
    ) -> Expanded: ...


class WindowStore(Protocol):
    """See store_windows."""

    async def lock_entities(
        self, tx: Transaction, notifications: Sequence[Notification], cancels: Sequence[Cancel]
    ) -> None: ...
    async def cancel(self, tx: Transaction, cancels: Sequence[Cancel], *, now: datetime) -> list[Cancelled]: ...
    async def close(self, tx: Transaction, closes: Sequence[Close]) -> Woken: ...
    async def trigger(self, tx: Transaction, run: Trigger, *, now: datetime) -> Triggered: ...
    async def record_outcomes(self, tx: Transaction, outcomes: Sequence[Outcome]) -> None: ...
    async def next_sequence(self, tx: Transaction) -> int: ...


@dataclass(slots=True)
class _Work:
    """The entries of one fetch, by what they ask for; those that are answered with their places."""

    is_group: bool
    """Whether they came in several frames."""
    notifications: list[Notification] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    """Of the notifications, in the same order."""
    cancels: list[tuple[Place, Cancel]] = field(default_factory=list)
    closes: list[Close] = field(default_factory=list)
    triggers: list[tuple[Place, Trigger]] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def may_close(self) -> bool:
        """Whether it may leave windows that are closing; what is sent alone has one of its own."""
        return bool(self.notifications or self.closes or self.triggers)


class Inlet:
    """Applies the frames that come to digest."""

    def __init__(
        self,
        *,
        expansion: ExpansionStore,
        windows: WindowStore,
        timers: "Timers",
        boundaries: Boundaries,
        clock: Clock,
        ring: Callable[[], None],
    ) -> None:
        self._expansion, self._windows, self._timers = expansion, windows, timers
        self._boundaries, self._clock, self._ring = boundaries, clock, ring
        self._schemas = PayloadSchemas()

    async def apply(self, tx: Transaction, frames: Sequence[IncomingFrame]) -> Applied:
        """See libs.links.receiver.Apply."""
        work = _Work(is_group=len(frames) > 1)
        for frame in frames:
            is_traced = frame.is_traced
            for index, entry in enumerate(frame.frame.entries):
                _sort(work, (frame.id, index), entry, frame.trace_of(entry) if is_traced else NOWHERE)
        now = self._clock.now()
        results: defaultdict[UUID, list[link_pb2.EntryResult]] = defaultdict(list)
        outgoing = await self._notify_and_cancel(tx, work, now, results)
        outgoing = [*outgoing, *await self._close(tx, work, now, results)]
        if work.outcomes:
            await self._windows.record_outcomes(tx, work.outcomes)
            for one in work.outcomes:
                metrics.OUTCOMES.labels(one.outcome).inc()
        return Applied(results=results, outgoing=outgoing, on_commit=self._ring if work.may_close else _nothing)

    async def _notify_and_cancel(
        self, tx: Transaction, work: _Work, now: datetime, results: dict[UUID, list[link_pb2.EntryResult]]
    ) -> Sequence[OutgoingFrame]:
        cancels = [cancel for _, cancel in work.cancels]
        await self._windows.lock_entities(tx, work.notifications, cancels)
        outgoing: Sequence[OutgoingFrame] = ()
        if work.notifications:
            expanded = await self._expansion.expand(
                tx,
                work.notifications,
                now=now,
                boundaries=self._boundaries,
                schemas=self._schemas,
                is_group=work.is_group,
            )
            outgoing = await self._timers.schedule(tx, expanded.timers, now=now)
            self._count(expanded)
            if expanded.refused:
                _tell_refused(work, expanded.refused, results)
        if cancels:
            hits = await self._windows.cancel(tx, cancels, now=now)
            for ((frame_id, index), _), hit in zip(work.cancels, hits, strict=True):
                metrics.items_of("cancelled", "").inc(hit.items)
                results[frame_id].append(
                    link_pb2.EntryResult(index=index, changed=hit.items, already_left=hit.already_left)
                )
        return outgoing

    async def _close(
        self, tx: Transaction, work: _Work, now: datetime, results: dict[UUID, list[link_pb2.EntryResult]]
    ) -> list[OutgoingFrame]:
        again: Sequence[WindowTimer] = ()
        if work.closes:
            woken = await self._windows.close(tx, work.closes)
            metrics.BATCH_WINDOWS.labels(metrics.FALLBACK).inc(woken.batch_windows)
            again = woken.again
        for (frame_id, index), run in work.triggers:
            triggered = await self._windows.trigger(tx, run, now=now)
            metrics.BATCH_WINDOWS.labels(metrics.TRIGGER).inc(triggered.windows)
            metrics.BATCH_RUNS.labels(metrics.REPEATED if triggered.is_repeated else metrics.NEW).inc()
            results[frame_id].append(
                link_pb2.EntryResult(index=index, changed=triggered.windows, is_repeated=triggered.is_repeated)
            )
        return await self._timers.schedule(tx, again, now=now)

    def _count(self, expanded: Expanded) -> None:
        """Counted before the commit: after a rollback the same notifications are counted again. The ledger is exact."""
        metrics.NOTIFICATIONS.inc(expanded.notifications)
        metrics.WINDOWS_OPENED.inc(len(expanded.timers))
        for verdict, count in expanded.verdicts.items():
            metrics.items_of(verdict.state.name.lower(), verdict.reason).inc(count)


class Timers:
    """Asks the scheduler to wake windows at their due times."""

    def __init__(self, *, sender: Sender, windows: WindowStore, shards: int) -> None:
        self._sender, self._windows, self._shards = sender, windows, shards

    async def schedule(self, tx: Transaction, timers: Sequence[WindowTimer], *, now: datetime) -> list[OutgoingFrame]:
        """Write the frames that ask for `timers` in the transaction that opened their windows."""
        if not timers:
            return []
        sequence = await self._windows.next_sequence(tx)
        frames, _ = self._sender.pack(
            self._addressed(timer, stencil)
            for (tenant, due_at), group in _alike(timers).items()
            for stencil in [Stencil.of(tenant, due_at, sequence=sequence, now=now)]
            for timer in group
        )
        await self._sender.insert(tx, frames)
        return frames

    def _addressed(self, timer: WindowTimer, stencil: Stencil) -> Encoded:
        entity = timer.entity
        body = stencil.filled(timer.id.bytes, entity, timer.window_id.bytes)
        partition = shard_of(timer.tenant, entity, self._shards)
        return Encoded(receiver="scheduler", partition=partition, body=body, trace=timer.trace)

    def publish(self, frames: Sequence[OutgoingFrame]) -> None:
        """After the commit."""
        self._sender.publish(frames)


class Post:
    """Hands messages over to the dispatcher."""

    def __init__(self, *, sender: Sender, windows: WindowStore) -> None:
        self._sender, self._windows = sender, windows

    def check_room(self) -> None:
        """Raise ResourceExhausted while the link holds too much already."""
        self._sender.check_room(["dispatcher"])

    async def hand_over(self, tx: Transaction, messages: Sequence[Message]) -> list[OutgoingFrame]:
        """Write the frames that carry `messages` in the transaction that closed their windows."""
        if not messages:
            return []
        sequence = await self._windows.next_sequence(tx)
        frames, _ = self._sender.pack(
            Addressed(receiver="dispatcher", entry=_delivery_entry(message, sequence), trace=message.trace)
            for message in messages
        )
        await self._sender.insert(tx, frames)
        return frames

    def publish(self, frames: Sequence[OutgoingFrame]) -> None:
        """After the commit."""
        self._sender.publish(frames)


def _tell_refused(
    work: _Work, refused: Mapping[tuple[str, UUID], str], results: dict[UUID, list[link_pb2.EntryResult]]
) -> None:
    for (frame_id, index), one in zip(work.places, work.notifications, strict=True):
        if problem := refused.get((one.tenant, one.id)):
            results[frame_id].append(
                link_pb2.EntryResult(
                    index=index,
                    error_code=code_pb2.INVALID_ARGUMENT,
                    error_reason="PAYLOAD_INVALID",
                    error_message=problem,
                )
            )


def _nothing() -> None:
    """Nothing to wake anybody for."""


# From entries


def _sort(work: _Work, place: Place, entry: link_pb2.Entry, trace: Point) -> None:
    kind = entry.WhichOneof("kind")
    if not entry.tenant:
        raise PoisonFrame(f"entry {place[1]} has no tenant")
    try:
        match kind:
            case "notification":
                work.notifications.append(_notification(entry, trace))
                work.places.append(place)
            case "cancel_items":
                work.cancels.append((place, _cancel(entry)))
            case "close_window":
                work.closes.append(_close_of(entry, trace))
            case "trigger_batch":
                work.triggers.append((place, _trigger(entry, trace)))
            case "delivery_outcome":
                work.outcomes.append(_outcome(entry))
            case _:
                raise PoisonFrame(f"entry {place[1]} is of the kind {kind}, which digest does not know")
    except (ValueError, OverflowError) as err:
        raise PoisonFrame(f"entry {place[1]} ({kind}) is not valid: {err}") from err


def _notification(entry: link_pb2.Entry, trace: Point) -> Notification:
    told = entry.notification
    content = told.content
    return Notification(
        tenant=entry.tenant,
        id=id_of(told.id),
        type=content.type,
        entity=told.entity,
        group_key=content.group_key,
        payload=content.payload,
        subscribers=content.subscribers[:],
        topics=content.topics[:],
        occurred_at=from_timestamp(told.occur_time),
        expires_at=from_timestamp(told.expire_time) if told.HasField("expire_time") else None,
        timer_id=id_of(told.timer_id) if told.timer_id else None,
        schedule_id=id_of(told.schedule_id) if told.schedule_id else None,
        timer_type=told.timer_type,
        timeline=told.timeline,
        sequence=entry.sequence,
        # Unspecified is normal, and so is what only a newer sender knows.
        priority=_PRIORITIES.get(content.priority, Priority.NORMAL),
        trace=trace,
    )


def _cancel(entry: link_pb2.Entry) -> Cancel:
    wanted = entry.cancel_items
    if not wanted.entity:
        raise ValueError("it names no entity")
    return Cancel(
        tenant=entry.tenant,
        entity=wanted.entity,
        type=wanted.type,
        timer_ids=[UUID(bytes=timer_id) for timer_id in wanted.timer_ids],
        timeline=wanted.timeline,
        sequence=entry.sequence,
    )


def _close_of(entry: link_pb2.Entry, trace: Point) -> Close:
    due = entry.close_window
    window_id, due_at = UUID(bytes=due.window_id), from_timestamp(due.due_time)
    return Close(tenant=entry.tenant, window_id=window_id, due_at=due_at, trace=trace)


def _trigger(entry: link_pb2.Entry, trace: Point) -> Trigger:
    run = entry.trigger_batch
    return Trigger(
        tenant=entry.tenant,
        batch=run.batch,
        start_at=from_timestamp(run.window_start_time) if run.HasField("window_start_time") else None,
        end_at=from_timestamp(run.window_end_time),
        trace=trace,
    )


def _outcome(entry: link_pb2.Entry) -> Outcome:
    told = entry.delivery_outcome
    if told.outcome not in ("sent", "dead", "suppressed", "held", "expired"):
        raise ValueError(f"{told.outcome!r} is no outcome")
    return Outcome(
        tenant=entry.tenant,
        digest_id=UUID(bytes=told.digest_id),
        delivery_id=UUID(bytes=told.delivery_id),
        outcome=told.outcome,
        reason=told.reason,
        ended_at=from_timestamp(told.end_time) if told.HasField("end_time") else None,
    )


# To entries


def _alike(timers: Sequence[WindowTimer]) -> dict[tuple[str, datetime], list[WindowTimer]]:
    """Timers by what their entries have in common."""
    groups: defaultdict[tuple[str, datetime], list[WindowTimer]] = defaultdict(list)
    for one in timers:
        groups[one.tenant, one.due_at].append(one)
    return groups


def _delivery_entry(message: Message, sequence: int) -> link_pb2.Entry:
    expire_time: Timestamp | None = to_timestamp(message.expires_at) if message.expires_at else None
    return link_pb2.Entry(
        tenant=message.tenant,
        sequence=sequence,
        delivery=link_pb2.Delivery(
            id=message.delivery_id.bytes,
            digest_id=message.digest_id.bytes,
            subscriber=message.subscriber,
            channel=message.channel,
            address=message.address,
            subject=message.part.subject,
            html=message.part.html,
            text=message.part.text,
            json=message.part.json,
            expire_time=expire_time,
            priority=timer_pb2.Priority.ValueType(message.priority),
            list_id=message.list_id,
        ),
    )
