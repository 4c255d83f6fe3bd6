"""Publishes the events of fired timers on the stream EVENTS, and sweeps up what JetStream has not acknowledged.

Use, in this order:

    async with db.transaction() as tx:
        ...                               # the firing
        await events.insert(tx, encoded)  # 1. in the same transaction
    events.publish(encoded)               # 2. after the commit; never fails, the sweeper makes up for it

JetStream's acknowledgement deletes the row. As with links, what counts is in the table: everything here may be lost
with the process. Unlike a link, nobody of ours is at the other end; so this is the guarantee:

- Every event is stored in the stream at least once, whatever process, broker or connection dies meanwhile.
- An event whose report does not come by its deadline is published again as the next attempt (the shard does that, not
  this module), so a wiped stream loses no event that expects a report.
- Events that expect no report are as durable as the stream, once acknowledged.
- A consumer may see an event twice, and two events in any order. It tells duplicates by the CloudEvent's id.

While the backlog is full nothing may fire (`check_room`, INV-9): the timers wait in their own table.
"""

import asyncio
import itertools
import logging
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Protocol, TypeVar
from uuid import UUID

from libs.errors import FailedPrecondition, ResourceExhausted, Unavailable
from libs.ids import new_id
from libs.lifecycle import heed_cancellation
from libs.postgres import Database, Transaction
from libs.settings import LinkSettings
from services.scheduler import metrics
from services.scheduler.events import ALL_SUBJECTS, STREAM, EventBacklog, OutgoingEvent
from services.scheduler.settings import SchedulerSettings

log = logging.getLogger(__name__)

Result = TypeVar("Result")

PUBLISHERS = 64
"""Publications under way at once; each waits a whole fsync of JetStream."""

_QUEUE_EVENTS = 10_000
_QUEUE_BYTES = 32 << 20
"""What waits to be published in this process; what is above this the sweeper publishes (INV-9)."""

_CONFIRM_EVENTS = 1_000
_GATHER_S = 0.02
"""Acknowledged events are deleted together, this often at most."""

_STATS_INTERVAL_S = 1.0
_FINISH_S = 2.0
"""How long a stopping replica goes on with what it has committed, so that nobody waits for another one's sweep."""


class Outbox(Protocol):
    """The events without an acknowledgement; services.scheduler.store_events.EventStore."""

    async def insert(self, tx: Transaction, events: Sequence[OutgoingEvent]) -> None: ...
    async def take_due(
        self, tx: Transaction, *, first: timedelta, longest: timedelta, limit: int
    ) -> Sequence[OutgoingEvent]: ...
    async def hurry(self, tx: Transaction) -> None: ...
    async def confirm(self, tx: Transaction, event_ids: Sequence[UUID]) -> None: ...
    async def backlog(self, tx: Transaction) -> EventBacklog: ...


class Broker(Protocol):
    """What a publisher needs of NATS; libs.jetstream.Bus."""

    async def publish(self, subject: str, payload: bytes, *, headers: Mapping[str, str], msg_id: str) -> object: ...
    async def ensure_stream(
        self, name: str, subjects: Sequence[str], *, is_work_queue: bool, max_age: timedelta, max_bytes: int
    ) -> bool: ...


