"""Intake's commands on timers: events and policies in schedules, and what is said of timers that exist."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import grpc
import pytest
from carillon.intake.v1 import intake_pb2
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2

from libs.ids import new_id
from libs.rpc_client import refusal_of
from libs.sharding import shard_of
from libs.wire import to_duration, to_timestamp
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.intake_world import NOW, TENANT, IntakeWorld, content, event, intake_world, notification, schedule


@pytest.fixture
async def world(postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus) -> AsyncIterator[IntakeWorld]:
    """Intake and its peers."""
    async with intake_world(postgres_url, open_database, open_bus) as it:
        yield it


HOUR = to_duration(timedelta(hours=1))
AN_ID, ANOTHER_ID = str(new_id()), str(new_id())
BY_ENTITY = intake_pb2.Selector(entity=intake_pb2.EntitySelector(entity="shop-1"))
SELECTORS = [
    (
        intake_pb2.Selector(ids=intake_pb2.IdSelector(entity="shop-1", ids=[AN_ID])),
        link_pb2.TimerSelector(entity="shop-1", ids=[UUID(AN_ID).bytes]),
    ),
    (
        intake_pb2.Selector(entity=intake_pb2.EntitySelector(entity="shop-1", type="reminder")),
        link_pb2.TimerSelector(entity="shop-1", type="reminder"),
    ),
    (
        intake_pb2.Selector(timeline=intake_pb2.TimelineSelector(entity="shop-1", timeline="trial")),
        link_pb2.TimerSelector(entity="shop-1", timeline="trial"),
    ),
]


def refused(entity: str, code: int, reason: str) -> Any:
    """A scheduler that refuses what it is told of an entity, and changes two timers for everybody else."""

    def result(index: int, entry: link_pb2.Entry) -> link_pb2.EntryResult:
        kind: Any = getattr(entry, str(entry.WhichOneof("kind")))
        if kind.entity == entity:
            return link_pb2.EntryResult(index=index, error_code=code, error_reason=reason, error_message="it says why")
        return link_pb2.EntryResult(index=index, changed=2)

    return result


# Schedules


async def test_an_event_is_sent_with_its_retry_policy_and_its_condition(world: IntakeWorld) -> None:
    """Everything the scheduler needs to publish it, ask before, and try again."""
    policy = timer_pb2.RetryPolicy(initial_delay=HOUR, maximum_delay=HOUR, multiplier=3, maximum_attempts=5)
    asked = timer_pb2.ServiceCondition(service="credit-check", timeout=to_duration(timedelta(seconds=2)))
    condition = timer_pb2.Condition(service=asked)
    one = schedule(after=HOUR, target=event(), retry_policy=policy, condition=condition)
    answer = await world.stub.Schedule(intake_pb2.ScheduleRequest(schedules=[one]))
    (entry,) = world.scheduler.entries
    assert entry.schedule_timer == link_pb2.ScheduleTimer(
        id=UUID(answer.results[0].id).bytes,
        entity="shop-1",
        due_time=to_timestamp(NOW + timedelta(hours=1)),
        target=link_pb2.TimerTarget(event=event().event),
        condition=condition,
        retry_policy=policy,
    )


async def test_an_event_without_payload_gets_an_empty_object(world: IntakeWorld) -> None:
    """As a notification does; a policy that was not given is not made up here."""
    one = schedule(after=HOUR, target=timer_pb2.Target(event=timer_pb2.EventContent(type="trial.over")))
    await world.stub.Schedule(intake_pb2.ScheduleRequest(schedules=[one]))
    timer = world.scheduler.entries[0].schedule_timer
    assert timer.target.event == timer_pb2.EventContent(type="trial.over", payload="{}")
    assert not timer.HasField("retry_policy")


async def test_a_recurrence_travels_with_its_policies(world: IntakeWorld) -> None:
    """As it came."""
    rule = timer_pb2.Recurrence(
        cron="*/5 * * * *",
        jitter=to_duration(timedelta(minutes=1)),
        misfire_policy=timer_pb2.MISFIRE_POLICY_FIRE_ALL,
        catch_up_window=to_duration(timedelta(days=2)),
        overlap_policy=timer_pb2.OVERLAP_POLICY_BUFFER_ONE,
    )
    await world.stub.Schedule(intake_pb2.ScheduleRequest(schedules=[schedule(recurrence=rule, target=event())]))
    assert world.scheduler.entries[0].schedule_timer.recurrence == rule


def recurring(**rule: Any) -> intake_pb2.Schedule:
    """An event that recurs every day."""
    return schedule(recurrence=timer_pb2.Recurrence(cron="0 9 * * *", **rule), target=event())


def asking(**service: Any) -> intake_pb2.Schedule:
    """A timer that asks a service."""
    asked = timer_pb2.ServiceCondition(service="a" * 64, **service)
    return schedule(after=HOUR, condition=timer_pb2.Condition(service=asked))


def span(**parts: float) -> Any:
    """A Duration."""
    return to_duration(timedelta(**parts))


AT_THE_BOUND = [
    *(recurring(jitter=one) for one in (span(), span(hours=1))),
    *(recurring(catch_up_window=one) for one in (span(), span(days=30))),
    *(recurring(misfire_policy=one) for one in timer_pb2.MisfirePolicy.values()),
    *(recurring(overlap_policy=one) for one in timer_pb2.OverlapPolicy.values()),
    recurring(misfire_policy=timer_pb2.MISFIRE_POLICY_SKIP, catch_up_window=span()),
    *(asking(timeout=one) for one in (span(milliseconds=100), span(seconds=30))),
    *(asking(no_answer_policy=one) for one in timer_pb2.NoAnswerPolicy.values()),
    *(schedule(after=HOUR, target=event(report_within=one)) for one in (span(), span(days=7))),
    schedule(after=HOUR, target=event(type="e" * 128)),
    schedule(after=HOUR, condition=timer_pb2.Condition(cel=" " * 2_044 + "true")),
    schedule(after=span(days=3_653)),
]


async def test_what_is_just_within_its_bounds_is_taken(world: IntakeWorld) -> None:
    """Bounds are inclusive, and every policy of the contract is known."""
    answer = await world.stub.Schedule(intake_pb2.ScheduleRequest(schedules=AT_THE_BOUND))
    assert [result.error.message for result in answer.results if result.HasField("error")] == []


async def test_every_priority_is_carried(world: IntakeWorld) -> None:
    """With what is told directly as with what is scheduled."""
    contents = [content(priority=one) for one in timer_pb2.Priority.values()]
    await world.stub.Notify(intake_pb2.NotifyRequest(notifications=[notification(content=one) for one in contents]))
    later = [schedule(after=HOUR, target=timer_pb2.Target(notification=one)) for one in contents]
    await world.stub.Schedule(intake_pb2.ScheduleRequest(schedules=later))
    assert [entry.notification.content for entry in world.digest.entries] == contents
    assert [entry.schedule_timer.target.notification for entry in world.scheduler.entries] == contents


async def test_rules_that_take_long_to_read_keep_their_places(world: IntakeWorld) -> None:
    """They are checked a few at a time, beside the loop; results stay in order all the same."""
    rules = ["FREQ=DAILY" if number % 3 else f"FREQ=NO{number}" for number in range(50)]
    items = [schedule(recurrence=timer_pb2.Recurrence(rrule=rule)) for rule in rules]
    answer = await world.stub.Schedule(intake_pb2.ScheduleRequest(schedules=items))
    assert [bool(result.id) for result in answer.results] == [rule == "FREQ=DAILY" for rule in rules]
    assert "got 'FREQ=NO48'" in answer.results[48].error.message
    assert answer.results[48].error.field == "schedules[48].recurrence.rrule"


# Reschedule, Pause, Resume


@pytest.mark.parametrize(("selector", "timers"), SELECTORS)
async def test_timers_are_moved_by_any_selector(
    world: IntakeWorld, selector: intake_pb2.Selector, timers: link_pb2.TimerSelector
) -> None:
    """One entry, to the shard of the entity; the count is the scheduler's."""
    world.scheduler.results = lambda index, _: link_pb2.EntryResult(index=index, changed=3)
    at = to_timestamp(NOW + timedelta(days=2))
    answer = await world.stub.Reschedule(intake_pb2.RescheduleRequest(selector=selector, at_time=at))
    assert answer == intake_pb2.RescheduleResponse(timers=3, is_applied=True)
    (entry,) = world.scheduler.entries
    assert entry.reschedule_timers == link_pb2.RescheduleTimers(selector=timers, due_time=at)
    assert entry.sequence > 0
    assert world.scheduler.partitions == [shard_of(TENANT, "shop-1", 8)]
    assert not world.digest.entries


