"""The log of requests at the door: submitting, answering, withdrawing, and questions about it.

A request's providers may have to be looked up, and whether a response is welcome depends on what is stored; so these
commands are checked first, and prepared in the transaction that accepts them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Protocol
from uuid import UUID

from carillon.intake.v1 import intake_pb2

from libs.errors import FieldViolation, NotFound, Violations
from libs.ids import new_id, parse_id
from libs.links.frames import Outgoing
from libs.postgres import Transaction
from libs.wire import check_page_size, page_token, read_page_token, to_timestamp
from services.intake import rpc_checks as checks
from services.intake.errors import Refusal
from services.intake.requests import (
    DEFAULT_ANSWER_WITHIN,
    MAX_PROVIDERS,
    Request,
    Response,
    State,
    judge_responses,
    judge_withdrawals,
    refusal_without_providers,
)
from services.intake.rpc_answers import BatchAnswer, WithdrawAnswer, refusal_of

SHORTEST_ANSWER = timedelta(minutes=1)
LONGEST_ANSWER = timedelta(days=366)
MAX_CAUSE = 512


class Entries(Protocol):
    """See services.intake.stream_entries."""

    def request(self, tenant: str, request: Request) -> Sequence[Outgoing]: ...
    def response(self, tenant: str, request: Request, response: Response) -> Outgoing: ...
    def withdrawal(self, tenant: str, request: Request, *, cause: str) -> Sequence[Outgoing]: ...


class Store(Protocol):
    """See services.intake.store_requests."""

    async def put_providers(self, tx: Transaction, tenant: str, providers: Mapping[str, Sequence[str]]) -> None: ...
    async def providers_of(self, tx: Transaction, tenant: str, items: Sequence[str]) -> dict[str, tuple[str, ...]]: ...
    async def add_requests(self, tx: Transaction, tenant: str, requests: Sequence[Request]) -> None: ...
    async def lock_requests(self, tx: Transaction, tenant: str, ids: Sequence[UUID]) -> dict[UUID, Request]: ...
    async def add_responses(self, tx: Transaction, tenant: str, responses: Sequence[Response]) -> None: ...
    async def withdraw(self, tx: Transaction, tenant: str, ids: Sequence[UUID], now: datetime, cause: str) -> None: ...
    async def find(self, tx: Transaction, tenant: str, any_id: UUID) -> Request | None: ...
    async def responses_to(
        self, tx: Transaction, tenant: str, request_ids: Sequence[UUID], *, payload_bytes: int = ...
    ) -> dict[UUID, list[Response]]: ...
    async def page(
        self,
        tx: Transaction,
        tenant: str,
        *,
        batch: str,
        customer: str,
        item: str,
        states: Sequence[int],
        before: UUID | None,
        limit: int,
    ) -> tuple[list[Request], bool]: ...


# Submitting


def check_requests(request: intake_pb2.SubmitRequestRequest, now: datetime) -> list[Request | Refusal]:
    """Each item as a request, its providers empty where they have to be looked up, or why it is none."""
    return [_check_request(item, now) for item in request.requests]


def _check_request(item: intake_pb2.Request, now: datetime) -> Request | Refusal:
    found: list[FieldViolation] = []
    checks.check_batch_name(found, "batch", item.batch)
    checks.check_name(found, "customer", item.customer)
    checks.check_name(found, "item", item.item)
    _check_providers(found, "providers", item.providers)
    if item.payload:
        checks.check_object(found, "payload", item.payload)
    within: timedelta | None = DEFAULT_ANSWER_WITHIN
    if item.HasField("answer_within"):
        least, most = SHORTEST_ANSWER, LONGEST_ANSWER
        within = checks.check_duration(found, "answer_within", item.answer_within, least=least, most=most)
    if found or within is None:
        return refusal_of(found)
    return Request(
        id=new_id(),
        batch=item.batch,
        customer=item.customer,
        item=item.item,
        providers=tuple(dict.fromkeys(item.providers)),
        payload=item.payload or "{}",
        submitted_at=now,
        answer_by=now + within,
    )


def _check_providers(found: checks.Found, field: str, providers: Sequence[str]) -> None:
    if len(providers) > MAX_PROVIDERS:
        found.append(FieldViolation(field, f"must have 0-{MAX_PROVIDERS} entries, got {len(providers):,}"))
        return
    for index, name in enumerate(providers):
        checks.check_name(found, f"{field}[{index}]", name)


async def submit(
    tx: Transaction, tenant: str, drafts: Sequence[Request | Refusal], *, store: Store, entries: Entries
) -> BatchAnswer[intake_pb2.SubmitRequestResponse]:
    """Log the requests and make what goes out for them: a timer each, and a notification."""
    answer = BatchAnswer(intake_pb2.SubmitRequestResponse(), "requests")
    wanted = [one.item for one in drafts if isinstance(one, Request) and not one.providers]
    known = await store.providers_of(tx, tenant, wanted) if wanted else {}
    submitted: list[Request] = []
    for draft in drafts:
        if isinstance(draft, Refusal):
            answer.refuse(draft)
            continue
        request = draft if draft.providers else replace(draft, providers=known.get(draft.item, ()))
        if not request.providers:
            answer.refuse(refusal_without_providers(request.item))
            continue
        submitted.append(request)
        answer.accept(str(request.id), entries.request(tenant, request))
    if submitted:
        await store.add_requests(tx, tenant, submitted)
    return answer


# Answering


def check_responses(request: intake_pb2.RecordResponseRequest, now: datetime) -> list[Response | Refusal]:
    """Each item as a response, or why it is none."""
    return [_check_response(item, now) for item in request.responses]


def _check_response(item: intake_pb2.Response, now: datetime) -> Response | Refusal:
    found: list[FieldViolation] = []
    request_id = checks.check_id(found, "request_id", item.request_id)
    checks.check_name(found, "provider", item.provider)
    if item.payload:
        checks.check_object(found, "payload", item.payload)
    if found or request_id is None:
        return refusal_of(found)
    return Response(
        id=new_id(), request_id=request_id, provider=item.provider, payload=item.payload or "{}", received_at=now
    )


async def record(
    tx: Transaction, tenant: str, drafts: Sequence[Response | Refusal], *, store: Store, entries: Entries
) -> BatchAnswer[intake_pb2.RecordResponseResponse]:
    """Log the responses that are welcome, and tell the customers."""
    answer = BatchAnswer(intake_pb2.RecordResponseResponse(), "responses")
    responses = [one for one in drafts if isinstance(one, Response)]
    requests = await store.lock_requests(tx, tenant, sorted({one.request_id for one in responses}))
    accepted, refused = judge_responses(responses, requests)
    if accepted:
        await store.add_responses(tx, tenant, accepted)
    for draft in drafts:
        refusal = draft if isinstance(draft, Refusal) else refused.get(draft.id)
        if refusal is not None:
            answer.refuse(refusal)
        elif isinstance(draft, Response):
            answer.accept(str(draft.id), (entries.response(tenant, requests[draft.request_id], draft),))
    return answer


# Withdrawing


def check_withdrawals(request: intake_pb2.WithdrawRequestRequest) -> list[UUID | Refusal]:
    """Each id, or why it is none. Raises InvalidArgument for the cause, which is everybody's."""
    violations, found = Violations(), list[FieldViolation]()
    checks.check_optional_text(found, "cause", request.cause, MAX_CAUSE)
    violations.extend(found)
    violations.raise_if_any()
    return [_check_request_id(text) for text in request.ids]


