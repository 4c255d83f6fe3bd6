"""The thin shell around the shards: one loop that gives them their turns and commits what they decide.

A turn takes what has arrived and what is due, for all shards of this replica at once, and makes it true in *one*
transaction (group commit): fence, admit frames, handle commands, fire, write, insert outgoing frames. After the commit
it publishes, acks and receipts. Shards share transactions and nothing else.

When a turn fails, its shards are thrown away and reported as lost; the leases loop takes them again under a new epoch,
which cannot happen before a commit still in flight has ended. Their frames wait here meanwhile.

What fails for a reason of its own must not hold up the others. After such a failure the frames of the turn become
suspects: each gets a turn alone, without firing, and one that fails alone is handed to `Settlement.fail`, which counts
and in the end buries it. Firing goes on with caution (`loops_caution.py`).

Shards are divided among *lanes*, which take their turns at the same time: while Postgres works for one, this process
decides the next.
"""

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from uuid import UUID

from libs.clock import Clock
from libs.errors import ResourceExhausted
from libs.links.frames import Addressed
from libs.links.incoming import processing
from libs.links.receiver import IncomingFrame, Message, PoisonFrame, receipts_of
from libs.postgres import Transaction, is_transient
from libs.sharding import shard_of
from services.scheduler import metrics
from services.scheduler.commands import Command
from services.scheduler.conditions import Answer
from services.scheduler.events import OutgoingEvent
from services.scheduler.loops_caution import Caution, Pace
from services.scheduler.loops_mailbox import Arrival, Mailbox, hand_back
from services.scheduler.loops_ports import Asker, Codec, Database, Events, Sender, Settlement, Store
from services.scheduler.loops_traces import Firing
from services.scheduler.loops_turn import Committed, Turn
from services.scheduler.needs import Needs, needs_of_answers, needs_to_fire
from services.scheduler.settings import SchedulerSettings
from services.scheduler.shard import Shard
from services.scheduler.timer import Mark

log = logging.getLogger(__name__)

_PAUSE_S = 0.05


