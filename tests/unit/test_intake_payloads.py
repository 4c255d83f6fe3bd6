"""What services.intake.payloads takes, and what it composes."""

import json
from datetime import UTC, datetime, timedelta
from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.intake.payloads import (
    MAX_COMPOSED_BYTES,
    MAX_NESTING,
    object_problem,
    request_payload,
    response_payload,
    summary_payload,
)
from services.intake.requests import Closing, Request, Response, State

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)
REQUEST = Request(
    id=UUID(int=1),
    batch="deals",
    customer="carl",
    item="lamp",
    providers=("paul", "petra"),
    payload='{ "count": 2.50 }',
    submitted_at=NOW,
    answer_by=NOW + timedelta(days=7),
)


def answer(provider: str, payload: str | None = '{"price": 1}') -> Response:
    """A provider's answer."""
    return Response(id=UUID(int=2), request_id=REQUEST.id, provider=provider, payload=payload, received_at=NOW)


@pytest.mark.parametrize("text", ["{}", ' {"a": [1, 2.5, null, true, "\\u00e9"]}\n', '{"a": "\\\\u0000"}'])
def test_objects_are_taken(text: str) -> None:
    """Space around, all kinds of values, and a backslash before u0000 that makes it no NUL."""
    assert object_problem(text, 1024) is None


def test_the_limit_is_in_bytes_of_utf8() -> None:
    """Not in characters."""
    text = json.dumps({"a": "名" * 10}, ensure_ascii=False)
    size = len(text.encode())
    assert object_problem(text, size) is None
    assert object_problem(text, size - 1) == f"must be at most 0 KiB, got {size} bytes"


@pytest.mark.parametrize("key", ["a", "\\u0000"])
def test_nul_is_found_in_values_and_keys(key: str) -> None:
    """Postgres could not store it."""
    assert object_problem(f'{{"{key}": [{{"b": "x\\u0000"}}]}}', 1024) == "must not hold NUL characters"


def test_the_nesting_bound_is_exact() -> None:
    """64 deep is fine, 65 is not; many siblings are not deep."""

    def nested(depth: int) -> str:
        return '{"a":' * depth + "1" + "}" * depth

    assert object_problem(nested(MAX_NESTING), 1024) is None
    assert object_problem(nested(MAX_NESTING + 1), 1024) == "must not be nested deeper than 64"
    assert object_problem(json.dumps({"a": [[]] * 100}), 1024) is None


@given(st.text())
def test_whatever_passes_is_an_object_for_other_parsers_too(text: str) -> None:
    """What intake takes no one after it trips over."""
    for candidate in (text, json.dumps({"t": text}), "{" + text + "}"):
        if object_problem(candidate, 4096) is None:
            assert isinstance(json.loads(candidate), dict)


def test_callers_payloads_are_carried_as_they_came() -> None:
    """Not parsed and written again: 2.50 stays 2.50."""
    assert '"payload":{ "count": 2.50 }' in request_payload(REQUEST)


def test_a_response_tells_of_the_request_it_answers() -> None:
    """The customer may have many requests."""
    assert json.loads(response_payload(REQUEST, answer("paul"))) == {
        "request_id": str(REQUEST.id),
        "item": "lamp",
        "provider": "paul",
        "payload": {"price": 1},
        "time": "2026-03-02T12:00:00+00:00",
    }


def test_a_summary_says_whose_payload_was_left_out() -> None:
    """Who answered is never left out."""
    closing = Closing(tenant="t", request=REQUEST, answers=[answer("petra", None), answer("paul")])
    summary = json.loads(summary_payload(closing))
    assert summary["answers"][0] == {
        "provider": "petra",
        "payload": None,
        "time": "2026-03-02T12:00:00+00:00",
        "is_cut": True,
    }
    assert "is_cut" not in summary["answers"][1]
    assert summary["unanswered"] == []


def test_without_answers_a_request_expires() -> None:
    """And everybody asked is listed as not having answered, in the order asked."""
    closing = Closing(tenant="t", request=REQUEST, answers=[])
    assert closing.state is State.EXPIRED
    assert json.loads(summary_payload(closing))["unanswered"] == ["paul", "petra"]


def test_what_is_composed_of_one_payload_stays_within_its_bound() -> None:
    """The longest names of the widest characters beside the largest payload."""
    name = "\U0001f514" * 256
    payload = orjson.dumps({"t": "x" * (64 * 1024 - 8)}).decode()
    request = Request(
        id=UUID(int=1),
        batch="b" * 64,
        customer=name,
        item=name,
        providers=(name,),
        payload=payload,
        submitted_at=NOW,
        answer_by=NOW,
    )
    assert len(request_payload(request).encode()) <= MAX_COMPOSED_BYTES
    assert len(response_payload(request, answer(name, payload)).encode()) <= MAX_COMPOSED_BYTES
