"""Timers: durable future events of entities, and their place in a shard's firing order. Pure."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import NamedTuple
from uuid import UUID

from msgspec import Struct

from libs.trace_points import NOWHERE, Point
from services.scheduler.attempts import RetryPolicy
from services.scheduler.conditions import ServiceCondition
from services.scheduler.recurrence import Recurrence

INTERNAL_PREFIX = "carillon:"
"""Entities of timers that services set for themselves; callers cannot use it."""


class Mark(NamedTuple):
    """A place in a shard's firing order: timers fire in `(at, id)` order (INV-5)."""

    at: datetime
    id: UUID


BEGINNING = Mark(datetime(1970, 1, 1, tzinfo=UTC), UUID(int=0))
"""The watermark of a shard that has never fired."""

_TICK = timedelta(microseconds=1)  # Postgres's resolution.


class State(IntEnum):
    """What is stored of a timer's state; numbers as in scheduler.v1.TimerState.

    FIRED is never stored: it is `SCHEDULED and mark <= watermark`, so that firing updates no timer row. Timers in these
    states have their turn at `fire_at` (`HAS_TURN`): SCHEDULED and RETRYING to fire, AWAITING when its report is
    overdue, ASKING to ask again.
    """

    SCHEDULED = 1
    PAUSED = 2
    FIRED = 3
    SKIPPED = 4
    CANCELLED = 5
    EXPIRED = 6
    DONE = 7
    FAILED = 8
    AWAITING = 9
    ASKING = 10
    BUFFERED = 11
    RETRYING = 12


HAS_TURN = frozenset({State.SCHEDULED, State.AWAITING, State.ASKING, State.RETRYING})
"""States in which something happens at `fire_at`; the wheel and the pages hold these."""

UNDER_WAY = frozenset({State.AWAITING, State.ASKING, State.BUFFERED, State.RETRYING})
"""States of a timer whose time has come and whose outcome has not. What follows it has been made already."""


class TargetKind(IntEnum):
    """What a timer does when it fires; numbers as the fields of link.v1.TimerTarget."""

    NOTIFICATION = 1
    EVENT = 2
    CLOSE_WINDOW = 3
    REQUEST_DUE = 4
    RETRY_DELIVERY = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOf:
    """Which step of which started timeline a timer is."""

    run_id: UUID
    timeline: str
    version: int
    step: str


class Timer(Struct, frozen=True, kw_only=True, gc=False):
    """A timer as it is stored. `target` is opaque here: a serialized link.v1.TimerTarget of `target_kind`.

    `sequence` orders it against cancels (0: none can overtake it); occurrences and follow-ups inherit it. A Struct,
    because tens of thousands are made a second, and a frozen dataclass of this size costs twelve times as much.

    `nominal_at`: an occurrence's time by its rule. `asks` and `holds`: how many questions to its condition's
    service came to no answer, and what it said. `report_within`: how long the service that gets its event may take to
    report; None: no report is expected. `trace`: what set it, where that is traced; what it does links to that.
    """

    id: UUID
    shard: int
    tenant: str
    entity: str
    type: str
    due_at: datetime
    fire_at: datetime
    target_kind: TargetKind
    target: bytes
    sequence: int
    schedule_id: UUID
    occurrence: int = 0
    recurrence: Recurrence | None = None
    nominal_at: datetime | None = None
    condition: str = ""
    asked: ServiceCondition | None = None
    expires_at: datetime | None = None
    step_of: StepOf | None = None
    report_within: timedelta | None = None
    retry: RetryPolicy | None = None
    asks: int = 0
    holds: bool | None = None
    attempts: int = 0
    first_attempt_at: datetime | None = None
    last_error: str | None = None
    state: State = State.SCHEDULED
    decided_at: datetime | None = None
    note: str | None = None
    trace: Point = NOWHERE

    @property
    def is_plain(self) -> bool:
        """Whether it just fires: nothing is to be decided, and nothing follows. The great majority."""
        return (
            self.state is State.SCHEDULED
            and not self.condition
            and self.recurrence is None
            and self.step_of is None
            and self.asked is None
            and self.expires_at is None
            and self.report_within is None
        )

    @property
    def is_held_back(self) -> bool:
        """Whether it is paused, and its time has not come otherwise."""
        return self.state is State.PAUSED and self.attempts == 0

    @property
    def is_under_way(self) -> bool:
        """Whether its time has come and its outcome has not, a paused retry included."""
        return self.state in UNDER_WAY or (self.state is State.PAUSED and self.attempts > 0)

    @property
    def mark(self) -> Mark:
        """Its place in the firing order."""
        return Mark(self.fire_at, self.id)


def fire_time(due_at: datetime, watermark: Mark) -> datetime:
    """When a timer that arrives now takes its turn: when due, or just after the watermark where it came late."""
    return due_at if due_at > watermark.at else watermark.at + _TICK


def origin_of(entity: str) -> str:
    """Whose sequence numbers an entity's commands carry: "" for callers' (intake), else the kind of internal entity.

    Sequences of different services are not comparable; each entity only ever sees one service's.
    """
    return entity.split(":", 2)[1] if entity.startswith(INTERNAL_PREFIX) else ""
