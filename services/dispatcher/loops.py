"""The sending loop: claim, send, record; and what keeps claims alive.

    claim   one transaction: lock what is due, let the pipeline decide, commit the intent to send
    send    everything claimed at once, in tasks of its own; bounded by `Room` and `Traffic` before it is claimed
    record  one transaction for what has finished meanwhile: states, outcomes to digest, retry timers to the scheduler

What a crash leaves behind is in the queue with a claim that runs out; the next claim finds it in doubt. A graceful stop
(cancellation) claims no more, gives back what was claimed and not begun, waits for what is being sent and records it:
then nothing is in doubt.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence, Set
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Protocol
from uuid import UUID

from libs.clock import Clock
from libs.errors import Unavailable
from libs.links.frames import OutgoingFrame
from libs.postgres import Database, Transaction
from libs.telemetry import traces
from services.dispatcher import metrics
from services.dispatcher.addresses import destination_of
from services.dispatcher.delivery import LANES, Channel, Hold, Priority, Reason, Result, Retryable, Sent, lane_of
from services.dispatcher.loops_traces import attempt_span, note_result
from services.dispatcher.pipeline import Candidate, Decisions, Policy, Settlement, conclude, judge, outlived
from services.dispatcher.room import Room
from services.dispatcher.settings import DispatchSettings

log = logging.getLogger(__name__)

Key = tuple[str, UUID]

_RETRY_S = 0.25
_RECORD_SETTLEMENTS = 500
_RELEASE = 2_000


class Queue(Protocol):
    """What the loop needs of the store."""

    async def claimable(
        self, tx: Transaction, places: Mapping[str, int], full: Sequence[str], *, patience: Mapping[str, timedelta]
    ) -> list[Candidate]: ...
    async def claim(
        self, tx: Transaction, candidates: Sequence[Candidate], *, by: str, claim_time: timedelta, now: datetime
    ) -> None: ...
    async def postpone(self, tx: Transaction, held: Sequence[tuple[Candidate, timedelta]]) -> None: ...
    async def release(self, tx: Transaction, *, lane: str, destination: str, limit: int) -> int: ...
    async def settle(self, tx: Transaction, settlements: Sequence[Settlement]) -> set[Key]: ...
    async def renew(self, tx: Transaction, candidates: Sequence[Candidate], *, claim_time: timedelta) -> None: ...
    async def give_back(self, tx: Transaction, candidates: Sequence[Candidate]) -> None: ...


class Traffic(Protocol):
    """What the loop needs of rates and breakers; see traffic.py."""

    def places(self, lane: str, free: int) -> int: ...
    def patience(self, lane: str) -> timedelta: ...
    def probed(self) -> list[str]: ...
    def take(self, lane: str, destination: str, priority: Priority, since: datetime) -> Hold | None: ...
    def leave(self, lane: str, destination: str) -> None: ...
    def end(self, lane: str, destination: str, *, is_outage: bool, retry_after: timedelta | None = None) -> None: ...
    def closed(self) -> list[tuple[str, str]]: ...
    def released(self, lane: str, destination: str) -> None: ...


class Bounces(Protocol):
    """Where the loop tells of addresses that do not exist; see store_suppressions.py."""

    async def note(self, tx: Transaction, settlements: Sequence[Settlement]) -> None: ...


class Outcomes(Protocol):
    """What the loop needs of the stream."""

    async def insert(self, tx: Transaction, settlements: Sequence[Settlement]) -> Sequence[OutgoingFrame]: ...
    def publish(self, frames: Sequence[OutgoingFrame]) -> None: ...


class SendingLoop:
    """Sends what is due, in one process; any number of processes share the queue."""

    def __init__(
        self,
        *,
        db: Database,
        clock: Clock,
        queue: Queue,
        bounces: Bounces,
        outcomes: Outcomes,
        channels: Mapping[str, Channel],
        policy: Policy,
        room: Room,
        traffic: Traffic,
        settings: DispatchSettings,
        replica: str,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._db = db
        self._clock = clock
        self._queue = queue
        self._bounces = bounces
        self._outcomes = outcomes
        self._channels = channels
        self._policy = policy
        self._room = room
        self._traffic = traffic
        self._settings = settings
        self._replica = replica
        self._draw = draw
        self._wake = asyncio.Event()
        self._is_stopping = False
        self._short: set[str] = set()  # Lanes in which the last claim may have left some, for want of room.
        self._under_way: dict[Key, Candidate] = {}
        self._sends: set[asyncio.Task[None]] = set()
        self._finished: asyncio.Queue[Settlement] = asyncio.Queue()

    def wake(self) -> None:
        """There may be something to send."""
        self._wake.set()

    async def run(self) -> None:
        """Send until cancelled; then finish, within `drain_timeout`, what was begun."""
        tasks = [asyncio.create_task(work) for work in (self._claim_loop(), self._record_loop(), self._renew_loop())]
        try:
            await _first_failure(tasks)
        except asyncio.CancelledError:
            await self._drain(claiming=tasks[0])
            raise
        finally:
            for task in (*tasks, *self._sends):
                task.cancel()
            await asyncio.gather(*tasks, *self._sends, return_exceptions=True)
            for channel in self._channels.values():
                await channel.close()

    async def _drain(self, *, claiming: asyncio.Task[None]) -> None:
        self._is_stopping = True
        self._wake.set()
        try:
            async with asyncio.timeout(self._settings.drain_timeout.total_seconds()):
                await claiming  # Ends by itself, with what it claimed last given back.
                while self._under_way:
                    self._wake.clear()
                    await self._wake.wait()
        except TimeoutError:
            log.warning("Some attempts did not end in time; they are in doubt.", extra={"count": len(self._under_way)})

    # Claiming

    async def _claim_loop(self) -> None:
        while not self._is_stopping:
            self._wake.clear()
            await self._attempt("release what was parked", self.release_closed())
            claimed = await self._attempt("claim deliveries", self.claim_once())
            if claimed and self._short & self._room.free().keys():
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.poll_interval.total_seconds()):
                    await self._wake.wait()

    async def claim_once(self) -> int:
        """Claim what is due and start sending it; returns how many deliveries were sent off, or settled unsent."""
        places = self._places()
        self._short = set(LANES) - places.keys()
        if not places:
            return 0
        decisions = Decisions()
        try:
            async with self._db.transaction() as tx:
                full = [*self._room.full_destinations(), *self._traffic.probed()]
                patience = {lane: self._traffic.patience(lane) for lane in places}
                candidates = await self._queue.claimable(tx, places, full, patience=patience)
                if not candidates:
                    return 0
                found = Counter(lane_of(one.delivery.channel) for one in candidates)
                self._short |= {lane for lane, count in places.items() if found[lane] >= count}
                now = self._clock.now()
                self._decide(candidates, now, decisions)
                claim_time = self._settings.claim_time
                await self._queue.claim(tx, decisions.letters, by=self._replica, claim_time=claim_time, now=now)
                await self._queue.postpone(tx, decisions.waits(claim_time))
                decided, frames = await self._settle(tx, decisions.settlements)
        except BaseException:
            self._leave(decisions.letters)
            raise
        self._outcomes.publish(frames)
        metrics.count_ends(decided)
        metrics.count_doubts(decisions.letters, decided)
        metrics.count_holds(decisions.held)
        self._count_waits(candidates, {*(one.key for one in decided), *(one.delivery.key for one, _ in decisions.held)})
        await self._start(decisions.letters)
        return len(decisions)

    def _count_waits(self, candidates: Sequence[Candidate], unsent: Set[Key]) -> None:
        """Those that ended or were put off without an attempt; `_send` counts the others."""
        for one in candidates:
            if one.delivery.key in unsent:
                metrics.handover_of(metrics.channel_label(one.delivery.channel)).observe(self._waited_s(one))

    def _places(self) -> dict[str, int]:
        """How many to claim per lane."""
        most = self._settings.claim_deliveries
        free = {lane: self._traffic.places(lane, min(free, most)) for lane, free in self._room.free().items()}
        return {lane: count for lane, count in free.items() if count}

    def _decide(self, candidates: Sequence[Candidate], now: datetime, decisions: Decisions) -> None:
        """Put each where it belongs; what finds no place stays queued as it is and is nowhere."""
        for one in candidates:
            if one.delivery.key in self._under_way:
                decisions.ours.append(one)
                continue
            place = _place_of(one)
            settlement = judge(one, self._policy, now)
            if settlement is None and self._room.take(*place):
                if (hold := self._traffic.take(*place, one.delivery.priority, one.fresh_since)) is None:
                    decisions.letters.append(one)
                    continue
                self._room.leave(*place)
                settlement = outlived(one, hold, self._policy, now)
                if settlement is None and hold.wait:
                    decisions.held.append((one, hold))
            if settlement is not None:
                decisions.settlements.append(settlement)

    async def release_closed(self) -> None:
        """Let what is parked for destinations that work again go, instead of when its time is over.

        So many each time and not all of it: the mails of an hour without a mail server must not keep others waiting.
        """
        for lane, destination in self._traffic.closed():
            async with self._db.transaction() as tx:
                released = await self._queue.release(tx, lane=lane, destination=destination, limit=_RELEASE)
            if released < _RELEASE:
                self._traffic.released(lane, destination)

    async def _start(self, letters: Sequence[Candidate]) -> None:
        if self._is_stopping:
            await self._attempt("give claims back", self._give_back(letters))
            self._leave(letters)
            return
        for one in letters:
            self._under_way[one.delivery.key] = one
            task = asyncio.create_task(self._send(one))
            self._sends.add(task)
            task.add_done_callback(self._sends.discard)
        metrics.UNDER_WAY.set(len(self._under_way))

    async def _give_back(self, letters: Sequence[Candidate]) -> None:
        async with self._db.transaction() as tx:
            await self._queue.give_back(tx, letters)

    def _leave(self, letters: Sequence[Candidate]) -> None:
        for one in letters:
            self._room.leave(*_place_of(one))
            self._traffic.leave(*_place_of(one))

    # Sending

    async def _send(self, candidate: Candidate) -> None:
        with traces.doing(attempt_span(candidate)) as span:
            result = await self._attempted(candidate)
            note_result(span, result)
        channel = candidate.delivery.channel
        if isinstance(result, Retryable) and result.is_in_doubt:
            metrics.IN_DOUBT.labels(channel, metrics.REPLY_LOST).inc()
        # What waits for its record takes nobody's place: only what is being sent has a connection.
        self._room.leave(*_place_of(candidate))
        self._note(candidate, result)
        now, draw, trace = self._clock.now(), self._draw(), traces.point_in(span)
        self._finished.put_nowait(conclude(candidate, result, self._policy, now, draw=draw, trace=trace))

    async def _attempted(self, candidate: Candidate) -> Result:
        channel, started_s = candidate.delivery.channel, time.monotonic()
        with metrics.attempt_seconds_of(channel).time():
            result = await self._result(candidate)
        reason = metrics.SENT if isinstance(result, Sent) else result.reason.value
        metrics.attempts_of(channel, reason).inc()
        metrics.handover_of(channel).observe(self._waited_s(candidate) + time.monotonic() - started_s)
        log.debug("An attempt has ended.", extra={"delivery_id": str(candidate.delivery.id), "reason": reason})
        return result

    def _waited_s(self, candidate: Candidate) -> float:
        """How long it could have been sent when it was claimed; an attempt that was lost had its claim until then."""
        lost = self._settings.claim_time if candidate.is_in_doubt else timedelta(0)
        return (candidate.waited + lost).total_seconds()

    def _note(self, candidate: Candidate, result: Result) -> None:
        """Have the destination's breaker know."""
        place, is_outage, retry_after = _place_of(candidate), False, None
        if isinstance(result, Retryable):
            is_outage = result.reason in self._channels[candidate.delivery.channel].outages
            retry_after = result.retry_after
        self._traffic.end(*place, is_outage=is_outage, retry_after=retry_after)

    async def _result(self, candidate: Candidate) -> Result:
        try:
            return await self._channels[candidate.delivery.channel].send(candidate.letter)
        except Exception as error:  # Outermost frame of one attempt: a bug in a channel must not stop the others.
            log.exception("A channel failed unexpectedly.", extra={"delivery_id": str(candidate.delivery.id)})
            return Retryable(Reason.INTERNAL_ERROR, type(error).__name__, is_in_doubt=True)

    # Recording

    async def _record_loop(self) -> None:
        while True:
            batch = [await self._finished.get()]
            await asyncio.sleep(self._settings.record_linger.total_seconds())
            while len(batch) < _RECORD_SETTLEMENTS and not self._finished.empty():
                batch.append(self._finished.get_nowait())
            while await self._attempt("record attempts", self.record_once(batch)) is None:
                pass
            for one in batch:
                self._under_way.pop(one.key, None)
            metrics.UNDER_WAY.set(len(self._under_way))
            if self._short or self._is_stopping:
                self._wake.set()

    async def record_once(self, settlements: Sequence[Settlement]) -> int:
        """Record what became of attempts; returns how many were still this process's to decide."""
        async with self._db.transaction() as tx:
            decided, frames = await self._settle(tx, settlements)
        self._outcomes.publish(frames)
        metrics.count_ends(decided)
        metrics.LOST_CLAIMS.inc(len(settlements) - len(decided))
        return len(decided)

    async def _settle(
        self, tx: Transaction, settlements: Sequence[Settlement]
    ) -> tuple[list[Settlement], Sequence[OutgoingFrame]]:
        """Those that were ours to decide, and the frames that tell of them."""
        if not settlements:
            return [], []
        ours = await self._queue.settle(tx, settlements)
        decided = [one for one in settlements if one.key in ours]
        await self._bounces.note(tx, decided)
        return decided, await self._outcomes.insert(tx, decided)

    # Keeping claims

    async def _renew_loop(self) -> None:
        """Renew what has been under way for a third of its claim; most attempts end long before."""
        interval_s = self._settings.claim_time.total_seconds() / 3
        seen: set[Key] = set()
        while True:
            await asyncio.sleep(interval_s)
            slow = [one for key, one in self._under_way.items() if key in seen]
            seen = set(self._under_way)
            if slow:
                await self._attempt("renew claims", self._renew(slow))

    async def _renew(self, slow: Sequence[Candidate]) -> None:
        async with self._db.transaction() as tx:
            await self._queue.renew(tx, slow, claim_time=self._settings.claim_time)

    async def _attempt(self, what: str, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of `work`, or None after a passing failure, which is waited out."""
        try:
            return await work
        except Unavailable as error:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise asyncio.CancelledError from error  # A transaction that is cancelled may fail with this instead.
            log.warning("Could not %s; trying again.", what, extra={"error": str(error)})
            await asyncio.sleep(_RETRY_S)
            return None


def _place_of(candidate: Candidate) -> tuple[str, str]:
    delivery = candidate.delivery
    return lane_of(delivery.channel), destination_of(delivery.channel, delivery.address)


async def _first_failure(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait until one of them ends, and raise what it raised."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        await task
