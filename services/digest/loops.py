"""What runs all the time: closing windows, forgetting tombstones, counting.

Closing is a loop of `close_once`, which does one batch in one transaction. It is woken when this process has applied
something that closes windows, and polls for what other replicas have begun.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Final, Protocol
from uuid import UUID

from libs.clock import Clock
from libs.errors import ResourceExhausted, Unavailable
from libs.ids import new_id
from libs.links.frames import OutgoingFrame
from libs.postgres import Database, Transaction
from libs.telemetry import traces
from libs.telemetry.logs import get_logger
from libs.trace_points import Point
from services.digest import metrics
from services.digest.catalog import ItemState
from services.digest.commands import WindowTimer
from services.digest.loops_traces import Making
from services.digest.rendering_jobs import Job, Message, Rendered, Source
from services.digest.settings import DigestSettings
from services.digest.templates import TemplateKey
from services.digest.views import WindowBacklog
from services.digest.windows import Closed, ClosingWindow, closed_by, held_until, job_of, without_rendering

log = get_logger(__name__)

_HOUSEKEEPING_S: Final = 60.0
_STATS_S: Final = 15.0
_REST: Final = 50.0  # Of a connection it takes a fiftieth at most,
_LONGEST_REST_S: Final = 30.0  # where that leaves gauges no older than this.
_FULL_REST_S: Final = 5.0
_FORGET_ROWS: Final = 10_000
_HAND_OVER_CHARACTERS: Final = 6_000_000  # Of what is rendered: more than a batch of usual digests has.


class Press(Protocol):
    """Turns jobs into messages; one result per job, in order, of as many as there is time for (see loops_press)."""

    async def render(self, jobs: Sequence[Job]) -> list[Rendered]: ...


class Post(Protocol):
    """Hands messages over to the dispatcher, while there is room: within the transaction, and after its commit."""

    def check_room(self) -> None: ...
    async def hand_over(self, tx: Transaction, messages: Sequence[Message]) -> list[OutgoingFrame]: ...
    def publish(self, frames: Sequence[OutgoingFrame]) -> None: ...


class Timers(Protocol):
    """Asks the scheduler to wake windows; see stream.Timers."""

    async def schedule(
        self, tx: Transaction, timers: Sequence[WindowTimer], *, now: datetime
    ) -> list[OutgoingFrame]: ...


class Claims(Protocol):
    """Locks closing windows for a transaction; see loops_aside."""

    async def claim(
        self, tx: Transaction, *, most_windows: int, most_items: int, now: datetime
    ) -> list[ClosingWindow]: ...
    async def give_back(self, tx: Transaction, windows: Sequence[ClosingWindow]) -> None: ...


class ClosingStore(Protocol):
    """What closing needs of the store; see store_rendering."""

    async def templates_for(
        self, tx: Transaction, windows: Sequence[ClosingWindow]
    ) -> Mapping[str, Mapping[TemplateKey, Source]]: ...
    async def part_off(self, tx: Transaction, window: ClosingWindow) -> ClosingWindow: ...
    async def hold(self, tx: Transaction, held: Mapping[UUID, datetime], tenants: Collection[str]) -> None: ...
    async def finish(self, tx: Transaction, closed: Sequence[Closed], *, now: datetime) -> None: ...


class TraceStore(Protocol):
    """See store_traces."""

    async def causes(self, tx: Transaction, window_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[Point]]: ...


class Alarm:
    """Wakes all closing loops of this process."""

    def __init__(self) -> None:
        self._events: list[asyncio.Event] = []

    def event(self) -> asyncio.Event:
        """One loop's own event."""
        event = asyncio.Event()
        self._events.append(event)
        return event

    def ring(self) -> None:
        """Something has begun to close."""
        for event in self._events:
            event.set()