async def test_after_counts_from_acceptance(world: IntakeWorld) -> None:
    """The scheduler hears of an instant, so it does not matter when; a repeated call does not move it on."""
    call = intake_pb2.RescheduleRequest(selector=BY_ENTITY, after=HOUR, idempotency_key="k")
    first = await world.stub.Reschedule(call)
    world.clock.advance(timedelta(minutes=30))
    assert await world.stub.Reschedule(call) == first
    (entry,) = world.scheduler.entries
    assert entry.reschedule_timers.due_time == to_timestamp(NOW + timedelta(hours=1))


@pytest.mark.parametrize(("method", "is_paused"), [("Pause", True), ("Resume", False)])
@pytest.mark.parametrize(("selector", "timers"), SELECTORS)
async def test_timers_are_held_back_and_let_go(
    world: IntakeWorld, method: str, is_paused: bool, selector: intake_pb2.Selector, timers: link_pb2.TimerSelector
) -> None:
    """By any selector; the count is the scheduler's."""
    world.scheduler.results = lambda index, _: link_pb2.EntryResult(index=index, changed=4)
    answer = await getattr(world.stub, method)(getattr(intake_pb2, f"{method}Request")(selector=selector))
    assert (answer.timers, answer.is_applied) == (4, True)
    (entry,) = world.scheduler.entries
    assert entry.pause_timers == link_pb2.PauseTimers(selector=timers, is_paused=is_paused)
    assert world.scheduler.partitions == [shard_of(TENANT, "shop-1", 8)]


