"""The receiver's half of a link: takes frames, has them applied exactly once, acks and receipts after the commit.

A service gives an `apply` function: it gets a transaction and frames never seen before, and makes their effects in
that transaction. What it returns says what to tell the sender and what to send on. It may be called again with the same
frames after a rollback, so it must have no effects outside of the transaction.

One bad frame does not hold up the others: when a group fails, each frame is tried alone; a frame that is wrong in
itself, or has failed `MAX_FAILURES` times for a reason nobody foresaw, is put aside (dead_frame) and receipted as dead.
Passing failures (Postgres away, deadlock) hand the frames back and never count against them.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Protocol
from uuid import UUID

from carillon.link.v1 import link_pb2

from libs.errors import InvalidArgument, Unavailable
from libs.ids import derived_id, id_floor, id_time
from libs.links import dead, inbox, metrics
from libs.links.frames import REPLY_HEADER, BadFrame, OutgoingFrame, all_subjects, stream_name
from libs.links.incoming import IncomingFrame, Message, processing
from libs.postgres import Database, Transaction, is_transient
from libs.settings import LinkSettings

__all__ = [
    "ACK_WAIT",
    "MAX_ACK_PENDING",
    "MAX_FAILURES",
    "MAX_GROUP_ENTRIES",
    "MAX_REASON",
    "Admission",
    "Applied",
    "Apply",
    "Broker",
    "EntryResult",
    "IncomingFrame",
    "Message",
    "PoisonFrame",
    "Receipt",
    "Receiver",
    "Settlement",
    "receipts_of",
]

log = logging.getLogger(__name__)

# For those who may not know the stubs.
Receipt = link_pb2.Receipt
EntryResult = link_pb2.EntryResult

MAX_FAILURES = 5
"""Attempts that may fail for a reason nobody foresaw. Counted per process: forgetting only means more attempts."""

ACK_WAIT = timedelta(seconds=30)
MAX_ACK_PENDING = 4_096
MAX_REASON = 2_048
MAX_GROUP_ENTRIES = 8_000
"""Entries applied in one transaction: enough to pay for the commit, few enough to keep it short."""

_HOUSEKEEPING_INTERVAL_S = 60.0
_FORGET_ROWS = 10_000
_COUNTED_FRAMES = 10_000


class PoisonFrame(Exception):
    """Raised by `apply`: this frame can never be applied as it is."""


class Broker(Protocol):
    """What a receiver needs of NATS."""

    async def ensure_stream(self, name: str, subjects: Sequence[str]) -> bool: ...
    async def send(self, subject: str, payload: bytes) -> None: ...
    def consume(
        self, stream: str, *, durable: str, filter_subject: str, batch: int, ack_wait: timedelta, max_ack_pending: int
    ) -> AsyncIterator[Sequence[Message]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What came of applying frames: results per frame (only where there is something to say), and what to send on.

    `on_commit` is called once it is true, to wake whoever works on it; it may be lost with the process.
    """

    results: Mapping[UUID, Sequence[link_pb2.EntryResult]] = field(default_factory=dict)
    outgoing: Sequence[OutgoingFrame] = ()
    on_commit: Callable[[], None] = lambda: None


Apply = Callable[[Transaction, Sequence[IncomingFrame]], Awaitable[Applied]]


