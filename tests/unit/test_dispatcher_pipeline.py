"""What becomes of a delivery, decided without any I/O."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from random import Random
from uuid import UUID

import pytest

from libs.backoff import Backoff
from services.dispatcher.app import policy_of
from services.dispatcher.delivery import Delivery, Permanent, Reason, Result, Retryable, Sent, State
from services.dispatcher.pipeline import Candidate, Policy, conclude, judge
from services.dispatcher.settings import DispatchSettings, DoubtPolicy

NOW = datetime(2013, 7, 4, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)

POLICY = Policy(
    channels=frozenset({"email", "webhook"}),
    max_attempts=3,
    max_age=timedelta(days=1),
    max_retry_after=HOUR,
    backoff=Backoff(first=timedelta(seconds=10), longest=HOUR),
    doubt={"email": DoubtPolicy.HOLD, "webhook": DoubtPolicy.RESEND},
)
MAIL = Delivery(
    tenant="shop",
    id=UUID(int=1),
    digest_id=UUID(int=2),
    subscriber="ann",
    channel="email",
    address="ann@example.com",
    subject="Hello",
)
HOOK = replace(MAIL, channel="webhook", address="https://example.com/hook")
STALE = replace(MAIL, expires_at=NOW)
SHORT_LIVED = replace(MAIL, expires_at=NOW + timedelta(seconds=5))
FRESH = Candidate(
    delivery=MAIL,
    attempts=0,
    budget=0,
    created_at=NOW,
    fresh_since=NOW,
    claimed_at=NOW,
    is_in_doubt=False,
)
LATER = Retryable(Reason.DEFERRED, "451 later")


def test_a_sound_delivery_is_sent() -> None:
    """No stage has anything against it."""
    assert judge(FRESH, POLICY, NOW) is None


@pytest.mark.parametrize(
    ("candidate", "state", "reason"),
    [
        (replace(FRESH, delivery=replace(MAIL, channel="apprise")), State.DEAD, Reason.UNSUPPORTED),
        (replace(FRESH, delivery=replace(MAIL, address="a@b\nBcc: c@d")), State.DEAD, Reason.ADDRESS_INVALID),
        (replace(FRESH, suppressed=Reason.UNSUBSCRIBED), State.SUPPRESSED, Reason.UNSUBSCRIBED),
        (replace(FRESH, delivery=STALE), State.EXPIRED, Reason.EXPIRED),
        (replace(FRESH, attempts=1, is_in_doubt=True), State.HELD, Reason.IN_DOUBT),
        (replace(FRESH, attempts=3, is_in_doubt=True, delivery=HOOK), State.DEAD, Reason.ATTEMPTS_EXHAUSTED),
        # The first stage that objects decides.
        (
            replace(FRESH, suppressed=Reason.UNSUBSCRIBED, delivery=STALE),
            State.SUPPRESSED,
            Reason.UNSUBSCRIBED,
        ),
    ],
)
def test_what_must_not_be_sent_ends_with_its_reason(candidate: Candidate, state: State, reason: Reason) -> None:
    """Each stage of the pipeline bites."""
    settlement = judge(candidate, POLICY, NOW)
    assert settlement is not None
    assert (settlement.state, settlement.reason, settlement.at) == (state, reason, NOW)


def test_in_doubt_is_sent_again_where_the_policy_says_so() -> None:
    """A webhook's receiver knows the second copy by its id."""
    assert judge(replace(FRESH, attempts=1, is_in_doubt=True, delivery=HOOK), POLICY, NOW) is None


def test_a_settlement_before_sending_names_the_attempt_it_ends() -> None:
    """The attempt in doubt, and none when none was under way."""
    in_doubt = judge(replace(FRESH, attempts=2, is_in_doubt=True), POLICY, NOW)
    waiting = judge(replace(FRESH, attempts=2, suppressed=Reason.UNSUBSCRIBED), POLICY, NOW)
    assert in_doubt is not None
    assert waiting is not None
    assert (in_doubt.number, in_doubt.attempt_reason, in_doubt.ended_at) == (2, Reason.IN_DOUBT, None)
    assert (waiting.number, waiting.attempt_reason) == (0, Reason.NONE)


