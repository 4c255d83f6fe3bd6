"""The gRPC service: who asks, what exactly, and until when; everything else is done elsewhere.

Every command goes the same way: fingerprint → check the items → accept (stream.Acceptance) → answer. `now` is read once
per call.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from carillon.intake.v1 import intake_pb2, intake_pb2_grpc

from libs.clock import Clock
from libs.postgres import Database, Transaction
from libs.rpc import Servicer, tenant_of
from services.intake import metrics, rpc_explain, rpc_items, rpc_requests, rpc_timers
from services.intake.commands import Command
from services.intake.rpc_answers import Answer, BatchAnswer, Response
from services.intake.rpc_commands import BOTH, DIGEST, SCHEDULER, Context, command_of
from services.intake.rpc_streams import answer_in_order

SLOW_ITEMS = 20
"""Items checked in one go where checking is slow: what a caller that has gone away still costs."""

SLOW_CEL_CHARACTERS = 8_192

AnswerT = TypeVar("AnswerT", bound=Answer[Any])
ResponseT = TypeVar("ResponseT", bound=Response)


class Acceptance(Protocol):
    """See services.intake.stream."""

    async def accept(
        self, command: Command, prepare: Callable[[Transaction], Awaitable[AnswerT]]
    ) -> AnswerT | bytes: ...
    async def accept_ready(self, command: Command, answer: AnswerT) -> AnswerT | bytes: ...


class Rate(Protocol):
    """See services.intake.rpc_limits."""

    def take(self, tenant: str, items: int) -> None: ...
    async def wait(self, tenant: str, items: int) -> None: ...


class Entries(rpc_items.Entries, rpc_timers.Entries, rpc_requests.Entries, Protocol):
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
        rate: Rate,
        answer_margin: timedelta,
    ) -> None:
        self._db = db
        self._clock = clock
        self._acceptance = acceptance
        self._entries = entries
        self._requests = requests
        self._rate = rate
        self._answer_margin = answer_margin

    # Commands

    async def Notify(self, request: intake_pb2.NotifyRequest, context: Context) -> intake_pb2.NotifyResponse:
        self._rate.take(tenant_of(context), min(len(request.notifications), rpc_items.MAX_ITEMS))
        return await self._notify(request, context, intake_pb2.WAIT_FOR_APPLIED)

    async def _notify(
        self, request: intake_pb2.NotifyRequest, context: Context, default: int
    ) -> intake_pb2.NotifyResponse:
        rpc_items.check_size(len(request.notifications), "notifications")
        command = self._command("Notify", DIGEST, request, context, default, items=0)
        answer = rpc_items.notify(request, tenant=command.tenant, now=self._clock.now(), entries=self._entries)
        return await self._accept(command, answer, intake_pb2.NotifyResponse)

    async def Schedule(self, request: intake_pb2.ScheduleRequest, context: Context) -> intake_pb2.ScheduleResponse:
        self._rate.take(tenant_of(context), min(len(request.schedules), rpc_items.MAX_ITEMS))
        return await self._schedule(request, context, intake_pb2.WAIT_FOR_APPLIED)

    async def _schedule(
        self, request: intake_pb2.ScheduleRequest, context: Context, default: int
    ) -> intake_pb2.ScheduleResponse:
        rpc_items.check_size(len(request.schedules), "schedules")
        command = self._command("Schedule", SCHEDULER, request, context, default, items=0)
        answer = BatchAnswer(intake_pb2.ScheduleResponse(), "schedules")
        now, is_slow = self._clock.now(), _is_slow(request.schedules)
        step = SLOW_ITEMS if is_slow else rpc_items.MAX_ITEMS

        def check(start: int) -> None:
            items = request.schedules[start : start + step]
            rpc_items.schedule(answer, items, tenant=command.tenant, now=now, entries=self._entries)

        for start in range(0, len(request.schedules), step):
            if is_slow:  # In steps, so that it ends soon after its caller has gone.
                await asyncio.to_thread(check, start)
            else:
                check(start)
        return await self._accept(command, answer, intake_pb2.ScheduleResponse)

    async def Cancel(self, request: intake_pb2.CancelRequest, context: Context) -> intake_pb2.CancelResponse:
        command = self._command("Cancel", BOTH, request, context)
        answer = rpc_timers.cancel(request, tenant=command.tenant, entries=self._entries)
        return await self._accept(command, answer, intake_pb2.CancelResponse)

    async def Reschedule(
        self, request: intake_pb2.RescheduleRequest, context: Context
    ) -> intake_pb2.RescheduleResponse:
        command = self._command("Reschedule", SCHEDULER, request, context)
        now = self._clock.now()
        answer = rpc_timers.reschedule(request, tenant=command.tenant, now=now, entries=self._entries)
        return await self._accept(command, answer, intake_pb2.RescheduleResponse)

    async def Pause(self, request: intake_pb2.PauseRequest, context: Context) -> intake_pb2.PauseResponse:
        command = self._command("Pause", SCHEDULER, request, context)
        answer = rpc_timers.pause(request, tenant=command.tenant, entries=self._entries)
        return await self._accept(command, answer, intake_pb2.PauseResponse)

    async def Resume(self, request: intake_pb2.ResumeRequest, context: Context) -> intake_pb2.ResumeResponse:
        command = self._command("Resume", SCHEDULER, request, context)
        answer = rpc_timers.resume(request, tenant=command.tenant, entries=self._entries)
        return await self._accept(command, answer, intake_pb2.ResumeResponse)

    async def TriggerSchedule(
        self, request: intake_pb2.TriggerScheduleRequest, context: Context
    ) -> intake_pb2.TriggerScheduleResponse:
        rpc_items.check_size(len(request.triggers), "triggers")
        command = self._command("TriggerSchedule", SCHEDULER, request, context, items=len(request.triggers))
        now = self._clock.now()
        answer = rpc_timers.trigger_schedule(request, tenant=command.tenant, now=now, entries=self._entries)
        return await self._accept(command, answer, intake_pb2.TriggerScheduleResponse)

    async def BackfillSchedule(
        self, request: intake_pb2.BackfillScheduleRequest, context: Context
    ) -> intake_pb2.BackfillScheduleResponse:
        rpc_items.check_size(len(request.backfills), "backfills", rpc_timers.MAX_BACKFILLS)
        command = self._command("BackfillSchedule", SCHEDULER, request, context, items=len(request.backfills))
        now = self._clock.now()
        answer = rpc_timers.backfill(request, tenant=command.tenant, now=now, entries=self._entries)
        return await self._accept(command, answer, intake_pb2.BackfillScheduleResponse)

    async def ReportOutcome(
        self, request: intake_pb2.ReportOutcomeRequest, context: Context
    ) -> intake_pb2.ReportOutcomeResponse:
        rpc_items.check_size(len(request.outcomes), "outcomes")
        command = self._command("ReportOutcome", SCHEDULER, request, context, items=len(request.outcomes))
        answer = rpc_timers.report_outcome(request, tenant=command.tenant, entries=self._entries)
        return await self._accept(command, answer, intake_pb2.ReportOutcomeResponse)

    async def PutFacts(self, request: intake_pb2.PutFactsRequest, context: Context) -> intake_pb2.PutFactsResponse:
        rpc_items.check_size(len(request.facts), "facts")
        command = self._command("PutFacts", SCHEDULER, request, context, items=len(request.facts))
        answer = rpc_items.put_facts(request, tenant=command.tenant, entries=self._entries)
        return await self._accept(command, answer, intake_pb2.PutFactsResponse)

    async def StartTimeline(
        self, request: intake_pb2.StartTimelineRequest, context: Context
    ) -> intake_pb2.StartTimelineResponse:
        rpc_items.check_size(len(request.starts), "starts")
        command = self._command("StartTimeline", SCHEDULER, request, context, items=len(request.starts))
        now = self._clock.now()
        answer = rpc_items.start_timeline(request, tenant=command.tenant, now=now, entries=self._entries)
        return await self._accept(command, answer, intake_pb2.StartTimelineResponse)

    async def SubmitRequest(
        self, request: intake_pb2.SubmitRequestRequest, context: Context
    ) -> intake_pb2.SubmitRequestResponse:
        self._rate.take(tenant_of(context), min(len(request.requests), rpc_items.MAX_ITEMS))
        return await self._submit(request, context, intake_pb2.WAIT_FOR_APPLIED)

    async def _submit(
        self, request: intake_pb2.SubmitRequestRequest, context: Context, default: int
    ) -> intake_pb2.SubmitRequestResponse:
        rpc_items.check_size(len(request.requests), "requests")
        command = self._command("SubmitRequest", BOTH, request, context, default, items=0)
        drafts = rpc_requests.check_requests(request, self._clock.now())

        async def prepare(tx: Transaction) -> BatchAnswer[intake_pb2.SubmitRequestResponse]:
            return await rpc_requests.submit(tx, command.tenant, drafts, store=self._requests, entries=self._entries)

        return await self._accept_prepared(command, prepare, intake_pb2.SubmitRequestResponse)

    async def RecordResponse(
        self, request: intake_pb2.RecordResponseRequest, context: Context
    ) -> intake_pb2.RecordResponseResponse:
        self._rate.take(tenant_of(context), min(len(request.responses), rpc_items.MAX_ITEMS))
        return await self._record(request, context, intake_pb2.WAIT_FOR_APPLIED)

    async def _record(
        self, request: intake_pb2.RecordResponseRequest, context: Context, default: int
    ) -> intake_pb2.RecordResponseResponse:
        rpc_items.check_size(len(request.responses), "responses")
        command = self._command("RecordResponse", DIGEST, request, context, default, items=0)
        drafts = rpc_requests.check_responses(request, self._clock.now())

        async def prepare(tx: Transaction) -> BatchAnswer[intake_pb2.RecordResponseResponse]:
            return await rpc_requests.record(tx, command.tenant, drafts, store=self._requests, entries=self._entries)

        return await self._accept_prepared(command, prepare, intake_pb2.RecordResponseResponse)

    async def WithdrawRequest(
        self, request: intake_pb2.WithdrawRequestRequest, context: Context
    ) -> intake_pb2.WithdrawRequestResponse:
        rpc_items.check_size(len(request.ids), "ids")
        command = self._command("WithdrawRequest", BOTH, request, context, items=len(request.ids))
        ids, now, cause = rpc_requests.check_withdrawals(request), self._clock.now(), request.cause

        async def prepare(tx: Transaction) -> BatchAnswer[intake_pb2.WithdrawRequestResponse]:
            return await rpc_requests.withdraw(
                tx, command.tenant, ids, cause=cause, now=now, store=self._requests, entries=self._entries
            )

        accepted = await self._acceptance.accept(command, prepare)
        if isinstance(accepted, bytes):
            return intake_pb2.WithdrawRequestResponse.FromString(accepted)
        metrics.CLOSED_REQUESTS.labels("withdrawn").inc(accepted.response.requests)
        return accepted.response

    async def TriggerBatch(
        self, request: intake_pb2.TriggerBatchRequest, context: Context
    ) -> intake_pb2.TriggerBatchResponse:
        command = self._command("TriggerBatch", DIGEST, request, context)
        answer = rpc_items.trigger_batch(request, tenant=command.tenant, now=self._clock.now(), entries=self._entries)
        return await self._accept(command, answer, intake_pb2.TriggerBatchResponse)

    async def PutItemProviders(
        self, request: intake_pb2.PutItemProvidersRequest, context: Context
    ) -> intake_pb2.PutItemProvidersResponse:
        rpc_items.check_size(len(request.items), "items")
        self._rate.take(tenant_of(context), len(request.items))
        providers = rpc_requests.checked_providers(request)
        async with self._db.transaction() as tx:
            await self._requests.put_providers(tx, tenant_of(context), providers)
        return intake_pb2.PutItemProvidersResponse()

    # Bulk

    async def NotifyStream(
        self, request_iterator: AsyncIterator[intake_pb2.NotifyStreamRequest], context: Context
    ) -> AsyncIterator[intake_pb2.NotifyStreamResponse]:
        async def one(request: intake_pb2.NotifyStreamRequest) -> intake_pb2.NotifyStreamResponse:
            await self._rate.wait(tenant_of(context), min(len(request.batch.notifications), rpc_items.MAX_ITEMS))
            batch = await self._notify(request.batch, context, intake_pb2.WAIT_FOR_ACCEPTED)
            return intake_pb2.NotifyStreamResponse(batch=batch)

        async for answer in answer_in_order(request_iterator, one):
            yield answer

    async def ScheduleStream(
        self, request_iterator: AsyncIterator[intake_pb2.ScheduleStreamRequest], context: Context
    ) -> AsyncIterator[intake_pb2.ScheduleStreamResponse]:
        async def one(request: intake_pb2.ScheduleStreamRequest) -> intake_pb2.ScheduleStreamResponse:
            await self._rate.wait(tenant_of(context), min(len(request.batch.schedules), rpc_items.MAX_ITEMS))
            batch = await self._schedule(request.batch, context, intake_pb2.WAIT_FOR_ACCEPTED)
            return intake_pb2.ScheduleStreamResponse(batch=batch)

        async for answer in answer_in_order(request_iterator, one):
            yield answer

    async def SubmitRequestStream(
        self, request_iterator: AsyncIterator[intake_pb2.SubmitRequestStreamRequest], context: Context
    ) -> AsyncIterator[intake_pb2.SubmitRequestStreamResponse]:
        async def one(request: intake_pb2.SubmitRequestStreamRequest) -> intake_pb2.SubmitRequestStreamResponse:
            await self._rate.wait(tenant_of(context), min(len(request.batch.requests), rpc_items.MAX_ITEMS))
            batch = await self._submit(request.batch, context, intake_pb2.WAIT_FOR_ACCEPTED)
            return intake_pb2.SubmitRequestStreamResponse(batch=batch)

        async for answer in answer_in_order(request_iterator, one):
            yield answer

    async def RecordResponseStream(
        self, request_iterator: AsyncIterator[intake_pb2.RecordResponseStreamRequest], context: Context
    ) -> AsyncIterator[intake_pb2.RecordResponseStreamResponse]:
        async def one(request: intake_pb2.RecordResponseStreamRequest) -> intake_pb2.RecordResponseStreamResponse:
            await self._rate.wait(tenant_of(context), min(len(request.batch.responses), rpc_items.MAX_ITEMS))
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

    # What they share

    def _command(
        self,
        method: str,
        receivers: tuple[str, ...],
        request: Any,
        context: Context,
        default: int = intake_pb2.WAIT_FOR_APPLIED,
        *,
        items: int = 1,
    ) -> Command:
        """`items` count against the tenant's rate: 0 where they have been counted."""
        self._rate.take(tenant_of(context), items)
        return command_of(method, receivers, request, context, default=default, answer_margin=self._answer_margin)

    async def _accept(self, command: Command, answer: Answer[ResponseT], response: type[ResponseT]) -> ResponseT:
        """For commands that need nothing of the database."""
        accepted = await self._acceptance.accept_ready(command, answer)
        return response.FromString(accepted) if isinstance(accepted, bytes) else accepted.response

    async def _accept_prepared(
        self,
        command: Command,
        prepare: Callable[[Transaction], Awaitable[Answer[ResponseT]]],
        response: type[ResponseT],
    ) -> ResponseT:
        accepted = await self._acceptance.accept(command, prepare)
        return response.FromString(accepted) if isinstance(accepted, bytes) else accepted.response


def _is_slow(schedules: Sequence[intake_pb2.Schedule]) -> bool:
    """Whether checking takes long enough to hold others up: then it is not for everybody's loop.

    Measured: an RRULE that never fires takes up to 0.4 s to be known as such, a rule that counts the minutes of a month
    as much, a new condition of 2,048 characters 11 ms.
    """
    rules = (item.recurrence for item in schedules if item.HasField("recurrence"))
    if any(rule.rrule or rule.count or rule.exclusions for rule in rules):
        return True
    conditions = {item.condition.cel for item in schedules if item.HasField("condition")}
    return sum(map(len, conditions)) > SLOW_CEL_CHARACTERS


def servicer(rpc: IntakeRpc) -> Servicer:
    """What the server registers."""
    return Servicer(intake_pb2_grpc.add_IntakeServiceServicer_to_server, rpc)
