"""What the links bring to digest, and what applying it gives. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from msgspec import Struct

from libs.ids import derived_id
from libs.trace_points import NOWHERE, Point
from services.digest.catalog import ItemState, Priority


class Notification(Struct, frozen=True, kw_only=True, gc=False):
    """One thing that happened. `sequence` orders it against cancels; 0: none of them came before it.

    They come by the thousand, and a Struct is made in a fifth of the time that a frozen dataclass takes. `trace`, here
    and below: what caused it, where that is traced.
    """

    tenant: str
    id: UUID
    type: str
    entity: str
    group_key: str
    payload: str
    subscribers: Sequence[str]
    topics: Sequence[str]
    occurred_at: datetime
    expires_at: datetime | None = None
    timer_id: UUID | None = None
    schedule_id: UUID | None = None
    timer_type: str = ""
    timeline: str = ""
    sequence: int = 0
    priority: Priority = Priority.NORMAL
    trace: Point = NOWHERE


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Takes what waits about an entity out of windows; empty fields match everything."""

    tenant: str
    entity: str
    type: str = ""
    timer_ids: Sequence[UUID] = ()
    timeline: str = ""
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """A window's timer has fired, for the due time it was set to."""

    tenant: str
    window_id: UUID
    due_at: datetime
    trace: Point = NOWHERE


@dataclass(frozen=True, slots=True, kw_only=True)
class Trigger:
    """A batch is to close what was opened up to the end of its logical window."""

    tenant: str
    batch: str
    start_at: datetime | None
    end_at: datetime
    trace: Point = NOWHERE


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a delivery: sent, dead, suppressed, held or expired."""

    tenant: str
    digest_id: UUID
    delivery_id: UUID
    outcome: str
    reason: str
    ended_at: datetime | None


class WindowTimer(Struct, frozen=True, kw_only=True, gc=False):
    """A window asks to be woken at its due time.

    `own_id` is new and given where the window may have asked for that time before: a timer that has fired never does
    again, whatever asks for its id.
    """

    tenant: str
    window_id: UUID
    due_at: datetime
    trace: Point = NOWHERE
    own_id: UUID | None = None

    @property
    def id(self) -> UUID:
        """Without an own one the same whenever this window asks for this time."""
        return self.own_id or derived_id("window-timer", self.window_id, self.due_at.isoformat())

    @property
    def entity(self) -> str:
        """The reserved entity whose timers wake the window."""
        return f"carillon:window:{self.window_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one expansion made of a choice, as metrics count it; `reason` is empty unless it was suppressed."""

    state: ItemState
    is_alone: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Expanded:
    """What expanding gave: how many notifications were new, timers to ask for, how many items got which verdict.

    `refused` says of notifications, by tenant and id, what is wrong with their payloads.
    """

    notifications: int = 0
    timers: Sequence[WindowTimer] = ()
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    refused: Mapping[tuple[str, UUID], str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """What one Cancel hit: items taken out, and items that had already left."""

    items: int = 0
    already_left: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Woken:
    """What windows' timers did: those to be asked for `again`, and how many windows of batches closed untriggered."""

    again: Sequence[WindowTimer] = ()
    batch_windows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Triggered:
    """What one Trigger closed."""

    windows: int = 0
    is_repeated: bool = False
