"""Schedules that are fired once more, and occurrences that are made up for."""

from typing import Any
from uuid import UUID

import pytest

from libs.ids import derived_id, new_id
from services.scheduler.attempts import RetryPolicy
from services.scheduler.recurrence import Misfire, Overlap
from services.scheduler.timer import State
from tests.support.scheduler_table import DAY, HOUR, MICROSECOND, MINUTE, NOW, SECOND, Table, hourly, ids

SCHEDULE = derived_id("schedule", 1)


def _table(*, down_until_hour: float = 0, **more: Any) -> Table:
    """A table with one schedule; nothing could fire until an hour."""
    table = Table()
    table.turn(table.schedule(None, **{"id": SCHEDULE, "recurrence": hourly(), **more}))
    table.run(until=NOW + down_until_hour * HOUR)
    return table


def _made_up(table: Table) -> list[float]:
    """The hours of what has fired besides the occurrences themselves."""
    return [(one.nominal_at - NOW) / HOUR for one in table.fired if one.recurrence is None and one.nominal_at]


def _backfill(table: Table, start_hour: float, end_hour: float, **more: Any) -> tuple[int, Any]:
    """How many it made, and its error."""
    command = table.backfill(SCHEDULE, NOW + start_hour * HOUR, NOW + end_hour * HOUR, **more)
    (outcome,) = table.turn(command).outcomes
    table.run(until=SECOND)
    return outcome.changed, outcome.error


# Once more


def test_a_triggered_schedule_fires_once_more_and_its_next_occurrence_stays_as_it_is() -> None:
    """With all that it is made of, but as no occurrence."""
    table = _table(type="report", condition="true")
    waiting = table.waiting()
    table.run(trigger := table.trigger(SCHEDULE), until=SECOND)
    (fired,) = table.fired
    assert (fired.id, fired.schedule_id, fired.type) == (trigger.id, SCHEDULE, "report")
    assert (fired.occurrence, fired.nominal_at, fired.recurrence, fired.due_at) == (0, None, None, NOW)
    assert table.waiting() == waiting
    assert [row.nominal_at for row in table.go(NOW + 2 * HOUR)] == [NOW + HOUR, NOW + 2 * HOUR]


def test_a_triggered_timer_awaits_its_report_and_is_retried_like_any_other() -> None:
    """Its attempts begin anew."""
    table = _table(report_within=MINUTE, retry=RetryPolicy(initial=SECOND, most_attempts=2))
    table.go(NOW + 2 * HOUR)
    table.turn(trigger := table.trigger(SCHEDULE))
    table.go(NOW + 2.5 * HOUR)
    assert table.state_of(trigger.id) is State.FAILED
    assert [attempt.number for attempt in table.attempts if attempt.timer_id == trigger.id] == [1, 2]


def test_a_schedule_can_be_triggered_in_the_turn_it_comes_in() -> None:
    """The draft knows it."""
    table = Table()
    schedule = table.schedule(None, id=SCHEDULE, recurrence=hourly())
    outcomes = table.turn(schedule, trigger := table.trigger(SCHEDULE)).outcomes
    assert [outcome.changed for outcome in outcomes] == [1, 1]
    table.run(until=SECOND)
    assert ids(table.fired) == [trigger.id]


def test_a_schedule_can_be_triggered_while_it_is_paused_and_when_it_has_ended() -> None:
    """A pause holds back what was accepted before it."""
    table = _table(recurrence=hourly(start=NOW + SECOND, count=1))
    table.turn(table.pause())
    table.run(one := table.trigger(SCHEDULE), until=SECOND)
    table.turn(table.resume())
    table.run(until=NOW + 2 * HOUR)
    assert table.waiting() == []
    table.run(two := table.trigger(SCHEDULE), until=SECOND)
    assert [table.state_of(each.id) for each in (one, two)] == [State.FIRED, State.FIRED]


def test_a_trigger_that_a_later_pause_has_overtaken_is_held_back() -> None:
    """As everything that was accepted before it."""
    table = _table()
    trigger = table.trigger(SCHEDULE)
    table.turn(table.pause())
    table.turn(trigger)
    assert table.state_of(trigger.id) is State.PAUSED


