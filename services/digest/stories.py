"""What an explanation is told with: the entries of a story, and what is known of those in it. Pure.

Catalog and subscriptions are as they are when somebody asks: what was decided with them may have been decided by what
they were before. Sentences say so where it matters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID
from zoneinfo import ZoneInfo

from services.digest.catalog import Subscriber, WindowKind
from services.digest.views import DigestView, WindowView

_LONGEST_SENTENCE = 1_000
_LONGEST_QUOTE = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """One entry of a story; see carillon.explain.v1.Entry."""

    at: datetime
    kind: str
    sentence: str
    details: Mapping[str, str] = field(default_factory=dict)
    related: Sequence[str] = ()
    is_expected: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownType:
    """A notification type, as far as it decides about items."""

    id: str
    default_cadence: str
    is_mandatory: bool
    payload_schema: str
    retention: timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownCadence:
    """A cadence, as far as it can be said in words; `zone` empty: the subscriber's."""

    id: str
    name: str
    kind: WindowKind
    cron: str = ""
    rrule: str = ""
    zone: str = ""
    batch: str = ""
    duration: timedelta | None = None
    maximum_items: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownChoice:
    """One choice of a subscription; `type` may end with *. An empty topic: told directly."""

    subscription: str
    subscriber: str
    topic: str
    type: str
    cadence: str
    channel: str
    filter: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownCancel:
    """A cancel that is still on record; empty parts match everything."""

    entity: str
    type: str
    timeline: str
    timer_ids: Sequence[UUID]
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known at `now` of everything that a story mentions; what is missing does not exist, or no longer."""

    now: datetime
    windows: Mapping[UUID, WindowView] = field(default_factory=dict)
    digests: Mapping[UUID, DigestView] = field(default_factory=dict)
    subscribers: Mapping[str, Subscriber] = field(default_factory=dict)
    cadences: Mapping[str, KnownCadence] = field(default_factory=dict)
    types: Mapping[str, KnownType] = field(default_factory=dict)
    choices: Sequence[KnownChoice] = ()
    cancels: Sequence[KnownCancel] = ()

    def when(self, at: datetime, subscriber: str) -> str:
        """An instant as a clock on the subscriber's wall shows it."""
        known = self.subscribers.get(subscriber)
        return clock_time(at, known.zone if known else "UTC")

    def cadence(self, one_id: str) -> str:
        """What people call a cadence."""
        known = self.cadences.get(one_id)
        return known.name if known and known.name else one_id

    def deciding(self, type_id: str, subscriber: str, topics: Sequence[str]) -> list[KnownChoice]:
        """The choices that decide about a type for a subscriber: of each topic's, the most specific ones."""
        found: list[KnownChoice] = []
        for topic in ("", *topics):
            matching = [
                one
                for one in self.choices
                if one.subscriber == subscriber and one.topic == topic and _matches(one.type, type_id)
            ]
            best = max((_specificity(one.type) for one in matching), default=None)
            found += [one for one in matching if _specificity(one.type) == best]
        return found


def _matches(pattern: str, type_id: str) -> bool:
    return type_id.startswith(pattern[:-1]) if pattern.endswith("*") else type_id == pattern


def _specificity(pattern: str) -> tuple[bool, int]:
    return (not pattern.endswith("*"), len(pattern))


def clock_time(at: datetime, zone: str) -> str:
    """As in "Tue 3 Mar 2026, 08:00 (Europe/Berlin)"; seconds only where there are any."""
    try:
        local = at.astimezone(ZoneInfo(zone))
    except (KeyError, ValueError):  # It was one when it was put.
        local, zone = at.astimezone(UTC), "UTC"
    return f"{local:%a} {local.day} {local:%b %Y, %H:%M}{f':{local:%S}' if local.second else ''} ({zone})"


def quoted(text: str) -> str:
    """As much of somebody else's words as a sentence bears, on one line; the details have more."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_QUOTE else f"{line[: _LONGEST_QUOTE - 1]}…"


def counted(count: int, noun: str) -> str:
    """As in "1 item", "2 items"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: Sequence[str], most: int = 5) -> str:
    """As in "a, b and 3 more"."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def cut(text: str) -> str:
    """As much of a text as the contract lets a sentence have."""
    return text if len(text) <= _LONGEST_SENTENCE else f"{text[: _LONGEST_SENTENCE - 1]}…"
