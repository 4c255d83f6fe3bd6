"""Timers as callers see them."""

from datetime import timedelta
from uuid import UUID

import pytest
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2
from msgspec.structs import replace

from libs.recurrence import Fold, Gap, Rule
from libs.wire import from_timestamp, to_duration, to_timestamp
from services.scheduler.attempts import EndedAttempt, RetryPolicy
from services.scheduler.conditions import NoAnswer, ServiceCondition
from services.scheduler.recurrence import CATCH_UP, Misfire, Overlap, Recurrence
from services.scheduler.rpc_messages import attempt_message, timer_message
from services.scheduler.stream import recurrence_of
from services.scheduler.timer import State, StepOf, TargetKind
from tests.support.scheduler_table import DAY, HOUR, MINUTE, NOW, SECOND, timer

ONE = timer(NOW, UUID(int=1))


@pytest.mark.parametrize("state", list(State))
def test_states_have_the_numbers_of_the_contract(state: State) -> None:
    """The contract has no other one."""
    assert timer_message(replace(ONE, state=state)).state == timer_pb2.TimerState.Value(f"TIMER_STATE_{state.name}")
    assert sorted(timer_pb2.TimerState.values()) == [0, *sorted(State)]


def test_a_plain_timer_has_nothing_it_was_not_given() -> None:
    """Absent is absent."""
    message = timer_message(ONE)
    absent = {"nominal_time", "expire_time", "decided_time", "condition", "recurrence", "retry_policy"}
    assert not absent & {descriptor.name for descriptor, _ in message.ListFields()}
    assert (message.attempts, message.last_error, message.verdict) == (0, "", "")


def test_a_timer_with_an_event_is_told_with_all_that_came_of_it() -> None:
    """Policies, attempts, error and verdict; attempts that have ended are told beside it."""
    event = timer_pb2.EventContent(type="trial.over", payload="{}", report_within=to_duration(MINUTE))
    it = replace(
        ONE,
        target_kind=TargetKind.EVENT,
        target=link_pb2.TimerTarget(event=event).SerializeToString(),
        report_within=MINUTE,
        retry=RetryPolicy(initial=SECOND, most_attempts=3),
        asked=ServiceCondition(service="crm", timeout=5 * SECOND, no_answer=NoAnswer.FIRE),
        state=State.RETRYING,
        attempts=2,
        last_error="no such account",
        note='{"asked": "crm", "holds": true, "reason": ""}',
        step_of=StepOf(run_id=UUID(int=2), timeline="trial", version=1, step="end"),
        expires_at=NOW + DAY,
    )
    message = timer_message(it)
    assert message.target.event == event
    assert (message.attempts, message.last_error, message.verdict) == (2, "no such account", it.note)
    assert message.condition.service.service == "crm"
    assert message.condition.service.no_answer_policy == timer_pb2.NO_ANSWER_POLICY_FIRE
    assert (message.retry_policy.maximum_attempts, message.retry_policy.multiplier) == (3, 2.0)
    assert message.retry_policy.maximum_age == to_duration(3 * DAY)
    assert (message.timeline_run_id, message.step) == (str(UUID(int=2)), "end")
    assert from_timestamp(message.expire_time) == NOW + DAY
    ended = EndedAttempt(timer_id=it.id, number=2, started_at=NOW, ended_at=NOW + MINUTE, error="no such account")
    start, end = to_timestamp(NOW), to_timestamp(NOW + MINUTE)
    expected = timer_pb2.Attempt(number=2, start_time=start, end_time=end, error="no such account")
    assert attempt_message(ended) == expected
    assert attempt_message(replace(ended, error=None)).error == ""


def test_a_fired_timer_was_decided_when_it_had_its_turn() -> None:
    """Unless its verdict is on record."""
    assert from_timestamp(timer_message(replace(ONE, state=State.FIRED)).decided_time) == NOW
    late = replace(ONE, state=State.FIRED, decided_at=NOW + SECOND)
    assert from_timestamp(timer_message(late).decided_time) == NOW + SECOND


def test_the_cause_of_a_cancel_is_no_verdict() -> None:
    """It is plain text."""
    assert timer_message(replace(ONE, state=State.CANCELLED, note="paid")).verdict == ""


@pytest.mark.parametrize(
    "recurrence",
    [
        Recurrence(rule=Rule(cron="0 9 * * 1-5", zone="Europe/Berlin", start=NOW)),
        Recurrence(
            rule=Rule(
                rrule="FREQ=DAILY",
                start=NOW,
                end=NOW + DAY,
                count=7,
                exclusions=frozenset({NOW + HOUR, NOW + MINUTE}),
                gap=Gap.SKIP,
                fold=Fold.BOTH,
            ),
            jitter=timedelta(seconds=90, microseconds=1),
            misfire=Misfire.FIRE_ALL,
            catch_up=HOUR,
            overlap=Overlap.BUFFER_ONE,
        ),
        Recurrence(rule=Rule(cron="* * * * *", start=NOW), misfire=Misfire.SKIP, overlap=Overlap.SKIP),
    ],
)
def test_a_recurrence_is_told_so_that_it_can_be_put_again(recurrence: Recurrence) -> None:
    """With its defaults spelled out; the nominal time is that of the rule."""
    message = timer_message(replace(ONE, recurrence=recurrence, nominal_at=NOW - MINUTE, occurrence=2))
    assert recurrence_of(message.recurrence, to_timestamp(NOW + DAY)) == recurrence
    assert message.recurrence.HasField("catch_up_window") == (recurrence.misfire is not Misfire.SKIP)
    assert recurrence.catch_up in {CATCH_UP, HOUR}
    assert (from_timestamp(message.nominal_time), message.occurrence) == (NOW - MINUTE, 2)