async def test_commands_on_an_entity_are_ordered_by_their_sequences(world: IntakeWorld) -> None:
    """That is how the scheduler knows which came first, whatever the order of arrival."""
    later = schedule(after=HOUR)
    await world.stub.Schedule(intake_pb2.ScheduleRequest(schedules=[later]))
    await world.stub.Pause(intake_pb2.PauseRequest(selector=BY_ENTITY))
    await world.stub.Reschedule(intake_pb2.RescheduleRequest(selector=BY_ENTITY, after=HOUR))
    await world.stub.Resume(intake_pb2.ResumeRequest(selector=BY_ENTITY))
    await world.stub.Cancel(intake_pb2.CancelRequest(selector=BY_ENTITY))
    sequences = [entry.sequence for entry in world.scheduler.entries]
    assert len(set(sequences)) == 5
    assert sequences == sorted(sequences)


@pytest.mark.parametrize("method", ["Cancel", "Pause", "Resume"])
async def test_nothing_to_cancel_pause_or_resume_is_no_error(world: IntakeWorld, method: str) -> None:
    """Cancel of nothing, resume of what is not paused: applied, and the counts are 0."""
    answer = await getattr(world.stub, method)(getattr(intake_pb2, f"{method}Request")(selector=BY_ENTITY))
    assert (answer.timers, answer.is_applied) == (0, True)


async def test_counts_stay_0_until_the_command_is_applied(
    postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus
) -> None:
    """The caller knows by is_applied that they are not known yet."""
    async with intake_world(postgres_url, open_database, open_bus, peers_run=False) as world:
        backfill = intake_pb2.ScheduleBackfill(
            schedule_id=AN_ID, entity="shop-1", start_time=to_timestamp(NOW - timedelta(1)), end_time=to_timestamp(NOW)
        )
        moved = await world.stub.Reschedule(intake_pb2.RescheduleRequest(selector=BY_ENTITY, after=HOUR), timeout=0.4)
        filled = await world.stub.BackfillSchedule(
            intake_pb2.BackfillScheduleRequest(backfills=[backfill]), timeout=0.4
        )
        assert (moved.timers, moved.is_applied) == (0, False)
        assert (filled.timers, filled.is_applied) == (0, False)
        assert await world.count("outbox") == 2


# TriggerSchedule, BackfillSchedule


def triggers(*entities: str) -> intake_pb2.TriggerScheduleRequest:
    """A schedule of each of these entities is to fire."""
    some = [intake_pb2.ScheduleTrigger(schedule_id=AN_ID, entity=one) for one in entities]
    return intake_pb2.TriggerScheduleRequest(triggers=some)


