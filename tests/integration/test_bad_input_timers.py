"""Bad input at the front door, in commands on timers that exist: selectors, ranges, ids and reports."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc
import pytest
from carillon.intake.v1 import intake_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from libs.ids import new_id
from libs.rpc_client import refusal_of
from libs.wire import to_duration
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.intake_world import IntakeWorld, assert_all_refused, days, intake_world


@pytest.fixture
async def world(postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus) -> AsyncIterator[IntakeWorld]:
    """Intake; nobody takes its frames, so what it stores can be counted: nothing."""
    async with intake_world(postgres_url, open_database, open_bus, peers_run=False) as it:
        yield it
        assert await it.stored() == {}


def span(**parts: float) -> Duration:
    """A Duration."""
    return to_duration(timedelta(**parts))


YEAR_10000 = Timestamp(seconds=253_402_300_800)
A_ID = str(new_id())
BY_ENTITY = intake_pb2.Selector(entity=intake_pb2.EntitySelector(entity="shop-1"))
SELECTORS = [
    (None, "selector"),
    (intake_pb2.Selector(), "selector"),
    (intake_pb2.Selector(entity=intake_pb2.EntitySelector()), "selector.entity.entity"),
    (
        intake_pb2.Selector(entity=intake_pb2.EntitySelector(entity="carillon:window:1")),
        "selector.entity.entity",
    ),
    (intake_pb2.Selector(entity=intake_pb2.EntitySelector(entity="e" * 10_240)), "selector.entity.entity"),
    (intake_pb2.Selector(entity=intake_pb2.EntitySelector(entity="a", type="b c")), "selector.entity.type"),
    (intake_pb2.Selector(ids=intake_pb2.IdSelector(entity="a")), "selector.ids.ids"),
    (intake_pb2.Selector(ids=intake_pb2.IdSelector(entity="a", ids=[A_ID] * 1_001)), "selector.ids.ids"),
    (intake_pb2.Selector(ids=intake_pb2.IdSelector(entity="a", ids=[A_ID, "x"])), "selector.ids.ids[1]"),
    (intake_pb2.Selector(ids=intake_pb2.IdSelector(ids=[A_ID])), "selector.ids.entity"),
    (intake_pb2.Selector(timeline=intake_pb2.TimelineSelector(entity="a")), "selector.timeline.timeline"),
    (intake_pb2.Selector(timeline=intake_pb2.TimelineSelector(timeline="a")), "selector.timeline.entity"),
]


@pytest.mark.parametrize("method", ["Cancel", "Reschedule", "Pause", "Resume"])
async def test_wrong_selectors_name_their_fields(world: IntakeWorld, method: str) -> None:
    """The same for all commands that select timers."""
    for selector, field in SELECTORS:
        call = getattr(intake_pb2, f"{method}Request")(selector=selector, idempotency_key="k")
        if method == "Reschedule":
            call.after.FromSeconds(1)
        assert await violated(world, method, call) == [field]


async def violated(world: IntakeWorld, method: str, call: Any) -> list[str]:
    """The fields for which a call is INVALID_ARGUMENT as a whole."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await getattr(world.stub, method)(call)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT, method
    return [violation.field for violation in refusal_of(raised.value).violations]


CALLS: list[tuple[str, Any, str]] = [
    ("Cancel", intake_pb2.CancelRequest(selector=BY_ENTITY, cause="c" * 513), "cause"),
    ("Reschedule", intake_pb2.RescheduleRequest(selector=BY_ENTITY), "at_time"),
    ("Reschedule", intake_pb2.RescheduleRequest(selector=BY_ENTITY, at_time=YEAR_10000), "at_time"),
    ("Reschedule", intake_pb2.RescheduleRequest(selector=BY_ENTITY, after=span(days=3_654)), "after"),
    ("Reschedule", intake_pb2.RescheduleRequest(selector=BY_ENTITY, after=span(seconds=-1)), "after"),
    ("Pause", intake_pb2.PauseRequest(selector=BY_ENTITY, idempotency_key="k" * 129), "idempotency_key"),
    ("Resume", intake_pb2.ResumeRequest(selector=BY_ENTITY, wait_for=9), "wait_for"),  # type: ignore[arg-type]
    ("TriggerSchedule", intake_pb2.TriggerScheduleRequest(), "triggers"),
    (
        "TriggerSchedule",
        intake_pb2.TriggerScheduleRequest(triggers=[intake_pb2.ScheduleTrigger()] * 1_001),
        "triggers",
    ),
    ("BackfillSchedule", intake_pb2.BackfillScheduleRequest(), "backfills"),
    (
        "BackfillSchedule",
        intake_pb2.BackfillScheduleRequest(backfills=[intake_pb2.ScheduleBackfill()] * 101),
        "backfills",
    ),
    ("ReportOutcome", intake_pb2.ReportOutcomeRequest(), "outcomes"),
    ("ReportOutcome", intake_pb2.ReportOutcomeRequest(outcomes=[intake_pb2.Outcome()] * 1_001), "outcomes"),
]


