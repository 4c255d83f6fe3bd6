"""What is known beforehand: notification types, subscribers, subscriptions, cadences, templates. Pure.

Words are stored and compared as they are written here; `""` means "not chosen" wherever a choice may be left open.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from enum import IntEnum, StrEnum

from libs.recurrence import Rule, zone_of

IMMEDIATE = "immediate"
OFF = "off"

# RRULEs of cadences count their intervals from here, a Monday, in the zone of the rule, as the contract says. Fixed, or
# every restart would shift "every second week".
_RULE_START = datetime(2000, 1, 3)  # noqa: DTZ001 - local time, whatever the zone.

DEFAULT_RETENTION = timedelta(days=90)
"""Of types that say nothing, of types that are gone, and of what has no type."""


class Channel(StrEnum):
    """How a message travels."""

    EMAIL = "email"
    WEBHOOK = "webhook"
    APPRISE = "apprise"
    LOG = "log"


class Format(StrEnum):
    """How a message is written."""

    HTML = "html"
    TEXT = "text"
    JSON = "json"


class Style(StrEnum):
    """How much of each item a message shows."""

    FULL = "full"
    SUMMARY = "summary"


class Priority(IntEnum):
    """How urgent what leaves is; digests are NORMAL. The numbers are stored, and are the contract's."""

    LOW = 1
    NORMAL = 2
    HIGH = 3


class WindowKind(IntEnum):
    """What closes a window: nothing (it holds one item, sent alone), its boundary, its batch's trigger, or its age."""

    ALONE = 1
    ALIGNED = 2
    EXTERNAL = 3
    ROLLING = 4


class WindowState(IntEnum):
    """Where a window is in its life; the numbers are stored, and are the contract's."""

    OPEN = 1
    CLOSING = 2
    CLOSED = 3


class ItemState(IntEnum):
    """Where an item is (INV-6: always exactly one); the numbers are stored, and are the contract's."""

    PENDING = 1
    DIGESTED = 2
    SENT_ALONE = 3
    SUPPRESSED = 4
    CANCELLED = 5
    EXPIRED = 6
    DEAD = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class NotificationType:
    """A catalog entry. `default_cadence` is a cadence's id, IMMEDIATE or OFF; `payload_schema` empty: any object.

    Its items are kept for `retention` after they went out, or ended otherwise. `formatting_service` writes them (see
    formatting.py); empty: templates do.
    """

    id: str
    name: str
    description: str = ""
    default_cadence: str = IMMEDIATE
    default_channel: Channel = Channel.EMAIL
    is_mandatory: bool = False
    payload_schema: str = ""
    retention: timedelta = DEFAULT_RETENTION
    formatting_service: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuietRange:
    """Local times of day at which nothing is sent, by one channel or (None) by any; see quiet.py."""

    start: time
    until: time
    channel: Channel | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscriber:
    """Somebody who is told; an empty address is none."""

    id: str
    zone: str = "UTC"
    locale: str = "en"
    email: str = ""
    webhook_url: str = ""
    apprise_url: str = ""
    quiet_hours: tuple[QuietRange, ...] = ()

    def address(self, channel: Channel) -> str:
        """Where messages by `channel` go; empty when there is nowhere."""
        match channel:
            case Channel.EMAIL:
                return self.email
            case Channel.WEBHOOK:
                return self.webhook_url
            case Channel.APPRISE:
                return self.apprise_url
            case Channel.LOG:
                return self.id


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way in which a subscription is told; None is left open: the type's channel, and what fits it."""

    cadence: str
    channel: Channel | None = None
    format: Format | None = None
    style: Style | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """Subscriber × type (exact id, or a prefix with * at its end) × topic (empty: told directly) → choices.

    `filter` is CEL (see filters.py), empty for none.
    """

    id: str
    subscriber: str
    type: str
    topic: str = ""
    choices: tuple[Choice, ...]
    filter: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aligned:
    """At fixed local times: one of `cron` and `rrule`; `zone` empty: the subscriber's."""

    cron: str = ""
    rrule: str = ""
    zone: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rolling:
    """`duration` after the first item came, each further one `extension` later, up to `cap` (None: duration × 4).

    Closed early at `maximum_items` (0: never), which the first item of a leading cadence, sent alone, is not among.
    """

    duration: timedelta
    extension: timedelta | None = None
    cap: timedelta | None = None
    maximum_items: int = 0
    is_leading: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class External:
    """When the batch is triggered, or `fallback_after` the first item when it never is."""

    batch: str
    fallback_after: timedelta = timedelta(days=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cadence:
    """How often somebody is told."""

    id: str
    name: str = ""
    kind: Aligned | Rolling | External


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """How something is written: `id` is a type (its items), "digest/<cadence>" or "digest" (layouts)."""

    id: str
    format: Format
    style: Style
    locale: str = ""
    subject: str = ""
    body: str = ""


def rule_of(cron: str, rrule: str, zone: str) -> Rule:
    """The recurrence rule of an aligned cadence in a zone. Raises BadRule when there is no such zone."""
    start = _RULE_START.replace(tzinfo=zone_of(zone)).astimezone(UTC)
    return Rule(cron=cron, rrule=rrule, zone=zone, start=start)
