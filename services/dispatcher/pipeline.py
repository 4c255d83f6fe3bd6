"""What becomes of a delivery: decided in small stages, before and after sending. Pure.

Before sending, each stage of `STAGES` may end a delivery; the first that does decides. One that passes all may still be
held back, by a rate or a breaker (traffic.py): `outlived` says whether it is worth waiting. After sending, `conclude`
turns a channel's result into the delivery's next state. A decision is a Settlement: the one value that says what is
stored, told to digest, asked of the scheduler, and counted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

from libs.backoff import Backoff
from libs.trace_points import NOWHERE, Point
from services.dispatcher.addresses import is_valid_address
from services.dispatcher.delivery import (
    MAX_REPLY,
    Delivery,
    Hold,
    Letter,
    Permanent,
    Reason,
    Result,
    Retryable,
    Sent,
    State,
)
from services.dispatcher.settings import DoubtPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """The rules, from settings."""

    channels: frozenset[str]
    max_attempts: int
    max_age: timedelta
    max_retry_after: timedelta
    backoff: Backoff
    doubt: Mapping[str, DoubtPolicy]

    def holds(self, channel: str) -> bool:
        """Whether what is in doubt is held."""
        return self.doubt.get(channel, DoubtPolicy.RESEND) is DoubtPolicy.HOLD


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A delivery whose turn it is.

    `attempts` were made so far; `budget` of them before it was last redriven, so that they do not count against the
    policy; its age counts from `fresh_since`. `is_in_doubt`: the last attempt was begun and nobody recorded its end.
    `waited`: for how long it could have been claimed before it was, on the database's clock.
    `suppressed`: why its address gets nothing of this kind; NONE when it does. `trace`: what brought a retry back.
    """

    delivery: Delivery
    attempts: int
    budget: int
    created_at: datetime
    fresh_since: datetime
    claimed_at: datetime
    is_in_doubt: bool
    suppressed: Reason = Reason.NONE
    waited: timedelta = timedelta(0)
    trace: Point = NOWHERE

    @property
    def number(self) -> int:
        """The attempt that would be made now, from 1."""
        return self.attempts + 1

    @property
    def letter(self) -> Letter:
        """What the channel gets."""
        return Letter(delivery=self.delivery, created_at=self.created_at, signed_at=self.claimed_at)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settlement:
    """The end of an attempt, or of a delivery.

    `number` is the attempt that it settles; 0 when none was under way. `attempt_reason` and `reply` are that attempt's,
    `reason` is the delivery's. `retry_at` is set exactly in state RETRYING; `ended_at` None: still in doubt.
    `is_bounce`: the attempt found out that the address does not exist. `trace`: the attempt, or what led to it.
    """

    tenant: str
    delivery_id: UUID
    digest_id: UUID
    channel: str
    address: str
    number: int
    state: State
    reason: Reason
    at: datetime
    attempt_reason: Reason = Reason.NONE
    reply: str = ""
    ended_at: datetime | None = None
    retry_at: datetime | None = None
    is_bounce: bool = False
    trace: Point = NOWHERE

    @property
    def key(self) -> tuple[str, UUID]:
        """What names the delivery."""
        return self.tenant, self.delivery_id

    @property
    def error(self) -> str:
        """In one line for people: why it is not sent, with what the other side said; empty when it is."""
        if self.state is State.SENT:
            return ""
        words = dict.fromkeys(word for word in (str(self.reason), str(self.attempt_reason), self.reply) if word)
        return ": ".join(words)[:MAX_REPLY]


@dataclass(frozen=True, slots=True)
class Decisions:
    """What becomes of claimable deliveries: ends unsent, is sent now, or is held back.

    `ours`: claims of this very process that ran out, because it could not renew them while Postgres was away. Their
    attempts go on, or wait for their record.
    """

    settlements: list[Settlement] = field(default_factory=list)
    letters: list[Candidate] = field(default_factory=list)
    held: list[tuple[Candidate, Hold]] = field(default_factory=list)
    ours: list[Candidate] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.settlements) + len(self.letters) + len(self.held) + len(self.ours)

    def waits(self, claim_time: timedelta) -> list[tuple[Candidate, timedelta]]:
        """What nobody may claim for how long."""
        return [*((one, hold.wait) for one, hold in self.held), *((one, claim_time) for one in self.ours)]


Verdict = tuple[State, Reason]
Stage = Callable[[Candidate, Policy, datetime], Verdict | None]


def unsupported(candidate: Candidate, policy: Policy, _now: datetime) -> Verdict | None:
    """No channel of that name is running."""
    is_known = candidate.delivery.channel in policy.channels
    return None if is_known else (State.DEAD, Reason.UNSUPPORTED)


def malformed(candidate: Candidate, _policy: Policy, _now: datetime) -> Verdict | None:
    """The address could smuggle something into a header, a command or a request; or leads nowhere."""
    is_valid = is_valid_address(candidate.delivery.channel, candidate.delivery.address)
    return None if is_valid else (State.DEAD, Reason.ADDRESS_INVALID)


