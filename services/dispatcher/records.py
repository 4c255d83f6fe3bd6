"""Deliveries as they stand: what is shown of them, and their story in sentences. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from services.dispatcher.delivery import Priority, Reason, State


@dataclass(frozen=True, kw_only=True, slots=True)
class DeliveryRecord:
    """A delivery as it stands, without its content."""

    id: UUID
    digest_id: UUID
    subscriber: str
    channel: str
    address: str
    subject: str
    list_id: str
    priority: Priority
    state: State
    attempts: int
    last_error: str
    reason: str
    created_at: datetime
    ended_at: datetime | None
    next_attempt_at: datetime | None
    dead_letter_at: datetime | None
    parked_until: datetime | None
    """On the database's clock; None when nothing holds it back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What a delivery says; empty where there is none."""

    html: str
    text: str
    json: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadLetterFilter:
    """Which dead letters; empty or None restricts nothing. `since` is included, `until` is not."""

    channel: str = ""
    reason: str = ""
    subscriber: str = ""
    since: datetime | None = None
    until: datetime | None = None
    state: State | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadLetterCount:
    """Dead letters with channel, state and reason in common."""

    channel: str
    state: State
    reason: str
    count: int
    first_at: datetime
    last_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptRecord:
    """One try; without `ended_at` it is under way, or in doubt."""

    delivery_id: UUID
    number: int
    started_at: datetime
    ended_at: datetime | None
    is_sent: bool
    reply: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StoryEntry:
    """One thing that happened to a delivery, or will (`is_expected`)."""

    at: datetime
    kind: str
    sentence: str
    details: dict[str, str] = field(default_factory=dict)
    related_ids: tuple[UUID, ...] = ()
    is_expected: bool = False


_ENDS = {
    State.DEAD: "was given up",
    State.SUPPRESSED: "was not sent, because the address is suppressed",
    State.EXPIRED: "was not sent, because it had expired",
    State.HELD: "is held: whether it arrived is not known, and somebody must decide whether to send it again",
}
_SUPPRESSED = {
    Reason.BOUNCED: "was not sent, because a mail server has said that the address does not exist",
    Reason.UNSUBSCRIBED: "was not sent, because its reader has unsubscribed from {list}",
}


def story(delivery: DeliveryRecord, attempts: Sequence[AttemptRecord]) -> Iterator[StoryEntry]:
    """What happened to a delivery, and what will when nothing changes; in order of time."""
    name = f"The {delivery.channel} delivery {delivery.id}"
    yield StoryEntry(
        at=delivery.created_at,
        kind="delivery_accepted",
        sentence=f"{name} to {delivery.subscriber} at {delivery.address} was taken in.",
        details={
            "state": delivery.state.name.lower(),
            "subject": delivery.subject,
            "channel": delivery.channel,
            "priority": delivery.priority.name.lower(),
        },
        related_ids=(delivery.digest_id, delivery.id),
    )
    for attempt in attempts:
        yield _told(name, attempt)
    ended_at = delivery.dead_letter_at or delivery.ended_at
    if delivery.state in _ENDS and ended_at is not None:
        why = f" ({delivery.last_error})" if delivery.last_error and delivery.state is State.DEAD else ""
        yield StoryEntry(
            at=ended_at,
            kind=f"delivery_{delivery.state.name.lower()}",
            sentence=_cut(f"{name} {_end_of(delivery)}{why}."),
            details={"last_error": delivery.last_error},
        )
    if delivery.parked_until is not None:
        yield StoryEntry(
            at=delivery.parked_until,
            kind="delivery_parked",
            sentence=f"{name} is held back: its destination has failed too often in a row, or is over its rate.",
            details={"attempts": str(delivery.attempts)},
            is_expected=True,
        )
    elif delivery.state is State.RETRYING and delivery.next_attempt_at is not None:
        yield StoryEntry(
            at=delivery.next_attempt_at,
            kind="delivery_retry_expected",
            sentence=f"{name} will be tried again.",
            details={"attempts": str(delivery.attempts)},
            is_expected=True,
        )


def _end_of(delivery: DeliveryRecord) -> str:
    usual = _ENDS[delivery.state]
    if delivery.state is not State.SUPPRESSED:
        return usual
    kind, _, which = delivery.list_id.partition(":")
    what = f"the digest {which}" if kind == "cadence" else f"messages of the kind {which}"
    return _SUPPRESSED.get(Reason(delivery.reason), usual).format(list=what)


def _told(name: str, attempt: AttemptRecord) -> StoryEntry:
    details = {"attempt": str(attempt.number), "reason": attempt.reason, "reply": attempt.reply}
    at = attempt.ended_at or attempt.started_at
    if attempt.is_sent:
        sentence = f"{name} was sent at attempt {attempt.number}; the other side said: {attempt.reply or 'nothing'}."
        return StoryEntry(at=at, kind="delivery_sent", sentence=_cut(sentence), details=details)
    if attempt.ended_at is not None:
        sentence = (
            f"Attempt {attempt.number} of {name[:1].lower()}{name[1:]} failed: {attempt.reason} {attempt.reply}".strip()
        )
        return StoryEntry(at=at, kind="delivery_attempt_failed", sentence=_cut(f"{sentence}."), details=details)
    if attempt.reason:
        sentence = f"Nobody knows whether attempt {attempt.number} of {name[:1].lower()}{name[1:]} arrived."
        return StoryEntry(at=at, kind="delivery_attempt_in_doubt", sentence=sentence, details=details)
    sentence = f"{name} is being sent, attempt {attempt.number}."
    return StoryEntry(at=at, kind="delivery_sending", sentence=sentence, details=details)


def _cut(sentence: str, longest: int = 1_000) -> str:
    return sentence if len(sentence) <= longest else sentence[: longest - 1] + "…"
