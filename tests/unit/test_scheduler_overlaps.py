"""Overlap policies: what happens to an occurrence while one before it has no outcome yet."""

from collections.abc import Callable
from typing import Any

import pytest

from libs.ids import derived_id
from services.scheduler.attempts import RetryPolicy
from services.scheduler.commands import Command
from services.scheduler.conditions import NoAnswer, ServiceCondition
from services.scheduler.recurrence import Overlap
from services.scheduler.timer import State, Timer
from tests.support.scheduler_table import DAY, HOUR, MICROSECOND, MINUTE, NOW, SECOND, Table, hourly

SCHEDULE = derived_id("schedule", 1)
ONCE = RetryPolicy(most_attempts=1)
AWAITING, BUFFERED, SKIPPED, SCHEDULED = State.AWAITING, State.BUFFERED, State.SKIPPED, State.SCHEDULED


def _table(overlap: Overlap, *, until_hour: int = 0, **more: Any) -> Table:
    """A table with one schedule of events whose reports may take a day, up to an hour."""
    table = Table()
    parts = {"id": SCHEDULE, "recurrence": hourly(overlap=overlap), "report_within": DAY, "retry": ONCE}
    table.turn(table.event(None, **parts | more))
    table.go(NOW + until_hour * HOUR)
    return table


def _states(table: Table) -> list[State]:
    """Of the occurrences, first to last."""
    return [table.state_of(row.id) for row in table.of(SCHEDULE)]


def _occurrence(table: Table, number: int) -> Timer:
    return table.of(SCHEDULE)[number - 1]


def test_skip_skips_what_comes_due_before_the_outcome_and_says_why() -> None:
    """The recurrence goes on, and the first occurrence after the outcome fires."""
    table = _table(Overlap.SKIP, until_hour=3)
    assert _states(table) == [AWAITING, SKIPPED, SKIPPED, SCHEDULED]
    assert _occurrence(table, 2).note == '{"skipped": "the occurrence before it has no outcome yet"}'
    table.turn(table.report(_occurrence(table, 1).id))
    table.go(NOW + 4 * HOUR)
    assert _states(table) == [State.DONE, SKIPPED, SKIPPED, AWAITING, SCHEDULED]


def test_buffer_one_keeps_one_and_skips_those_after_it() -> None:
    """It takes its turn just after the watermark when the outcome has come."""
    table = _table(Overlap.BUFFER_ONE, until_hour=4)
    assert _states(table) == [AWAITING, BUFFERED, SKIPPED, SKIPPED, SCHEDULED]
    watermark = table.watermark
    (fired,) = table.run(table.report(_occurrence(table, 1).id), until=SECOND)
    assert (fired.id, fired.fire_at) == (_occurrence(table, 2).id, watermark.at + MICROSECOND)
    table.go(NOW + 5 * HOUR)
    assert _states(table) == [State.DONE, AWAITING, SKIPPED, SKIPPED, BUFFERED, SCHEDULED]


def test_allow_fires_all_the_same() -> None:
    """As many as come due."""
    assert _states(_table(Overlap.ALLOW, until_hour=3)) == [AWAITING, AWAITING, AWAITING, SCHEDULED]


@pytest.mark.parametrize("overlap", [Overlap.SKIP, Overlap.BUFFER_ONE])
def test_an_occurrence_that_ended_before_the_next_came_due_is_in_nobodys_way(overlap: Overlap) -> None:
    """The next fires in its time."""
    table = _table(overlap, until_hour=1)
    table.turn(table.report(_occurrence(table, 1).id))
    table.go(NOW + 2 * HOUR)
    assert _states(table) == [State.DONE, AWAITING, SCHEDULED]


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (lambda table, first: table.report(first.id), State.DONE),
        (lambda table, first: table.report(first.id, error="no room"), State.FAILED),
        (lambda table, first: table.cancel(ids=[first.id]), State.CANCELLED),
    ],
)
@pytest.mark.parametrize("is_taken_over", [False, True])
def test_what_waits_is_released_by_any_end(
    end: Callable[[Table, Timer], Command], state: State, is_taken_over: bool
) -> None:
    """Done, failed or cancelled; also where another owner buffered it."""
    table = _table(Overlap.BUFFER_ONE, until_hour=2)
    if is_taken_over:
        table.take_over()
    table.run(end(table, _occurrence(table, 1)), until=SECOND)
    assert _states(table) == [state, AWAITING, SCHEDULED]


def test_what_waits_is_released_when_the_report_is_overdue() -> None:
    """After the last attempt; until then the occurrence has no outcome."""
    policy = RetryPolicy(initial=SECOND, most_attempts=2)
    table = _table(Overlap.BUFFER_ONE, until_hour=2, report_within=2.5 * HOUR, retry=policy)
    table.go(NOW + 3.5 * HOUR + MINUTE)
    assert (_states(table)[:2], _occurrence(table, 1).attempts) == ([AWAITING, BUFFERED], 2)
    table.go(NOW + 7 * HOUR)
    assert _states(table)[:2] == [State.FAILED, AWAITING]


def test_an_occurrence_that_waits_for_its_next_attempt_is_under_way() -> None:
    """The one that waits for it goes on waiting."""
    table = _table(Overlap.BUFFER_ONE, until_hour=2, retry=RetryPolicy(initial=DAY, longest=DAY))
    table.turn(table.report(_occurrence(table, 1).id, error="no room"))
    table.go(NOW + 3 * HOUR)
    assert _states(table)[:3] == [State.RETRYING, BUFFERED, SKIPPED]


