"""JSON that callers send and JSON that intake composes from it: what is allowed, and how large it may get. Pure.

Callers' payloads are checked and then carried as the text they are; nothing is parsed into the database. Whatever
passes here can be stored as jsonb and read by every JSON parser: one object, no NUL, no lone surrogates, numbers within
a double, nested at most 64 deep.

What intake composes is larger than what callers may send, and bounded all the same (INV-9):

| notification        | holds                                               | at most |
|---------------------|-----------------------------------------------------|---------|
| `<batch>/request`   | the request's payload, its item, customer and dates | 72 KiB  |
| `<batch>/response`  | one response's payload, item and provider           | 72 KiB  |
| `<batch>/summary`   | the request and each provider's latest answer       | 384 KiB |

A summary has the answers' payloads as long as they add up to 128 KiB, the smallest first, so that as many as possible
are whole; of the others it says who answered and when, with `payload` null and `is_cut` true. GetRequest has them.
"""

from datetime import datetime
from typing import Any

import orjson

from services.intake.requests import Closing, Request, Response

MAX_PAYLOAD_BYTES = 64 * 1024
MAX_FACTS_BYTES = 16 * 1024
MAX_NESTING = 64

MAX_COMPOSED_BYTES = 72 * 1024
MAX_SUMMARY_BYTES = 384 * 1024
MAX_ANSWERS_BYTES = 128 * 1024
"""What the answers' payloads in one summary add up to at most."""


def object_problem(text: str, most_bytes: int) -> str | None:
    """What is wrong with `text` as a JSON object of at most `most_bytes`; None when nothing is."""
    if len(text) * 4 > most_bytes and (size := len(text.encode())) > most_bytes:
        return f"must be at most {most_bytes // 1024} KiB, got {size:,} bytes"
    try:
        value = orjson.loads(text)
    except ValueError as error:
        return f"must be a JSON object: {error}"
    if type(value) is not dict:
        return "must be a JSON object"
    # Looking at every value costs more than parsing did; nearly no payload needs it.
    if "\\u0000" in text and _holds_nul(value):
        return "must not hold NUL characters"
    if (
        len(text) > 2 * MAX_NESTING
        and text.count("{") + text.count("[") > MAX_NESTING
        and _nesting(value) > MAX_NESTING
    ):
        return f"must not be nested deeper than {MAX_NESTING}"
    return None


def request_payload(request: Request) -> str:
    """What a provider's template may say about a request."""
    return _dumps(_about(request) | {"answer_by": _shown(request.answer_by)})


def response_payload(request: Request, response: Response) -> str:
    """What the customer's template may say about one answer."""
    return _dumps(
        {
            "request_id": str(request.id),
            "item": request.item,
            "provider": response.provider,
            "payload": _raw(response.payload),
            "time": _shown(response.received_at),
        }
    )


def summary_payload(closing: Closing) -> str:
    """What the customer's template may say at the answer-by date."""
    answers = [
        {"provider": answer.provider, "payload": _raw(answer.payload), "time": _shown(answer.received_at)}
        | ({"is_cut": True} if answer.payload is None else {})
        for answer in closing.answers
    ]
    return _dumps(
        _about(closing.request)
        | {"state": closing.state.name.lower(), "answers": answers, "unanswered": closing.unanswered}
    )


def _about(request: Request) -> dict[str, Any]:
    return {
        "request_id": str(request.id),
        "item": request.item,
        "customer": request.customer,
        "payload": _raw(request.payload),
    }


def _raw(text: str | None) -> object:
    return None if text is None else orjson.Fragment(text)


def _shown(instant: datetime) -> str:
    return instant.isoformat()


def _dumps(value: dict[str, Any]) -> str:
    return orjson.dumps(value).decode()


def _holds_nul(value: object) -> bool:
    match value:
        case str():
            return "\x00" in value
        case dict():
            return any("\x00" in key or _holds_nul(inner) for key, inner in value.items())
        case list():
            return any(map(_holds_nul, value))
    return False


def _nesting(value: object) -> int:
    """orjson refuses what is deeper than 1,024, so a level at a time is looked at without recursion."""
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, (dict, list))]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth
