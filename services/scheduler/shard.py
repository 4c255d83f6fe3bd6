"""A shard: an actor that owns a fixed slice of the entities. The pure core of the scheduler (sans I/O).

One turn of a shard:

    commands, pages, due timers ──▶ needs ──▶ (the store reads) ──▶ handle, fire ──▶ changes ──▶ (the store commits)

What is authoritative is the `timer` table and the shard's watermark; the wheel is a copy of the nearest timers. Its
contents are complete up to the *horizon*: the mark of the last timer that was read (None: all there are). One beyond
the horizon stays in the table until a page brings it in, so memory is bounded whatever is due (INV-9).

A turn changes the actor before its transaction commits. When the commit fails, or nobody knows whether it did, it
is thrown away and built anew from Postgres: there is no undo to get wrong.

What cannot be decided must not hold up the others: a timer whose firing raises is recorded as failed, and its siblings
fire. A command that raises undoes the turn; the shell then tries its frame alone.

Guarantees kept here: INV-2 (the watermark and what fired are one change), INV-4 (tombstones and cancels before firing),
INV-5 (firing order). INV-3 is the store's: every transaction checks the epoch.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from uuid import UUID

from msgspec.structs import replace

from services.scheduler import births, reports, verdicts
from services.scheduler.commands import (
    BackfillSchedule,
    Changes,
    Command,
    OrderTimers,
    Outcome,
    PutFacts,
    Refusal,
    ReportOutcome,
    ScheduleTimer,
    StartTimeline,
    Tombstone,
    TriggerSchedule,
)
from services.scheduler.conditions import Answer, Question
from services.scheduler.draft import Draft
from services.scheduler.facts import MAX_FACTS_CHARACTERS
from services.scheduler.needs import Known, Needs, needs_of
from services.scheduler.orders import obey
from services.scheduler.timer import HAS_TURN, UNDER_WAY, Mark, State, Timer, fire_time, origin_of
from services.scheduler.wheel import Wheel

_NOT_FOUND, _FAILED_PRECONDITION = 5, 9  # google.rpc.Code
_FIRST_PAGE = 64  # Timers have become due while the shard changed hands: they wait for no more than this to be read.


class Shard:
    """One owned shard."""

    def __init__(
        self,
        *,
        number: int,
        epoch: int,
        watermark: Mark,
        newest_tombstones: Mapping[str, int],
        page_timers: int,
        now: datetime,
    ) -> None:
        """`newest_tombstones`: the highest tombstone sequence per origin, so that most schedules need not look."""
        self.number, self.epoch = number, epoch
        self.watermark = watermark
        self.horizon: Mark | None = watermark
        self._newest_tombstones = dict(newest_tombstones)
        self._page_timers = page_timers
        self.next_page = min(_FIRST_PAGE, page_timers)  # How many timers it should have.
        self._wheel = Wheel(now)
        self._draft = Draft(number)

    def __len__(self) -> int:
        """Timers in the wheel."""
        return len(self._wheel)

    # Reading ahead

    def wants_page(self) -> Mark | None:
        """The mark after which to read the next page of waiting timers; None while there is no need."""
        if self.horizon is not None and len(self._wheel) <= self._page_timers // 4:
            return self.horizon
        return None

    def add_page(self, timers: Sequence[Timer], limit: int) -> None:
        """Take in the page after `wants_page`: waiting timers in firing order, below `limit` only at the very end."""
        for timer in timers:
            self._wheel.add(timer)
        self.horizon = timers[-1].mark if len(timers) >= limit else None
        self.next_page = min(8 * self.next_page, self._page_timers)

    def next_at(self) -> datetime | None:
        """When to look again; None: when told something."""
        return self._wheel.next_at()

    # Commands

    def needs(self, commands: Iterable[Command]) -> Needs:
        """What must be known to handle commands."""
        return needs_of(commands, self._may_be_buried)

    def handle(self, commands: Iterable[Command], known: Known, now: datetime) -> None:
        """Obey commands, in order."""
        for command in commands:
            already_left, error, is_news = 0, None, True
            match command:
                case ScheduleTimer():
                    changed, error = self._schedule(command, known, now)
                    is_news = error is not None
                case StartTimeline():
                    changed, error = self._start(command, known, now)
                case OrderTimers():
                    changed, already_left = self._order(command, known, now)
                case PutFacts():
                    changed, error = self._put_facts(command, known)
                case ReportOutcome():
                    changed, error = self._report(command, known, now)
                case TriggerSchedule():
                    changed, error = self._trigger(command, known, now)
                case BackfillSchedule():
                    changed, error = self._backfill(command, known, now)
                case _:
                    raise TypeError(f"a shard does not know {type(command).__name__}")
            self._draft.changes.outcomes.append(
                Outcome(
                    frame_id=command.frame_id,
                    index=command.index,
                    changed=changed,
                    already_left=already_left,
                    error=error,
                    is_news=is_news,
                )
            )

    def _schedule(self, command: ScheduleTimer, known: Known, now: datetime) -> tuple[int, Refusal | None]:
        if command.id in known.ids or command.id in self._draft.made:
            return 0, None
        timer = births.scheduled(command, shard=self.number, watermark=self.watermark)
        if timer is None:
            return 0, (_FAILED_PRECONDITION, "NEVER_DUE", "the recurrence has no occurrence after its acceptance")
        self._draft.made.add(command.id)
        return self._accept(timer, known, now, since=command.accepted_at), None

    def _start(self, command: StartTimeline, known: Known, now: datetime) -> tuple[int, Refusal | None]:
        timeline = known.newest_timelines.get((command.tenant, command.timeline))
        if timeline is None:
            message = f"there is no timeline {command.timeline!r}: store it with PutTimeline first"
            return 0, (_FAILED_PRECONDITION, "TIMELINE_NOT_FOUND", message)
        if command.run_id in known.ids or command.run_id in self._draft.made:
            return 0, None
        self._draft.made.add(command.run_id)
        first = births.started(command, timeline, shard=self.number, watermark=self.watermark)
        return sum(self._accept(timer, known, now) for timer in first), None

    def _trigger(self, command: TriggerSchedule, known: Known, now: datetime) -> tuple[int, Refusal | None]:
        newest = self._draft.newest(command.schedule_id, command.key, known)
        if newest is None or newest.state is State.CANCELLED:
            return 0, _no_schedule(command.schedule_id)
        timer = births.triggered(newest, command, watermark=self.watermark)
        return self._accept(timer, known, now, since=command.due_at), None

    def _backfill(self, command: BackfillSchedule, known: Known, now: datetime) -> tuple[int, Refusal | None]:
        newest = self._draft.newest(command.schedule_id, command.key, known)
        if newest is None or newest.recurrence is None or newest.state is State.CANCELLED:
            return 0, _no_schedule(command.schedule_id)
        times = newest.recurrence.between(command.start, command.end, most=births.MAX_BACKFILL)
        if len(times) > births.MAX_BACKFILL:
            message = f"the range holds more than {births.MAX_BACKFILL:,} occurrences; make up for it in parts"
            return 0, (_FAILED_PRECONDITION, "TOO_MANY_OCCURRENCES", message)
        past = known.ranges.get((command.schedule_id, command.start, command.end), ())
        missing = births.made_up_for(newest, command, times, past, watermark=self.watermark)
        return sum(self._accept(one, known, now) for one in missing if self._draft.now(one.id) is None), None

    def _accept(self, timer: Timer, known: Known, now: datetime, *, since: datetime | None = None) -> int:
        """Store a new timer, as the orders accepted after it leave it; returns how many now wait because of it."""
        if timer.sequence:
            later = self._draft.tombstones((timer.tenant, timer.entity), known, after=timer.sequence)
            timer = self._obedient(timer, later, now)
        self._insert(timer)
        self._note_due(timer, since or now)
        return int(timer.state is not State.CANCELLED)

    def _note_due(self, timer: Timer, since: datetime) -> None:
        if timer.state is State.SCHEDULED and timer.due_at < since:
            self._draft.changes.due_since[timer.id] = since

    def _insert(self, timer: Timer) -> None:
        self._draft.insert(timer)
        self._keep_near(timer)

    def _keep_near(self, timer: Timer) -> None:
        if timer.state is not State.SCHEDULED and timer.state not in HAS_TURN:
            return
        if timer.fire_at <= self.watermark.at and timer.mark <= self.watermark:
            return  # It has just fired.
        if self.horizon is not None and timer.mark > self.horizon:
            return  # A page will bring it.
        self._wheel.add(timer)
        if len(self._wheel) > 2 * self._page_timers and (last := self._wheel.cut(self._page_timers)) is not None:
            self.horizon = last

    def _put_facts(self, command: PutFacts, known: Known) -> tuple[int, Refusal | None]:
        facts = self._draft.facts(command.key, known).patched(command.sequence, command.patch)
        if len(json.dumps(facts.now)) > MAX_FACTS_CHARACTERS:
            message = f"the facts of {command.entity} would exceed {MAX_FACTS_CHARACTERS} characters of JSON"
            return 0, (_FAILED_PRECONDITION, "TOO_MANY_FACTS", message)
        self._draft.changes.facts[command.key] = facts
        return 1, None

    # Orders

    def _order(self, command: OrderTimers, known: Known, now: datetime) -> tuple[int, int]:
        """Obey an order, and keep it for timers still to come; returns how many it changed, and how many had left."""
        later = self._draft.tombstones(command.key, known, after=command.sequence)
        before: list[Timer] = []
        after: list[Timer] = []
        for timer in self._draft.waiting(command.key, known):
            if not self._is_open(timer) or timer.sequence >= command.sequence:
                continue
            if not command.order.selection.selects(timer):
                continue
            obedient = obey(timer, command.order, watermark=self.watermark, now=now)
            if obedient is not timer:
                before.append(timer)
                after.append(self._obedient(obedient, later, now))
        self._replace(before, after)
        for timer in after:
            self._note_due(timer, now)
        self._release_buffered((timer for timer in after if timer.state is State.CANCELLED), known)
        self._bury(command)
        already_left = sum(timer.state is State.AWAITING for timer in before)
        return len(before) - already_left, already_left

    def _is_open(self, timer: Timer) -> bool:
        """Whether it may still do something."""
        if timer.state is State.SCHEDULED:
            return timer.mark > self.watermark
        return timer.state in UNDER_WAY or timer.state is State.PAUSED

    def _bury(self, command: OrderTimers) -> None:
        tenant, entity = command.key
        self._draft.bury(Tombstone(tenant=tenant, entity=entity, sequence=command.sequence, order=command.order))
        origin = origin_of(entity)
        self._newest_tombstones[origin] = max(command.sequence, self._newest_tombstones.get(origin, 0))

    def _may_be_buried(self, command: Command) -> bool:
        """Whether a tombstone may lie for it: no order that has arrived was accepted later than the newest one."""
        return 0 < command.sequence < self._newest_tombstones.get(origin_of(command.entity), 0)

    def _obedient(self, timer: Timer, later: Iterable[Tombstone], now: datetime) -> Timer:
        """A timer as the orders that were accepted later leave it."""
        for tombstone in later:
            if timer.state is not State.CANCELLED and tombstone.order.selection.selects(timer):
                timer = obey(timer, tombstone.order, watermark=self.watermark, now=now)
        return timer

    def _replace(self, before: Iterable[Timer], after: Iterable[Timer]) -> None:
        """Have timers be otherwise than they were."""
        self._wheel.remove(timer.id for timer in before)
        for timer in after:
            self._draft.update(timer)
            self._keep_near(timer)

    # Outcomes

    def _report(self, command: ReportOutcome, known: Known, now: datetime) -> tuple[int, Refusal | None]:
        timer = self._draft.timer(command.timer_id, command.key, known)
        refusal = reports.refusal_of(timer, attempt=command.attempt, is_done=command.is_done)
        if timer is None or refusal is not None:
            return 0, refusal
        if not reports.is_news(timer, attempt=command.attempt, is_done=command.is_done):
            return 0, None
        if command.is_done:
            after = verdicts.ended(timer, State.DONE, now, timer.note)
        else:
            after = verdicts.after_failure(timer, command.error, watermark=self.watermark, now=now)
        self._go_on(timer, after, known, now)
        return 1, None

    def answer(self, answers: Iterable[Answer], known: Known, now: datetime) -> None:
        """Take in what services say of conditions. A verdict counts from any question, an error only from the last."""
        for one in answers:
            timer = self._draft.now(one.timer_id) or known.timers.get(one.timer_id)
            if timer is None or timer.state is not State.ASKING or one.number > timer.asks + 1:
                continue
            if one.holds is None and one.number <= timer.asks:
                continue
            self._go_on(timer, verdicts.answered(timer, one, watermark=self.watermark, now=now), known, now)

    def _go_on(self, timer: Timer, after: Timer, known: Known, now: datetime) -> None:
        """Put on record what became of a timer, of its attempt, and of the occurrence that waited for it."""
        if timer.state is State.AWAITING:
            self._draft.changes.attempts.append(verdicts.ended_attempt(timer, after, now))
        self._replace([timer], [after])
        # What is reported done while it is paused has been under way before.
        if timer.is_under_way and not after.is_under_way:
            self._release_buffered([after], known)

    def _release_buffered(self, ended: Iterable[Timer], known: Known) -> None:
        """The occurrences that waited for the end of these, all of one entity, have their turn."""
        schedules = {one.schedule_id: (one.tenant, one.entity) for one in ended if one.schedule_id != one.id}
        if schedules:
            buffered = self._draft.next_buffered(schedules.keys(), next(iter(schedules.values())), known)
            fire_at = fire_time(self.watermark.at, self.watermark)
            self._replace((), [replace(one, state=State.RETRYING, fire_at=fire_at) for one in buffered])

    # Firing

    def take_due(self, now: datetime, limit: int) -> list[Timer]:
        """The next timers to fire, in order, at most `limit`; each must be given to `fire` in this turn."""
        return self._wheel.take_due(now, limit)

    def fire(
        self, timers: Sequence[Timer], known: Known, now: datetime, broken: Mapping[UUID, str] | None = None
    ) -> None:
        """Decide what becomes of timers whose time has come, and move the watermark past them (INV-2, INV-5).

        `broken`: timers that cannot be fired, and why; they fail.
        """
        if not timers:
            return
        self.watermark = self._draft.changes.watermark = timers[-1].mark
        self._draft.changes.due = len(timers)
        for timer in timers:
            if timer.is_plain and not broken:
                self._draft.changes.fired.append(timer)
                continue
            after, following = self._fire(timer, known, now, broken or {})
            if after is not timer:
                self._go_on(timer, after, known, now)
            if after.state is State.ASKING:
                self._draft.changes.questions.append(self._question(after, known))
            for one in following:
                self._insert(one)

    def _fire(self, timer: Timer, known: Known, now: datetime, broken: Mapping[UUID, str]) -> tuple[Timer, list[Timer]]:
        """A timer as its time leaves it, and what follows it; a recurrence goes on whatever becomes of the timer."""
        following: list[Timer] = []
        try:
            if timer.state is State.SCHEDULED:  # What is under way has had its successor.
                following += births.following(timer, watermark=self.watermark, now=now)
            if timer.id in broken:
                raise _CannotFire(broken[timer.id])
            after = self._at_its_time(timer, known, now)
            if after.state is State.FIRED:
                following += self._follow_ups(timer, known, now)
                after = verdicts.fired(timer, after, now)
                self._draft.changes.fired.append(timer)
        except Exception as err:  # noqa: BLE001 - outermost frame of a timer: its siblings must fire all the same.
            what = str(err) if isinstance(err, _CannotFire) else f"{type(err).__name__}: {err}"
            after = verdicts.failed(timer, what, now)
        return after, following

    def _at_its_time(self, timer: Timer, known: Known, now: datetime) -> Timer:
        key = (timer.tenant, timer.entity)
        return verdicts.at_its_time(
            timer,
            siblings=self._draft.under_way({timer.schedule_id}, key, known).get(timer.schedule_id, ()),
            facts=self._draft.facts(key, known).now,
            watermark=self.watermark,
            now=now,
        )

    def _follow_ups(self, timer: Timer, known: Known, now: datetime) -> list[Timer]:
        """The steps that begin when it fires for the first time."""
        if timer.step_of is None or timer.attempts:
            return []
        timeline = known.timelines[timer.tenant, timer.step_of.timeline, timer.step_of.version]
        return list(births.follow_ups(timer, timeline, watermark=self.watermark, now=now))

    def _question(self, timer: Timer, known: Known) -> Question:
        assert timer.asked is not None
        about: dict[str, object] = {
            "tenant": timer.tenant,
            "entity": timer.entity,
            "timer_id": str(timer.id),
            "type": timer.type,
            "due_time": timer.due_at.isoformat(),
            "facts": self._draft.facts((timer.tenant, timer.entity), known).now,
        }
        return Question(shard=self.number, timer_id=timer.id, number=timer.asks + 1, condition=timer.asked, about=about)

    def take_changes(self) -> Changes:
        """What this turn decided; the next turn begins."""
        changes, self._draft = self._draft.changes, Draft(self.number)
        return changes


class _CannotFire(Exception):
    """A timer that cannot be sent, or that has brought a turn down before."""


def _no_schedule(schedule_id: UUID) -> Refusal:
    return _NOT_FOUND, "SCHEDULE_NOT_FOUND", f"the entity has no recurring schedule {schedule_id}"
