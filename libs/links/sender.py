"""The sender's half of a link: publishes committed frames, collects receipts, sweeps up what got none.

Use, in this order:

    frames, positions = sender.pack(addressed)
    async with db.transaction() as tx:
        ...                                # the state change
        await sender.insert(tx, frames)    # 1. in the same transaction
    sender.publish(frames)                 # 2. after the commit; never fails, the sweeper makes up for it
    receipts = await sender.wait(frames, timeout)   # only where somebody waits for APPLIED; instead of publish()

Everything here may be lost with the process: what counts is in the `outbox` table.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Protocol, TypeVar
from uuid import UUID

from carillon.link.v1 import link_pb2
from google.protobuf.message import DecodeError
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind

from libs.errors import FailedPrecondition, ResourceExhausted, Unavailable
from libs.lifecycle import heed_cancellation
from libs.links import metrics, outbox
from libs.links.frames import (
    REPLY_HEADER,
    Outgoing,
    OutgoingFrame,
    Position,
    all_subjects,
    destination_of,
    pack,
    receipt_subject,
    stream_name,
    subject_of,
)
from libs.postgres import Database, Transaction
from libs.settings import LinkSettings
from libs.telemetry import traces
from libs.trace_points import carrier_at, point_of

log = logging.getLogger(__name__)

Result = TypeVar("Result")

PUBLISHERS = 32
"""Publications under way at once. One at a time waits a whole fsync of JetStream each; more than this gain nothing."""

_QUEUE_FRAMES = 10_000
_QUEUE_BYTES = 64 << 20
"""What waits to be published in this process; what is above this the sweeper publishes (INV-9)."""

_CONFIRM_FRAMES = 1_000
_GATHER_S = 0.05
"""Frames with receipts are forgotten together, this often at most: nobody waits for it, and each time costs 1.5 ms."""

_STATS_INTERVAL_S = 1.0
_FINISH_S = 2.0
"""How long a stopping process goes on publishing what it has committed, so that nobody waits for another's sweep."""


class Broker(Protocol):
    """What a sender needs of NATS."""

    async def publish(self, subject: str, payload: bytes, *, headers: Mapping[str, str], msg_id: str) -> object: ...
    async def ensure_stream(self, name: str, subjects: Sequence[str]) -> bool: ...
    async def subscribe(self, subject: str, callback: Callable[[bytes], Awaitable[None]]) -> object: ...


