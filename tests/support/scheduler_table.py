"""Timers, commands and a shard with a table, for the scheduler's unit tests."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any
from uuid import UUID

from libs.ids import derived_id, new_id
from services.scheduler.commands import (
    CancelTimers,
    Changes,
    Command,
    Entity,
    Known,
    PutFacts,
    ScheduleTimer,
    Selection,
    StartTimeline,
    Tombstone,
)
from services.scheduler.shard import Shard
from services.scheduler.timelines import Step, Timeline
from services.scheduler.timer import BEGINNING, Mark, State, TargetKind, Timer

NOW = datetime(2013, 7, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)


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
    return Step(
        name=name,
        offset=offset,
        target_kind=TargetKind.NOTIFICATION,
        target=b"",
        **{"condition": "", "follow_ups": (), **more},
    )


def timeline(*steps: Step, name: str = "trial", version: int = 1) -> Timeline:
    """A timeline."""
    return Timeline(name=name, version=version, description="", steps=steps, created_at=NOW)


@dataclass
class Table:
    """What Postgres would hold for one shard, and the turns of its actor."""

    page_timers: int = 16
    now: datetime = NOW
    watermark: Mark = BEGINNING
    rows: dict[UUID, Timer] = field(default_factory=dict)
    facts: dict[Entity, dict[str, Any]] = field(default_factory=dict)
    tombstones: list[Tombstone] = field(default_factory=list)
    timelines: list[Timeline] = field(default_factory=list)
    fired: list[Timer] = field(default_factory=list)
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
            newest[""] = max(newest.get("", 0), stone.sequence)
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
            **self._common({}),
            id=new_id(),
            type="",
            due_at=due_at,
            recurrence=None,
            target_kind=TargetKind.NOTIFICATION,
            target=b"",
            condition="",
            expires_at=None,
            accepted_at=NOW,
        )
        return replace(plain, **more)

    def cancel(self, entity: str = "e", *, sequence: int | None = None, **selection: Any) -> CancelTimers:
        """A cancel with the next sequence."""
        return CancelTimers(
            **self._common({"entity": entity} | ({"sequence": sequence} if sequence is not None else {})),
            selection=Selection(**selection),
            cause="a test says so",
        )

    def put_facts(self, **patch: Any) -> PutFacts:
        """Facts of e."""
        return PutFacts(**self._common({}), patch=patch)

    def start(self, anchor_at: datetime = NOW, name: str = "trial", **more: Any) -> StartTimeline:
        """A start of a timeline for e."""
        return StartTimeline(
            **self._common(more), run_id=derived_id("run", name, anchor_at), timeline=name, anchor_at=anchor_at
        )

    def _common(self, more: dict[str, Any]) -> dict[str, Any]:
        sequence = more["sequence"] if "sequence" in more else next(self.sequences)
        return {
            "frame_id": UUID(int=0),
            "index": 0,
            "tenant": "acme",
            "entity": more.get("entity", "e"),
            "sequence": sequence,
        }

    # Turns

    def turn(self, *commands: Command, most_timers: int = 1_000, broken: dict[UUID, str] | None = None) -> Changes:
        """One turn at `now`, committed."""
        self._read_page()
        self.shard.needs(commands)
        self.shard.handle(commands, self._known(), self.now)
        due = self.shard.take_due(self.now, most_timers)
        self.shard.needs_to_fire(due)
        self.shard.fire(due, self._known(), self.now, broken)
        changes = self.shard.take_changes()
        self._write(changes)
        return changes

    def run(self, *commands: Command, until: datetime | None = None) -> list[Timer]:
        """Turns until nothing is due at `until`; what they fired."""
        self.now = until or self.now
        before = len(self.fired)
        self.turn(*commands)
        while self.shard.wants_page() is not None or ((at := self.shard.next_at()) is not None and at <= self.now):
            self.turn()
        return self.fired[before:]

    def state_of(self, timer_id: UUID) -> State:
        """As the API tells it."""
        row = self.rows[timer_id]
        return State.FIRED if row.state is State.SCHEDULED and row.mark <= self.watermark else row.state

    def waiting(self) -> list[Timer]:
        """What has not fired and is not decided, in firing order."""
        rows = [row for row in self.rows.values() if row.state is State.SCHEDULED and row.mark > self.watermark]
        return sorted(rows, key=lambda row: row.mark)

    def _read_page(self) -> None:
        after = self.shard.wants_page()
        if after is not None:
            self.shard.add_page([row for row in self.waiting() if row.mark > after][: self.page_timers])

    def _known(self) -> Known:
        known = Known(facts=dict(self.facts), ids=set(self.rows))
        for row in self.waiting():
            known.waiting.setdefault((row.tenant, row.entity), []).append(row)
        for row in self.rows.values():
            known.ids.add(row.schedule_id)
            if row.step_of:
                known.ids.add(row.step_of.run_id)
        for stone in self.tombstones:
            known.tombstones.setdefault((stone.tenant, stone.entity), []).append(stone)
        for one in self.timelines:
            known.newest_timelines["acme", one.name] = one
            known.timelines["acme", one.name, one.version] = one
        return known

    def _write(self, changes: Changes) -> None:
        assert not changes.inserts.keys() & self.rows.keys(), "COPY would refuse a second row with the same id"
        self.rows |= changes.inserts
        for change in changes.states.values():
            self.rows[change.timer_id] = replace(
                self.rows[change.timer_id], state=change.state, decided_at=change.decided_at, note=change.note
            )
        self.facts |= changes.facts
        self.tombstones += changes.tombstones
        if changes.watermark is not None:
            assert changes.watermark > self.watermark, "INV-5: the watermark never moves back"
            self.watermark = changes.watermark
        self.fired += changes.fired


def ids(timers: Iterable[Timer | ScheduleTimer]) -> list[UUID]:
    """Their ids."""
    return [one.id for one in timers]