def suppressed(candidate: Candidate, _policy: Policy, _now: datetime) -> Verdict | None:
    """The address wants nothing from us."""
    return (State.SUPPRESSED, candidate.suppressed) if candidate.suppressed else None


def expired(candidate: Candidate, _policy: Policy, now: datetime) -> Verdict | None:
    """It is no longer worth sending."""
    expires_at = candidate.delivery.expires_at
    return (State.EXPIRED, Reason.EXPIRED) if expires_at is not None and expires_at <= now else None


def in_doubt(candidate: Candidate, policy: Policy, _now: datetime) -> Verdict | None:
    """The last attempt may have arrived, and the channel's policy is not to risk a second one."""
    is_held = candidate.is_in_doubt and policy.holds(candidate.delivery.channel)
    return (State.HELD, Reason.IN_DOUBT) if is_held else None


def exhausted(candidate: Candidate, policy: Policy, _now: datetime) -> Verdict | None:
    """Every attempt it had ended in doubt: what takes the process down with it must not do so for ever."""
    has_none_left = candidate.attempts - candidate.budget >= policy.max_attempts
    return (State.DEAD, Reason.ATTEMPTS_EXHAUSTED) if has_none_left else None


STAGES: tuple[Stage, ...] = (unsupported, malformed, suppressed, expired, in_doubt, exhausted)


def judge(candidate: Candidate, policy: Policy, now: datetime) -> Settlement | None:
    """What ends this delivery before it is sent; None: send it."""
    for stage in STAGES:
        if (verdict := stage(candidate, policy, now)) is not None:
            return _unsent(candidate, *verdict, now)
    return None


def outlived(candidate: Candidate, hold: Hold, policy: Policy, now: datetime) -> Settlement | None:
    """What ends this delivery instead of holding it back once more; None: hold it.

    Waiting costs no attempt, so it is the age that must end it: a destination that is gone for good would otherwise
    keep what is parked for it for ever (INV-9).
    """
    is_too_old = hold.reason is Reason.BREAKER_OPEN and now - candidate.fresh_since > policy.max_age
    return _unsent(candidate, State.DEAD, Reason.TOO_OLD, now, why=hold.reason) if is_too_old else None


def _unsent(
    candidate: Candidate, state: State, reason: Reason, now: datetime, *, why: Reason = Reason.NONE
) -> Settlement:
    return Settlement(
        tenant=candidate.delivery.tenant,
        delivery_id=candidate.delivery.id,
        digest_id=candidate.delivery.digest_id,
        channel=candidate.delivery.channel,
        address=candidate.delivery.address,
        number=candidate.attempts if candidate.is_in_doubt else 0,
        state=state,
        reason=reason,
        at=now,
        attempt_reason=Reason.IN_DOUBT if candidate.is_in_doubt else why,
        trace=candidate.trace or candidate.delivery.trace,
    )


def conclude(
    candidate: Candidate, result: Result, policy: Policy, now: datetime, *, draw: float, trace: Point = NOWHERE
) -> Settlement:
    """What follows from an attempt (number `candidate.number`) that ended `now`; `draw` is random in [0, 1)."""
    state, reason, retry_at = _next(candidate, result, policy, now, draw)
    return Settlement(
        tenant=candidate.delivery.tenant,
        delivery_id=candidate.delivery.id,
        digest_id=candidate.delivery.digest_id,
        channel=candidate.delivery.channel,
        address=candidate.delivery.address,
        number=candidate.number,
        state=state,
        reason=reason,
        at=now,
        attempt_reason=Reason.NONE if isinstance(result, Sent) else result.reason,
        reply=result.reply,
        ended_at=now,
        retry_at=retry_at,
        is_bounce=isinstance(result, Permanent) and result.is_bounce,
        trace=trace or candidate.trace or candidate.delivery.trace,
    )


def _next(
    candidate: Candidate, result: Result, policy: Policy, now: datetime, draw: float
) -> tuple[State, Reason, datetime | None]:
    match result:
        case Sent():
            return State.SENT, Reason.NONE, None
        case Permanent(reason=reason):
            return State.DEAD, reason, None
        case Retryable(is_in_doubt=True) if policy.holds(candidate.delivery.channel):
            return State.HELD, Reason.IN_DOUBT, None
        case Retryable():
            return _retry(candidate, result, policy, now, draw)


def _retry(
    candidate: Candidate, result: Retryable, policy: Policy, now: datetime, draw: float
) -> tuple[State, Reason, datetime | None]:
    made = candidate.number - candidate.budget
    if made >= policy.max_attempts:
        return State.DEAD, Reason.ATTEMPTS_EXHAUSTED, None
    asked_for = min(result.retry_after, policy.max_retry_after) if result.retry_after else None
    retry_at = now + policy.backoff.delay(made, draw=draw, retry_after=asked_for)
    expires_at = candidate.delivery.expires_at
    if expires_at is not None and expires_at <= retry_at:
        return State.EXPIRED, Reason.EXPIRED, None
    if retry_at - candidate.fresh_since > policy.max_age:
        return State.DEAD, Reason.TOO_OLD, None
    return State.RETRYING, result.reason, retry_at