async def test_a_triggered_schedule_fires_as_a_new_timer(world: IntakeWorld) -> None:
    """Its id is in the answer; without a key the next call fires again."""
    first = await world.stub.TriggerSchedule(triggers("shop-1"))
    again = await world.stub.TriggerSchedule(triggers("shop-1"))
    assert first.is_applied
    assert first.results[0].id != again.results[0].id
    entry, _ = world.scheduler.entries
    assert entry.trigger_schedule == link_pb2.TriggerSchedule(
        id=UUID(first.results[0].id).bytes,
        schedule_id=UUID(AN_ID).bytes,
        entity="shop-1",
        due_time=to_timestamp(NOW),
    )
    assert world.scheduler.partitions == [shard_of(TENANT, "shop-1", 8)] * 2


async def test_a_repeated_trigger_with_a_key_fires_once(world: IntakeWorld) -> None:
    """INV-2: same key, one command, the same id."""
    call = triggers("shop-1")
    call.idempotency_key = "k"
    assert await world.stub.TriggerSchedule(call) == await world.stub.TriggerSchedule(call)
    assert len(world.scheduler.entries) == 1


async def test_an_unknown_schedule_is_refused_beside_known_ones(world: IntakeWorld) -> None:
    """The scheduler says so: the item loses its id, the others keep theirs."""
    world.scheduler.results = refused("shop-2", 9, "SCHEDULE_UNKNOWN")
    answer = await world.stub.TriggerSchedule(triggers("shop-1", "shop-2", "shop-3"))
    assert answer.is_applied
    assert [bool(result.id) for result in answer.results] == [True, False, True]
    assert answer.results[1].error == intake_pb2.ItemError(
        code=9, reason="SCHEDULE_UNKNOWN", message="it says why", field="triggers[1]"
    )


async def test_backfills_add_up_what_fires(world: IntakeWorld) -> None:
    """Over the ranges of all shards; a refused range counts for nothing, and has no id to lose."""
    world.scheduler.results = refused("shop-2", 9, "TOO_MANY_OCCURRENCES")
    start, end = to_timestamp(NOW - timedelta(days=400)), to_timestamp(NOW)
    some = [
        intake_pb2.ScheduleBackfill(schedule_id=AN_ID, entity=one, start_time=start, end_time=end)
        for one in ("shop-1", "shop-2", "shop-3")
    ]
    answer = await world.stub.BackfillSchedule(intake_pb2.BackfillScheduleRequest(backfills=some))
    assert (answer.timers, answer.is_applied) == (4, True)
    assert [result.id for result in answer.results] == ["", "", ""]
    assert [result.error.code for result in answer.results] == [0, 9, 0]
    entries = {entry.backfill_schedule.entity: entry.backfill_schedule for entry in world.scheduler.entries}
    assert entries["shop-3"] == link_pb2.BackfillSchedule(
        schedule_id=UUID(AN_ID).bytes, entity="shop-3", start_time=start, end_time=end
    )


# ReportOutcome


async def test_outcomes_reach_the_scheduler(world: IntakeWorld) -> None:
    """Done and failed; a report that nobody expects is refused by the scheduler, alone."""
    world.scheduler.results = refused("shop-2", 5, "NO_REPORT_EXPECTED")
    outcomes = [
        intake_pb2.Outcome(timer_id=AN_ID, entity="shop-1", attempt=2, is_done=True),
        intake_pb2.Outcome(timer_id=ANOTHER_ID, entity="shop-1", attempt=1, error="no\n\tstock"),
        intake_pb2.Outcome(timer_id=AN_ID, entity="shop-2", attempt=100, error="e" * 2_048),
    ]
    answer = await world.stub.ReportOutcome(intake_pb2.ReportOutcomeRequest(outcomes=outcomes))
    assert answer.is_applied
    assert [result.error.code for result in answer.results] == [0, 0, 5]
    told = [entry.report_outcome for entry in world.scheduler.entries if entry.report_outcome.entity == "shop-1"]
    assert told == [
        link_pb2.ReportOutcome(timer_id=UUID(AN_ID).bytes, entity="shop-1", attempt=2, is_done=True),
        link_pb2.ReportOutcome(timer_id=UUID(ANOTHER_ID).bytes, entity="shop-1", attempt=1, error="no\n\tstock"),
    ]


async def test_a_key_of_one_command_on_timers_is_not_anothers(world: IntakeWorld) -> None:
    """Pause and Resume look the same on the wire; the method is part of what a key stands for."""
    await world.stub.Pause(intake_pb2.PauseRequest(selector=BY_ENTITY, idempotency_key="k"))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await world.stub.Resume(intake_pb2.ResumeRequest(selector=BY_ENTITY, idempotency_key="k"))
    assert refusal_of(raised.value).reason == "IDEMPOTENCY_KEY_REUSED"