def test_what_waits_is_released_when_a_paused_retry_is_reported_done() -> None:
    """Nothing else would ever release it."""
    table = _table(Overlap.BUFFER_ONE, until_hour=2, retry=RetryPolicy(initial=DAY, longest=DAY))
    first = _occurrence(table, 1)
    table.turn(table.report(first.id, error="no room"), table.pause(ids=[first.id]))
    table.run(table.report(first.id), until=SECOND)
    assert _states(table)[:2] == [State.DONE, AWAITING]


def test_an_occurrence_whose_condition_is_being_asked_is_under_way() -> None:
    """When the answer is no, the one that waits for it is asked about in its turn."""
    asked = ServiceCondition(service="stock", timeout=30 * SECOND, no_answer=NoAnswer.FAIL)
    table = _table(Overlap.BUFFER_ONE, recurrence=hourly(cron="* * * * *", overlap=Overlap.BUFFER_ONE), asked=asked)
    table.run(until=NOW + MINUTE)
    table.now = NOW + 2 * MINUTE
    table.turn(answers=[table.answer(None, "no answer")])
    answer = table.answer(holds=False)
    table.run(until=NOW + 2 * MINUTE)
    assert _states(table)[:2] == [State.ASKING, BUFFERED]
    table.run(answers=[answer])
    table.run(until=SECOND)
    assert _states(table)[:2] == [SKIPPED, State.ASKING]
    assert table.questions[-1].timer_id == _occurrence(table, 2).id


def test_the_one_that_is_released_and_the_next_that_comes_due_in_the_same_turn_come_in_order() -> None:
    """The first is in the second's way."""
    table = _table(Overlap.BUFFER_ONE, until_hour=2)
    table.now = NOW + 3 * HOUR
    table.turn(table.report(_occurrence(table, 1).id))
    assert _states(table) == [State.DONE, AWAITING, BUFFERED, SCHEDULED]


def test_what_waits_can_be_cancelled_with_what_it_waits_for() -> None:
    """Neither fires, and the schedule has ended."""
    table = _table(Overlap.BUFFER_ONE, until_hour=2)
    (outcome,) = table.turn(table.cancel(ids=[SCHEDULE])).outcomes
    assert (outcome.changed, outcome.already_left) == (2, 1)
    assert set(_states(table)) == {State.CANCELLED}
    assert table.run(until=DAY) == []


def test_when_what_waits_is_cancelled_alone_the_next_may_wait() -> None:
    """There is room for one again."""
    table = _table(Overlap.BUFFER_ONE, until_hour=2)
    table.turn(table.cancel(ids=[_occurrence(table, 2).id]))
    table.go(NOW + 3 * HOUR)
    assert _states(table) == [AWAITING, State.CANCELLED, BUFFERED, SCHEDULED]


def test_what_waits_can_expire() -> None:
    """It is decided when it is released."""
    table = _table(Overlap.BUFFER_ONE, until_hour=2, expires_at=NOW + 2.5 * HOUR)
    table.run(until=NOW + 3 * HOUR)
    table.run(table.report(_occurrence(table, 1).id), until=SECOND)
    assert _states(table) == [State.DONE, State.EXPIRED]


@pytest.mark.parametrize("is_reported", [True, False])
def test_an_occurrence_waits_for_one_that_was_triggered(is_reported: bool) -> None:
    """Until its report, or until it is overdue."""
    table = _table(Overlap.BUFFER_ONE, report_within=1.5 * HOUR)
    trigger = table.trigger(SCHEDULE)
    table.run(trigger, until=SECOND)
    table.go(NOW + HOUR)
    assert [table.state_of(trigger.id), *_states(table)[:1]] == [AWAITING, BUFFERED]
    if is_reported:
        table.turn(table.report(trigger.id))
    table.go(NOW + 1.6 * HOUR)
    assert table.state_of(trigger.id) is (State.DONE if is_reported else State.FAILED)
    assert _states(table)[0] is AWAITING


def test_an_occurrence_waits_for_all_that_are_under_way() -> None:
    """For the one before it, and for one that was triggered meanwhile."""
    table = _table(Overlap.BUFFER_ONE, until_hour=2)
    table.run(trigger := table.trigger(SCHEDULE), until=SECOND)
    table.run(table.report(_occurrence(table, 1).id), until=SECOND)
    assert _states(table)[:2] == [State.DONE, BUFFERED]
    table.run(table.report(trigger.id), until=SECOND)
    assert _states(table)[:2] == [State.DONE, AWAITING]


def test_an_occurrence_that_is_released_and_has_not_had_its_turn_cannot_be_held_back() -> None:
    """What follows it has been made; it would be made again."""
    table = _table(Overlap.BUFFER_ONE, until_hour=2)
    table.turn(table.report(_occurrence(table, 1).id), most_timers=0)
    orders = [table.pause(), table.reschedule(NOW + DAY), table.resume()]
    for order in orders:
        table.turn(order, most_timers=0)
    table.run(until=SECOND)
    assert _states(table) == [State.DONE, AWAITING, SCHEDULED]


def test_other_schedules_of_the_entity_are_in_nobodys_way() -> None:
    """Overlap is a matter of one schedule."""
    table = _table(Overlap.SKIP)
    table.turn(table.event(NOW + MINUTE, report_within=DAY))
    table.turn(table.event(None, recurrence=hourly(), report_within=DAY))
    table.go(NOW + HOUR)
    assert _states(table) == [AWAITING, SCHEDULED]
