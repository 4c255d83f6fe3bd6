"""Timers, commands and a shard with a table, for the scheduler's unit tests."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any
from uuid import UUID

from msgspec.structs import asdict, replace

from libs.ids import derived_id, new_id
from libs.recurrence import Rule
from services.scheduler.attempts import EndedAttempt
from services.scheduler.commands import (
    BackfillSchedule,
    Changes,
    Command,
    Entity,
    OrderTimers,
    PutFacts,
    ReportOutcome,
    ScheduleTimer,
    StartTimeline,
    Tombstone,
    TriggerSchedule,
)
from services.scheduler.conditions import Answer, Question
from services.scheduler.facts import Facts
from services.scheduler.needs import Known, Needs, Past, needs_of_answers, needs_to_fire
from services.scheduler.orders import Action, Order, Selection
from services.scheduler.recurrence import Recurrence
from services.scheduler.shard import Shard
from services.scheduler.timelines import Step, Timeline
from services.scheduler.timer import BEGINNING, HAS_TURN, UNDER_WAY, Mark, State, TargetKind, Timer, origin_of

NOW = datetime(2013, 7, 1, 12, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)

_CHANGEABLE = frozenset(
    {
        *("state", "fire_at", "due_at", "asks", "holds", "attempts", "first_attempt_at", "last_error", "decided_at"),
        "note",
    }
)
"""The columns that the store updates."""


def timer(fire_at: datetime, timer_id: UUID | None = None) -> Timer:
    """A one-shot timer."""
    timer_id = timer_id or new_id()
    return Timer(
        id=timer_id,
        shard=0,
        tenant="acme",
        entity="e",
        type="",
        due_at=fire_at,
        fire_at=fire_at,
        target_kind=TargetKind.NOTIFICATION,
        target=b"",
        sequence=1,
        schedule_id=timer_id,
    )


def step(name: str, offset: timedelta, **more: Any) -> Step:
    """A step of a timeline."""
    plain = Step(name=name, offset=offset, condition="", target_kind=TargetKind.NOTIFICATION, target=b"")
    return replace(plain, **more)


def timeline(*steps: Step, name: str = "trial", version: int = 1) -> Timeline:
    """A timeline."""
    return Timeline(name=name, version=version, description="", steps=steps, created_at=NOW)


def hourly(
    *, cron: str = "0 * * * *", start: datetime = NOW, end: datetime | None = None, count: int = 0, **policies: Any
) -> Recurrence:
    """A recurrence at every full hour after NOW."""
    return Recurrence(rule=Rule(cron=cron, start=start, end=end, count=count), **policies)


def _silence(question: Question) -> Answer:
    return Answer(shard=0, timer_id=question.timer_id, number=question.number, holds=None, reason="it was silent")


@dataclass
class Table:
    """What Postgres would hold for one shard, and the turns of its actor.

    It answers what the actor says it needs and nothing else, as the real store does, and refuses what that would.
    """

    page_timers: int = 16
    read_at_most: int = 1_000
    now: datetime = NOW
    watermark: Mark = BEGINNING
    rows: dict[UUID, Timer] = field(default_factory=dict)
    facts: dict[Entity, Facts] = field(default_factory=dict)
    tombstones: list[Tombstone] = field(default_factory=list)
    timelines: list[Timeline] = field(default_factory=list)
    attempts: list[EndedAttempt] = field(default_factory=list)
    fired: list[Timer] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    sequences: Any = field(default_factory=lambda: count(1))
    shard: Shard = field(init=False)
    epoch: int = 0

    def __post_init__(self) -> None:
        self.take_over()

    def take_over(self) -> None:
        """Build the actor anew from what is stored."""
        self.epoch += 1
        newest: dict[str, int] = {}
        for stone in self.tombstones:
            origin = origin_of(stone.entity)
            newest[origin] = max(newest.get(origin, 0), stone.sequence)
        self.shard = Shard(
            number=0,
            epoch=self.epoch,
            watermark=self.watermark,
            newest_tombstones=newest,
            page_timers=self.page_timers,
            now=self.now,
        )

    # Commands

    def schedule(self, due_at: datetime | None, **more: Any) -> ScheduleTimer:
        """A schedule with the next sequence."""
        plain = ScheduleTimer(
            **self._common({key: more.pop(key) for key in ("entity", "sequence", "tenant") if key in more}),
            id=new_id(),
            type="",
            due_at=due_at,
            recurrence=None,
            target_kind=TargetKind.NOTIFICATION,
            target=b"",
            condition="",
            asked=None,
            expires_at=None,
            report_within=None,
            retry=None,
            accepted_at=NOW,
        )
        return replace(plain, **more)

    def event(self, due_at: datetime | None, **more: Any) -> ScheduleTimer:
        """A schedule of an event whose report may take a minute."""
        return self.schedule(due_at, **{"target_kind": TargetKind.EVENT, "report_within": MINUTE, **more})

    def cancel(self, entity: str = "e", *, sequence: int | None = None, **selection: Any) -> OrderTimers:
        """A cancel with the next sequence."""
        order = Order(action=Action.CANCEL, selection=_selection(selection), cause="a test says so")
        return self._order(entity, sequence, order)

    def pause(self, entity: str = "e", *, sequence: int | None = None, **selection: Any) -> OrderTimers:
        """A pause with the next sequence."""
        return self._order(entity, sequence, Order(action=Action.PAUSE, selection=_selection(selection)))

    def resume(self, entity: str = "e", *, sequence: int | None = None, **selection: Any) -> OrderTimers:
        """A resume with the next sequence."""
        return self._order(entity, sequence, Order(action=Action.RESUME, selection=_selection(selection)))

    def reschedule(
        self, due_at: datetime, entity: str = "e", *, sequence: int | None = None, **selection: Any
    ) -> OrderTimers:
        """A reschedule with the next sequence."""
        order = Order(action=Action.RESCHEDULE, selection=_selection(selection), due_at=due_at)
        return self._order(entity, sequence, order)

    def trigger(self, schedule_id: UUID, **more: Any) -> TriggerSchedule:
        """A trigger, due now."""
        return TriggerSchedule(**self._common(more), id=new_id(), schedule_id=schedule_id, due_at=self.now)

    def backfill(self, schedule_id: UUID, start: datetime, end: datetime, **more: Any) -> BackfillSchedule:
        """A backfill of (start, end]."""
        return BackfillSchedule(**self._common(more), schedule_id=schedule_id, start=start, end=end)

    def report(self, timer_id: UUID, attempt: int = 1, *, error: str = "", **more: Any) -> ReportOutcome:
        """A report: done, or failed where there is an error."""
        return ReportOutcome(**self._common(more), timer_id=timer_id, attempt=attempt, is_done=not error, error=error)

    def put_facts(self, **patch: Any) -> PutFacts:
        """Facts of e."""
        return PutFacts(**self._common({}), patch=patch)

    def start(self, anchor_at: datetime = NOW, name: str = "trial", **more: Any) -> StartTimeline:
        """A start of a timeline for e."""
        return StartTimeline(
            **self._common(more), run_id=derived_id("run", name, anchor_at), timeline=name, anchor_at=anchor_at
        )

    def _order(self, entity: str, sequence: int | None, order: Order) -> OrderTimers:
        return OrderTimers(**self._common({"entity": entity, "sequence": sequence}), order=order)

    def _common(self, more: dict[str, Any]) -> dict[str, Any]:
        sequence = more.get("sequence")
        return {
            "frame_id": UUID(int=0),
            "index": 0,
            "tenant": more.get("tenant", "acme"),
            "entity": more.get("entity", "e"),
            "sequence": next(self.sequences) if sequence is None else sequence,
        }

    # Turns

    def turn(
        self,
        *commands: Command,
        answers: Iterable[Answer] = (),
        most_timers: int = 1_000,
        broken: dict[UUID, str] | None = None,
    ) -> Changes:
        """One turn at `now`, committed."""
        self._read_page()
        answers = list(answers)
        needs = self.shard.needs(commands)
        needs |= needs_of_answers(answers)
        known = self.load(needs)
        self.shard.handle(commands, known, self.now)
        self.shard.answer(answers, known, self.now)
        due = self.shard.take_due(self.now, most_timers)
        self.shard.fire(due, self.load(needs_to_fire(due)), self.now, broken)
        changes = self.shard.take_changes()
        self._write(changes)
        return changes

    def run(
        self, *commands: Command, answers: Iterable[Answer] = (), until: datetime | timedelta | None = None
    ) -> list[Timer]:
        """Turns until nothing is due at `until` (an instant, or so long from now); what they fired."""
        self.now = self.now + until if isinstance(until, timedelta) else until or self.now
        before = len(self.fired)
        self.turn(*commands, answers=answers)
        while self.shard.wants_page() is not None or ((at := self.shard.next_at()) is not None and at <= self.now):
            self.turn()
        return self.fired[before:]

    def go(self, until: datetime) -> list[Timer]:
        """Turns at each instant at which something is due, as if nothing was ever late; what they fired.

        Services that are asked meanwhile are silent.
        """
        before = len(self.fired)
        self.run()
        while (at := self.shard.next_at()) is not None and at <= until:
            asked = len(self.questions)
            self.run(until=max(at, self.now))
            if silences := [_silence(question) for question in self.questions[asked:]]:
                self.turn(answers=silences)
        self.run(until=until)
        return self.fired[before:]

    def answer(self, holds: bool | None, reason: str = "", *, number: int | None = None) -> Answer:
        """An answer to the last question."""
        question = self.questions[-1]
        return Answer(shard=0, timer_id=question.timer_id, number=number or question.number, holds=holds, reason=reason)

    def state_of(self, timer_id: UUID) -> State:
        """As the API tells it."""
        row = self.rows[timer_id]
        return State.FIRED if row.state is State.SCHEDULED and row.mark <= self.watermark else row.state

    def waiting(self) -> list[Timer]:
        """What has not fired and is not decided, in firing order."""
        rows = [row for row in self.rows.values() if row.state is State.SCHEDULED and row.mark > self.watermark]
        return sorted(rows, key=lambda row: row.mark)

    def of(self, schedule_id: UUID) -> list[Timer]:
        """A schedule's timers, as they came into being."""
        return [row for row in self.rows.values() if row.schedule_id == schedule_id]

    # The store

    def _read_page(self) -> None:
        after = self.shard.wants_page()
        if after is not None:
            having_turn = [row for row in self.rows.values() if row.state in HAS_TURN and row.mark > after]
            limit = min(self.shard.next_page, self.read_at_most)
            self.shard.add_page(sorted(having_turn, key=lambda row: row.mark)[:limit], limit)

    def load(self, needs: Needs) -> Known:
        """What is needed, as services.scheduler.store.TurnStore.load answers."""
        rows = sorted(self.rows.values(), key=lambda row: row.mark)
        ids = {*self.rows, *(row.schedule_id for row in rows)}
        known = Known(
            ids=(ids & needs.ids) | ({row.step_of.run_id for row in rows if row.step_of} & needs.runs),
            facts={key: facts for key, facts in self.facts.items() if key in needs.facts},
            timers={timer_id: self.rows[timer_id] for timer_id in needs.timers & self.rows.keys()},
        )
        for stone in self.tombstones:
            if (key := (stone.tenant, stone.entity)) in needs.tombstones:
                known.tombstones.setdefault(key, []).append(stone)
        for row in rows:
            is_open = row.state in UNDER_WAY or row.state is State.PAUSED
            is_open = is_open or (row.state is State.SCHEDULED and row.mark > self.watermark)
            if is_open and (key := (row.tenant, row.entity)) in needs.waiting:
                known.waiting.setdefault(key, []).append(row)
        for one in self.timelines:  # Ascending by version.
            if ("acme", one.name) in needs.newest_timelines:
                known.newest_timelines["acme", one.name] = one
            if ("acme", one.name, one.version) in needs.timelines:
                known.timelines["acme", one.name, one.version] = one
        self._load_schedules(needs, known)
        return known

    def _load_schedules(self, needs: Needs, known: Known) -> None:
        siblings = needs.siblings | {one.schedule_id for one in known.timers.values() if one.schedule_id != one.id}
        for row in self.rows.values():
            if row.schedule_id == row.id:
                continue
            if row.schedule_id in siblings and row.is_under_way:
                known.siblings.setdefault(row.schedule_id, []).append(row)
            if row.schedule_id in needs.schedules and row.recurrence is not None and row.nominal_at is not None:
                newest = known.schedules.get(row.schedule_id)
                if newest is None or newest.nominal_at is None or newest.nominal_at < row.nominal_at:
                    known.schedules[row.schedule_id] = row
            for wanted in needs.ranges:
                schedule_id, after, until = wanted
                if row.schedule_id == schedule_id and row.nominal_at is not None and after < row.nominal_at <= until:
                    is_over = row.state in {State.SKIPPED, State.EXPIRED}
                    past = Past(timer_id=row.id, nominal_at=row.nominal_at, is_over=is_over)
                    known.ranges.setdefault(wanted, []).append(past)

    def _write(self, changes: Changes) -> None:
        assert not changes.inserts.keys() & self.rows.keys(), "COPY would refuse a second row with the same id"
        for timer_id, row in changes.updates.items():
            changed = {name: value for name, value in asdict(row).items() if name in _CHANGEABLE}
            stored = replace(self.rows[timer_id], **changed)
            assert stored == row, "the store does not update other columns"
            self.rows[timer_id] = stored
        self.rows |= changes.inserts
        numbers = [(one.timer_id, one.number) for one in (*self.attempts, *changes.attempts)]
        assert len(numbers) == len(set(numbers)), "COPY would refuse a second row for the same attempt"
        self.attempts += changes.attempts
        self.facts |= changes.facts
        self.tombstones += changes.tombstones
        self.questions += changes.questions
        if changes.watermark is not None:
            assert changes.watermark > self.watermark, "INV-5: the watermark never moves back"
            self.watermark = changes.watermark
        self.fired += changes.fired


def ids(timers: Iterable[Timer | ScheduleTimer]) -> list[UUID]:
    """Their ids."""
    return [one.id for one in timers]


def _selection(parts: dict[str, Any]) -> Selection:
    """`ids` may be any iterable."""
    return Selection(**parts | ({"ids": frozenset(parts["ids"])} if "ids" in parts else {}))
