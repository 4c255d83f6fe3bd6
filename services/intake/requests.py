"""Requests of customers to the providers of an item, and the providers' answers. Pure.

    open ──response──▶ answered ──answer-by date──▶ closed
      ├───────────────answer-by date──────────────▶ expired
      └────────────────withdrawal─────────────────▶ withdrawn     (from answered too)

A response counts while the answer-by date lies ahead, also when the scheduler is late to say that it has passed: so
what is accepted does not depend on how busy anybody is. Late answers are refused and not logged: what the log holds of
a request that is over is what its summary was made of. A provider may answer again; the log keeps every answer, the
summary has the latest of each provider.

A request can be withdrawn until its summary goes out, and again after that, which changes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum
from uuid import UUID

from services.intake.errors import Code, Refusal

MAX_PROVIDERS = 100
MAX_RESPONSES = 1_000
"""Answers one request takes in all (INV-9)."""

DEFAULT_ANSWER_WITHIN = timedelta(days=7)


class State(IntEnum):
    """Numbers as in intake.v1.RequestState."""

    OPEN = 1
    ANSWERED = 2
    CLOSED = 3
    EXPIRED = 4
    WITHDRAWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A logged request. `providers` are in the order given, each once; `payload` is JSON text of an object.

    `closed_at` is when it ended, by its summary or its withdrawal; `cause` is why it was withdrawn.
    """

    id: UUID
    batch: str
    customer: str
    item: str
    providers: tuple[str, ...]
    payload: str
    submitted_at: datetime
    answer_by: datetime
    state: State = State.OPEN
    responses: int = 0
    closed_at: datetime | None = None
    cause: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A logged answer. `payload` None: left out, because there is too much of it."""

    id: UUID
    request_id: UUID
    provider: str
    payload: str | None
    received_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """A request whose answer-by date has passed, with each provider's latest answer in order of arrival."""

    tenant: str
    request: Request
    answers: Sequence[Response]

    @property
    def state(self) -> State:
        """What the request becomes."""
        return State.CLOSED if self.answers else State.EXPIRED

    @property
    def unanswered(self) -> list[str]:
        """The providers that did not answer, in the order in which they were asked."""
        answered = {answer.provider for answer in self.answers}
        return [provider for provider in self.request.providers if provider not in answered]


def refusal_without_providers(item: str) -> Refusal:
    """For a request that names no provider, about an item of which none is known."""
    return Refusal(
        code=Code.FAILED_PRECONDITION,
        reason="NO_PROVIDERS",
        message=f"no provider is named, and none is known for the item {item!r}; name some, or PutItemProviders first",
        field="providers",
    )


def judge_responses(
    responses: Sequence[Response], requests: Mapping[UUID, Request]
) -> tuple[list[Response], dict[UUID, Refusal]]:
    """Which responses are accepted, and why the others (by response id) are not.

    `requests` are the requests they are about, as they stand now; ids that are not in it are unknown to the tenant.
    """
    taken = {request_id: request.responses for request_id, request in requests.items()}
    accepted: list[Response] = []
    refused: dict[UUID, Refusal] = {}
    for response in responses:
        request = requests.get(response.request_id)
        refusal = _judge(response, request, taken.get(response.request_id, 0))
        if refusal is None:
            taken[response.request_id] += 1
            accepted.append(response)
        else:
            refused[response.id] = refusal
    return accepted, refused


def _judge(response: Response, request: Request | None, taken: int) -> Refusal | None:
    if request is None:
        return _unknown(response.request_id, "request_id")
    if response.provider not in request.providers:
        return Refusal(
            code=Code.PERMISSION_DENIED,
            reason="PROVIDER_NOT_ASKED",
            message=f"{response.provider!r} was not asked by the request {request.id}",
            field="provider",
        )
    if request.state is State.WITHDRAWN:
        return Refusal(
            code=Code.FAILED_PRECONDITION,
            reason="REQUEST_WITHDRAWN",
            message=f"the request {request.id} has been withdrawn",
            field="request_id",
        )
    if request.state not in (State.OPEN, State.ANSWERED) or response.received_at >= request.answer_by:
        return Refusal(
            code=Code.FAILED_PRECONDITION,
            reason="REQUEST_OVER",
            message=f"the request {request.id} is over: its answer-by date was {request.answer_by.isoformat()}",
            field="request_id",
        )
    if taken >= MAX_RESPONSES:
        return Refusal(
            code=Code.FAILED_PRECONDITION,
            reason="TOO_MANY_RESPONSES",
            message=f"the request {request.id} has {MAX_RESPONSES:,} answers already, as many as one takes",
            field="request_id",
        )
    return None


def judge_withdrawals(ids: Sequence[UUID], requests: Mapping[UUID, Request]) -> dict[UUID, Refusal]:
    """Why requests (by id) cannot be withdrawn; those that are not in it can be, or have been before.

    `requests` are those among `ids` that the tenant has, as they stand now.
    """
    refused: dict[UUID, Refusal] = {}
    for request_id in ids:
        request = requests.get(request_id)
        if request is None:
            refused[request_id] = _unknown(request_id, "")
        elif request.state in (State.CLOSED, State.EXPIRED):
            refused[request_id] = Refusal(
                code=Code.FAILED_PRECONDITION,
                reason="REQUEST_OVER",
                message=f"the request {request_id} is over: its summary has gone out",
            )
    return refused


def _unknown(request_id: UUID, field: str) -> Refusal:
    return Refusal(
        code=Code.NOT_FOUND, reason="REQUEST_UNKNOWN", message=f"there is no request {request_id}", field=field
    )
