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
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import chain
from uuid import UUID

from libs.conditions import BadCondition, compile_condition
from services.scheduler.commands import (
    CancelTimers,
    Changes,
    Command,
    Entity,
    Known,
    Needs,
    Outcome,
    PutFacts,
    Refusal,
    ScheduleTimer,
    StartTimeline,
    StateChange,
    Tombstone,
)
from services.scheduler.facts import MAX_FACTS_CHARACTERS, merge_patch
from services.scheduler.recurrence import occurrence_id
from services.scheduler.timelines import step_timer
from services.scheduler.timer import Mark, State, Timer, fire_time, origin_of
from services.scheduler.wheel import Wheel

_FAILED_PRECONDITION = 9  # google.rpc.Code
_MAX_NOTE = 4_096


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
        self.number = number
        self.epoch = epoch
        self.watermark = watermark
        self.horizon: Mark | None = watermark
        self._newest_tombstones = dict(newest_tombstones)
        self._page_timers = page_timers
        self._wheel = Wheel(now)
        self._begin_turn()

    def _begin_turn(self) -> None:
        self._changes = Changes(shard=self.number)
        # What this turn has made so far, for the commands after it: ids of timers, schedules and runs; what it
        # inserted and buried, by entity, so that a turn of thousands of commands stays linear.
        self._made: set[UUID] = set()
        self._inserted: defaultdict[Entity, list[UUID]] = defaultdict(list)
        self._buried: defaultdict[Entity, list[Tombstone]] = defaultdict(list)

    def __len__(self) -> int:
        """Timers in the wheel."""
        return len(self._wheel)

    # Reading ahead

    def wants_page(self) -> Mark | None:
        """The mark after which to read the next page of waiting timers; None while there is no need."""
        if self.horizon is not None and len(self._wheel) <= self._page_timers // 4:
            return self.horizon
        return None

    def add_page(self, timers: Sequence[Timer]) -> None:
        """Take in the page that `wants_page` asked for: waiting timers in firing order, short only at the very end."""
        for timer in timers:
            self._wheel.add(timer)
        self.horizon = timers[-1].mark if len(timers) >= self._page_timers else None

    def next_at(self) -> datetime | None:
        """When to look again; None: when told something."""
        return self._wheel.next_at()

    # Commands

    def needs(self, commands: Iterable[Command]) -> Needs:
        """What must be known to handle commands."""
        needs = Needs()
        for command in commands:
            match command:
                case ScheduleTimer():
                    if self._may_be_buried(command):
                        needs.tombstones.add(command.key)
                    if command.id.version != 7:  # Only derived ids can come twice; a frame is applied once.
                        needs.ids.add(command.id)
                case StartTimeline():
                    needs.newest_timelines.add((command.tenant, command.timeline))
                    needs.runs.add(command.run_id)
                    if self._may_be_buried(command):
                        needs.tombstones.add(command.key)
                case CancelTimers():
                    needs.waiting.add(command.key)
                case PutFacts():
                    needs.facts.add(command.key)
        return needs

    def handle(self, commands: Iterable[Command], known: Known, now: datetime) -> None:
        """Obey commands, in order."""
        for command in commands:
            match command:
                case ScheduleTimer():
                    changed, error = self._schedule(command, known, now)
                case StartTimeline():
                    changed, error = self._start(command, known, now)
                case CancelTimers():
                    changed, error = self._cancel(command, known, now), None
                case PutFacts():
                    changed, error = self._put_facts(command, known)
                case _:
                    raise TypeError(f"a shard does not know {type(command).__name__}")
            self._changes.outcomes.append(
                Outcome(frame_id=command.frame_id, index=command.index, changed=changed, error=error)
            )

    def _schedule(self, command: ScheduleTimer, known: Known, now: datetime) -> tuple[int, Refusal | None]:
        if command.id in known.ids or command.id in self._made:
            return 0, None
        timer_id, due_at, occurrence = command.id, command.due_at, 0
        if command.recurrence is not None:
            due_at, occurrence = command.recurrence.first(command.accepted_at), 1
            if due_at is not None:
                timer_id = occurrence_id(command.id, due_at)
        if due_at is None:
            return 0, (_FAILED_PRECONDITION, "NEVER_DUE", "the recurrence has no occurrence after its acceptance")
        self._made.add(command.id)
        timer = Timer(
            id=timer_id,
            shard=self.number,
            tenant=command.tenant,
            entity=command.entity,
            type=command.type,
            due_at=due_at,
            fire_at=fire_time(due_at, self.watermark),
            target_kind=command.target_kind,
            target=command.target,
            sequence=command.sequence,
            schedule_id=command.id,
            occurrence=occurrence,
            recurrence=command.recurrence,
            condition=command.condition,
            expires_at=command.expires_at,
        )
        return self._insert(timer, known, now), None

    def _start(self, command: StartTimeline, known: Known, now: datetime) -> tuple[int, Refusal | None]:
        timeline = known.newest_timelines.get((command.tenant, command.timeline))
        if timeline is None:
            return 0, (
                _FAILED_PRECONDITION,
                "TIMELINE_NOT_FOUND",
                f"there is no timeline {command.timeline!r}: store it with PutTimeline first",
            )
        if command.run_id in known.ids or command.run_id in self._made:
            return 0, None
        self._made.add(command.run_id)
        return sum(
            self._insert(
                step_timer(
                    step,
                    timeline=timeline,
                    run_id=command.run_id,
                    tenant=command.tenant,
                    entity=command.entity,
                    due_at=command.anchor_at + step.offset,
                    sequence=command.sequence,
                    watermark=self.watermark,
                    shard=self.number,
                ),
                known,
                now,
            )
            for step in timeline.steps
        ), None

    def _insert(self, timer: Timer, known: Known, now: datetime) -> int:
        """Store a new timer, waiting or born cancelled; returns how many now wait because of it."""
        if (tombstone := self._tombstone_of(timer, known)) is not None:
            self._changes.inserts[timer.id] = _decided(timer, State.CANCELLED, now, tombstone.cause)
            return 0
        self._changes.inserts[timer.id] = timer
        self._inserted[timer.tenant, timer.entity].append(timer.id)
        self._keep_near(timer)
        return 1

    def _keep_near(self, timer: Timer) -> None:
        if self.horizon is not None and timer.mark > self.horizon:
            return  # A page will bring it.
        self._wheel.add(timer)
        if len(self._wheel) > 2 * self._page_timers and (last := self._wheel.cut(self._page_timers)) is not None:
            self.horizon = last

    def _cancel(self, command: CancelTimers, known: Known, now: datetime) -> int:
        """Cancel what is selected and was accepted before; see the module `commands` for what stays behind."""
        count = 0
        for timer in [*known.waiting.get(command.key, ()), *self._new_timers_of(command.key)]:
            if timer.id in self._changes.states or timer.sequence >= command.sequence:
                continue
            if not command.selection.selects(timer):
                continue
            self._wheel.remove(timer.id)
            self._record(timer, State.CANCELLED, command.cause, now)
            count += 1
        tombstone = Tombstone(
            tenant=command.tenant,
            entity=command.entity,
            sequence=command.sequence,
            selection=command.selection,
            cause=command.cause,
        )
        self._changes.tombstones.append(tombstone)
        self._buried[command.key].append(tombstone)
        origin = origin_of(command.entity)
        self._newest_tombstones[origin] = max(command.sequence, self._newest_tombstones.get(origin, 0))
        return count

    def _new_timers_of(self, key: Entity) -> list[Timer]:
        new = [self._changes.inserts[timer_id] for timer_id in self._inserted.get(key, ())]
        return [timer for timer in new if timer.state is State.SCHEDULED]

    def _put_facts(self, command: PutFacts, known: Known) -> tuple[int, Refusal | None]:
        before = self._changes.facts.get(command.key, known.facts.get(command.key, {}))
        merged = merge_patch(before, command.patch)
        if len(json.dumps(merged)) > MAX_FACTS_CHARACTERS:
            message = f"the facts of {command.entity} would exceed {MAX_FACTS_CHARACTERS} characters of JSON"
            return 0, (_FAILED_PRECONDITION, "TOO_MANY_FACTS", message)
        self._changes.facts[command.key] = merged
        return 1, None

    # Tombstones

    def _may_be_buried(self, command: Command) -> bool:
        """Whether a tombstone may lie for it: no cancel that has arrived was accepted later than the newest one."""
        return 0 < command.sequence < self._newest_tombstones.get(origin_of(command.entity), 0)

    def _tombstone_of(self, timer: Timer, known: Known) -> Tombstone | None:
        if timer.sequence == 0:
            return None
        key = (timer.tenant, timer.entity)
        for tombstone in chain(known.tombstones.get(key, ()), self._buried.get(key, ())):
            if timer.sequence < tombstone.sequence and tombstone.selection.selects(timer):
                return tombstone
        return None

    # Firing

    def take_due(self, now: datetime, limit: int) -> list[Timer]:
        """The next timers to fire, in order, at most `limit`; each must be given to `fire` in this turn."""
        return self._wheel.take_due(now, limit)

    @staticmethod
    def needs_to_fire(timers: Iterable[Timer]) -> Needs:
        """What must be known to fire timers."""
        needs = Needs()
        for timer in timers:
            if timer.condition:
                needs.facts.add((timer.tenant, timer.entity))
            if timer.step_of is not None:
                needs.timelines.add((timer.tenant, timer.step_of.timeline, timer.step_of.version))
        return needs

    def fire(
        self, timers: Sequence[Timer], known: Known, now: datetime, broken: Mapping[UUID, str] | None = None
    ) -> None:
        """Decide what becomes of timers whose time has come, and move the watermark past them (INV-2, INV-5).

        `broken`: timers that cannot be fired, and why; they fail.
        """
        if not timers:
            return
        self.watermark = self._changes.watermark = timers[-1].mark
        for timer in timers:
            if (error := (broken or {}).get(timer.id)) is not None:
                self._record(timer, State.FAILED, _note(error=error), now)
                continue
            try:
                state, note = self._verdict(timer, known, now)
                successors = self._successors(timer, known, now, has_fired=state is State.FIRED)
            except Exception as err:  # noqa: BLE001 - outermost frame of a timer: its siblings must fire all the same.
                self._record(timer, State.FAILED, _note(error=f"{type(err).__name__}: {err}"), now)
                continue
            if state is State.FIRED:
                self._changes.fired.append(timer)
            self._record(timer, state, note, now)
            for successor in successors:
                self._changes.inserts[successor.id] = successor
                self._keep_near(successor)

    def _verdict(self, timer: Timer, known: Known, now: datetime) -> tuple[State, str | None]:
        if timer.expires_at is not None and timer.expires_at <= now:
            return State.EXPIRED, None
        if not timer.condition:
            return State.FIRED, None
        key = (timer.tenant, timer.entity)
        facts = self._changes.facts.get(key, known.facts.get(key, {}))
        about = {"entity": timer.entity, "type": timer.type, "due": timer.due_at}
        try:
            verdict = compile_condition(timer.condition).decide(facts, about, now)
        except BadCondition as err:  # Accepted by another version; its siblings must fire all the same.
            return State.FAILED, _note(error=str(err))
        if verdict.error is not None:
            return State.FAILED, _note(error=verdict.error, facts=verdict.facts_read)
        note = _note(condition=timer.condition, holds=verdict.holds, facts=verdict.facts_read)
        return (State.FIRED if verdict.holds else State.SKIPPED), note

    def _record(self, timer: Timer, state: State, note: str | None, now: datetime) -> None:
        """Put a verdict on record; an unconditional firing needs none, the watermark says it."""
        if state is State.FIRED:
            if note is None:
                return
            state = State.SCHEDULED  # Behind the watermark this reads as fired.
        if timer.id in self._changes.inserts:
            self._changes.inserts[timer.id] = _decided(timer, state, now, note)
        else:
            self._changes.states[timer.id] = StateChange(timer_id=timer.id, state=state, decided_at=now, note=note)

    def _successors(self, timer: Timer, known: Known, now: datetime, *, has_fired: bool) -> list[Timer]:
        """What comes after a timer: its next occurrence whatever its verdict, its step's follow-ups if it fired."""
        successors = []
        if timer.recurrence is not None and (due_at := timer.recurrence.following(timer.due_at, now)) is not None:
            following = replace(
                timer,
                id=occurrence_id(timer.schedule_id, due_at),
                due_at=due_at,
                fire_at=fire_time(due_at, self.watermark),
                occurrence=timer.occurrence + 1,
                state=State.SCHEDULED,
                decided_at=None,
                note=None,
            )
            successors.append(following)
        if timer.step_of is not None and has_fired:
            timeline = known.timelines[timer.tenant, timer.step_of.timeline, timer.step_of.version]
            step = timeline.step(timer.step_of.step)
            successors += [
                step_timer(
                    follow_up,
                    timeline=timeline,
                    run_id=timer.step_of.run_id,
                    tenant=timer.tenant,
                    entity=timer.entity,
                    due_at=timer.due_at + follow_up.offset,
                    sequence=timer.sequence,
                    watermark=self.watermark,
                    shard=self.number,
                )
                for follow_up in (step.follow_ups if step else ())
            ]
        return successors

    def take_changes(self) -> Changes:
        """What this turn decided; the next turn begins."""
        changes = self._changes
        self._begin_turn()
        return changes


def _decided(timer: Timer, state: State, now: datetime, note: str | None) -> Timer:
    return replace(timer, state=state, decided_at=now, note=note)


def _note(**parts: object) -> str:
    """A verdict as a JSON object, cut to what may be stored."""
    text = json.dumps(parts, default=str)
    return text if len(text) <= _MAX_NOTE else json.dumps({"truncated": text[:_MAX_NOTE]})
