"""What a shard is told, what it must know to obey, and what it decides. Pure data.

`Needs` → `Known`: before a decision the store reads what the commands and due timers touch, so that the decision itself
needs no I/O. `Changes`: everything a decision makes true, written in the transaction that decided it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any
from uuid import UUID

from services.scheduler.recurrence import Recurrence
from services.scheduler.timelines import Timeline
from services.scheduler.timer import Mark, State, TargetKind, Timer

Entity = tuple[str, str]
"""(tenant, entity)"""

Refusal = tuple[int, str, str]
"""Why a command changed nothing: (google.rpc.Code, reason, message)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What all commands have. `frame_id` and `index` say where the result goes."""

    frame_id: UUID
    index: int
    tenant: str
    entity: str
    sequence: int

    @property
    def key(self) -> Entity:
        """Whose command it is."""
        return (self.tenant, self.entity)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleTimer(Command):
    """Make a timer; with a recurrence, its first occurrence. `id` is the timer's, or the schedule's when it recurs."""

    id: UUID
    type: str
    due_at: datetime | None
    recurrence: Recurrence | None
    target_kind: TargetKind
    target: bytes
    condition: str
    expires_at: datetime | None
    accepted_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which timers of an entity; empty parts select all."""

    type: str = ""
    ids: frozenset[UUID] = frozenset()
    timeline: str = ""

    def selects(self, timer: Timer) -> bool:
        """Whether this timer, of the entity in question, is selected."""
        return (
            (not self.type or self.type == timer.type)
            and (not self.timeline or (timer.step_of is not None and self.timeline == timer.step_of.timeline))
            and (not self.ids or timer.id in self.ids or timer.schedule_id in self.ids)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelTimers(Command):
    """Cancel waiting timers, and those that were accepted earlier and have not arrived yet (INV-4)."""

    selection: Selection
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PutFacts(Command):
    """Merge facts (RFC 7396)."""

    patch: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartTimeline(Command):
    """Start the newest version of a timeline."""

    run_id: UUID
    timeline: str
    anchor_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Tombstone:
    """What a cancel leaves behind: whatever it selects and was accepted before `sequence` is born cancelled."""

    tenant: str
    entity: str
    sequence: int
    selection: Selection
    cause: str


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

    def __ior__(self, other: "Needs") -> "Needs":
        """Add what another shard needs."""
        for one in fields(self):
            getattr(self, one.name).update(getattr(other, one.name))
        return self


@dataclass(slots=True, kw_only=True)
class Known:
    """The answers to Needs. `waiting`: timers that have not fired yet; `ids`: timers and runs asked for that exist."""

    tombstones: dict[Entity, list[Tombstone]] = field(default_factory=dict)
    waiting: dict[Entity, list[Timer]] = field(default_factory=dict)
    facts: dict[Entity, dict[str, Any]] = field(default_factory=dict)
    newest_timelines: dict[tuple[str, str], Timeline] = field(default_factory=dict)
    timelines: dict[tuple[str, str, int], Timeline] = field(default_factory=dict)
    ids: set[UUID] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChange:
    """A timer's new state and the words on record about it."""

    timer_id: UUID
    state: State
    decided_at: datetime
    note: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a command gave, for its caller."""

    frame_id: UUID
    index: int
    changed: int = 0
    error: Refusal | None = None


@dataclass(slots=True, kw_only=True)
class Changes:
    """What one shard decided in one turn."""

    shard: int
    inserts: dict[UUID, Timer] = field(default_factory=dict)
    states: dict[UUID, StateChange] = field(default_factory=dict)
    tombstones: list[Tombstone] = field(default_factory=list)
    facts: dict[Entity, dict[str, Any]] = field(default_factory=dict)
    fired: list[Timer] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    watermark: Mark | None = None