def _check_request_id(text: str) -> UUID | Refusal:
    found: list[FieldViolation] = []
    request_id = checks.check_id(found, "", text)
    return refusal_of(found) if request_id is None else request_id


async def withdraw(
    tx: Transaction,
    tenant: str,
    ids: Sequence[UUID | Refusal],
    *,
    cause: str,
    now: datetime,
    store: Store,
    entries: Entries,
) -> WithdrawAnswer:
    """Mark the requests as withdrawn and cancel what has not left.

    What was withdrawn before is cancelled again: that changes nothing, and its caller too may wait until it is applied.
    """
    answer = WithdrawAnswer(intake_pb2.WithdrawRequestResponse(), "ids")
    wanted = sorted({one for one in ids if isinstance(one, UUID)})
    requests = await store.lock_requests(tx, tenant, wanted)
    refused = judge_withdrawals(wanted, requests)
    news = [one.id for one in requests.values() if one.id not in refused and one.state is not State.WITHDRAWN]
    if news:
        await store.withdraw(tx, tenant, news, now, cause)
    answer.response.requests = len(news)
    told: set[UUID] = set()
    for one in ids:
        refusal = one if isinstance(one, Refusal) else refused.get(one)
        if refusal is not None:
            answer.refuse(refusal)
        elif isinstance(one, UUID):
            answer.accept(str(one), entries.withdrawal(tenant, requests[one], cause=cause) if one not in told else ())
            told.add(one)
    return answer


