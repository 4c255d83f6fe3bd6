"""What a shard is told, and what it decides. Pure data.

`Changes`: everything a turn makes true, written in the transaction that decided it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from msgspec import Struct

from libs.trace_points import NOWHERE, Point
from services.scheduler.attempts import EndedAttempt, RetryPolicy
from services.scheduler.conditions import Question, ServiceCondition
from services.scheduler.facts import Facts
from services.scheduler.orders import Order
from services.scheduler.recurrence import Recurrence
from services.scheduler.timer import Mark, TargetKind, Timer

Entity = tuple[str, str]
"""(tenant, entity)"""

Refusal = tuple[int, str, str]
"""Why a command changed nothing: (google.rpc.Code, reason, message)."""


class Command(Struct, frozen=True, kw_only=True, gc=False):
    """What all commands have. `frame_id` and `index` say where the result goes, `trace` who caused it, if traced."""

    frame_id: UUID
    index: int
    tenant: str
    entity: str
    sequence: int
    trace: Point = NOWHERE

    @property
    def key(self) -> Entity:
        """Whose command it is."""
        return (self.tenant, self.entity)


class ScheduleTimer(Command, frozen=True, kw_only=True):
    """Make a timer; with a recurrence, its first occurrence after `accepted_at`.

    `id` is the timer's, or the schedule's when it recurs.
    """

    id: UUID
    type: str
    due_at: datetime | None
    recurrence: Recurrence | None
    target_kind: TargetKind
    target: bytes
    condition: str
    asked: ServiceCondition | None
    expires_at: datetime | None
    report_within: timedelta | None
    retry: RetryPolicy | None
    accepted_at: datetime | None


class OrderTimers(Command, frozen=True, kw_only=True):
    """Cancel, pause, resume or reschedule waiting timers, and those accepted earlier that have not arrived (INV-4)."""

    order: Order


class PutFacts(Command, frozen=True, kw_only=True):
    """Merge facts (RFC 7396)."""

    patch: Mapping[str, Any]


class StartTimeline(Command, frozen=True, kw_only=True):
    """Start the newest version of a timeline."""

    run_id: UUID
    timeline: str
    anchor_at: datetime


class TriggerSchedule(Command, frozen=True, kw_only=True):
    """Fire a schedule once more, as the timer `id`."""

    id: UUID
    schedule_id: UUID
    due_at: datetime


class BackfillSchedule(Command, frozen=True, kw_only=True):
    """Make up for the occurrences in (start, end] that have not fired."""

    schedule_id: UUID
    start: datetime
    end: datetime


class ReportOutcome(Command, frozen=True, kw_only=True):
    """What came of an event, as the business service tells it."""

    timer_id: UUID
    attempt: int
    is_done: bool
    error: str


class Tombstone(Struct, frozen=True, kw_only=True):
    """What an order leaves behind: whatever it selects and was accepted before `sequence` obeys it on arrival."""

    tenant: str
    entity: str
    sequence: int
    order: Order


class Outcome(Struct, frozen=True, kw_only=True, gc=False):
    """What a command gave, for its caller. `is_news`: it says more than that the command was obeyed."""

    frame_id: UUID
    index: int
    changed: int = 0
    already_left: int = 0
    error: Refusal | None = None
    is_news: bool = True


@dataclass(slots=True, kw_only=True)
class Changes:
    """What one shard decided in one turn. `updates`: timers that were there before, as they are now.

    For those who measure: `due`, how many timers had their time, and `due_since`, since when timers could have been
    fired that were asked for when their due time had passed.
    """

    shard: int
    inserts: dict[UUID, Timer] = field(default_factory=dict)
    updates: dict[UUID, Timer] = field(default_factory=dict)
    attempts: list[EndedAttempt] = field(default_factory=list)
    tombstones: list[Tombstone] = field(default_factory=list)
    facts: dict[Entity, Facts] = field(default_factory=dict)
    fired: list[Timer] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    watermark: Mark | None = None
    due: int = 0
    due_since: dict[UUID, datetime] = field(default_factory=dict)
