"""The thin shell around the shards: one loop that gives them their turns and commits what they decide.

A turn takes what has arrived and what is due, for all shards of this replica at once, and makes it true in *one*
transaction (group commit): fence, admit frames, read pages, handle commands, fire, write, insert outgoing frames. After
the commit it publishes, acks and receipts. Shards share transactions and nothing else.

When a turn fails, its shards are thrown away and reported as lost; the leases loop takes them again under a new epoch,
which waits for a commit still in flight. Frames go back to the broker.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol
from uuid import UUID

from libs.clock import Clock
from libs.links.frames import Addressed, OutgoingFrame
from libs.links.inbox import keep_results
from libs.links.receiver import EntryResult, IncomingFrame, Message, PoisonFrame, Receipt, Settlement, receipts_of
from libs.links.sender import Sender
from libs.postgres import Database, Transaction, is_transient
from services.scheduler import metrics
from services.scheduler.commands import Changes, Command, Known, Needs, Outcome
from services.scheduler.settings import SchedulerSettings
from services.scheduler.shard import Shard
from services.scheduler.timer import Mark, State, Timer

log = logging.getLogger(__name__)


class Store(Protocol):
    """What a turn reads and writes; services.scheduler.store.TurnStore."""

    async def fence(self, tx: Transaction, epochs: Mapping[int, int], *, longest_pause: timedelta) -> set[int]: ...
    async def pages(self, tx: Transaction, after: Mapping[int, Mark], limit: int) -> dict[int, list[Timer]]: ...
    async def load(self, tx: Transaction, needs: Needs) -> Known: ...
    async def write(self, tx: Transaction, changes: Sequence[Changes], now: datetime) -> None: ...


class Codec(Protocol):
    """Between frames and commands; the module services.scheduler.stream."""

    def commands_of(self, incoming: IncomingFrame) -> list[Command]: ...
    def addressed(self, fired: Iterable[Timer]) -> list[Addressed]: ...
    def results_of(self, outcomes: Sequence[Outcome]) -> Mapping[UUID, Sequence[EntryResult]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A frame for a shard, decoded."""

    shard: int
    incoming: IncomingFrame
    commands: list[Command]


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """What a turn made true."""

    changes: list[Changes]
    frames: list[OutgoingFrame]
    settled: list[IncomingFrame]
    fresh: list[IncomingFrame]
    receipts: dict[UUID, Receipt]
    has_more: bool