class Closing:
    """One loop that closes windows; several run in each process."""

    def __init__(
        self,
        *,
        db: Database,
        claims: Claims,
        store: ClosingStore,
        traced: TraceStore,
        press: Press,
        post: Post,
        timers: Timers,
        clock: Clock,
        wake: asyncio.Event,
        settings: DigestSettings,
    ) -> None:
        self._db, self._store, self._press, self._post, self._clock = db, store, press, post, clock
        self._timers, self._wake, self._settings, self._claims = timers, wake, settings, claims
        self._traced = traced

    async def run(self) -> None:
        """Close windows until cancelled."""
        while True:
            self._wake.clear()
            try:
                closed = await self.close_once()
            except ResourceExhausted as err:
                log.warning("Nothing closes: the windows wait.", error=str(err))
                await _rest_while_full()
                continue
            except Exception as err:
                log.warning("Windows could not be closed; trying again.", error=repr(err), exc_info=not _passes(err))
                closed = 0
            if not closed:
                await self._rest(self._settings.poll_interval.total_seconds())

    async def close_once(self) -> int:
        """Close one batch of windows in one transaction, or hold them for quiet hours; returns how many there were.

        Raises ResourceExhausted while the link to the dispatcher is full: what waits in windows can be cancelled, and
        is bounded by what comes in (INV-9).
        """
        self._post.check_room()
        started = time.perf_counter()
        settings = self._settings
        with Making() as making:
            async with self._db.transaction() as tx:
                now = self._clock.now()  # Not before there is a connection, which may take seconds.
                claimed = await self._claims.claim(
                    tx, most_windows=settings.render_windows, most_items=settings.render_items, now=now
                )
                if not claimed:
                    return 0
                windows = making.begin(claimed, await self._causes(tx, claimed))
                with making.current():
                    frames, closed, done = await self._close(tx, windows, now)
            making.note(closed)
        self._post.publish(frames)
        _count(closed)
        metrics.RENDER_SECONDS.observe(time.perf_counter() - started, making.exemplar)
        return done

    async def _causes(self, tx: Transaction, windows: Sequence[ClosingWindow]) -> Mapping[UUID, Sequence[Point]]:
        return await self._traced.causes(tx, [one.id for one in windows]) if traces.is_on() else {}

    async def _close(
        self, tx: Transaction, windows: Sequence[ClosingWindow], now: datetime
    ) -> tuple[list[OutgoingFrame], list[Closed], int]:
        """What was sent, what became of the windows, and how many were closed or held: at least one.

        The others are as if they had not been claimed; the next batch begins with them.
        """
        timers = await self._hold(tx, held := _held(windows, now), now)
        closing = [one for one in windows if one.id not in held]
        parted = [one if one.rest_from is None else await self._store.part_off(tx, one) for one in closing]
        closed = await self._verdicts(tx, parted, now)
        await self._store.finish(tx, closed, now=now)
        frames = await self._hand_over(tx, (message for one in closed for message in one.messages))
        done = {one.window.id for one in closed} | held.keys()
        await self._claims.give_back(tx, [one for one in windows if one.id not in done])
        log.debug("Closed windows.", windows=len(done))
        return [*timers, *frames], closed, len(done)

    async def _hand_over(self, tx: Transaction, messages: Iterable[Message]) -> list[OutgoingFrame]:
        frames: list[OutgoingFrame] = []
        for some in _by_size(messages):
            frames += await self._post.hand_over(tx, some)
        return frames

    async def _hold(self, tx: Transaction, held: Mapping[UUID, WindowTimer], now: datetime) -> list[OutgoingFrame]:
        if not held:
            return []
        tenants = {timer.tenant for timer in held.values()}
        await self._store.hold(tx, {one_id: timer.due_at for one_id, timer in held.items()}, tenants)
        return await self._timers.schedule(tx, list(held.values()), now=now)

    async def _verdicts(self, tx: Transaction, windows: Sequence[ClosingWindow], now: datetime) -> list[Closed]:
        known = {window.id: verdict for window in windows if (verdict := without_rendering(window))}
        rendering = [window for window in windows if window.id not in known]
        templates = await self._store.templates_for(tx, rendering)
        jobs = [job_of(window, templates.get(window.tenant, {}), now=now) for window in rendering]
        rendered = await self._press.render(jobs)
        for window, result in zip(rendering, rendered, strict=False):
            known[window.id] = closed_by(window, result)
            if result.error:
                log.warning("A template failed.", tenant=window.tenant, digest_id=str(window.id), error=result.error)
        return [known[window.id] for window in windows if window.id in known]

    async def _rest(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()


async def _rest_while_full() -> None:
    await asyncio.sleep(_FULL_REST_S)


def _by_size(messages: Iterable[Message]) -> Iterator[list[Message]]:
    """So many at once that a large digest is never in memory a second time as what goes over the link."""
    some: list[Message] = []
    room = _HAND_OVER_CHARACTERS
    for message in messages:
        some.append(message)
        room -= sum(map(len, message.part))
        if room < 0:
            yield some
            some, room = [], _HAND_OVER_CHARACTERS
    if some:
        yield some


def _held(windows: Sequence[ClosingWindow], now: datetime) -> dict[UUID, WindowTimer]:
    """The windows that quiet hours hold, with what wakes them; what leaves nothing behind is not worth holding.

    A window may have been woken for that very time already, by a clock a little ahead of `now`.
    """
    return {
        one.id: WindowTimer(tenant=one.tenant, window_id=one.id, due_at=until, trace=one.trace, own_id=new_id())
        for one in windows
        if (until := held_until(one, now=now)) is not None and without_rendering(one) is None
    }


def _passes(error: Exception) -> bool:
    return isinstance(error, Unavailable)


def _count(closed: Sequence[Closed]) -> None:
    for one in closed:
        metrics.DIGESTS.labels(one.result).inc()
        if not one.window.is_alone:
            metrics.WINDOW_ITEMS.observe(len(one.window.lines))
        if one.template_error and one.result == "sent":
            metrics.TEMPLATE_FAILURES.inc()
        if one.state is not None:
            reason = one.reason if one.state is ItemState.SUPPRESSED else ""
            metrics.items_of(one.state.name.lower(), reason).inc(len(one.window.lines))


class TombstoneStore(Protocol):
    """See store_windows."""

    async def forget_tombstones(self, tx: Transaction, retention: timedelta, *, limit: int) -> int: ...


class CountStore(Protocol):
    """See store_views."""

    async def backlog(self, tx: Transaction) -> WindowBacklog: ...


class Care:
    """Forgets what is no longer needed and measures what is waiting."""

    def __init__(
        self, *, db: Database, tombstones: TombstoneStore, counts: CountStore, clock: Clock, retention: timedelta
    ) -> None:
        self._db, self._tombstones, self._counts = db, tombstones, counts
        self._clock, self._retention = clock, retention

    async def run(self) -> None:
        """Forget and measure until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_again_and_again(self.forget_once, _HOUSEKEEPING_S))
            tasks.create_task(_again_and_again(self.measure_once, _STATS_S))

    async def forget_once(self) -> None:
        """Delete all tombstones older than any entry that could still come (INV-9), some at a time."""
        forgotten = _FORGET_ROWS
        while forgotten == _FORGET_ROWS:
            async with self._db.transaction() as tx:
                forgotten = await self._tombstones.forget_tombstones(tx, self._retention, limit=_FORGET_ROWS)

    async def measure_once(self) -> None:
        """Read the windows' backlog into the gauges."""
        async with self._db.read() as tx:
            backlog = await self._counts.backlog(tx)
        metrics.show_backlog(backlog, self._clock.now())


async def _again_and_again(work: Callable[[], Awaitable[None]], interval_s: float) -> None:
    while True:
        started_s = time.monotonic()
        try:
            await work()
        except Exception as err:  # noqa: BLE001 - outermost frame of a loop that must go on.
            log.warning("Housekeeping failed; trying again.", error=repr(err))
        # To look at a million windows takes a while; so does a pause, after which alerts must not wait for minutes.
        await asyncio.sleep(max(interval_s, min((time.monotonic() - started_s) * _REST, _LONGEST_REST_S)))
