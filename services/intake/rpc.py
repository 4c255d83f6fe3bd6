"""The gRPC service: who asks, what exactly, and until when; everything else is done elsewhere.

Every command goes the same way: fingerprint → check the items → accept (stream.Acceptance) → answer. `now` is read once
per call.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from hashlib import blake2b
from typing import Any, Protocol, TypeVar

import grpc
from carillon.intake.v1 import intake_pb2, intake_pb2_grpc

from libs.clock import Clock
from libs.errors import FieldViolation, InvalidArgument, Unimplemented
from libs.postgres import Database, Transaction
from libs.rpc import Servicer, remaining_of, tenant_of
from services.intake import rpc_checks, rpc_explain, rpc_items, rpc_requests
from services.intake.commands import Command
from services.intake.rpc_answers import BatchAnswer, BatchResponse, CancelAnswer, TriggerAnswer
from services.intake.rpc_streams import answer_in_order

Context = grpc.aio.ServicerContext[Any, Any]

SCHEDULER = ("scheduler",)
DIGEST = ("digest",)
BOTH = ("scheduler", "digest")

AnswerT = TypeVar("AnswerT", BatchAnswer[Any], CancelAnswer, TriggerAnswer)
ResponseT = TypeVar("ResponseT", bound=BatchResponse)


class Acceptance(Protocol):
    """See services.intake.stream."""

    async def accept(
        self, command: Command, prepare: Callable[[Transaction], Awaitable[AnswerT]]
    ) -> AnswerT | bytes: ...


class Entries(rpc_items.Entries, rpc_requests.Entries, Protocol):
    """Makes what goes out; see services.intake.stream_entries."""


class IntakeRpc(intake_pb2_grpc.IntakeServiceServicer):
    """Answers intake.v1.IntakeService. Waiting for receipts ends `answer_margin` before the caller's deadline."""

    def __init__(
        self,
        *,
        db: Database,
        clock: Clock,
        acceptance: Acceptance,
        entries: Entries,
        requests: rpc_requests.Store,
        answer_margin: timedelta,
    ) -> None:
        self._db = db
        self._clock = clock
        self._acceptance = acceptance
        self._entries = entries
        self._requests = requests
        self._answer_margin = answer_margin

    # Commands

    async def Notify(self, request: intake_pb2.NotifyRequest, context: Context) -> intake_pb2.NotifyResponse:
        return await self._notify(request, context, intake_pb2.WAIT_FOR_APPLIED)

    async def _notify(
        self, request: intake_pb2.NotifyRequest, context: Context, default: int
    ) -> intake_pb2.NotifyResponse:
        rpc_items.check_size(len(request.notifications), "notifications")
        command = self._command("Notify", DIGEST, request, context, default)
        answer = rpc_items.notify(request, tenant=command.tenant, now=self._clock.now(), entries=self._entries)
        return await self._accept_batch(command, answer, intake_pb2.NotifyResponse)

    async def Schedule(self, request: intake_pb2.ScheduleRequest, context: Context) -> intake_pb2.ScheduleResponse:
        return await self._schedule(request, context, intake_pb2.WAIT_FOR_APPLIED)

    async def _schedule(
        self, request: intake_pb2.ScheduleRequest, context: Context, default: int
    ) -> intake_pb2.ScheduleResponse:
        rpc_items.check_size(len(request.schedules), "schedules")
        command = self._command("Schedule", SCHEDULER, request, context, default)
        now = self._clock.now()

        def check() -> BatchAnswer[intake_pb2.ScheduleResponse]:
            return rpc_items.schedule(request, tenant=command.tenant, now=now, entries=self._entries)

        # An RRULE that never fires takes up to a second to be known as such: not on everybody's loop.
        has_rrule = any(item.recurrence.rrule for item in request.schedules if item.HasField("recurrence"))
        answer = await asyncio.to_thread(check) if has_rrule else check()
        return await self._accept_batch(command, answer, intake_pb2.ScheduleResponse)

    async def Cancel(self, request: intake_pb2.CancelRequest, context: Context) -> intake_pb2.CancelResponse:
        command = self._command("Cancel", BOTH, request, context, intake_pb2.WAIT_FOR_APPLIED)
        answer = rpc_items.cancel(request, tenant=command.tenant, entries=self._entries)
        accepted = await self._acceptance.accept(command, _prepared(answer))
        return intake_pb2.CancelResponse.FromString(accepted) if isinstance(accepted, bytes) else accepted.response

    async def PutFacts(self, request: intake_pb2.PutFactsRequest, context: Context) -> intake_pb2.PutFactsResponse:
        rpc_items.check_size(len(request.facts), "facts")
        command = self._command("PutFacts", SCHEDULER, request, context, intake_pb2.WAIT_FOR_APPLIED)
        answer = rpc_items.put_facts(request, tenant=command.tenant, entries=self._entries)
        return await self._accept_batch(command, answer, intake_pb2.PutFactsResponse)

    async def StartTimeline(
        self, request: intake_pb2.StartTimelineRequest, context: Context
    ) -> intake_pb2.StartTimelineResponse:
        rpc_items.check_size(len(request.starts), "starts")
        command = self._command("StartTimeline", SCHEDULER, request, context, intake_pb2.WAIT_FOR_APPLIED)
        now = self._clock.now()
        answer = rpc_items.start_timeline(request, tenant=command.tenant, now=now, entries=self._entries)
        return await self._accept_batch(command, answer, intake_pb2.StartTimelineResponse)

    async def SubmitRequest(
        self, request: intake_pb2.SubmitRequestRequest, context: Context
    ) -> intake_pb2.SubmitRequestResponse:
        return await self._submit(request, context, intake_pb2.WAIT_FOR_APPLIED)

    async def _submit(
        self, request: intake_pb2.SubmitRequestRequest, context: Context, default: int
    ) -> intake_pb2.SubmitRequestResponse:
        rpc_items.check_size(len(request.requests), "requests")
        command = self._command("SubmitRequest", BOTH, request, context, default)
        drafts = rpc_requests.check_requests(request, self._clock.now())

        async def prepare(tx: Transaction) -> BatchAnswer[intake_pb2.SubmitRequestResponse]:
            return await rpc_requests.submit(tx, command.tenant, drafts, store=self._requests, entries=self._entries)

        accepted: BatchAnswer[intake_pb2.SubmitRequestResponse] | bytes = await self._acceptance.accept(
            command, prepare
        )
        return _response_of(accepted, intake_pb2.SubmitRequestResponse)

    async def RecordResponse(
        self, request: intake_pb2.RecordResponseRequest, context: Context
    ) -> intake_pb2.RecordResponseResponse:
        return await self._record(request, context, intake_pb2.WAIT_FOR_APPLIED)

    async def _record(
        self, request: intake_pb2.RecordResponseRequest, context: Context, default: int
    ) -> intake_pb2.RecordResponseResponse:
        rpc_items.check_size(len(request.responses), "responses")
        command = self._command("RecordResponse", DIGEST, request, context, default)
        drafts = rpc_requests.check_responses(request, self._clock.now())

        async def prepare(tx: Transaction) -> BatchAnswer[intake_pb2.RecordResponseResponse]:
            return await rpc_requests.record(tx, command.tenant, drafts, store=self._requests, entries=self._entries)

        accepted: BatchAnswer[intake_pb2.RecordResponseResponse] | bytes = await self._acceptance.accept(
            command, prepare
        )
        return _response_of(accepted, intake_pb2.RecordResponseResponse)

    async def TriggerBatch(
        self, request: intake_pb2.TriggerBatchRequest, context: Context
    ) -> intake_pb2.TriggerBatchResponse:
        command = self._command("TriggerBatch", DIGEST, request, context, intake_pb2.WAIT_FOR_APPLIED)
        answer = rpc_items.trigger(request, tenant=command.tenant, now=self._clock.now(), entries=self._entries)
        accepted = await self._acceptance.accept(command, _prepared(answer))
        assert not isinstance(accepted, bytes)  # It has no idempotency key: it is idempotent by nature.
        return accepted.response

    async def PutItemProviders(
        self, request: intake_pb2.PutItemProvidersRequest, context: Context
    ) -> intake_pb2.PutItemProvidersResponse:
        rpc_items.check_size(len(request.items), "items")
        providers = rpc_requests.checked_providers(request)
        async with self._db.transaction() as tx:
            await self._requests.put_providers(tx, tenant_of(context), providers)
        return intake_pb2.PutItemProvidersResponse()

    # Bulk

    async def NotifyStream(
        self, request_iterator: AsyncIterator[intake_pb2.NotifyStreamRequest], context: Context
    ) -> AsyncIterator[intake_pb2.NotifyStreamResponse]:
        async def one(request: intake_pb2.NotifyStreamRequest) -> intake_pb2.NotifyStreamResponse:
            batch = await self._notify(request.batch, context, intake_pb2.WAIT_FOR_ACCEPTED)
            return intake_pb2.NotifyStreamResponse(batch=batch)

        async for answer in answer_in_order(request_iterator, one):
            yield answer

    async def ScheduleStream(
        self, request_iterator: AsyncIterator[intake_pb2.ScheduleStreamRequest], context: Context
    ) -> AsyncIterator[intake_pb2.ScheduleStreamResponse]:
        async def one(request: intake_pb2.ScheduleStreamRequest) -> intake_pb2.ScheduleStreamResponse:
            batch = await self._schedule(request.batch, context, intake_pb2.WAIT_FOR_ACCEPTED)
            return intake_pb2.ScheduleStreamResponse(batch=batch)

        async for answer in answer_in_order(request_iterator, one):
            yield answer

    async def SubmitRequestStream(
        self, request_iterator: AsyncIterator[intake_pb2.SubmitRequestStreamRequest], context: Context
    ) -> AsyncIterator[intake_pb2.SubmitRequestStreamResponse]:
        async def one(request: intake_pb2.SubmitRequestStreamRequest) -> intake_pb2.SubmitRequestStreamResponse:
            batch = await self._submit(request.batch, context, intake_pb2.WAIT_FOR_ACCEPTED)
            return intake_pb2.SubmitRequestStreamResponse(batch=batch)

        async for answer in answer_in_order(request_iterator, one):
            yield answer

    async def RecordResponseStream(
        self, request_iterator: AsyncIterator[intake_pb2.RecordResponseStreamRequest], context: Context
    ) -> AsyncIterator[intake_pb2.RecordResponseStreamResponse]:
        async def one(request: intake_pb2.RecordResponseStreamRequest) -> intake_pb2.RecordResponseStreamResponse:
            batch = await self._record(request.batch, context, intake_pb2.WAIT_FOR_ACCEPTED)
            return intake_pb2.RecordResponseStreamResponse(batch=batch)

        async for answer in answer_in_order(request_iterator, one):
            yield answer

    # Questions

    async def GetRequest(
        self, request: intake_pb2.GetRequestRequest, context: Context
    ) -> intake_pb2.GetRequestResponse:
        async with self._db.read() as tx:
            return await rpc_requests.get(tx, tenant_of(context), request, self._requests)

    async def ListRequests(
        self, request: intake_pb2.ListRequestsRequest, context: Context
    ) -> intake_pb2.ListRequestsResponse:
        async with self._db.read() as tx:
            return await rpc_requests.page(tx, tenant_of(context), request, self._requests)

    async def Explain(self, request: intake_pb2.ExplainRequest, context: Context) -> intake_pb2.ExplainResponse:
        async with self._db.read() as tx:
            return await rpc_explain.explain(tx, tenant_of(context), request, self._requests)

    # Later

    async def Reschedule(
        self, request: intake_pb2.RescheduleRequest, context: Context
    ) -> intake_pb2.RescheduleResponse:
        raise Unimplemented("Reschedule is part of the contract and not built yet; Cancel and Schedule again.")

    async def Pause(self, request: intake_pb2.PauseRequest, context: Context) -> intake_pb2.PauseResponse:
        raise Unimplemented("Pause is part of the contract and not built yet.")

    async def Resume(self, request: intake_pb2.ResumeRequest, context: Context) -> intake_pb2.ResumeResponse:
        raise Unimplemented("Resume is part of the contract and not built yet.")

    async def ReportOutcome(
        self, request: intake_pb2.ReportOutcomeRequest, context: Context
    ) -> intake_pb2.ReportOutcomeResponse:
        raise Unimplemented("ReportOutcome is part of the contract and not built yet, as are event targets.")

    # What they share

    def _command(
        self, method: str, receivers: tuple[str, ...], request: Any, context: Context, default: int
    ) -> Command:
        """The command a request is. Raises InvalidArgument for its key or its wait_for."""
        key = getattr(request, "idempotency_key", "")
        wait_for = request.wait_for or default
        if not rpc_checks.is_key(key):
            what = "must be 1-128 characters without control characters, or absent"
            raise InvalidArgument([FieldViolation("idempotency_key", what)])
        if wait_for not in intake_pb2.WaitFor.values():
            what = "must be WAIT_FOR_ACCEPTED or WAIT_FOR_APPLIED"
            raise InvalidArgument([FieldViolation("wait_for", what)])
        is_waiting = wait_for == intake_pb2.WAIT_FOR_APPLIED
        return Command(
            tenant=tenant_of(context),
            method=method,
            receivers=receivers,
            key=key,
            fingerprint=_fingerprint(request) if key else b"",
            timeout=remaining_of(context) - self._answer_margin if is_waiting else None,
        )

    async def _accept_batch(
        self, command: Command, answer: BatchAnswer[ResponseT], response: type[ResponseT]
    ) -> ResponseT:
        accepted: BatchAnswer[ResponseT] | bytes = await self._acceptance.accept(command, _prepared(answer))
        return _response_of(accepted, response)


def servicer(rpc: IntakeRpc) -> Servicer:
    """What the server registers."""
    return Servicer(intake_pb2_grpc.add_IntakeServiceServicer_to_server, rpc)


def _prepared(answer: AnswerT) -> Callable[[Transaction], Awaitable[AnswerT]]:
    """For commands that need nothing of the database."""

    async def prepare(_: Transaction) -> AnswerT:
        return answer

    return prepare


def _response_of(accepted: BatchAnswer[ResponseT] | bytes, response: type[ResponseT]) -> ResponseT:
    return response.FromString(accepted) if isinstance(accepted, bytes) else accepted.response


def _fingerprint(request: Any) -> bytes:
    """Stands for what the call says; how long it waits and under which key are no part of that."""
    content = type(request)()
    content.CopyFrom(request)
    content.ClearField("idempotency_key")
    content.ClearField("wait_for")
    return blake2b(content.SerializeToString(deterministic=True), digest_size=16).digest()