@pytest.mark.parametrize(
    "astray", [{"entity": "f"}, {"tenant": "other"}, {"schedule_id": new_id()}, {"schedule_id": derived_id("one-shot")}]
)
def test_an_unknown_schedule_is_refused(astray: dict[str, Any]) -> None:
    """Another entity's, another tenant's, nobody's, or what does not recur; for triggers and backfills."""
    table = _table()
    table.turn(table.schedule(NOW + DAY, id=derived_id("one-shot")))
    more: dict[str, Any] = dict(astray)
    schedule_id: UUID = more.pop("schedule_id", SCHEDULE)
    commands = [table.trigger(schedule_id, **more), table.backfill(schedule_id, NOW, NOW + DAY, **more)]
    for outcome in table.turn(*commands).outcomes:
        message = f"the entity has no recurring schedule {schedule_id}"
        assert (outcome.changed, outcome.error) == (0, (5, "SCHEDULE_NOT_FOUND", message))


def test_a_cancelled_schedule_is_gone() -> None:
    """For triggers and backfills, in the turn of the cancel and later."""
    table = _table()
    commands = [table.trigger(SCHEDULE), table.backfill(SCHEDULE, NOW, NOW + DAY)]
    outcomes = table.turn(table.cancel(), *commands).outcomes[1:] + table.turn(*commands).outcomes
    assert [outcome.error and outcome.error[1] for outcome in outcomes] == ["SCHEDULE_NOT_FOUND"] * 4


# Making up


def test_a_backfill_fires_what_was_missed_and_nothing_that_has_fired_or_waits() -> None:
    """One of five fired for all; the other four are made up for, oldest first, each at its nominal time."""
    table = _table(down_until_hour=5.5)
    assert _backfill(table, 0, 5.5) == (4, None)
    assert _made_up(table) == [2, 3, 4, 5]
    made_up = [one for one in table.fired if one.recurrence is None]
    assert all(one.due_at == one.nominal_at for one in made_up)
    assert [row.nominal_at for row in table.waiting()] == [NOW + 6 * HOUR]


def test_a_backfill_takes_its_start_out_and_its_end_in() -> None:
    """As windows are told: (start, end]."""
    table = _table(down_until_hour=5.5)
    assert _backfill(table, 2, 4) == (2, None)
    assert _made_up(table) == [3, 4]


@pytest.mark.parametrize("is_same_turn", [True, False])
def test_inv2_a_backfill_that_is_repeated_makes_up_for_each_occurrence_once(is_same_turn: bool) -> None:
    """The same range again, and one that overlaps."""
    table = _table(down_until_hour=5.5)
    spans = [(0, 3), (0, 3), (2, 5)]
    commands = [table.backfill(SCHEDULE, NOW + start * HOUR, NOW + end * HOUR) for start, end in spans]
    turns = [commands] if is_same_turn else [[command] for command in commands]
    assert [outcome.changed for each in turns for outcome in table.turn(*each).outcomes] == [2, 0, 2]
    table.run(until=SECOND)
    assert sorted(_made_up(table)) == [2, 3, 4, 5]


def test_a_backfill_makes_up_for_what_was_skipped_or_has_expired() -> None:
    """By its condition, its misfire policy, or its overlap policy."""
    table = _table(condition="has(facts.paid)")
    table.go(NOW + 2 * HOUR)
    table.turn(table.put_facts(paid=True))
    assert _backfill(table, 0, 2) == (2, None)
    assert _made_up(table) == [1, 2]
    table = _table(down_until_hour=2.5, recurrence=hourly(misfire=Misfire.SKIP))
    assert _backfill(table, 0, 2) == (2, None)
    table = _table(recurrence=hourly(overlap=Overlap.SKIP), report_within=DAY)
    table.go(NOW + 3 * HOUR)
    assert _backfill(table, 0, 3) == (2, None)


def test_a_backfill_makes_up_for_the_very_last_occurrence_too() -> None:
    """It was skipped, and no other came after it."""
    table = _table(recurrence=hourly(start=NOW + SECOND, count=1), condition="has(facts.paid)")
    table.go(NOW + 2 * HOUR)
    table.turn(table.put_facts(paid=True))
    assert _backfill(table, 0, 2) == (1, None)
    assert _made_up(table) == [1]


