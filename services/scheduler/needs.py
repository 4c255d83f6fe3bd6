"""What must be read before a shard can decide, and the answers. Pure data.

Before a turn decides, the store reads what its commands and due timers touch, all at once; so the decision itself needs
no I/O.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from datetime import datetime
from uuid import UUID

from msgspec import Struct

from services.scheduler.commands import (
    BackfillSchedule,
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
from services.scheduler.conditions import Answer
from services.scheduler.facts import Facts
from services.scheduler.recurrence import Overlap
from services.scheduler.timelines import Timeline
from services.scheduler.timer import Timer


class Past(Struct, frozen=True, kw_only=True):
    """An occurrence that was made, for a backfill. `is_over`: it ended without having fired."""

    timer_id: UUID
    nominal_at: datetime
    is_over: bool


Range = tuple[UUID, datetime, datetime]
"""(schedule, start, end]"""


@dataclass(slots=True, kw_only=True)
class Needs:
    """What must be read before a decision."""

    tombstones: set[Entity] = field(default_factory=set)
    waiting: set[Entity] = field(default_factory=set)
    facts: set[Entity] = field(default_factory=set)
    newest_timelines: set[tuple[str, str]] = field(default_factory=set)
    timelines: set[tuple[str, str, int]] = field(default_factory=set)
    ids: set[UUID] = field(default_factory=set)
    runs: set[UUID] = field(default_factory=set)
    timers: set[UUID] = field(default_factory=set)
    schedules: set[UUID] = field(default_factory=set)
    ranges: set[Range] = field(default_factory=set)
    siblings: set[UUID] = field(default_factory=set)

    def __ior__(self, other: "Needs") -> "Needs":
        """Add what another shard needs."""
        for one in fields(self):
            getattr(self, one.name).update(getattr(other, one.name))
        return self


@dataclass(slots=True, kw_only=True)
class Known:
    """The answers to Needs.

    `waiting`: an entity's timers that may still do something, in firing order. `ids`: timers, schedules and runs asked
    for that exist. `timers`: those asked for by id, in any state. `schedules`: the newest occurrence of each. `ranges`:
    the occurrences made in each. `siblings`: what is under way of each schedule, those of `timers` included.
    """

    tombstones: dict[Entity, list[Tombstone]] = field(default_factory=dict)
    waiting: dict[Entity, list[Timer]] = field(default_factory=dict)
    facts: dict[Entity, Facts] = field(default_factory=dict)
    newest_timelines: dict[tuple[str, str], Timeline] = field(default_factory=dict)
    timelines: dict[tuple[str, str, int], Timeline] = field(default_factory=dict)
    ids: set[UUID] = field(default_factory=set)
    timers: dict[UUID, Timer] = field(default_factory=dict)
    schedules: dict[UUID, Timer] = field(default_factory=dict)
    ranges: dict[Range, list[Past]] = field(default_factory=dict)
    siblings: dict[UUID, list[Timer]] = field(default_factory=dict)


def needs_of(commands: Iterable[Command], may_be_buried: Callable[[Command], bool]) -> Needs:
    """What must be known to handle commands; `may_be_buried`: whether a tombstone may lie for one."""
    needs = Needs()
    for command in commands:
        _add(needs, command)
        if isinstance(command, _ORDERLY) and may_be_buried(command):
            needs.tombstones.add(command.key)
    return needs


_ORDERLY = (ScheduleTimer, StartTimeline, OrderTimers, TriggerSchedule, BackfillSchedule)
"""Commands that make or change timers, and so must obey the orders accepted after them."""


def _add(needs: Needs, command: Command) -> None:
    match command:
        case ScheduleTimer():
            if command.id.version != 7:  # Only derived ids can come twice; a frame is applied once.
                needs.ids.add(command.id)
        case StartTimeline():
            needs.newest_timelines.add((command.tenant, command.timeline))
            needs.runs.add(command.run_id)
        case OrderTimers():
            needs.waiting.add(command.key)
        case PutFacts():
            needs.facts.add(command.key)
        case ReportOutcome():
            needs.timers.add(command.timer_id)
        case TriggerSchedule():
            needs.schedules.add(command.schedule_id)
        case BackfillSchedule():
            needs.schedules.add(command.schedule_id)
            needs.ranges.add((command.schedule_id, command.start, command.end))


def needs_of_answers(answers: Iterable[Answer]) -> Needs:
    """What must be known to take in answers."""
    return Needs(timers={one.timer_id for one in answers})


def needs_to_fire(timers: Iterable[Timer]) -> Needs:
    """What must be known to fire timers."""
    needs = Needs()
    for timer in timers:
        if timer.condition or timer.asked is not None:
            needs.facts.add((timer.tenant, timer.entity))
        if timer.step_of is not None:
            needs.timelines.add((timer.tenant, timer.step_of.timeline, timer.step_of.version))
        overlap = Overlap.ALLOW if timer.recurrence is None else timer.recurrence.overlap
        is_extra = timer.recurrence is None and timer.schedule_id != timer.id  # Occurrences may wait for its end, too.
        if is_extra or overlap is not Overlap.ALLOW:
            needs.siblings.add(timer.schedule_id)
    return needs
