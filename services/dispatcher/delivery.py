"""The nouns: a delivery is one message to one address, an attempt one try to hand it over. Pure.

    pending ──▶ sending ──▶ sent
       ▲           │  ├───▶ dead          given up
       │           │  └───▶ held          in doubt, and the channel's policy is to hold
    retrying ◀─────┘
    pending, retrying, sending ──▶ suppressed | expired | dead    (decided before sending)
    dead, held ──▶ pending | retrying                             (redriven)

`sending` is committed before anything leaves, with the attempt's number: who finds a delivery in it whose claim has run
out knows that the attempt is *in doubt*.
"""

from collections.abc import Awaitable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum, StrEnum
from typing import Protocol, TypeAlias
from uuid import UUID

from libs.trace_points import NOWHERE, Point

MAX_REPLY = 2_048

CHANNELS = ("email", "webhook", "apprise", "log")
"""The channels of the contract."""

OTHER_LANE = "other"
LANES = (*CHANNELS, OTHER_LANE)
"""Deliveries queue by lane, so that a slow channel holds up no other."""


class State(IntEnum):
    """Numbers are those of the contract, and what the table holds."""

    PENDING = 1
    SENDING = 2
    RETRYING = 3
    SENT = 4
    DEAD = 5
    SUPPRESSED = 6
    HELD = 7
    EXPIRED = 8


DEAD_LETTERS = frozenset({State.DEAD, State.HELD})
ENDED = frozenset({State.SENT, State.DEAD, State.SUPPRESSED, State.EXPIRED})
TOLD = ENDED | {State.HELD}
"""States of which digest is told."""


class Priority(IntEnum):
    """How urgent a delivery is: within its lane it overtakes whatever is less so. Numbers are the contract's."""

    LOW = 1
    NORMAL = 2
    HIGH = 3


class Reason(StrEnum):
    """Why something was not sent: stable words, for attempts, outcomes, metrics and logs."""

    NONE = ""
    # Decided before sending.
    SUPPRESSED = "suppressed"
    BOUNCED = "bounced"
    UNSUBSCRIBED = "unsubscribed"
    EXPIRED = "expired"
    UNSUPPORTED = "unsupported"
    ADDRESS_INVALID = "address_invalid"
    RATE = "rate"
    BREAKER_OPEN = "breaker_open"
    CONTENT_EMPTY = "content_empty"
    IN_DOUBT = "in_doubt"
    # Decided after an attempt.
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    TOO_OLD = "too_old"
    # What the other side, or the way to it, had to say.
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    DISCONNECTED = "disconnected"
    TIMEOUT = "timeout"
    RATE_LIMITED = "rate_limited"
    DEFERRED = "deferred"
    SERVER_ERROR = "server_error"
    AUTH_FAILED = "auth_failed"
    TLS_FAILED = "tls_failed"
    REJECTED = "rejected"
    ADDRESS_REJECTED = "address_rejected"
    SENDER_REJECTED = "sender_rejected"
    REDIRECTED = "redirected"
    GONE = "gone"
    DESTINATION_FORBIDDEN = "destination_forbidden"
    INTERNAL_ERROR = "internal_error"


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """One message to one address, as digest asked for it; `html`, `text`, `json` are empty where there is none.

    `list_id` is what its reader can unsubscribe from, empty when something in it is mandatory. `trace`: what made it.
    """

    tenant: str
    id: UUID
    digest_id: UUID
    subscriber: str
    channel: str
    address: str
    subject: str
    html: str = ""
    text: str = ""
    json: str = ""
    expires_at: datetime | None = None
    priority: Priority = Priority.NORMAL
    list_id: str = ""
    trace: Point = NOWHERE

    @property
    def key(self) -> tuple[str, UUID]:
        """What names it."""
        return self.tenant, self.id


@dataclass(frozen=True, kw_only=True, slots=True)
class Letter:
    """A delivery on its way out, with all a channel may need.

    `created_at` is business time and the same for every attempt, so that every copy is identical; `signed_at` is the
    database's clock, which receivers of webhooks compare with theirs.
    """

    delivery: Delivery
    created_at: datetime
    signed_at: datetime


@dataclass(frozen=True, slots=True)
class Sent:
    """The other side took it over."""

    reply: str = ""


@dataclass(frozen=True, slots=True)
class Retryable:
    """It did not work now and may later. `is_in_doubt`: the other side may have taken it all the same."""

    reason: Reason
    reply: str = ""
    retry_after: timedelta | None = None
    is_in_doubt: bool = False


@dataclass(frozen=True, slots=True)
class Permanent:
    """It will never work as it is. `is_bounce`: nor will anything else to this address, because there is none."""

    reason: Reason
    reply: str = ""
    is_bounce: bool = False


Result: TypeAlias = Sent | Retryable | Permanent


@dataclass(frozen=True, slots=True)
class Hold:
    """Not now: why, and for how long at least, in real time. Costs no attempt."""

    reason: Reason
    wait: timedelta


class Channel(Protocol):
    """A way out. One small module each; app.py names them, nothing else knows which there are.

    `outages` are the reasons that speak of the destination as a whole, not of one message: enough of them in a row open
    its circuit breaker.
    """

    @property
    def outages(self) -> frozenset[Reason]: ...

    def send(self, letter: Letter) -> Awaitable[Result]:
        """Try once, in bounded time. An error is a Result; what is raised is a bug."""
        ...

    async def close(self) -> None:
        """Let go of connections; nothing is sent afterwards."""
        ...


def lane_of(channel: str) -> str:
    """Where a delivery waits: by its channel, and by `other` for channels that the contract does not have."""
    return channel if channel in CHANNELS else OTHER_LANE


def clean_reply(text: str) -> str:
    """What the other side said, fit for a column and a log line: no control characters, at most MAX_REPLY."""
    printable = "".join(char if char.isprintable() else " " for char in text[: MAX_REPLY * 2])
    return " ".join(printable.split())[:MAX_REPLY]