def test_what_was_made_up_for_and_skipped_again_is_not_made_up_for_again() -> None:
    """Once, whatever became of it."""
    table = _table(down_until_hour=3.5, condition="false")
    assert [_backfill(table, 0, 3)[0], _backfill(table, 0, 3)[0]] == [3, 0]


def test_what_failed_or_is_under_way_is_not_made_up_for() -> None:
    """It has fired."""
    table = _table(report_within=90 * MINUTE, retry=RetryPolicy(most_attempts=1))
    table.go(NOW + 3 * HOUR)
    states = [table.state_of(row.id) for row in table.of(SCHEDULE)]
    assert states == [State.FAILED, State.AWAITING, State.AWAITING, State.SCHEDULED]
    assert _backfill(table, 0, 4) == (0, None)


@pytest.mark.parametrize(("minutes", "changed", "reason"), [(1_001, 1_000, None), (1_002, 0, "TOO_MANY_OCCURRENCES")])
def test_inv9_a_backfill_is_bounded(minutes: int, changed: int, reason: str | None) -> None:
    """A thousand occurrences in a range; refused as a whole beyond."""
    table = _table(recurrence=hourly(cron="* * * * *"), down_until_hour=30)
    command = table.backfill(SCHEDULE, NOW + MINUTE, NOW + minutes * MINUTE)
    (outcome,) = table.turn(command).outcomes
    assert (outcome.changed, outcome.error and outcome.error[1]) == (changed, reason)
    fired = table.run(until=SECOND)
    assert len([one for one in table.fired if one.recurrence is None]) == changed
    marks = [one.mark for one in fired]
    assert marks == sorted(marks)


def test_a_schedule_that_comes_in_the_same_turn_is_made_up_for_from_its_start() -> None:
    """Its waiting occurrence is not."""
    table = Table(now=NOW + 3.5 * HOUR)
    schedule = table.schedule(None, id=SCHEDULE, recurrence=hourly(), accepted_at=NOW + 3.5 * HOUR)
    command = table.backfill(SCHEDULE, NOW - DAY, NOW + 4 * HOUR)
    outcomes = table.turn(schedule, command).outcomes
    assert [outcome.changed for outcome in outcomes] == [1, 4]
    table.run(until=MICROSECOND * 10)
    assert _made_up(table) == [0, 1, 2, 3]


def test_inv2_what_the_waiting_occurrence_will_make_itself_is_not_made_up_for() -> None:
    """FIRE_ALL, and nothing could fire yet: the chain comes by all hours; a backfill in between adds none of them."""
    table = Table()
    table.turn(table.schedule(None, id=SCHEDULE, recurrence=hourly(misfire=Misfire.FIRE_ALL)))
    table.now = NOW + 3.5 * HOUR
    command = table.backfill(SCHEDULE, NOW, NOW + 3 * HOUR)
    (outcome,) = table.turn(command, most_timers=0).outcomes
    table.run(until=NOW + 3.5 * HOUR + SECOND)
    assert outcome.changed == 0
    assert [one.nominal_at for one in table.fired] == [NOW + hour * HOUR for hour in (1, 2, 3)]


def test_inv2_what_a_paused_occurrence_will_make_itself_is_not_made_up_for() -> None:
    """The watermark may have passed it; when it is resumed the chain goes on."""
    table = Table()
    table.turn(table.schedule(None, id=SCHEDULE, recurrence=hourly(misfire=Misfire.FIRE_ALL)))
    table.turn(table.pause())
    table.run(table.schedule(NOW + 3 * HOUR, entity="other"), until=NOW + 3.5 * HOUR)
    (outcome,) = table.turn(table.backfill(SCHEDULE, NOW, NOW + 3 * HOUR)).outcomes
    assert outcome.changed == 0
    table.turn(table.resume())
    table.run(until=NOW + 3.5 * HOUR + SECOND)
    fired = [one.nominal_at for one in table.fired if one.entity == "e"]
    assert fired == [NOW + hour * HOUR for hour in (1, 2, 3)]
