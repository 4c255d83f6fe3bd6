"""What digest's naive model is made of: the catalog, what comes, and where it waits; see digest_model."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

DAY = timedelta(days=1)
KEPT_RUNS = 90 * DAY
KEPT_OTHERWISE = 90 * DAY
"""Of notifications whose type is not known."""

Key = tuple[str, str, str, str, str]
"""What a window gathers for: subscriber, cadence, channel, format, style."""
ItemKey = tuple[UUID, str, str]
"""Notification, subscriber, choice: INV-6 says that each is in exactly one state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aligned:
    """At these whole hours of every day, in `zone` or (empty) the subscriber's."""

    hours: tuple[int, ...]
    zone: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rolling:
    """See the README; maximum 0 is none."""

    duration: timedelta
    extension: timedelta = timedelta(0)
    cap: timedelta | None = None
    maximum: int = 0
    is_leading: bool = False

    @property
    def full_at(self) -> int | None:
        """How many items make a window full, the one that leads included."""
        return self.maximum + self.is_leading if self.maximum else None


@dataclass(frozen=True, slots=True, kw_only=True)
class External:
    """Until its batch is triggered, or for as long as `fallback`."""

    batch: str
    fallback: timedelta


Cadence = Aligned | Rolling | External


@dataclass(frozen=True, slots=True, kw_only=True)
class Type:
    """A notification type; `needs_number`: its schema wants one in the payload."""

    default_cadence: str = "immediate"
    default_channel: str = "email"
    is_mandatory: bool = False
    retention: timedelta = KEPT_OTHERWISE
    needs_number: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscriber:
    """Somebody; `quiet` are hours of the day [from, until), over midnight if until is not later."""

    zone: str = "UTC"
    email: str = ""
    webhook_url: str = ""
    quiet: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way of being told; empty is left open."""

    cadence: str
    channel: str = ""
    style: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """`least` filters: the payload's number must be greater, if there is one."""

    subscriber: str
    type: str
    topic: str = ""
    choices: tuple[Choice, ...]
    least: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """One notification. `number` is its payload's, None for none."""

    id: UUID
    type: str
    subscribers: tuple[str, ...]
    topics: tuple[str, ...]
    entity: str
    number: int | None
    at: datetime
    expires: datetime | None
    sequence: int
    is_urgent: bool = False
    timeline: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """What takes items out of windows; empty matches everything."""

    entity: str
    type: str = ""
    timeline: str = ""
    sequence: int

    def matches(self, told: Told) -> bool:
        """Whether it is about this notification, and came after it."""
        return (
            told.entity == self.entity
            and told.sequence < self.sequence
            and self.type in ("", told.type)
            and self.timeline in ("", told.timeline)
        )


@dataclass(slots=True, kw_only=True, eq=False)
class Window:
    """`id` is the real one's, once it is known; `slot` tells open windows of one key apart."""

    key: Key
    kind: str
    opened_at: datetime
    due_at: datetime
    slot: datetime | None = None
    state: str = "open"
    is_held: bool = False
    is_urgent: bool = False
    batch: str = ""
    hours: tuple[int, ...] = ()  # Of aligned windows that follow their subscriber's zone.
    rolling: Rolling | None = None  # The rule it was opened with.
    latest_at: datetime | None = None
    placed: int = 0
    closed_at: datetime | None = None
    outcome: str = ""  # Of its digest, if there is one.
    told_at: datetime | None = None
    id: UUID | None = None


@dataclass(slots=True, kw_only=True)
class Item:
    """`ended_at` of what never had a window; the others end with theirs."""

    state: str
    reason: str = ""
    window: Window | None = None
    ended_at: datetime | None = None