class Engine:
    """The shards of this replica."""

    def __init__(
        self,
        *,
        db: Database,
        store: Store,
        codec: Codec,
        settlement: Settlement,
        sender: Sender,
        clock: Clock,
        settings: SchedulerSettings,
        shard_count: int,
    ) -> None:
        self._db = db
        self._store = store
        self._codec = codec
        self._settlement = settlement
        self._sender = sender
        self._clock = clock
        self._settings = settings
        self._page_timers = max(16, settings.wheel_timers // shard_count)
        self._shards: dict[int, Shard] = {}
        self._mailbox: deque[Arrival] = deque()
        self._room = asyncio.Semaphore(settings.max_mailbox_frames)
        self._wake = asyncio.Event()
        self._turn = asyncio.Lock()
        self.is_trusted: Callable[[], bool] = lambda: True
        self.on_lost: Callable[[Sequence[int]], None] = lambda _: None

    # Shards come and go

    def add(self, *, number: int, epoch: int, watermark: Mark, newest_tombstones: Mapping[str, int]) -> None:
        """Begin with a shard that has become ours."""
        self._shards[number] = Shard(
            number=number,
            epoch=epoch,
            watermark=watermark,
            newest_tombstones=newest_tombstones,
            page_timers=self._page_timers,
            now=self._clock.now(),
        )
        self._wake.set()

    async def drop(self, numbers: Iterable[int]) -> None:
        """Let go of shards, between two turns: when this returns, no turn of theirs is under way."""
        async with self._turn:
            for number in numbers:
                self._shards.pop(number, None)
        self._wake.set()

    @property
    def epochs(self) -> dict[int, int]:
        """The shards that are here, and their epochs."""
        return {number: shard.epoch for number, shard in self._shards.items()}

    # The mailbox

    async def deliver(self, shard: int, messages: Sequence[Message]) -> None:
        """Put frames for a shard into the mailbox; waits while it is full (INV-9)."""
        for incoming in await self._settlement.parse(messages):
            try:
                commands = self._codec.commands_of(incoming)
            except PoisonFrame as err:
                await self._settlement.fail([incoming], err)
                continue
            await self._room.acquire()
            self._mailbox.append(Arrival(shard=shard, incoming=incoming, commands=commands))
            self._wake.set()

    def _take_mail(self) -> list[Arrival]:
        arrivals: list[Arrival] = []
        entries = 0
        seen: set[UUID] = set()
        while self._mailbox:
            arrival = self._mailbox[0]
            entries += len(arrival.commands)
            # A copy of a frame waits for the next turn, where the inbox knows it.
            if arrivals and (entries > self._settings.turn_entries or arrival.incoming.id in seen):
                break
            seen.add(arrival.incoming.id)
            arrivals.append(self._mailbox.popleft())
            self._room.release()
        return arrivals

    # Turns

    async def run(self) -> None:
        """Take turns until cancelled."""
        while True:
            has_more = await self.turn()
            if not has_more:
                await self._clock.wait_until(self._next_at(), self._wake)

    def _next_at(self) -> datetime | None:
        if self._mailbox or any(shard.wants_page() is not None for shard in self._shards.values()):
            return self._clock.now()
        return min((at for shard in self._shards.values() if (at := shard.next_at()) is not None), default=None)

    async def turn(self) -> bool:
        """One turn; returns whether there is more to do at once."""
        async with self._turn:
            if not self.is_trusted():
                await self._lose(list(self._shards), [])
            arrivals = self._take_mail()
            ours = [one for one in arrivals if one.shard in self._shards]
            await self._hand_back([one for one in arrivals if one.shard not in self._shards])
            shards = self._shards_with_work(ours)
            if not shards:
                return bool(self._mailbox)
            try:
                committed = await self._commit_turn(shards, ours)
            except Exception as err:  # noqa: BLE001 - outermost frame of a turn: everything of it is undone, and done again.
                await self._on_failure(shards, ours, err)
                return True
        await self._after_commit(committed)
        return committed.has_more or bool(self._mailbox)

    def _shards_with_work(self, arrivals: Sequence[Arrival]) -> dict[int, Shard]:
        now = self._clock.now()
        addressed = {one.shard for one in arrivals}
        return {
            number: shard
            for number, shard in sorted(self._shards.items())
            if number in addressed
            or shard.wants_page() is not None
            or ((at := shard.next_at()) is not None and at <= now)
        }

    async def _commit_turn(self, shards: dict[int, Shard], arrivals: Sequence[Arrival]) -> Committed:
        async with self._db.transaction() as tx:
            epochs = {number: shard.epoch for number, shard in shards.items()}
            still_ours = await self._store.fence(tx, epochs, longest_pause=self._settings.lease_ttl)
            if lost := epochs.keys() - still_ours:
                metrics.FENCED.inc(len(lost))
                await self._lose(lost, [one for one in arrivals if one.shard in lost])
            shards = {number: shard for number, shard in shards.items() if number in still_ours}
            arrivals = [one for one in arrivals if one.shard in still_ours]

            now = self._clock.now()
            await self._read_pages(tx, shards)
            admission = await self._settlement.admit(tx, [one.incoming for one in arrivals])
            fresh = [one for one in arrivals if one.incoming.id in admission.fresh]
            await self._handle(tx, shards, fresh, now)
            has_more = await self._fire(tx, shards, now)

            changes = [shard.take_changes() for shard in shards.values()]
            await self._store.write(tx, changes, now)
            frames, _ = self._sender.pack(self._codec.addressed(timer for one in changes for timer in one.fired))
            await self._sender.insert(tx, frames)
            results = self._codec.results_of([outcome for one in changes for outcome in one.outcomes])
            incoming = [one.incoming for one in fresh]
            receipts = admission.receipts | receipts_of(incoming, results)
            await keep_results(tx, {i: r for i, r in receipts.items() if i in admission.fresh and r.results})
        return Committed(
            changes=changes,
            frames=frames,
            settled=[one.incoming for one in arrivals],
            fresh=incoming,
            receipts=receipts,
            has_more=has_more,
        )

    async def _read_pages(self, tx: Transaction, shards: Mapping[int, Shard]) -> None:
        wanted = {number: mark for number, shard in shards.items() if (mark := shard.wants_page()) is not None}
        if wanted:
            for number, page in (await self._store.pages(tx, wanted, self._page_timers)).items():
                shards[number].add_page(page)
            metrics.PAGES.inc(len(wanted))

    async def _handle(
        self, tx: Transaction, shards: Mapping[int, Shard], fresh: Sequence[Arrival], now: datetime
    ) -> None:
        needs = Needs()
        for one in fresh:
            needs |= shards[one.shard].needs(one.commands)
        known = await self._store.load(tx, needs)
        for one in fresh:
            shards[one.shard].handle(one.commands, known, now)

    async def _fire(self, tx: Transaction, shards: Mapping[int, Shard], now: datetime) -> bool:
        """Fire what is due; whether some of it had to wait for another turn."""
        with_due = [shard for shard in shards.values() if (at := shard.next_at()) is not None and at <= now]
        limit = max(1, self._settings.turn_timers // max(1, len(with_due)))
        due = [(shard, shard.take_due(now, limit)) for shard in with_due]
        needs = Needs()
        for _, timers in due:
            needs |= Shard.needs_to_fire(timers)
        known = await self._store.load(tx, needs)
        for shard, timers in due:
            shard.fire(timers, known, now)
        return any(len(timers) == limit or shard.wants_page() is not None for shard, timers in due)

    async def _after_commit(self, committed: Committed) -> None:
        self._sender.publish(committed.frames)
        await self._settlement.settle(committed.settled, committed.receipts, committed.fresh)
        metrics.TURNS.labels("committed").inc()
        now = self._clock.now()
        for one in committed.changes:
            metrics.ACCEPTED.inc(len(one.inserts))
            for timer in one.fired:
                metrics.FIRED.labels(timer.target_kind.name.lower()).inc()
                metrics.LATENESS_SECONDS.observe(max(0.0, (now - timer.due_at).total_seconds()))
            for state in one.states.values():
                if state.state is not State.SCHEDULED:
                    metrics.DECIDED.labels(state.state.name.lower()).inc()

    # What goes wrong

    async def _on_failure(self, shards: Mapping[int, Shard], arrivals: Sequence[Arrival], error: Exception) -> None:
        metrics.TURNS.labels("failed").inc()
        log.warning(
            "A turn failed; its shards are taken anew.",
            extra={"shards": len(shards), "frames": len(arrivals), "error": repr(error)},
            exc_info=None if is_transient(error) else error,
        )
        await self._lose(shards, [])
        await self._settlement.fail([one.incoming for one in arrivals], error)
        await asyncio.sleep(0.05)  # Whatever is away is not back within microseconds.

    async def _lose(self, numbers: Iterable[int], arrivals: Sequence[Arrival]) -> None:
        lost = [number for number in numbers if self._shards.pop(number, None) is not None]
        await self._hand_back(arrivals)
        if lost:
            self.on_lost(lost)

    async def _hand_back(self, arrivals: Sequence[Arrival]) -> None:
        for one in arrivals:
            await one.incoming.message.nak(timedelta(milliseconds=50))

    def measure(self) -> None:
        """Read the gauges."""
        now = self._clock.now()
        metrics.WHEEL_TIMERS.set(sum(map(len, self._shards.values())))
        metrics.SHARDS_HELD.set(len(self._shards))
        lags = [(now - at).total_seconds() for s in self._shards.values() if (at := s.next_at()) is not None]
        metrics.WATERMARK_LAG_SECONDS.set(max(0.0, *lags) if lags else 0.0)
