"""What intake knows of an id, as a story in order of time."""

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol
from uuid import UUID

from carillon.explain.v1 import explain_pb2
from carillon.intake.v1 import intake_pb2

from libs.errors import FieldViolation, Violations
from libs.explaining import MOST_ENTRIES
from libs.ids import derived_id
from libs.postgres import Transaction
from libs.wire import to_timestamp
from services.intake import rpc_checks as checks
from services.intake.requests import Request, Response, State

_MOST_ANSWERS = MOST_ENTRIES - 3


class Store(Protocol):
    """See services.intake.store_requests."""

    async def find(self, tx: Transaction, tenant: str, any_id: UUID) -> Request | None: ...
    async def responses_to(
        self, tx: Transaction, tenant: str, request_ids: Sequence[UUID], *, payload_bytes: int = ...
    ) -> dict[UUID, list[Response]]: ...


async def explain(
    tx: Transaction, tenant: str, request: intake_pb2.ExplainRequest, store: Store
) -> intake_pb2.ExplainResponse:
    """The story of the request with this id, or of the request that the response with this id answers.

    Of notifications and schedules intake keeps nothing: they are their owners' once they are accepted. Raises
    InvalidArgument.
    """
    violations, found = Violations(), list[FieldViolation]()
    checks.check_name(found, "id", request.id)
    violations.extend(found)
    violations.raise_if_any()
    try:
        any_id = UUID(request.id.removeprefix("carillon:request:"))
    except ValueError:
        return intake_pb2.ExplainResponse()
    about = await store.find(tx, tenant, any_id)
    if about is None:
        return intake_pb2.ExplainResponse()
    responses = await store.responses_to(tx, tenant, [about.id], payload_bytes=0)
    answers = responses[about.id]
    return intake_pb2.ExplainResponse(entries=story_of(about, answers), is_cut=len(answers) > _MOST_ANSWERS)


def story_of(request: Request, responses: Sequence[Response]) -> list[explain_pb2.Entry]:
    """Ascending by time; of more than `_MOST_ANSWERS` answers the latest."""
    submitted = _entry(
        request.submitted_at,
        "request_submitted",
        f"{request.customer} asked {len(request.providers)} providers about {request.item}.",
        request,
        # Whom it was told digest knows by the entity: of older requests there is a notification for each provider.
        related=[derived_id("request-timer", request.id), f"carillon:request:{request.id}"],
    )
    answers = [
        _entry(
            one.received_at,
            "response_recorded",
            f"{one.provider} answered.",
            request,
            {"response_id": str(one.id), "provider": one.provider},
            related=[derived_id("response-notification", one.id)],
        )
        for one in responses[-_MOST_ANSWERS:]
    ]
    return [submitted, *answers, _end_of(request)]


def _end_of(request: Request) -> explain_pb2.Entry:
    summary = derived_id("summary-notification", request.id)
    if request.closed_at is None:
        sentence = "The answer-by date comes; the customer gets the summary."
        entry = _entry(request.answer_by, "request_due", sentence, request, related=[summary])
        entry.is_expected = True
        return entry
    if request.state is State.WITHDRAWN:
        why = f" The cause given: {request.cause}" if request.cause else ""
        sentence = f"It was taken back, with {request.responses} answers; what had not left was cancelled.{why}"
        return _entry(request.closed_at, "request_withdrawn", sentence, request)
    kind = "request_expired" if request.state is State.EXPIRED else "request_closed"
    sentence = f"The answer-by date had come, with {request.responses} answers; the summary went out."
    return _entry(request.closed_at, kind, sentence, request, related=[summary])


def _entry(
    at: datetime,
    kind: str,
    sentence: str,
    request: Request,
    details: dict[str, str] | None = None,
    *,
    related: Sequence[UUID | str] = (),
) -> explain_pb2.Entry:
    about = {"request_id": str(request.id), "batch": request.batch, "state": request.state.name.lower()}
    return explain_pb2.Entry(
        time=to_timestamp(at),
        service="intake",
        kind=kind,
        sentence=sentence[:1_000],
        details=about | (details or {}),
        related_ids=[str(one) for one in related],
    )
