"""The scheduler's gRPC API: questions about timers and shards, and timelines. Reads Postgres, needs no shard."""

import asyncio
from collections.abc import Sequence
from datetime import datetime
from itertools import islice
from typing import Protocol
from uuid import UUID

import grpc
from carillon.explain.v1 import explain_pb2
from carillon.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc, timer_pb2

from libs.clock import Clock
from libs.errors import FieldViolation, InvalidArgument, NotFound, Violations
from libs.recurrence import BadRule, Rule, check_rule, occurrences
from libs.recurrence_cost import check_cost
from libs.rpc import Servicer, tenant_of
from libs.wire import (
    check_id,
    check_instant,
    check_number,
    check_page_size,
    check_text,
    page_token,
    read_page_token,
    to_timestamp,
)
from services.scheduler.explain import explain_timer
from services.scheduler.queries import Place, ShardSummary, TimerFilter
from services.scheduler.rpc_messages import (
    check_recurrence,
    read_steps,
    rule_of,
    shard_message,
    timeline_message,
    timer_message,
)
from services.scheduler.timelines import Step, Timeline
from services.scheduler.timer import State, Timer

Context = grpc.aio.ServicerContext


class Store(Protocol):
    """services.scheduler.store_queries.QueryStore."""

    async def timer(self, tenant: str, timer_id: UUID) -> Timer | None: ...
    async def timers_by(self, tenant: str, column: str, value: UUID) -> list[Timer]: ...
    async def timers(self, wanted: TimerFilter, *, after: Place | None, limit: int) -> list[Timer]: ...
    async def shards(self, tenant: str, now: datetime) -> list[ShardSummary]: ...
    async def put_timeline(
        self, tenant: str, name: str, description: str, steps: tuple[Step, ...], now: datetime
    ) -> Timeline: ...
    async def timelines(
        self, tenant: str, name: str, *, after: tuple[str, int] | None, limit: int
    ) -> Sequence[Timeline]: ...


