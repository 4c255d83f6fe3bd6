"""Subscriptions' filters: what they say, and what happens when they cannot say anything."""

from datetime import UTC, datetime
from uuid import UUID

import pytest

from libs.conditions import BadCondition
from services.digest.commands import Notification
from services.digest.filters import Answer, Question, answers, compile_filter

NOTIFICATION_ID = UUID(int=1)


def answer(text: str, payload: str = '{"delay": 40}') -> Answer:
    """A filter's answer about a flight that is delayed."""
    one = Notification(
        tenant="acme",
        id=NOTIFICATION_ID,
        type="flight.delayed",
        entity="UA1",
        group_key="",
        payload=payload,
        subscribers=["ann"],
        topics=[],
        occurred_at=datetime(2026, 3, 2, tzinfo=UTC),
    )
    question = Question(tenant="acme", notification_id=NOTIFICATION_ID, filter=text)
    (given,) = answers([question], {("acme", NOTIFICATION_ID): one})
    return given


@pytest.mark.parametrize(
    ("text", "is_wanted"),
    [
        ("payload.delay > 30", True),
        ("payload.delay > 60", False),
        ("entity == 'UA1' && type.startsWith('flight.')", True),
        ("entity.startsWith('LH')", False),
        ("has(payload.gate) && payload.gate == 'A1'", False),
    ],
)
def test_a_filter_reads_payload_entity_and_type(text: str, is_wanted: bool) -> None:
    """True lets through, false leaves out."""
    given = answer(text)
    assert (given.is_wanted, given.error) == (is_wanted, "")


@pytest.mark.parametrize(
    ("text", "payload", "error"),
    [
        ("payload.gate == 'A1'", "{}", "there is no 'gate'"),
        ("payload.delay > 'x'", '{"delay": 1}', "an operation is not defined for these types"),
        ("payload.delay", '{"delay": 1}', "must give true or false"),
        ("payload.delay > 1", "no json", "the payload is not JSON"),
        ("payload.delay > 1", "[" * 200_000, "the payload is not JSON"),
        ("no filter at all", "{}", "is not a CEL expression"),
    ],
)
def test_a_filter_that_cannot_be_decided_lets_through(text: str, payload: str, error: str) -> None:
    """A message too many rather than one lost; the answer says why."""
    given = answer(text, payload)
    assert given.is_wanted
    assert given.error.startswith(error)


@pytest.mark.parametrize("text", ["facts.paid", "now > now", "payload.l.all(a, payload.l.all(b, true))", "'text'"])
def test_what_a_filter_may_not_read_or_cost_is_refused(text: str) -> None:
    """A condition's variables are not a filter's; a condition's limits are."""
    with pytest.raises(BadCondition):
        compile_filter(text)