class Receiver:
    """Takes one service's frames; several replicas share the work.

    `publish` is called with what `apply` has to send on, after the commit.
    """

    def __init__(
        self,
        *,
        db: Database,
        bus: Broker,
        service: str,
        apply: Apply,
        publish: Callable[[Sequence[OutgoingFrame]], None],
        settings: LinkSettings,
    ) -> None:
        self._db = db
        self._bus = bus
        self._service = service
        self._apply = apply
        self._publish = publish
        self._settings = settings
        self.settlement = Settlement(db=db, bus=bus, service=service, settings=settings)

    async def run(self) -> None:
        """Take and apply frames until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.settlement.run_housekeeping())
            tasks.create_task(self._take())

    async def _take(self) -> None:
        with suppress(Unavailable):  # Declared all the same; the bus makes it once NATS is there.
            await self._bus.ensure_stream(stream_name(self._service), [all_subjects(self._service)])
        consumer = self._bus.consume(
            stream_name(self._service),
            durable=self._service,
            filter_subject=all_subjects(self._service),
            batch=self._settings.fetch_frames,
            ack_wait=ACK_WAIT,
            max_ack_pending=MAX_ACK_PENDING,
        )
        async for messages in consumer:
            try:
                await self.handle(messages)
            except asyncio.CancelledError:
                for message in messages:  # Those that are settled stay settled; the others need not wait for a sweep.
                    await message.nak(timedelta(0))
                raise

    async def handle(self, messages: Sequence[Message]) -> None:
        """Apply what one fetch gave: together where possible, alone where not."""
        frames = await self.settlement.parse(messages)
        if not frames:
            return
        for group in _groups(frames):
            with processing(self._service, group) as work, metrics.APPLY_SECONDS.time():
                group = [replace(one, points=work.points) for one in group] if work.points else group
                error = await self._attempt(group)
                if error is not None:
                    work.fail(error)
                log.debug("Applied frames.", extra={"frames": len(group), "is_applied": error is None})
                if error is not None and not is_transient(error) and len(group) > 1:
                    for one in group:
                        await self._settle_failure([one], await self._attempt([one]))
                else:
                    await self._settle_failure(group, error)

    async def _attempt(self, frames: Sequence[IncomingFrame]) -> Exception | None:
        """Apply frames in one transaction; the error, if that failed and had no effects."""
        try:
            async with self._db.transaction() as tx:
                known = await self.settlement.admit(tx, frames)
                fresh = [one for one in frames if one.id in known.fresh]
                applied = await self._apply(tx, fresh) if fresh else Applied()
                receipts = known.receipts | receipts_of(fresh, applied.results)
                await self.settlement.keep(tx, {i: r for i, r in receipts.items() if i in known.fresh})
        except Exception as err:  # noqa: BLE001 — outermost frame of an attempt: the error decides about its frames.
            return err
        self._publish(applied.outgoing)
        applied.on_commit()
        await self.settlement.settle(frames, receipts, fresh)
        return None

    async def _settle_failure(self, frames: Sequence[IncomingFrame], error: Exception | None) -> None:
        if error is not None:
            await self.settlement.fail(frames, error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """Which frames are new, and the receipts of those that are not."""

    fresh: frozenset[UUID]
    receipts: dict[UUID, link_pb2.Receipt]


class Settlement:
    """What happens to a frame around its application: admission, ack and receipt, handing back, burial.

    Also used by the scheduler's shards, which take frames by partition and apply them in transactions of their own.
    """

    def __init__(self, *, db: Database, bus: Broker, service: str, settings: LinkSettings) -> None:
        self._db = db
        self._bus = bus
        self._service = service
        self._settings = settings
        self._failures: dict[UUID, int] = {}

    async def parse(self, messages: Sequence[Message]) -> list[IncomingFrame]:
        """The frames in messages, each id once; what is no frame is put aside."""
        frames: dict[UUID, IncomingFrame] = {}
        for message in messages:
            try:
                one = IncomingFrame.of(message, receiver=self._service)
            except BadFrame as err:
                await self._bury_garbage(message, str(err))
                continue
            if one.id in frames:
                await message.ack()  # The same frame is in hand already.
                continue
            frames[one.id] = one
        return list(frames.values())

    async def admit(self, tx: Transaction, frames: Sequence[IncomingFrame]) -> Admission:
        """Claim frames in `tx`; those too old to be judged are put aside here."""
        if not frames:
            return Admission(fresh=frozenset(), receipts={})
        fresh = await inbox.admit(tx, [one.id for one in frames])
        receipts = await inbox.kept_receipts(tx, [one.id for one in frames if one.id not in fresh])
        floor = id_floor(min(fresh.values()) - self._settings.inbox_retention) if fresh else None
        too_old = [one for one in frames if floor is not None and one.id in fresh and one.id < floor]
        for one in too_old:
            receipts[one.id] = await self._bury(
                tx,
                one,
                f"older than the inbox remembers ({self._settings.inbox_retention}); it may have been applied before",
            )
        for one in (one for one in frames if one.id in fresh):
            metrics.come_from(one.frame.sender).took(fresh[one.id] - id_time(one.id))
        return Admission(fresh=frozenset(fresh.keys() - {one.id for one in too_old}), receipts=receipts)

    async def keep(self, tx: Transaction, receipts: Mapping[UUID, link_pb2.Receipt]) -> None:
        """Keep the receipts that say something, so that a frame that comes again is answered as the first time."""
        await inbox.keep_results(tx, {i: receipt for i, receipt in receipts.items() if receipt.results})

    async def settle(
        self, frames: Sequence[IncomingFrame], receipts: Mapping[UUID, link_pb2.Receipt], fresh: Sequence[IncomingFrame]
    ) -> None:
        """After the commit: ack JetStream, then send the receipts, grouped by who waits for them."""
        for one in fresh:
            inbound = metrics.come_from(one.frame.sender)
            inbound.applied_frames.inc()
            inbound.applied_entries.inc(len(one.frame.entries))
        fresh_ids = {one.id for one in fresh}
        replies: defaultdict[str, list[link_pb2.Receipt]] = defaultdict(list)
        for one in frames:
            receipt = receipts[one.id]
            self._failures.pop(one.id, None)
            if one.id not in fresh_ids and receipt.verdict == inbox.APPLIED:
                metrics.come_from(one.frame.sender).duplicate_frames.inc()
            await one.message.ack()
            if reply := one.headers.get(REPLY_HEADER):
                replies[reply].append(receipt)
        for reply, group in replies.items():
            await self._bus.send(reply, link_pb2.Receipts(receipts=group).SerializeToString())

    async def fail(self, frames: Sequence[IncomingFrame], error: Exception) -> None:
        """After a rollback: hand frames back, or put aside those that will never do."""
        for one in frames:
            deliveries = one.message.num_delivered
            if not is_transient(error) and (
                isinstance(error, PoisonFrame | InvalidArgument) or self._count_failure(one.id) >= MAX_FAILURES
            ):
                await self._bury_alone(one, error)
                continue
            metrics.come_from(one.frame.sender).deferred_frames.inc()
            log.warning(
                "A frame was not applied and will come again.",
                extra={"frame_id": str(one.id), "deliveries": deliveries, "error": repr(error)},
                exc_info=None if is_transient(error) else error,
            )
            await one.message.nak(min(timedelta(seconds=0.1) * 2 ** min(deliveries, 8), timedelta(seconds=15)))

    async def run_housekeeping(self) -> None:
        """Keep house until cancelled."""
        while True:
            try:
                await self.keep_house_once()
            except Exception:  # Outermost frame of a loop that must go on.
                log.warning("Link housekeeping failed; trying again.", exc_info=True)
            await asyncio.sleep(_HOUSEKEEPING_INTERVAL_S)

    async def keep_house_once(self) -> int:
        """Forget inbox rows past retention, all there are, and count what is dead; returns how many were forgotten."""
        forgotten = 0
        while True:
            async with self._db.transaction() as tx:
                rows = await inbox.forget_old(
                    tx, self._settings.inbox_retention, slack=timedelta(hours=1), limit=_FORGET_ROWS
                )
            forgotten += rows
            if rows < _FORGET_ROWS:
                break
        async with self._db.read() as tx:
            metrics.DEAD_FRAMES_KEPT.set(await dead.count_dead(tx))
        return forgotten

    def _count_failure(self, frame_id: UUID) -> int:
        """One more failure of a frame that nobody foresaw; returns how many there were.

        Not the broker's count of deliveries: that counts Postgres's absences, and begins anew with every copy.
        """
        if len(self._failures) >= _COUNTED_FRAMES and frame_id not in self._failures:
            self._failures.pop(next(iter(self._failures)))
        self._failures[frame_id] = self._failures.get(frame_id, 0) + 1
        return self._failures[frame_id]

    async def _bury_alone(self, one: IncomingFrame, error: Exception) -> None:
        try:
            async with self._db.transaction() as tx:
                if one.id in await inbox.admit(tx, [one.id]):
                    receipt = await self._bury(tx, one, f"{type(error).__name__}: {error}")
                else:
                    receipt = (await inbox.kept_receipts(tx, [one.id]))[one.id]
        except Exception:  # Outermost frame: it comes again and is buried then.
            log.warning("A frame could not be put aside; it will come again.", exc_info=True)
            await one.message.nak(timedelta(seconds=1))
            return
        await self.settle([one], {one.id: receipt}, [])

    async def _bury(self, tx: Transaction, one: IncomingFrame, reason: str) -> link_pb2.Receipt:
        reason = reason[:MAX_REASON]
        receipt = link_pb2.Receipt(frame_id=one.id.bytes, verdict=inbox.DEAD, reason=reason)
        await dead.bury(
            tx,
            one.id,
            sender=one.frame.sender,
            partition=one.frame.partition,
            payload=one.message.data,
            entries=len(one.frame.entries),
            reason=reason,
            deliveries=one.message.num_delivered,
        )
        await inbox.keep_results(tx, {one.id: receipt})
        metrics.come_from(one.frame.sender).dead_frames.inc()
        log.error(
            "A frame was put aside.", extra={"frame_id": str(one.id), "sender": one.frame.sender, "reason": reason}
        )
        return receipt

    async def _bury_garbage(self, message: Message, reason: str) -> None:
        """Put aside what is no frame, under an id derived from its bytes."""
        try:
            async with self._db.transaction() as tx:
                await dead.bury(
                    tx,
                    derived_id("garbage", message.data.hex()),
                    sender="",
                    partition=0,
                    payload=message.data,
                    entries=0,
                    reason=reason[:MAX_REASON],
                    deliveries=message.num_delivered,
                )
        except Exception:  # Outermost frame: it comes again.
            log.warning("Something that is no frame could not be put aside; it will come again.", exc_info=True)
            await message.nak(timedelta(seconds=1))
            return
        metrics.come_from("").dead_frames.inc()
        log.error("Something that is no frame was put aside.", extra={"reason": reason})
        await message.ack()


def _groups(frames: Sequence[IncomingFrame]) -> Iterator[list[IncomingFrame]]:
    """Frames that share a transaction: as many as hold MAX_GROUP_ENTRIES entries together, at least one."""
    group: list[IncomingFrame] = []
    entries = 0
    for one in frames:
        if group and entries + len(one.frame.entries) > MAX_GROUP_ENTRIES:
            yield group
            group, entries = [], 0
        group.append(one)
        entries += len(one.frame.entries)
    if group:
        yield group


def receipts_of(
    fresh: Sequence[IncomingFrame], results: Mapping[UUID, Sequence[link_pb2.EntryResult]]
) -> dict[UUID, link_pb2.Receipt]:
    """One APPLIED receipt per frame, with its results."""
    return {
        one.id: link_pb2.Receipt(frame_id=one.id.bytes, verdict=inbox.APPLIED, results=results.get(one.id, ()))
        for one in fresh
    }