class _Lane:
    """Every so manieth shard: they take their turns together, while other lanes take theirs."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.wake = asyncio.Event()
        self.turn = asyncio.Lock()


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
        events: Events,
        asker: Asker,
        clock: Clock,
        settings: SchedulerSettings,
        shard_count: int,
        receivers: Sequence[str],
    ) -> None:
        """`receivers`: those that timers send to; nothing fires while the link to one of them is full (INV-9)."""
        self._db = db
        self._store = store
        self._codec = codec
        self._settlement = settlement
        self._sender = sender
        self._events = events
        self._asker = asker
        self._clock = clock
        self._settings = settings
        self._shard_count = shard_count
        self._receivers = receivers
        self._page_timers = max(16, settings.wheel_timers // shard_count)
        self._shards: dict[int, Shard] = {}
        self._mailbox = Mailbox(max(1, settings.max_mailbox_frames // shard_count))
        self._answers: defaultdict[int, list[Answer]] = defaultdict(list)
        self._lanes = [_Lane(number) for number in range(settings.lanes)]
        self._has_room = True
        self._caution = Caution()
        self._pace = Pace(settings.lease_ttl)
        self.is_trusted: Callable[[], bool] = lambda: True
        self.on_lost: Callable[[], None] = lambda: None

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
        self.wake()

    async def drop(self, numbers: Collection[int]) -> None:
        """Let go of shards and hand back their mail, between two turns: afterwards no turn of theirs is under way."""
        mail: list[Arrival] = []
        for members in self.by_lane(numbers):
            async with self._lane_of(members[0]).turn:
                for number in members:
                    self._shards.pop(number, None)
                    self._answers.pop(number, None)
                    self._caution.forget(number)
                mail += self._mailbox.remove(members)
        await hand_back(one.incoming for one in mail)

    async def hand_back_mail(self) -> None:
        """Give all waiting mail back to the broker; somebody else may be able to handle it."""
        await hand_back(one.incoming for one in self._mailbox.remove(range(self._shard_count)))

    def wake(self) -> None:
        """Look for work again: a lease was renewed, a shard has come, a link has room."""
        for lane in self._lanes:
            lane.wake.set()

    def answer(self, answer: Answer) -> None:
        """Take in what a service says of a condition; lost with a turn that fails, and then asked again."""
        if answer.shard in self._shards:
            self._answers[answer.shard].append(answer)
            self._lane_of(answer.shard).wake.set()

    def by_lane(self, numbers: Collection[int]) -> list[list[int]]:
        """Shards by who has their turns together."""
        parts = ([number for number in numbers if self._lane_of(number) is lane] for lane in self._lanes)
        return [part for part in parts if part]

    def _lane_of(self, shard: int) -> _Lane:
        return self._lanes[shard % len(self._lanes)]

    @property
    def epochs(self) -> dict[int, int]:
        """The shards that are here, and their epochs."""
        return {number: shard.epoch for number, shard in self._shards.items()}

    async def deliver(self, shard: int, messages: Sequence[Message]) -> None:
        """Put frames for a shard into the mailbox; waits while it is full (INV-9)."""
        waiting = deque(await self._settlement.parse(messages))
        try:
            while waiting:
                try:
                    commands = self._commands_of(shard, waiting[0])
                except PoisonFrame as err:
                    await self._settlement.fail([waiting.popleft()], err)
                    continue
                await self._mailbox.put(Arrival(shard=shard, incoming=waiting[0], commands=commands))
                waiting.popleft()
                self._lane_of(shard).wake.set()
        except asyncio.CancelledError:
            await hand_back(waiting)  # Or they would come to the shard's next owner only after ACK_WAIT.
            raise

    def _commands_of(self, shard: int, incoming: IncomingFrame) -> list[Command]:
        commands = self._codec.commands_of(incoming)
        for command in commands:
            if (belongs_to := shard_of(command.tenant, command.entity, self._shard_count)) != shard:
                raise PoisonFrame(
                    f"entry {command.index} belongs to shard {belongs_to}, but came to {shard}: CARILLON_SHARDS differs"
                )
        return commands

    # Turns

    async def run(self) -> None:
        """Take turns until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for lane in self._lanes:
                tasks.create_task(self._run_lane(lane))

    async def _run_lane(self, lane: _Lane) -> None:
        while True:
            if not await self._take_turn(lane):
                await self._clock.wait_until(self._next_at(lane), lane.wake)

    def _shards_of(self, lane: _Lane) -> dict[int, Shard]:
        return {n: shard for n, shard in self._shards.items() if n % len(self._lanes) == lane.number}

    def _next_at(self, lane: _Lane) -> datetime | None:
        """When there is work without anybody waking us."""
        if not self.is_trusted() or not self._has_room:
            return None
        return min(
            (at for shard in self._shards_of(lane).values() if (at := shard.next_at()) is not None), default=None
        )

    async def turn(self) -> bool:
        """One turn of each lane; whether there was something to do, and so may be more."""
        return any([await self._take_turn(lane) for lane in self._lanes])

    async def _take_turn(self, lane: _Lane) -> bool:
        async with lane.turn:
            # An untrusted lease may be good still; who renews it wakes us.
            turn = self._plan(self._shards_of(lane)) if self.is_trusted() else None
            if turn is None:
                return False
            try:
                committed = await self._commit_traced(turn)
            except Exception as err:  # noqa: BLE001 - outermost frame of a turn: all of it is undone, and done again.
                await self._on_failure(turn, err)
                return True
            self._caution.relax(turn.taken.keys(), self._settings.turn_timers)
        await self._after_commit(committed, turn.firing)
        return True

    def _plan(self, shards: dict[int, Shard]) -> Turn | None:
        if (suspect := self._mailbox.take_suspect(shards)) is not None:
            return Turn(
                shards={suspect.shard: shards[suspect.shard]}, arrivals=[suspect], most_timers=0, is_careful=True
            )
        now = self._clock.now()
        due = {n for n, shard in shards.items() if self._has_room and (at := shard.next_at()) and at <= now}
        hungry = {number for number, shard in shards.items() if shard.wants_page() is not None}
        for number in (due | hungry) & self._caution.shards:
            most_timers = self._caution.most_timers(number) if self._has_room else 0
            return Turn(shards={number: shards[number]}, arrivals=[], most_timers=most_timers, is_careful=True)
        arrivals = self._mailbox.take(shards, self._settings.turn_entries)
        answers = {number: self._answers.pop(number) for number in shards.keys() & self._answers.keys()}
        busy = sorted(due | hungry | answers.keys() | {one.shard for one in arrivals})
        if not busy:
            return None
        most_timers = self._settings.turn_timers if self._has_room else 0
        return Turn(shards={n: shards[n] for n in busy}, arrivals=arrivals, answers=answers, most_timers=most_timers)

    async def _commit_traced(self, turn: Turn) -> Committed | None:
        with processing("scheduler", [one.incoming for one in turn.arrivals]) as work, turn.firing:
            try:
                committed = await self._commit(turn)
            except Exception as err:
                work.fail(err)
                raise
            turn.firing.note(committed.changes if committed is not None else ())
            return committed

    async def _commit(self, turn: Turn) -> Committed | None:
        """Take a turn in one transaction; None when not one of its shards was ours any more."""
        await self._read_pages(turn.shards)
        async with self._db.transaction() as tx:
            await self._fence(tx, turn)
            if not turn.shards:
                return None
            now = self._clock.now()
            admission = await self._settlement.admit(tx, [one.incoming for one in turn.arrivals])
            fresh = [one for one in turn.arrivals if one.incoming.id in admission.fresh]
            await self._handle(tx, turn, fresh, now)
            sent = await self._fire(tx, turn, now)

            changes = [shard.take_changes() for shard in turn.shards.values()]
            await self._store.write(tx, changes, now)
            fired = [sent[timer.id] for one in changes for timer in one.fired]
            frames, _ = self._sender.pack((one for one in fired if not isinstance(one, OutgoingEvent)), {})
            events = [one for one in fired if isinstance(one, OutgoingEvent)]
            await self._sender.insert(tx, frames)
            await self._events.insert(tx, events)
            results = self._codec.results_of([outcome for one in changes for outcome in one.outcomes])
            incoming = [one.incoming for one in fresh]
            receipts = admission.receipts | receipts_of(incoming, results)
            await self._settlement.keep(tx, {i: r for i, r in receipts.items() if i in admission.fresh})
        settled = [one.incoming for one in turn.arrivals]
        return Committed(
            changes=changes, frames=frames, events=events, settled=settled, fresh=incoming, receipts=receipts
        )

    async def _read_pages(self, shards: Mapping[int, Shard]) -> None:
        """Read ahead. Before the fence, so that a process stopped in the middle of a large answer holds no lock.

        What is read is right if the fence then holds: since the shard was taken nobody else has changed it. It is no
        more than a turn may fire, or what is due meanwhile would wait.
        """
        wanted = {number: mark for number, shard in shards.items() if (mark := shard.wants_page()) is not None}
        if not wanted:
            return
        limit = max(1, min(self._settings.turn_timers // len(wanted), *(shards[n].next_page for n in wanted)))
        async with self._db.transaction() as tx:  # Not `read`: it costs a round trip more.
            pages = await self._store.pages(tx, wanted, limit)
        for number, page in pages.items():
            shards[number].add_page(page, limit)
        metrics.PAGES.inc(len(wanted))

    async def _fence(self, tx: Transaction, turn: Turn) -> None:
        """INV-3: lock the shards of the turn, and leave out those that are not ours any more."""
        epochs = {number: shard.epoch for number, shard in turn.shards.items()}
        lost = epochs.keys() - await self._store.fence(tx, epochs, longest_pause=self._settings.lease_ttl)
        if lost:
            metrics.FENCED.inc(len(lost))
            self._lose(lost)
            self._mailbox.put_back([one for one in turn.arrivals if one.shard in lost])
            turn.shards = {number: shard for number, shard in turn.shards.items() if number not in lost}
            turn.arrivals = [one for one in turn.arrivals if one.shard not in lost]

    async def _handle(self, tx: Transaction, turn: Turn, fresh: Sequence[Arrival], now: datetime) -> None:
        needs = Needs()
        for one in fresh:
            needs |= turn.shards[one.shard].needs(one.commands)
        for answers in turn.answers.values():
            needs |= needs_of_answers(answers)
        known = await self._store.load(tx, needs)
        with self._pace.deciding(turn):
            for one in fresh:
                turn.shards[one.shard].handle(one.commands, known, now)
            for number in turn.answers.keys() & turn.shards.keys():
                turn.shards[number].answer(turn.answers[number], known, now)

    async def _fire(self, tx: Transaction, turn: Turn, now: datetime) -> Mapping[UUID, Addressed | OutgoingEvent]:
        """Fire what is due, at most the turn's share of each shard; what each timer sends if it does fire."""
        due = [s for s in turn.shards.values() if turn.most_timers and (at := s.next_at()) and at <= now]
        limit = max(1, self._pace.most_timers(turn.most_timers) // max(1, len(due)))
        turn.taken = {shard.number: shard.take_due(now, limit) for shard in due}
        needs = Needs()
        for timers in turn.taken.values():
            needs |= needs_to_fire(timers)
        known = await self._store.load(tx, needs)
        timers = [timer for timers in turn.taken.values() for timer in timers]
        encoded, broken = self._codec.encode(timers, now, turn.firing.begin(timers))
        broken |= self._caution.blamed
        with self._pace.deciding(turn, len(timers)):
            for shard in due:
                shard.fire(turn.taken[shard.number], known, now, broken)
        return encoded

    async def _after_commit(self, committed: Committed | None, firing: Firing) -> None:
        if committed is None:
            return
        self._sender.publish(committed.frames)
        self._events.publish(committed.events)
        self._asker.ask([firing.asking(question) for one in committed.changes for question in one.questions])
        await self._settlement.settle(committed.settled, committed.receipts, committed.fresh)
        metrics.count_turn(committed.changes, self._clock.now(), firing.points)

    # What goes wrong

    async def _on_failure(self, turn: Turn, error: Exception) -> None:
        metrics.TURNS.labels("failed").inc()
        error = self._pace.own_fault(turn, error)
        log.warning(
            "A turn failed; its shards are taken anew.",
            extra={"shards": len(turn.shards), "frames": len(turn.arrivals), "error": repr(error)},
            exc_info=None if is_transient(error) else error,
        )
        self._lose(turn.shards)
        if is_transient(error):
            self._mailbox.put_back(turn.arrivals)
        else:
            await self._find_culprit(turn, error)
        await asyncio.sleep(_PAUSE_S)  # Whatever is away is not back within microseconds.

    async def _find_culprit(self, turn: Turn, error: Exception) -> None:
        """Have what failed together tried apart, and blame what failed alone."""
        if turn.is_careful and turn.arrivals:
            await self._settlement.fail([one.incoming for one in turn.arrivals], error)
        else:
            self._mailbox.put_back(replace(one, is_suspect=True) for one in turn.arrivals)
        self._caution.blame(turn.taken, error, is_alone=turn.is_careful)

    def _lose(self, numbers: Iterable[int]) -> None:
        for number in list(numbers):
            self._shards.pop(number, None)
        self.on_lost()

    def measure(self) -> None:
        """Read the gauges, and whether the links have room."""
        now = self._clock.now()
        metrics.WHEEL_TIMERS.set(sum(map(len, self._shards.values())))
        metrics.MAILBOX_FRAMES.set(len(self._mailbox))
        metrics.SHARDS_HELD.set(len(self._shards))
        lags = [(now - at).total_seconds() for s in self._shards.values() if (at := s.next_at()) is not None]
        metrics.WATERMARK_LAG_SECONDS.set(max(0.0, *lags) if lags else 0.0)
        had_room = self._has_room
        try:
            self._sender.check_room(self._receivers)
            self._events.check_room()
            self._has_room = True
        except ResourceExhausted as err:
            self._has_room = False
            log.warning("Nothing fires: the timers wait in their table.", extra={"error": str(err)})
        metrics.FIRING_PAUSED.set(not self._has_room)
        if self._has_room and not had_room:
            self.wake()