class Sender:
    """Sends one service's frames to `receivers`; one per process."""

    def __init__(
        self, *, db: Database, bus: Broker, service: str, replica: str, receivers: Sequence[str], settings: LinkSettings
    ) -> None:
        self._db = db
        self._bus = bus
        self._service = service
        self._receivers = tuple(receivers)
        self._settings = settings
        self._reply_to = receipt_subject(service, replica)
        self._queue: asyncio.Queue[OutgoingFrame] = asyncio.Queue(_QUEUE_FRAMES)
        self._queued_bytes = 0
        self._waiting: dict[UUID, asyncio.Future[link_pb2.Receipt]] = {}
        self._confirmed: set[UUID] = set()
        self._has_confirmed = asyncio.Event()
        self._unconfirmed: dict[str, int] = dict.fromkeys(receivers, 0)
        self._to_republish: set[str] = set()
        metrics.know(receivers=receivers, senders=())

    def pack(
        self, addressed: Iterable[Outgoing], carrier: Mapping[str, str] | None = None
    ) -> tuple[list[OutgoingFrame], list[Position]]:
        """Pack entries into frames that carry a trace, the current one by default; one position per entry, in order."""
        return pack(self._service, addressed, traces.carried() if carrier is None else dict(carrier))

    def check_room(self, receivers: Iterable[str]) -> None:
        """Raise ResourceExhausted when a link holds too much already (INV-9); call before accepting a command."""
        for receiver in receivers:
            if self._unconfirmed[receiver] >= self._settings.max_unconfirmed_frames:
                raise ResourceExhausted(
                    f"the link to {receiver} holds {self._unconfirmed[receiver]} unconfirmed frames; come back later",
                    reason="LINK_BACKLOG_FULL",
                    retry_after=timedelta(seconds=5),
                    metadata={"receiver": receiver},
                )

    async def insert(self, tx: Transaction, frames: Sequence[OutgoingFrame]) -> None:
        """Step 1: write frames in the transaction of the state change they tell of."""
        await outbox.insert_frames(tx, frames, first_sweep=self._settings.republish_after)

    def publish(self, frames: Sequence[OutgoingFrame]) -> None:
        """Step 2, after the commit. When the queue is full the sweeper publishes them later."""
        for frame in frames:
            if self._queue.full() or self._queued_bytes > _QUEUE_BYTES:
                return
            self._queue.put_nowait(frame)
            self._queued_bytes += len(frame.payload)

    async def wait(self, frames: Sequence[OutgoingFrame], timeout: timedelta) -> dict[UUID, link_pb2.Receipt]:
        """Publish and wait for receipts; returns those that came before `timeout` (or the receipt_timeout setting)."""
        expected = self.expect(frames)
        self.publish(frames)
        return await self.collect(expected, timeout)

    def expect(self, frames: Sequence[OutgoingFrame]) -> dict[UUID, asyncio.Future[link_pb2.Receipt]]:
        """The receipts to come within the receipt_timeout setting, for whoever waits; call before `publish`."""
        loop = asyncio.get_running_loop()
        expected: dict[UUID, asyncio.Future[link_pb2.Receipt]] = {frame.id: loop.create_future() for frame in frames}
        self._waiting |= expected
        loop.call_later(self._settings.receipt_timeout.total_seconds(), self._give_up, list(expected))
        return expected

    async def collect(
        self, expected: Mapping[UUID, asyncio.Future[link_pb2.Receipt]], timeout: timedelta
    ) -> dict[UUID, link_pb2.Receipt]:
        """Wait for receipts; returns those that came before `timeout` (or the receipt_timeout setting)."""
        limit = min(timeout, self._settings.receipt_timeout)
        if expected and limit > timedelta(0):
            await asyncio.wait(expected.values(), timeout=limit.total_seconds())
        return {frame_id: future.result() for frame_id, future in expected.items() if future.done()}

    def _give_up(self, frame_ids: Iterable[UUID]) -> None:
        for frame_id in frame_ids:
            self._waiting.pop(frame_id, None)

    async def ensure_streams(self) -> bool:
        """Have the receivers' streams exist; publish everything again where one had vanished or could not be reached.

        Raises Unavailable when NATS or Postgres is away.
        """
        for receiver in self._receivers:
            try:
                is_news = await self._bus.ensure_stream(stream_name(receiver), [all_subjects(receiver)])
            except Unavailable:
                self._to_republish.update(self._receivers)
                raise
            except FailedPrecondition as err:  # Somebody else made it, otherwise. It may do all the same.
                log.error("A stream is not as it should be.", extra={"receiver": receiver, "error": str(err)})
                continue
            if is_news:
                self._to_republish.add(receiver)
            if receiver in self._to_republish:
                async with self._db.transaction() as tx:
                    await outbox.make_all_due(tx, receiver)
                self._to_republish.discard(receiver)
        return True

    async def run(self) -> None:
        """Publish, confirm and sweep until cancelled; then publish what is queued, for a moment."""
        await self._bus.subscribe(self._reply_to, self._on_receipts)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(PUBLISHERS):
                tasks.create_task(self._publish_loop())
            tasks.create_task(self._confirm_loop())
            tasks.create_task(self._sweep_loop())
            tasks.create_task(self._stats_loop())
            try:
                await asyncio.Event().wait()
            finally:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_FINISH_S):
                        await self._queue.join()

    async def _publish_loop(self) -> None:
        while True:
            frame = await self._queue.get()
            self._queued_bytes -= len(frame.payload)
            await self._publish_frame(frame, str(frame.id))
            self._queue.task_done()

    async def _publish_frame(self, frame: OutgoingFrame, msg_id: str) -> None:
        try:
            with traces.doing(_publication(frame, msg_id)) as span:
                await self._bus.publish(
                    subject_of(frame.receiver, frame.partition),
                    frame.payload,
                    headers=frame.headers | carrier_at(traces.point_in(span)) | {REPLY_HEADER: self._reply_to},
                    msg_id=msg_id,
                )
            metrics.to(frame.receiver).published_frames.inc()
        except Unavailable as err:
            metrics.to(frame.receiver).publish_failures.inc()
            log.info(
                "A frame was not published; the sweeper will.", extra={"frame_id": str(frame.id), "error": str(err)}
            )

    async def _on_receipts(self, payload: bytes) -> None:
        try:
            receipts = link_pb2.Receipts.FromString(payload).receipts
        except DecodeError:
            log.warning("Something that is no receipt came in on our receipt subject; ignored.")
            return
        for receipt in receipts:
            frame_id = UUID(bytes=receipt.frame_id)
            future = self._waiting.pop(frame_id, None)
            if future is not None and not future.done():
                future.set_result(receipt)
            self._confirmed.add(frame_id)
            if receipt.verdict == link_pb2.FRAME_VERDICT_DEAD:
                log.error(
                    "A frame was put aside by its receiver.",
                    extra={"frame_id": str(frame_id), "reason": receipt.reason},
                )
        self._has_confirmed.set()

    async def confirm_once(self) -> int:
        """Forget the frames whose receipts have come; returns how many."""
        frame_ids = [self._confirmed.pop() for _ in range(min(len(self._confirmed), _CONFIRM_FRAMES))]
        try:
            async with self._db.transaction() as tx:
                confirmed = await outbox.confirm(tx, frame_ids)
        except BaseException:
            self._confirmed.update(frame_ids)
            raise
        for receiver, frames in confirmed.items():
            metrics.to(receiver).confirmed_frames.inc(frames)
        return len(frame_ids)

    async def sweep_once(self) -> int:
        """Publish frames whose receipt is overdue; returns how many there were, at most `sweep_frames`."""
        async with self._db.transaction() as tx:
            due = await outbox.take_due(
                tx,
                first=self._settings.republish_after,
                longest=self._settings.republish_max,
                limit=self._settings.sweep_frames,
            )
        for start in range(0, len(due), PUBLISHERS):
            await asyncio.gather(*map(self._republish, due[start : start + PUBLISHERS]))
        return len(due)

    async def _republish(self, due: outbox.DueFrame) -> None:
        metrics.to(due.frame.receiver).republished_frames.inc()
        # Under a new message id, or JetStream's duplicate window would swallow it.
        await self._publish_frame(due.frame, f"{due.frame.id}:{due.publishes}")

    async def measure_once(self) -> None:
        """Read the exact backlog of every link into the gauges and `check_room`."""
        async with self._db.read() as tx:
            found = {backlog.receiver: backlog for backlog in await outbox.backlogs(tx)}
        for receiver in {*self._unconfirmed, *found}:  # Our own, too: to it we redrive.
            backlog = found.get(receiver)
            self._unconfirmed[receiver] = backlog.frames if backlog else 0
            metrics.to(receiver).unconfirmed_frames.set(backlog.frames if backlog else 0)
            metrics.to(receiver).oldest_unconfirmed_seconds.set(backlog.oldest_s if backlog else 0)

    async def _confirm_loop(self) -> None:
        while True:
            await self._has_confirmed.wait()
            await asyncio.sleep(_GATHER_S)
            self._has_confirmed.clear()
            while self._confirmed:
                if not await self._attempt("confirm frames", self.confirm_once()):
                    await asyncio.sleep(self._settings.sweep_interval.total_seconds())

    async def _sweep_loop(self) -> None:
        while True:
            await asyncio.sleep(self._settings.sweep_interval.total_seconds())
            if not await self._attempt("ensure the receivers' streams", self.ensure_streams()):
                continue  # Swept now, frames would go nowhere, and wait the longer for their next sweep.
            while await self._attempt("sweep", self.sweep_once()) == self._settings.sweep_frames:
                pass

    async def _stats_loop(self) -> None:
        while True:
            await self._attempt("measure the backlog", self.measure_once())
            await asyncio.sleep(_STATS_INTERVAL_S)

    async def _attempt(self, what: str, work: Coroutine[None, None, Result]) -> Result | None:
        result = None
        try:
            result = await work
        except Unavailable as err:
            log.warning("Could not %s; trying again.", what, extra={"error": str(err)})
        heed_cancellation()
        return result


def _publication(frame: OutgoingFrame, msg_id: str) -> Span:
    """The span of publishing a frame that belongs to one trace; of what belongs to several its work alone is seen."""
    if not (point := point_of(frame.headers)):
        return INVALID_SPAN
    destination = destination_of(frame.receiver)
    return traces.begin(
        f"send {destination}",
        parent=point,
        kind=SpanKind.PRODUCER,
        attributes={
            "messaging.system": "nats",
            "messaging.operation.name": "send",
            "messaging.operation.type": "send",
            "messaging.destination.name": destination,
            "messaging.destination.partition.id": str(frame.partition),
            "messaging.message.id": msg_id,
            "carillon.entries": frame.entries,
        },
    )