class SchedulerRpc(scheduler_pb2_grpc.SchedulerServiceServicer):
    """See proto/carillon/scheduler/v1/scheduler.proto."""

    def __init__(self, *, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def GetTimer(
        self, request: scheduler_pb2.GetTimerRequest, context: Context[object, object]
    ) -> scheduler_pb2.GetTimerResponse:
        """One timer."""
        violations = Violations()
        timer_id = check_id(violations, "id", request.id)
        violations.raise_if_any()
        assert timer_id is not None
        timer = await self._store.timer(tenant_of(context), timer_id)
        if timer is None:
            raise NotFound(f"there is no timer {request.id}", reason="TIMER_NOT_FOUND")
        return scheduler_pb2.GetTimerResponse(timer=timer_message(timer))

    async def ListTimers(
        self, request: scheduler_pb2.ListTimersRequest, context: Context[object, object]
    ) -> scheduler_pb2.ListTimersResponse:
        """Timers in firing order."""
        violations = Violations()
        limit = check_page_size(violations, request.page_size)
        wanted = TimerFilter(
            tenant=tenant_of(context),
            entity=check_text(violations, "entity", request.entity, shortest=0, longest=256),
            type=check_text(violations, "type", request.type, shortest=0, longest=128),
            states=_states(violations, request.states),
            from_at=check_instant(violations, "from_time", request.from_time)
            if request.HasField("from_time")
            else None,
            until_at=check_instant(violations, "until_time", request.until_time)
            if request.HasField("until_time")
            else None,
        )
        if wanted.from_at is not None and wanted.until_at is not None and wanted.from_at >= wanted.until_at:
            violations.add("until_time", "must be after from_time")
        violations.raise_if_any()
        after = _place(request.page_token, query=repr(wanted))
        timers = await self._store.timers(wanted, after=after, limit=limit + 1)
        token = ""
        if len(timers) > limit:
            last = timers[limit - 1]
            cursor: dict[str, str | int | None] = {
                "shard": last.shard,
                "at": last.fire_at.isoformat(),
                "id": str(last.id),
            }
            token = page_token(cursor, query=repr(wanted))
        return scheduler_pb2.ListTimersResponse(
            timers=[timer_message(timer) for timer in timers[:limit]], next_page_token=token
        )

    async def PreviewOccurrences(
        self, request: scheduler_pb2.PreviewOccurrencesRequest, context: Context[object, object]
    ) -> scheduler_pb2.PreviewOccurrencesResponse:
        """The next occurrences of a rule."""
        violations = Violations()
        count = check_number(violations, "count", request.count or 10, least=1, most=1_000)
        now = self._clock.now()
        after = check_instant(violations, "after_time", request.after_time) if request.HasField("after_time") else now
        check_recurrence(violations, "recurrence", request.recurrence)
        violations.raise_if_any()
        assert after is not None
        try:
            rule = rule_of(request.recurrence, min(now, after))
            check_cost(rule, after)
            # In a thread: what is cheap enough to answer is still too long for the shards to wait.
            times = await asyncio.to_thread(_first, rule, after, count)
        except BadRule as err:
            raise InvalidArgument([FieldViolation(f"recurrence.{err.field}", str(err))]) from err
        return scheduler_pb2.PreviewOccurrencesResponse(times=[to_timestamp(at) for at in times])

    async def PutTimeline(
        self, request: scheduler_pb2.PutTimelineRequest, context: Context[object, object]
    ) -> scheduler_pb2.PutTimelineResponse:
        """Store a timeline."""
        violations = Violations()
        steps = read_steps(violations, request.timeline)
        violations.raise_if_any()
        timeline = await self._store.put_timeline(
            tenant_of(context), request.timeline.name, request.timeline.description, steps, self._clock.now()
        )
        return scheduler_pb2.PutTimelineResponse(timeline=timeline_message(timeline))

    async def ListTimelines(
        self, request: scheduler_pb2.ListTimelinesRequest, context: Context[object, object]
    ) -> scheduler_pb2.ListTimelinesResponse:
        """Timelines by name."""
        violations = Violations()
        limit = check_page_size(violations, request.page_size)
        check_text(violations, "name", request.name, shortest=0, longest=128)
        violations.raise_if_any()
        query = f"timelines {request.name}"
        cursor = read_page_token(request.page_token, {"name": str, "version": int}, query=query)
        after = (cursor["name"], cursor["version"]) if cursor else None
        timelines = await self._store.timelines(tenant_of(context), request.name, after=after, limit=limit + 1)
        token = ""
        if len(timelines) > limit:
            last = timelines[limit - 1]
            token = page_token({"name": last.name, "version": last.version}, query=query)
        return scheduler_pb2.ListTimelinesResponse(
            timelines=[timeline_message(one) for one in timelines[:limit]], next_page_token=token
        )

    async def ListShards(
        self, request: scheduler_pb2.ListShardsRequest, context: Context[object, object]
    ) -> scheduler_pb2.ListShardsResponse:
        """All shards."""
        shards = await self._store.shards(tenant_of(context), self._clock.now())
        return scheduler_pb2.ListShardsResponse(shards=[shard_message(shard) for shard in shards])

    async def Explain(
        self, request: scheduler_pb2.ExplainRequest, context: Context[object, object]
    ) -> scheduler_pb2.ExplainResponse:
        """What is known of a timer, schedule, timeline run or entity."""
        violations = Violations()
        text = check_text(violations, "id", request.id, longest=256)
        violations.raise_if_any()
        timers = await self._about(tenant_of(context), text)
        entries = sorted((entry for timer in timers for entry in explain_timer(timer)), key=lambda entry: entry.at)
        return scheduler_pb2.ExplainResponse(
            entries=[
                explain_pb2.Entry(
                    time=to_timestamp(entry.at),
                    service="scheduler",
                    kind=entry.kind,
                    sentence=entry.sentence,
                    details=entry.details,
                    is_expected=entry.is_expected,
                )
                for entry in entries[:1_000]
            ]
        )

    async def _about(self, tenant: str, text: str) -> list[Timer]:
        found = await self._store.timers(TimerFilter(tenant=tenant, entity=text), after=None, limit=1_000)
        asked = check_id(Violations(), "id", text)
        for column in ("id", "schedule_id", "run_id"):
            if not found and asked is not None:
                found = await self._store.timers_by(tenant, column, asked)
        return found


def servicer(*, store: Store, clock: Clock) -> Servicer:
    """The API, ready to be registered."""
    return Servicer(scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server, SchedulerRpc(store=store, clock=clock))


def _first(rule: Rule, after: datetime, count: int) -> list[datetime]:
    check_rule(rule)
    return list(islice(occurrences(rule, after), count))


def _states(violations: Violations, values: Sequence[timer_pb2.TimerState.ValueType]) -> frozenset[State]:
    known = {int(state) for state in State}
    for index, value in enumerate(values):
        if value not in known:
            violations.add(f"states[{index}]", "must be a TimerState other than unspecified")
    return frozenset(State(value) for value in values if value in known)


def _place(token: str, *, query: str) -> Place | None:
    cursor = read_page_token(token, {"shard": int, "at": str, "id": str}, query=query)
    if cursor is None:
        return None
    try:
        if not 0 <= cursor["shard"] < 1 << 31:
            raise ValueError("no shard has this number")
        return Place(shard=cursor["shard"], fire_at=datetime.fromisoformat(cursor["at"]), timer_id=UUID(cursor["id"]))
    except ValueError as err:
        raise InvalidArgument([FieldViolation("page_token", "is not a token from an answer before")]) from err