@pytest.mark.parametrize(
    ("candidate", "result", "state", "reason"),
    [
        (FRESH, Sent("250 ok"), State.SENT, Reason.NONE),
        (FRESH, Permanent(Reason.REJECTED, "554"), State.DEAD, Reason.REJECTED),
        (FRESH, LATER, State.RETRYING, Reason.DEFERRED),
        (replace(FRESH, attempts=2), LATER, State.DEAD, Reason.ATTEMPTS_EXHAUSTED),
        (replace(FRESH, attempts=2, budget=1), LATER, State.RETRYING, Reason.DEFERRED),
        (replace(FRESH, fresh_since=NOW - timedelta(days=1)), LATER, State.DEAD, Reason.TOO_OLD),
        (
            replace(FRESH, delivery=SHORT_LIVED),
            LATER,
            State.EXPIRED,
            Reason.EXPIRED,
        ),
        (FRESH, Retryable(Reason.TIMEOUT, is_in_doubt=True), State.HELD, Reason.IN_DOUBT),
        (replace(FRESH, delivery=HOOK), Retryable(Reason.TIMEOUT, is_in_doubt=True), State.RETRYING, Reason.TIMEOUT),
    ],
)
def test_what_follows_from_an_attempt(candidate: Candidate, result: Result, state: State, reason: Reason) -> None:
    """Sent, dead, retried, held or expired, each with its reason; only what is retried has a next time."""
    settlement = conclude(candidate, result, POLICY, NOW, draw=0.5)
    assert (settlement.state, settlement.reason) == (state, reason)
    assert (settlement.number, settlement.ended_at) == (candidate.attempts + 1, NOW)
    assert (settlement.retry_at is not None) == (state is State.RETRYING)


def test_the_wait_grows_and_restarts_with_a_redrive() -> None:
    """The bound doubles with each attempt of this round; the draw chooses below it."""
    first = conclude(FRESH, LATER, POLICY, NOW, draw=0.5)
    second = conclude(replace(FRESH, attempts=1), LATER, POLICY, NOW, draw=0.5)
    redriven = conclude(replace(FRESH, attempts=7, budget=7), LATER, POLICY, NOW, draw=0.5)
    assert first.retry_at == NOW + timedelta(seconds=5)
    assert second.retry_at == NOW + timedelta(seconds=10)
    assert redriven.retry_at == NOW + timedelta(seconds=5)


def test_retry_after_is_honoured_up_to_a_limit() -> None:
    """What the receiver asks for is the least, and is cut to the policy's most."""
    asked = replace(LATER, retry_after=timedelta(minutes=3))
    too_much = replace(LATER, retry_after=timedelta(days=9))
    assert conclude(FRESH, asked, POLICY, NOW, draw=0.0).retry_at == NOW + timedelta(minutes=3)
    assert conclude(FRESH, too_much, POLICY, NOW, draw=0.0).retry_at == NOW + HOUR


def test_the_error_is_one_line_for_people() -> None:
    """Why, what the attempt failed with, what the other side said; nothing twice, nothing for what was sent."""
    dead = conclude(replace(FRESH, attempts=2), LATER, POLICY, NOW, draw=0.5)
    assert dead.error == "attempts_exhausted: deferred: 451 later"
    assert conclude(FRESH, LATER, POLICY, NOW, draw=0.5).error == "deferred: 451 later"
    assert conclude(FRESH, Sent("250 ok"), POLICY, NOW, draw=0.5).error == ""


def test_by_default_age_ends_retries_and_not_their_number() -> None:
    """A mailbox that is greylisted or a webhook that asks for a password has two days, not an afternoon."""
    policy, draw = policy_of(DispatchSettings(), frozenset({"email"})), Random(2013).random
    ends = set()
    for _ in range(200):
        one, now = FRESH, NOW
        while (settlement := conclude(one, LATER, policy, now, draw=draw())).retry_at is not None:
            now = settlement.retry_at
            one = replace(one, attempts=one.number)
        assert now - NOW > timedelta(days=1, hours=21)
        ends.add(settlement.reason)
    assert ends == {Reason.TOO_OLD}
