"""Timers of every kind, sent to a scheduler for as long as its test makes trouble.

Half of the plain ones are sent beforehand and are due all the time, so that pages are read throughout; everything else
is due within seconds. What comes of each is fixed by what is sent, whatever happens meanwhile; cancels alone race with
firing, and then their answers must add up.
"""

import asyncio
import random
from collections.abc import Coroutine
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2

from libs.ids import new_id
from libs.wire import to_timestamp
from services.scheduler.timer import State
from tests.support.durable_peer import TENANT, DurablePeer, NotApplied
from tests.support.scheduler_books import Books, Cancel

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
APPLIED_WITHIN = timedelta(seconds=60)
"""Longer than any accident lasts; a frame that takes longer goes into the books as not applied."""

_WAVE_S = 1.0
_MOST_WAVES = 8
_SOON = 4 * SECOND
_CANCELS = 4
_OCCURRENCES = 30
_ENTITIES = 1_000


class Load:
    """`timers`: how many there are at least. `lasts`: how long they take on a machine that keeps up with them.

    Not more than a few waves are under way at once, so a slower machine gets the same timers at its own pace.
    """

    def __init__(self, peer: DurablePeer, *, timers: int, lasts: timedelta, rng: random.Random) -> None:
        self.books = Books()
        self._peer = peer
        self._timers = timers
        self._lasts = lasts
        self._per_wave = max(20, round(timers / 2 / (lasts.total_seconds() / _WAVE_S)))
        self._rng = rng
        self._room = asyncio.Semaphore(_MOST_WAVES)
        self._may_end = False

    def end(self) -> None:
        """Have `run` return once it has sent enough."""
        self._may_end = True

    async def prepare(self) -> None:
        """Facts for conditions, and the timers that are due all the time."""
        await self._send(self._facts("wanted", '{"is_wanted": true}'), self._facts("unwanted", '{"is_wanted": false}'))
        await self._send(*self._plain(self._timers // 2, SECOND, self._lasts))

    async def run(self) -> None:
        """Send waves until told to end and all is sent; returns when everything is applied and every cancel is back."""
        async with asyncio.TaskGroup() as tasks:
            while self.books.timers < self._timers or not self._may_end:
                await self._room.acquire()
                tasks.create_task(self._wave())
                await asyncio.sleep(_WAVE_S)

    async def _wave(self) -> None:
        """Of ten timers five are plain, one has a condition, three have a cancel behind them and one before."""
        tenth = self._per_wave // 10
        try:
            async with asyncio.TaskGroup() as tasks:
                free = [*self._plain(5 * tenth, 0.1 * SECOND, _SOON), *self._conditional(tenth)]
                recurring = [self._recurring() for _ in range(1 + tenth // 10)]
                tasks.create_task(self._noting(self._send(*free, *recurring)))
                tasks.create_task(self._noting(self._overtaken(tenth)))
                for _ in range(_CANCELS):
                    tasks.create_task(self._noting(self._cancelled(max(4, 3 * tenth // _CANCELS))))
        finally:
            self._room.release()

    async def _noting(self, part: Coroutine[Any, Any, object]) -> None:
        """Go on after a failure: the books say more than one of them."""
        try:
            await part
        except NotApplied as err:
            self.books.failures.append(str(err))

    # Kinds of timers

    def _plain(self, count: int, earliest: timedelta, latest: timedelta) -> list[link_pb2.Entry]:
        entries = [self._timer(f"e{self._rng.randrange(_ENTITIES)}", self._due(earliest, latest)) for _ in range(count)]
        self.books.once.update(map(_id_of, entries))
        return entries

    def _conditional(self, count: int) -> list[link_pb2.Entry]:
        """Half of them are for an entity whose facts say no."""
        condition = timer_pb2.Condition(cel="facts.is_wanted")
        both = [
            [self._timer(entity, self._due(0.1 * SECOND, _SOON), condition=condition) for _ in range(count // 2)]
            for entity in ("wanted", "unwanted")
        ]
        self.books.once.update(map(_id_of, both[0]))
        self.books.never |= dict.fromkeys(map(_id_of, both[1]), State.SKIPPED)
        return [*both[0], *both[1]]

    async def _cancelled(self, count: int) -> None:
        """An entity whose timers are cancelled when some of them have fired."""
        entity = f"cancelled/{new_id()}"
        entries = [self._timer(entity, self._due(0.1 * SECOND, _SOON)) for _ in range(count)]
        cancel = Cancel(entity=entity, timer_ids=frozenset(map(_id_of, entries)))
        self.books.cancels.append(cancel)
        await self._send(*entries)
        with suppress(TimeoutError):
            async with asyncio.timeout(_SOON.total_seconds()):
                await self._peer.until_seen(entity, self._rng.randrange(count))
        (result,) = await self._send(self._cancel(entity))
        cancel.changed, cancel.returned_at = result.changed, datetime.now(UTC)

    async def _overtaken(self, count: int) -> None:
        """An entity whose cancel was accepted after its timers and is applied before they come."""
        entity = f"overtaken/{new_id()}"
        entries = [self._timer(entity, self._due(0.1 * SECOND, _SOON)) for _ in range(count)]
        self.books.never |= dict.fromkeys(map(_id_of, entries), State.CANCELLED)
        await self._send(self._cancel(entity))
        await self._send(*entries)

    def _recurring(self) -> link_pb2.Entry:
        """Every minute of the past half hour: each occurrence is made by the one before and is due at once."""
        schedule_id, begin = new_id(), datetime.now(UTC).replace(second=0, microsecond=0) - 40 * MINUTE
        self.books.chains[schedule_id] = [begin + n * MINUTE for n in range(1, _OCCURRENCES + 1)]
        rule = timer_pb2.Recurrence(
            cron="* * * * *",
            misfire_policy=timer_pb2.MISFIRE_POLICY_FIRE_ALL,
            end_time=to_timestamp(begin + (_OCCURRENCES + 1) * MINUTE),
        )
        return self._entry(schedule_timer=_schedule(f"r/{schedule_id}", schedule_id, begin, recurrence=rule))

    # Entries

    def _due(self, earliest: timedelta, latest: timedelta) -> datetime:
        return datetime.now(UTC) + earliest + self._rng.random() * (latest - earliest)

    def _timer(self, entity: str, due_at: datetime, **more: Any) -> link_pb2.Entry:
        due = to_timestamp(due_at)
        return self._entry(schedule_timer=_schedule(entity, new_id(), datetime.now(UTC), due_time=due, **more))

    def _cancel(self, entity: str) -> link_pb2.Entry:
        selector = link_pb2.TimerSelector(entity=entity)
        return self._entry(cancel_timers=link_pb2.CancelTimers(selector=selector, cause="a test says so"))

    def _facts(self, entity: str, facts: str) -> link_pb2.Entry:
        return self._entry(put_facts=link_pb2.PutFacts(entity=entity, facts=facts))

    def _entry(self, **kind: Any) -> link_pb2.Entry:
        return link_pb2.Entry(tenant=TENANT, sequence=self._peer.next_sequence(), **kind)

    async def _send(self, *entries: link_pb2.Entry) -> list[link_pb2.EntryResult]:
        return await self._peer.send(entries, timeout=APPLIED_WITHIN)


def _schedule(entity: str, timer_id: UUID, accepted_at: datetime, **more: Any) -> link_pb2.ScheduleTimer:
    content = timer_pb2.NotificationContent(type="test", subscribers=["s"], payload="{}")
    return link_pb2.ScheduleTimer(
        id=timer_id.bytes,
        entity=entity,
        accept_time=to_timestamp(accepted_at),
        target=link_pb2.TimerTarget(notification=content),
        **more,
    )


def _id_of(entry: link_pb2.Entry) -> UUID:
    return UUID(bytes=entry.schedule_timer.id)