async def test_calls_that_are_wrong_as_a_whole_are_refused(world: IntakeWorld) -> None:
    """No items, too many, no time to move to."""
    for method, call, field in CALLS:
        assert await violated(world, method, call) == [field]


def backfill(**more: Any) -> intake_pb2.ScheduleBackfill:
    """A range that is as it should be."""
    fields: dict[str, Any] = {"schedule_id": A_ID, "entity": "shop-1", "start_time": days(-2), "end_time": days(-1)}
    return intake_pb2.ScheduleBackfill(**(fields | more))


BACKFILLS = [
    (backfill(schedule_id="x"), "schedule_id", "must be a UUID such as "),
    (backfill(entity=""), "entity", "must be 1-256 characters, got 0"),
    (backfill(start_time=None), "start_time", "must be given"),
    (backfill(end_time=None), "end_time", "must be given"),
    (backfill(start_time=YEAR_10000), "start_time", "must be a valid time, year 1970 to 2199"),
    (backfill(start_time=days(-1)), "start_time", "must be before end_time"),
    (backfill(start_time=days(-0.5)), "start_time", "must be before end_time"),
    (backfill(end_time=days(0.001)), "end_time", "must not be after 2026-03-02T12:00:00+00:00"),
]


async def test_wrong_backfills_name_their_fields(world: IntakeWorld) -> None:
    """Ranges that are none, and the future."""
    items = [item for item, _, _ in BACKFILLS]
    answer = await world.stub.BackfillSchedule(intake_pb2.BackfillScheduleRequest(backfills=items))
    assert_all_refused(answer.results, "backfills", BACKFILLS)


TRIGGERS = [
    (intake_pb2.ScheduleTrigger(schedule_id="", entity="a"), "schedule_id", "must be a UUID such as "),
    (intake_pb2.ScheduleTrigger(schedule_id=A_ID, entity="\x00"), "entity", "must not hold control characters"),
]


async def test_wrong_triggers_name_their_fields(world: IntakeWorld) -> None:
    """Ids and entities."""
    items = [item for item, _, _ in TRIGGERS]
    answer = await world.stub.TriggerSchedule(intake_pb2.TriggerScheduleRequest(triggers=items, idempotency_key="k"))
    assert_all_refused(answer.results, "triggers", TRIGGERS)


def outcome(**more: Any) -> intake_pb2.Outcome:
    """A report that is as it should be."""
    fields: dict[str, Any] = {"timer_id": A_ID, "entity": "shop-1", "attempt": 1}
    return intake_pb2.Outcome(**(fields | more))


OUTCOMES = [
    (outcome(timer_id=A_ID.replace("-", "")), "timer_id", "must be a UUID such as "),
    (outcome(entity="carillon:request:1"), "entity", 'must not start with "carillon:"'),
    (outcome(attempt=0), "attempt", "must be the event's carillonattempt, 1-100, got 0"),
    (outcome(attempt=4_294_967_295), "attempt", "must be the event's carillonattempt, 1-100, got 4,294,967,295"),
    (outcome(error="e" * 2_049), "error", "must be 0-2,048 characters, got 2,049"),
    (outcome(error="\x1b[31mred"), "error", "must not hold control characters"),
]


async def test_wrong_outcomes_name_their_fields(world: IntakeWorld) -> None:
    """Ids, attempts and errors."""
    items = [item for item, _, _ in OUTCOMES]
    answer = await world.stub.ReportOutcome(intake_pb2.ReportOutcomeRequest(outcomes=items))
    assert_all_refused(answer.results, "outcomes", OUTCOMES)
