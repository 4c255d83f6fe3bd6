"""The rules of services.intake.requests."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from services.intake.requests import MAX_RESPONSES, Request, Response, State, judge_responses

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)
REQUEST = Request(
    id=UUID(int=1),
    batch="deals",
    customer="carl",
    item="lamp",
    providers=("paul", "petra"),
    payload="{}",
    submitted_at=NOW,
    answer_by=NOW + timedelta(days=7),
)


def response(provider: str = "paul", request_id: UUID = REQUEST.id, at: datetime = NOW) -> Response:
    """An answer."""
    return Response(id=uuid4(), request_id=request_id, provider=provider, payload="{}", received_at=at)


def verdict(one: Response, request: Request = REQUEST) -> str:
    """Why a response is refused; empty when it is not."""
    accepted, refused = judge_responses([one], {request.id: request})
    assert len(accepted) + len(refused) == 1
    return refused[one.id].reason if refused else ""


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (State.OPEN, ""),
        (State.ANSWERED, ""),
        (State.CLOSED, "REQUEST_OVER"),
        (State.EXPIRED, "REQUEST_OVER"),
        (State.WITHDRAWN, "REQUEST_WITHDRAWN"),
    ],
)
def test_only_a_request_that_is_not_over_takes_responses(state: State, reason: str) -> None:
    """Open and answered do; the others are over."""
    assert verdict(response(), replace(REQUEST, state=state)) == reason


def test_the_answer_by_date_counts_however_late_the_scheduler_is() -> None:
    """A microsecond before it is in time, the date itself is not."""
    assert verdict(response(at=REQUEST.answer_by - timedelta(microseconds=1))) == ""
    assert verdict(response(at=REQUEST.answer_by)) == "REQUEST_OVER"


def test_unknown_requests_and_providers_are_told_apart() -> None:
    """Each has its own reaction."""
    assert verdict(response(request_id=UUID(int=9))) == "REQUEST_UNKNOWN"
    assert verdict(response(provider="mallory")) == "PROVIDER_NOT_ASKED"


def test_a_provider_may_answer_again_up_to_the_bound() -> None:
    """INV-9: the batch itself counts too."""
    nearly_full = replace(REQUEST, state=State.ANSWERED, responses=MAX_RESPONSES - 1)
    first, second = response(), response()
    accepted, refused = judge_responses([first, second], {REQUEST.id: nearly_full})
    assert accepted == [first]
    assert refused[second.id].reason == "TOO_MANY_RESPONSES"
