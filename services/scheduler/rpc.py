"""The scheduler's gRPC API: questions about timers and shards, and timelines. Reads Postgres, needs no shard."""

import asyncio
from collections.abc import Collection, Sequence
from datetime import datetime
from itertools import islice
from typing import Protocol
from uuid import UUID

import grpc
from carillon.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc, timer_pb2

from libs.clock import Clock
from libs.errors import FieldViolation, InvalidArgument, NotFound, Violations
from libs.explaining import MOST_ENTRIES, nearest
from libs.recurrence import BadRule, Rule, check_rule, occurrences
from libs.recurrence_cost import check_cost
from libs.rpc import Servicer, tenant_of
from libs.wire import (
    check_id,
    check_instant,
    check_number,
    check_page_size,
    check_text,
    instant_token,
    page_token,
    read_instant_token,
    read_page_token,
    to_timestamp,
)
from services.scheduler.attempts import EndedAttempt
from services.scheduler.explain import explain_timer
from services.scheduler.queries import About, Page, Place, ShardSummary, TimerFilter
from services.scheduler.rpc_messages import (
    attempt_message,
    entry_message,
    shard_message,
    timeline_message,
    timer_message,
)
from services.scheduler.rpc_recurrences import read_rule
from services.scheduler.rpc_timelines import read_steps
from services.scheduler.timelines import Step, Timeline
from services.scheduler.timer import State, Timer

MAX_ANSWER_BYTES = 7 << 19
"""3.5 MiB: gRPC clients take 4 MiB unless told otherwise. A page ends early, with a token to go on."""

Context = grpc.aio.ServicerContext


class Store(Protocol):
    """services.scheduler.store_queries.QueryStore."""

    async def timer(self, tenant: str, timer_id: UUID) -> Timer | None: ...
    async def timers(self, wanted: TimerFilter, *, after: Place | None, limit: int, most_bytes: int) -> Page[Timer]: ...
    async def timers_near(
        self, tenant: str, about: About, value: str | UUID, *, now: datetime, most: int
    ) -> Sequence[Timer]: ...
    async def under_way(self, tenant: str, schedule_ids: Collection[UUID]) -> dict[UUID, list[UUID]]: ...
    async def attempts(self, tenant: str, timer_ids: Collection[UUID]) -> dict[UUID, list[EndedAttempt]]: ...
    async def shards(self, tenant: str, now: datetime) -> list[ShardSummary]: ...
    async def put_timeline(
        self, tenant: str, name: str, description: str, steps: tuple[Step, ...], now: datetime
    ) -> Timeline: ...
    async def timelines(
        self, tenant: str, name: str, *, after: tuple[str, int] | None, limit: int, most_bytes: int
    ) -> Page[Timeline]: ...


class SchedulerRpc(scheduler_pb2_grpc.SchedulerServiceServicer):
    """See proto/carillon/scheduler/v1/scheduler.proto."""

    def __init__(self, *, store: Store, clock: Clock, condition_services: frozenset[str]) -> None:
        """`condition_services`: names that the conditions of timelines may ask."""
        self._store = store
        self._clock = clock
        self._condition_services = condition_services

    async def GetTimer(
        self, request: scheduler_pb2.GetTimerRequest, context: Context[object, object]
    ) -> scheduler_pb2.GetTimerResponse:
        """One timer, with its attempts."""
        violations = Violations()
        timer_id = check_id(violations, "id", request.id)
        violations.raise_if_any()
        assert timer_id is not None
        tenant = tenant_of(context)
        timer = await self._store.timer(tenant, timer_id)
        if timer is None:
            raise NotFound(f"there is no timer {request.id}", reason="TIMER_NOT_FOUND")
        attempts = await self._attempts(tenant, [timer])
        return scheduler_pb2.GetTimerResponse(
            timer=timer_message(timer), attempts=[attempt_message(one) for one in attempts.get(timer_id, ())]
        )

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
            is_internal_wanted=request.include_internal,
        )
        if wanted.from_at is not None and wanted.until_at is not None and wanted.from_at >= wanted.until_at:
            violations.add("until_time", "must be after from_time")
        violations.raise_if_any()
        after = _place(request.page_token, query=repr(wanted))
        page = await self._store.timers(wanted, after=after, limit=limit, most_bytes=MAX_ANSWER_BYTES)
        token = ""
        if not page.is_last:
            last = page.items[-1]
            token = instant_token(last.fire_at, last.id, query=repr(wanted))
        return scheduler_pb2.ListTimersResponse(
            timers=[timer_message(timer) for timer in page.items], next_page_token=token
        )

    async def PreviewOccurrences(
        self, request: scheduler_pb2.PreviewOccurrencesRequest, context: Context[object, object]
    ) -> scheduler_pb2.PreviewOccurrencesResponse:
        """The next occurrences of a rule, without jitter: that depends on the id of the schedule."""
        violations = Violations()
        count = check_number(violations, "count", request.count or 10, least=1, most=1_000)
        now = self._clock.now()
        after = check_instant(violations, "after_time", request.after_time) if request.HasField("after_time") else now
        rule = read_rule(violations, "recurrence", request.recurrence, now=min(now, after or now))
        violations.raise_if_any()
        assert after is not None
        try:
            check_cost(rule)
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
        steps = read_steps(violations, request.timeline, services=self._condition_services)
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
        page = await self._store.timelines(
            tenant_of(context), request.name, after=after, limit=limit, most_bytes=MAX_ANSWER_BYTES
        )
        token = ""
        if not page.is_last:
            token = page_token({"name": page.items[-1].name, "version": page.items[-1].version}, query=query)
        return scheduler_pb2.ListTimelinesResponse(
            timelines=[timeline_message(one) for one in page.items], next_page_token=token
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
        tenant, now = tenant_of(context), self._clock.now()
        timers = await self._about(tenant, text, now)
        attempts = await self._attempts(tenant, timers)
        buffered = {timer.schedule_id for timer in timers if timer.state is State.BUFFERED}
        under_way = await self._store.under_way(tenant, buffered) if buffered else {}
        entries = [
            entry
            for timer in timers
            for entry in explain_timer(timer, attempts.get(timer.id, ()), under_way.get(timer.schedule_id, ()))
        ]
        told, is_cut = nearest(entries, now, entry_message)
        return scheduler_pb2.ExplainResponse(entries=told, is_cut=is_cut or len(timers) >= MOST_ENTRIES)

    async def _about(self, tenant: str, text: str, now: datetime) -> Sequence[Timer]:
        """The timers of an entity of that name; else the timer, schedule or timeline run of that id."""
        found = await self._store.timers_near(tenant, "entity", text, now=now, most=MOST_ENTRIES)
        asked = check_id(Violations(), "id", text)
        by_id: tuple[About, ...] = ("id", "schedule_id", "run_id")
        for about in by_id:
            if not found and asked is not None:
                found = await self._store.timers_near(tenant, about, asked, now=now, most=MOST_ENTRIES)
        return found

    async def _attempts(self, tenant: str, timers: Sequence[Timer]) -> dict[UUID, list[EndedAttempt]]:
        tried = [timer.id for timer in timers if timer.attempts]
        return await self._store.attempts(tenant, tried) if tried else {}


def servicer(*, store: Store, clock: Clock, condition_services: frozenset[str] = frozenset()) -> Servicer:
    """The API, ready to be registered."""
    return Servicer(
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server,
        SchedulerRpc(store=store, clock=clock, condition_services=condition_services),
    )


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
    after = read_instant_token(token, query=query)
    return None if after is None else Place(fire_at=after[0], timer_id=after[1])
