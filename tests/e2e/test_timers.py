"""Timers as callers see them: everything intake accepts about them, through real processes and back."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import nats
import pytest
from carillon.intake.v1 import intake_pb2, intake_pb2_grpc
from carillon.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc, timer_pb2
from google.protobuf.duration_pb2 import Duration
from nats.js.api import ConsumerConfig, DeliverPolicy
from nats.js.client import JetStreamContext

from libs.wire import to_timestamp
from local.stack import Stack
from tests.e2e.conftest import token_of

TENANT = "shop"
_AS_TENANT = (("authorization", f"Bearer {token_of(TENANT)}"),)
HOUR = timedelta(hours=1)


class Caller:
    """Calls intake and the scheduler as a tenant, and consumes its events with plain JetStream."""

    def __init__(self, intake: Any, scheduler: Any, events: JetStreamContext.PullSubscription) -> None:
        self.intake = intake
        self.scheduler = scheduler
        self._events = events

    async def call(self, method: Any, request: Any) -> Any:
        """An answer that says it has been applied."""
        answer = await method(request, metadata=_AS_TENANT, timeout=30)
        assert answer.is_applied
        return answer

    async def schedule(self, entity: str, **more: Any) -> str:
        """A schedule with an event; its id."""
        within = more.pop("report_within", None)
        event = timer_pb2.EventContent(type="trial.over", payload='{"plan": "trial"}')
        if within is not None:
            event.report_within.FromTimedelta(within)
        schedule = intake_pb2.Schedule(entity=entity, target=timer_pb2.Target(event=event), **more)
        answer = await self.call(self.intake.Schedule, intake_pb2.ScheduleRequest(schedules=[schedule]))
        assert not answer.results[0].HasField("error"), answer.results[0].error
        return str(answer.results[0].id)

    async def event(self) -> dict[str, Any]:
        """The next event of the tenant."""
        (message,) = await self._events.fetch(1, timeout=20)
        await message.ack()
        return dict(json.loads(message.data))

    async def report(self, event: dict[str, Any], *, is_done: bool, error: str = "") -> intake_pb2.ItemResult:
        """What came of an event."""
        outcome = intake_pb2.Outcome(
            timer_id=event["carillontimerid"],
            attempt=event["carillonattempt"],
            entity=event["subject"],
            is_done=is_done,
            error=error,
        )
        request = intake_pb2.ReportOutcomeRequest(outcomes=[outcome])
        answer: intake_pb2.ReportOutcomeResponse = await self.call(self.intake.ReportOutcome, request)
        return answer.results[0]

    async def timer(self, timer_id: str) -> scheduler_pb2.GetTimerResponse:
        """As the scheduler has it."""
        request = scheduler_pb2.GetTimerRequest(id=timer_id)
        answer: scheduler_pb2.GetTimerResponse = await self.scheduler.GetTimer(request, metadata=_AS_TENANT, timeout=10)
        return answer

    async def timers_of(self, entity: str) -> list[timer_pb2.Timer]:
        """All of an entity."""
        request = scheduler_pb2.ListTimersRequest(entity=entity)
        return list((await self.scheduler.ListTimers(request, metadata=_AS_TENANT, timeout=10)).timers)


@asynccontextmanager
async def calling(stack: Stack) -> AsyncIterator[Caller]:
    """Connected; only events from now on."""
    client = await nats.connect(stack.nats_url)
    try:
        js = client.jetstream()
        only_new = ConsumerConfig(deliver_policy=DeliverPolicy.NEW)
        events = await js.pull_subscribe(f"carillon.events.{TENANT}.trial.over", stream="EVENTS", config=only_new)
        async with (
            grpc.aio.insecure_channel(stack.grpc("intake")) as to_intake,
            grpc.aio.insecure_channel(stack.grpc("scheduler")) as to_scheduler,
        ):
            yield Caller(
                intake_pb2_grpc.IntakeServiceStub(to_intake),
                scheduler_pb2_grpc.SchedulerServiceStub(to_scheduler),
                events,
            )
    finally:
        await client.close()


def selector(entity: str) -> intake_pb2.Selector:
    """Everything of an entity."""
    return intake_pb2.Selector(entity=intake_pb2.EntitySelector(entity=entity))


@pytest.mark.timeout(120)
async def test_an_event_is_tried_again_until_it_is_reported_done(guarded: Stack) -> None:
    """Published as a CloudEvent; failed, so again by policy; done, so never again; all on record."""
    async with calling(guarded) as caller:
        timer_id = await caller.schedule(
            "retried",
            after=Duration(),
            report_within=timedelta(minutes=5),
            retry_policy=timer_pb2.RetryPolicy(initial_delay=Duration(seconds=1), maximum_delay=Duration(seconds=1)),
        )
        first = await caller.event()
        assert (first["type"], first["subject"], first["data"]) == ("trial.over", "retried", {"plan": "trial"})
        assert (first["carillontimerid"], first["carillonattempt"]) == (timer_id, 1)
        assert not (await caller.report(first, is_done=False, error="no room")).HasField("error")
        second = await caller.event()
        assert (second["carillontimerid"], second["carillonattempt"]) == (timer_id, 2)
        assert (await caller.timer(timer_id)).timer.state == timer_pb2.TIMER_STATE_AWAITING
        assert not (await caller.report(second, is_done=True)).HasField("error")
        found = await caller.timer(timer_id)
        assert (found.timer.state, found.timer.attempts) == (timer_pb2.TIMER_STATE_DONE, 2)
        assert [(one.number, one.error) for one in found.attempts] == [(1, "no room"), (2, "")]
        refused = await caller.report({**second, "carillontimerid": str(first["id"])}, is_done=True)
        assert refused.error.reason == "TIMER_NOT_FOUND"


@pytest.mark.timeout(120)
async def test_timers_are_paused_moved_and_let_go(guarded: Stack) -> None:
    """Each call says how many; the timer says where it is."""
    async with calling(guarded) as caller:
        timer_id = await caller.schedule("moved", after=Duration(seconds=3600))
        paused = await caller.call(caller.intake.Pause, intake_pb2.PauseRequest(selector=selector("moved")))
        again = await caller.call(caller.intake.Pause, intake_pb2.PauseRequest(selector=selector("moved")))
        assert (paused.timers, again.timers) == (1, 0)
        moved = intake_pb2.RescheduleRequest(selector=selector("moved"), after=Duration())
        assert (await caller.call(caller.intake.Reschedule, moved)).timers == 1
        assert (await caller.timer(timer_id)).timer.state == timer_pb2.TIMER_STATE_PAUSED
        resumed = await caller.call(caller.intake.Resume, intake_pb2.ResumeRequest(selector=selector("moved")))
        assert resumed.timers == 1
        assert (await caller.event())["carillontimerid"] == timer_id
        nothing = await caller.call(caller.intake.Cancel, intake_pb2.CancelRequest(selector=selector("moved")))
        assert (nothing.timers, nothing.items) == (0, 0)


@pytest.mark.timeout(120)
async def test_a_schedule_is_triggered_made_up_for_and_cancelled(guarded: Stack) -> None:
    """Besides its occurrences one now; each missed one once; and when it is cancelled there is no schedule any more."""
    now = datetime.now(UTC)
    rule = timer_pb2.Recurrence(cron="0 * * * *", start_time=to_timestamp(now - 10 * HOUR))
    async with calling(guarded) as caller:
        schedule_id = await caller.schedule("recurring", recurrence=rule)
        trigger = intake_pb2.ScheduleTrigger(schedule_id=schedule_id, entity="recurring")
        answer = await caller.call(caller.intake.TriggerSchedule, intake_pb2.TriggerScheduleRequest(triggers=[trigger]))
        assert (await caller.event())["carillontimerid"] == answer.results[0].id
        missed = intake_pb2.ScheduleBackfill(
            schedule_id=schedule_id,
            entity="recurring",
            start_time=to_timestamp(now - 4 * HOUR),
            end_time=to_timestamp(now),
        )
        backfill = intake_pb2.BackfillScheduleRequest(backfills=[missed])
        assert [(await caller.call(caller.intake.BackfillSchedule, backfill)).timers for _ in range(2)] == [4, 0]
        times = [(await caller.event())["time"] for _ in range(4)]
        assert times == sorted(times)
        cancel = intake_pb2.CancelRequest(selector=selector("recurring"))
        assert (await caller.call(caller.intake.Cancel, cancel)).timers == 1
        gone = await caller.call(caller.intake.TriggerSchedule, intake_pb2.TriggerScheduleRequest(triggers=[trigger]))
        assert gone.results[0].error.reason == "SCHEDULE_NOT_FOUND"
        states = [timer.state for timer in await caller.timers_of("recurring")]
        assert sorted(states) == [timer_pb2.TIMER_STATE_FIRED] * 5 + [timer_pb2.TIMER_STATE_CANCELLED]


@pytest.mark.timeout(120)
async def test_calls_about_timers_reach_only_the_tenants_own(guarded: Stack) -> None:
    """INV-8: another tenant's orders, triggers and reports find nothing."""
    as_another = (("authorization", f"Bearer {token_of('bank')}"),)
    async with calling(guarded) as caller:
        timer_id = await caller.schedule("private", after=Duration(seconds=3600))
        orders = [
            (caller.intake.Pause, intake_pb2.PauseRequest(selector=selector("private"))),
            (caller.intake.Reschedule, intake_pb2.RescheduleRequest(selector=selector("private"), after=Duration())),
            (caller.intake.Cancel, intake_pb2.CancelRequest(selector=selector("private"))),
        ]
        for method, request in orders:
            answer = await method(request, metadata=as_another, timeout=30)
            assert (answer.is_applied, answer.timers) == (True, 0)
        outcome = intake_pb2.Outcome(timer_id=timer_id, attempt=1, entity="private", is_done=True)
        request = intake_pb2.ReportOutcomeRequest(outcomes=[outcome])
        answer = await caller.intake.ReportOutcome(request, metadata=as_another, timeout=30)
        assert answer.results[0].error.reason == "TIMER_NOT_FOUND"
        assert (await caller.timer(timer_id)).timer.state == timer_pb2.TIMER_STATE_SCHEDULED
        await caller.call(caller.intake.Cancel, intake_pb2.CancelRequest(selector=selector("private")))


async def test_waiting_and_past_timers_are_listed_by_time(guarded: Stack) -> None:
    """System-wide: in the order of their times, over all shards, in pages."""
    async with calling(guarded) as caller:
        for n in range(6):
            await caller.schedule(f"listed-{n}", type="listed", after=Duration(seconds=86_400 * (6 - n)))
        request = scheduler_pb2.ListTimersRequest(
            from_time=to_timestamp(datetime.now(UTC) + 2 * HOUR),
            type="listed",
            states=[timer_pb2.TIMER_STATE_SCHEDULED],
            page_size=4,
        )
        pages = [await caller.scheduler.ListTimers(request, metadata=_AS_TENANT, timeout=10)]
        request.page_token = pages[0].next_page_token
        pages.append(await caller.scheduler.ListTimers(request, metadata=_AS_TENANT, timeout=10))
        entities = [timer.entity for page in pages for timer in page.timers]
        assert entities == [f"listed-{n}" for n in reversed(range(6))]
        await asyncio.gather(
            *(
                caller.call(caller.intake.Cancel, intake_pb2.CancelRequest(selector=selector(f"listed-{n}")))
                for n in range(6)
            )
        )