class EventPublisher:
    """Publishes the events of one replica, and sweeps those of all; one per process."""

    def __init__(
        self, *, db: Database, bus: Broker, store: Outbox, settings: SchedulerSettings, links: LinkSettings
    ) -> None:
        """`links`: events are swept as often, and published again after the same waits, as frames."""
        self._db = db
        self._bus = bus
        self._store = store
        self._settings = settings
        self._links = links
        self._queue: asyncio.Queue[tuple[float, OutgoingEvent]] = asyncio.Queue(_QUEUE_EVENTS)
        self._queued_bytes = 0
        self._confirmed: set[UUID] = set()
        self._has_confirmed = asyncio.Event()
        self._confirming = asyncio.Lock()
        self._unconfirmed = 0
        self._is_stream_lost = False
        self._failures = 0  # Since they were last logged.
        self._last_failure = ""

    def has_room(self) -> bool:
        """Whether timers may fire events: whether the backlog of all replicas is below its limit (INV-9).

        Exact once a second, and in between counted on with what this replica does.
        """
        return self._unconfirmed < self._settings.events_max_backlog

    def check_room(self) -> None:
        """Raise ResourceExhausted when there is no room; nothing may fire then."""
        if not self.has_room():
            raise ResourceExhausted(
                f"{self._unconfirmed} events wait for the stream {STREAM}; come back later",
                reason="EVENT_BACKLOG_FULL",
                retry_after=timedelta(seconds=5),
            )

    async def insert(self, tx: Transaction, events: Sequence[OutgoingEvent]) -> None:
        """Step 1: write events in the transaction that fires their timers."""
        if events:
            await self._store.insert(tx, events)
            self._unconfirmed += len(events)  # Too many where it is rolled back, until the next measurement.

    def publish(self, events: Sequence[OutgoingEvent]) -> None:
        """Step 2, after the commit. When the queue is full the sweeper publishes them later."""
        swept_at = asyncio.get_running_loop().time() + self._links.republish_after.total_seconds()
        for event in events:
            if self._queue.full() or self._queued_bytes > _QUEUE_BYTES:
                return
            self._queue.put_nowait((swept_at, event))
            self._queued_bytes += len(event.payload)

    @property
    def queued(self) -> int:
        """Events in memory that wait to be published."""
        return self._queue.qsize()

    async def run(self) -> None:
        """Publish, confirm and sweep until cancelled; then finish what is under way, for a moment."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(PUBLISHERS):
                tasks.create_task(self._publish_loop())
            tasks.create_task(self._confirm_loop())
            tasks.create_task(self._sweep_loop())
            tasks.create_task(self._stats_loop())
            try:
                await asyncio.Event().wait()
            finally:
                await self._finish()

    async def _finish(self) -> None:
        with suppress(TimeoutError, Unavailable):
            async with asyncio.timeout(_FINISH_S):
                await self._queue.join()
                while await self.confirm_once():
                    pass

    async def _publish_loop(self) -> None:
        while True:
            swept_at, event = await self._queue.get()
            self._queued_bytes -= len(event.payload)
            # What has waited here too long is the sweeper's by now.
            if asyncio.get_running_loop().time() < swept_at:
                await self._publish_event(event, str(event.id))
            self._queue.task_done()

    async def _publish_event(self, event: OutgoingEvent, msg_id: str) -> None:
        try:
            await self._bus.publish(event.subject, event.payload, headers=event.headers, msg_id=msg_id)
        except Unavailable as err:
            metrics.EVENT_PUBLISH_FAILURES.inc()
            self._failures += 1
            self._last_failure = str(err)
            return
        metrics.EVENTS_PUBLISHED.inc()
        self._confirmed.add(event.id)
        self._has_confirmed.set()

    async def confirm_once(self) -> int:
        """Forget acknowledged events, at most a thousand; returns how many.

        One call at a time: who finishes waits for the one under way, or it would be cancelled with the loop.
        """
        async with self._confirming:
            event_ids = list(itertools.islice(self._confirmed, _CONFIRM_EVENTS))
            if event_ids:
                async with self._db.transaction() as tx:
                    await self._store.confirm(tx, event_ids)
            self._confirmed.difference_update(event_ids)
        self._unconfirmed = max(0, self._unconfirmed - len(event_ids))
        return len(event_ids)

    async def ensure_stream(self) -> bool:
        """Have the stream exist; where it had vanished or was out of reach, sweep without regard to former sweeps.

        Raises Unavailable when NATS or Postgres is away.
        """
        try:
            is_news = await self._bus.ensure_stream(
                STREAM,
                [ALL_SUBJECTS],
                is_work_queue=False,
                max_age=self._settings.events_max_age,
                max_bytes=self._settings.events_max_bytes,
            )
        except Unavailable:
            self._is_stream_lost = True
            raise
        except FailedPrecondition as err:  # Somebody else made it, otherwise. It may do all the same.
            log.error("The stream of events is not as it should be.", extra={"error": str(err)})
            return True
        self._is_stream_lost |= is_news
        if self._is_stream_lost:
            async with self._db.transaction() as tx:
                await self._store.hurry(tx)
            self._is_stream_lost = False
        return True

    async def sweep_once(self) -> int:
        """Publish events whose acknowledgement is overdue; returns how many there were, at most `sweep_frames`."""
        async with self._db.transaction() as tx:
            due = await self._store.take_due(
                tx,
                first=self._links.republish_after,
                longest=self._links.republish_max,
                limit=self._links.sweep_frames,
            )
        for start in range(0, len(due), PUBLISHERS):
            await asyncio.gather(*map(self._republish, due[start : start + PUBLISHERS]))
        return len(due)

    async def _republish(self, event: OutgoingEvent) -> None:
        metrics.EVENTS_REPUBLISHED.inc()
        # Under a new message id, or JetStream's duplicate window would swallow it.
        await self._publish_event(event, str(new_id()))

    async def measure_once(self) -> None:
        """Read the exact backlog into the gauges and `has_room`."""
        async with self._db.read() as tx:
            found = await self._store.backlog(tx)
        self._unconfirmed = found.events
        metrics.EVENTS_UNCONFIRMED.set(found.events)
        metrics.OLDEST_UNCONFIRMED_EVENT_SECONDS.set(found.oldest_s)

    async def _confirm_loop(self) -> None:
        while True:
            await self._has_confirmed.wait()
            await asyncio.sleep(_GATHER_S)
            self._has_confirmed.clear()
            while self._confirmed:
                if not await self._attempt("confirm events", self.confirm_once()):
                    await asyncio.sleep(self._links.sweep_interval.total_seconds())

    async def _sweep_loop(self) -> None:
        while True:
            if await self._attempt("ensure the stream of events", self.ensure_stream()):
                while await self._attempt("sweep events", self.sweep_once()) == self._links.sweep_frames:
                    pass
            await asyncio.sleep(self._links.sweep_interval.total_seconds())

    async def _stats_loop(self) -> None:
        while True:
            await self._attempt("measure the backlog of events", self.measure_once())
            if self._failures:  # A line for each would drown the log while NATS is away.
                log.warning(
                    "Events were not published; the sweeper will.",
                    extra={"events": self._failures, "last_error": self._last_failure},
                )
                self._failures = 0
            await asyncio.sleep(_STATS_INTERVAL_S)

    async def _attempt(self, what: str, work: Coroutine[None, None, Result]) -> Result | None:
        result = None
        try:
            result = await work
        except Unavailable as err:
            log.warning("Could not %s; trying again.", what, extra={"error": str(err)})
        heed_cancellation()
        return result