# Who provides what


def checked_providers(request: intake_pb2.PutItemProvidersRequest) -> dict[str, tuple[str, ...]]:
    """The providers of each item or pattern; of two entries for one item the last counts. Raises InvalidArgument."""
    violations = Violations()
    for index, item in enumerate(request.items):
        found: list[FieldViolation] = []
        checks.check_name(found, f"items[{index}].item", item.item)
        if "*" in item.item[:-1]:
            found.append(FieldViolation(f"items[{index}].item", "must have * only at its end"))
        _check_providers(found, f"items[{index}].providers", item.providers)
        violations.extend(found)
    violations.raise_if_any()
    return {item.item: tuple(dict.fromkeys(item.providers)) for item in request.items}


# Questions


async def get(
    tx: Transaction, tenant: str, request: intake_pb2.GetRequestRequest, store: Store
) -> intake_pb2.GetRequestResponse:
    """One request; the payloads of its answers as long as they add up to 3 MiB. Raises NotFound."""
    request_id = parse_id(request.id, "id")
    found = await store.find(tx, tenant, request_id)
    if found is None or found.id != request_id:
        raise NotFound(f"There is no request {request_id}.", reason="REQUEST_UNKNOWN", metadata={"id": str(request_id)})
    responses = await store.responses_to(tx, tenant, [request_id])
    return intake_pb2.GetRequestResponse(request=_logged(found, responses[request_id]))


async def page(
    tx: Transaction, tenant: str, request: intake_pb2.ListRequestsRequest, store: Store
) -> intake_pb2.ListRequestsResponse:
    """A page of requests. Raises InvalidArgument."""
    violations = Violations()
    limit = check_page_size(violations, request.page_size)
    for name in ("batch", "customer", "item"):
        found: list[FieldViolation] = []
        checks.check_optional_text(found, name, getattr(request, name), 256)
        violations.extend(found)
    if any(state not in intake_pb2.RequestState.values()[1:] for state in request.states):
        violations.add("states", f"each must be one of {', '.join(intake_pb2.RequestState.keys()[1:])}")
    violations.raise_if_any()
    states = sorted(set(request.states))
    query = "\x1f".join([request.batch, request.customer, request.item, *map(str, states)])
    cursor = read_page_token(request.page_token, {"id": str}, query=query)
    requests, has_more = await store.page(
        tx,
        tenant,
        batch=request.batch,
        customer=request.customer,
        item=request.item,
        states=states,
        before=parse_id(cursor["id"], "page_token") if cursor else None,
        limit=limit,
    )
    responses = await store.responses_to(tx, tenant, [one.id for one in requests], payload_bytes=0)
    return intake_pb2.ListRequestsResponse(
        requests=[_logged(one, responses[one.id]) for one in requests],
        next_page_token=page_token({"id": str(requests[-1].id)}, query=query) if has_more else "",
    )


def _logged(request: Request, responses: Sequence[Response]) -> intake_pb2.LoggedRequest:
    asked = intake_pb2.Request(
        batch=request.batch,
        customer=request.customer,
        item=request.item,
        providers=request.providers,
        payload=request.payload,
    )
    asked.answer_within.FromTimedelta(request.answer_by - request.submitted_at)
    return intake_pb2.LoggedRequest(
        id=str(request.id),
        request=asked,
        state=intake_pb2.RequestState.ValueType(request.state.value),
        submit_time=to_timestamp(request.submitted_at),
        answer_by_time=to_timestamp(request.answer_by),
        responses=[
            intake_pb2.LoggedResponse(
                id=str(one.id),
                provider=one.provider,
                payload=one.payload or "",
                receive_time=to_timestamp(one.received_at),
            )
            for one in responses
        ],
        close_time=None if request.closed_at is None else to_timestamp(request.closed_at),
        history=_history(request, responses),
    )


def _history(request: Request, responses: Sequence[Response]) -> list[intake_pb2.RequestChange]:
    changes = [(State.OPEN, request.submitted_at, "")]
    if responses:
        changes.append((State.ANSWERED, responses[0].received_at, ""))
    if request.closed_at is not None:
        changes.append((request.state, request.closed_at, request.cause))
    return [
        intake_pb2.RequestChange(
            state=intake_pb2.RequestState.ValueType(state.value), time=to_timestamp(at), cause=cause
        )
        for state, at, cause in changes
    ]
