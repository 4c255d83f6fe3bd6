"""Outcomes: events, reports, deadlines, retries and what is on record of them."""

from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.ids import new_id
from services.scheduler.attempts import MAX_ERROR, RetryPolicy
from services.scheduler.commands import ScheduleTimer
from services.scheduler.timer import State
from tests.support.scheduler_table import (
    DAY,
    HOUR,
    MICROSECOND,
    MINUTE,
    NOW,
    SECOND,
    Table,
    hourly,
    ids,
    step,
    timeline,
)

TWICE = RetryPolicy(initial=SECOND, longest=SECOND, most_attempts=2)


def _told(table: Table, timer_id: UUID) -> list[tuple[int, str | None]]:
    """The attempts on record."""
    return [(one.number, one.error) for one in table.attempts if one.timer_id == timer_id]


def _at_attempt(number: int, **more: Any) -> tuple[Table, ScheduleTimer]:
    """A table whose event awaits the report of this attempt; the ones before it had none."""
    table = Table()
    table.run(one := table.event(NOW, **more))
    while table.rows[one.id].attempts < number:
        table.run(until=table.rows[one.id].fire_at)
    assert table.state_of(one.id) is State.AWAITING
    return table, one


# The first attempt


def test_an_event_that_fires_awaits_its_report_until_its_deadline() -> None:
    """Its turn at `fire_at` is then that of the deadline."""
    table, one = _at_attempt(1)
    row = table.rows[one.id]
    assert (row.attempts, row.first_attempt_at, row.fire_at) == (1, NOW, NOW + MINUTE)
    assert (row.decided_at, _told(table, one.id)) == (None, [])


def test_an_event_that_expects_no_report_has_fired_for_good() -> None:
    """A report about it is refused."""
    table = Table()
    table.run(one := table.event(NOW, report_within=None))
    (outcome,) = table.turn(table.report(one.id)).outcomes
    assert outcome.error is not None
    assert (outcome.error[:2], table.state_of(one.id)) == ((5, "NO_REPORT_EXPECTED"), State.FIRED)


def test_done_ends_it_with_its_attempt_on_record() -> None:
    """And nothing follows its deadline."""
    table, one = _at_attempt(1)
    table.now += SECOND
    (outcome,) = table.turn(table.report(one.id)).outcomes
    assert (outcome.changed, outcome.error) == (1, None)
    row = table.rows[one.id]
    assert (row.state, row.decided_at) == (State.DONE, NOW + SECOND)
    (attempt,) = table.attempts
    assert (attempt.number, attempt.started_at, attempt.ended_at, attempt.error) == (1, NOW, NOW + SECOND, None)
    assert table.run(until=DAY) == []


def test_failed_is_tried_again_and_then_done() -> None:
    """The delay is counted from the report; both attempts are on record."""
    table, one = _at_attempt(1, retry=RetryPolicy(initial=10 * MINUTE))
    table.now += SECOND
    table.turn(table.report(one.id, error="no room"))
    row = table.rows[one.id]
    assert (row.state, row.last_error) == (State.RETRYING, "no room")
    assert table.now < row.fire_at <= table.now + 10 * MINUTE
    assert ids(table.run(until=row.fire_at)) == [one.id]
    table.turn(table.report(one.id, 2))
    assert table.state_of(one.id) is State.DONE
    assert _told(table, one.id) == [(1, "no room"), (2, None)]


def test_a_report_that_does_not_come_counts_as_failed() -> None:
    """At its deadline and not a microsecond before."""
    table, one = _at_attempt(1, retry=TWICE)
    table.run(until=MINUTE - MICROSECOND)
    assert table.state_of(one.id) is State.AWAITING
    table.run(until=MICROSECOND)
    assert table.state_of(one.id) is State.RETRYING
    assert _told(table, one.id) == [(1, "no report came within 0:01:00")]


def test_the_last_attempt_that_fails_fails_the_timer() -> None:
    """With its error; nothing is tried any more."""
    table, one = _at_attempt(2, retry=TWICE)
    table.turn(table.report(one.id, 2, error="x" * 9_999))
    row = table.rows[one.id]
    assert (row.state, row.last_error, row.decided_at) == (State.FAILED, "x" * MAX_ERROR, table.now)
    assert [number for number, _ in _told(table, one.id)] == [1, 2]
    assert table.run(until=DAY) == []


def test_a_report_in_the_turn_of_its_deadline_wins() -> None:
    """Commands are obeyed before anything has its turn."""
    table, one = _at_attempt(1)
    table.run(table.report(one.id), until=MINUTE)
    assert (table.state_of(one.id), _told(table, one.id)) == (State.DONE, [(1, None)])


def test_a_retry_holds_when_the_clock_has_gone_back() -> None:
    """A turn before the watermark would never come."""
    table, one = _at_attempt(1)
    table.now = NOW - DAY
    table.turn(table.report(one.id, error="no room"))
    assert table.rows[one.id].mark > table.watermark
    assert ids(table.run(until=NOW + SECOND)) == [one.id]


# Reports that come late, twice, or astray


@pytest.mark.parametrize("error", ["", "no room"])
def test_a_report_that_comes_twice_counts_once(error: str) -> None:
    """In the same turn, and in a later one; the second is no error."""
    table, one = _at_attempt(1)
    report = table.report(one.id, error=error)
    outcomes = table.turn(report, report).outcomes + table.turn(report).outcomes
    assert [(outcome.changed, outcome.error) for outcome in outcomes] == [(1, None), (0, None), (0, None)]
    assert len(table.attempts) == 1


def test_done_counts_from_an_older_attempt_while_the_next_is_awaited() -> None:
    """The work is done. The attempt that is under way ends with it, and each is on record once."""
    table, one = _at_attempt(2)
    (outcome,) = table.turn(table.report(one.id, 1)).outcomes
    assert (outcome.changed, table.state_of(one.id)) == (1, State.DONE)
    assert [number for number, _ in _told(table, one.id)] == [1, 2]


def test_done_counts_from_an_older_attempt_while_the_next_is_waited_for() -> None:
    """It is not tried again."""
    table, one = _at_attempt(1)
    table.turn(table.report(one.id, error="no room"))
    table.turn(table.report(one.id))
    assert table.state_of(one.id) is State.DONE
    assert table.run(until=DAY) == []


def test_failed_from_an_older_attempt_changes_nothing() -> None:
    """It has been judged already; the one under way may still succeed."""
    table, one = _at_attempt(2)
    (outcome,) = table.turn(table.report(one.id, 1, error="no room")).outcomes
    assert (outcome.changed, outcome.error, table.state_of(one.id)) == (0, None, State.AWAITING)


@pytest.mark.parametrize("attempt", [0, 2, 99])
def test_a_report_of_an_attempt_that_was_not_made_is_refused(attempt: int) -> None:
    """Whoever says so has mixed something up."""
    table, one = _at_attempt(1)
    (outcome,) = table.turn(table.report(one.id, attempt)).outcomes
    assert outcome.error == (
        *(9, "NO_SUCH_ATTEMPT"),
        f"timer {one.id} has made no attempt {attempt}: 1 so far",
    )


def test_done_is_refused_for_a_timer_that_was_cancelled_or_has_failed() -> None:
    """Too late: others have acted on it."""
    table, cancelled = _at_attempt(1)
    table.turn(table.cancel())
    table.turn(failed := table.event(table.now, retry=RetryPolicy(most_attempts=1)))
    table.go(NOW + HOUR)
    assert [table.state_of(one.id) for one in (cancelled, failed)] == [State.CANCELLED, State.FAILED]
    outcomes = table.turn(table.report(cancelled.id), table.report(failed.id)).outcomes
    assert [one.error[:2] for one in outcomes if one.error] == [(9, "TIMER_CANCELLED"), (9, "TIMER_FAILED")]


@pytest.mark.parametrize("astray", [{"tenant": "other"}, {"entity": "f"}, {"timer_id": new_id()}])
def test_inv8_a_report_about_somebody_elses_timer_finds_nothing(astray: dict[str, Any]) -> None:
    """Another tenant's, another entity's, nobody's: the answer is the same."""
    table, one = _at_attempt(1)
    (outcome,) = table.turn(table.report(**{"timer_id": one.id} | astray)).outcomes
    assert outcome.error == (5, "TIMER_NOT_FOUND", "the entity has no such timer")
    assert table.state_of(one.id) is State.AWAITING


# How attempts follow each other


_seconds = st.integers(1, 10_000).map(lambda s: s * SECOND)


@given(st.uuids(version=4), _seconds, _seconds, st.floats(1, 10), st.integers(1, 100), st.integers(1, 100))
def test_delays_are_within_the_exponential_bound_and_always_the_same(
    timer_id: UUID, initial: timedelta, longest: timedelta, multiplier: float, most: int, attempts: int
) -> None:
    """min(initial × multiplier^n, longest) at most; fixed per timer and attempt."""
    policy = RetryPolicy(
        initial=initial, longest=longest, multiplier=multiplier, most_attempts=most, most_age=9_999 * DAY
    )
    at = policy.next_at(timer_id, attempts, first_at=NOW, now=NOW)
    assert (at is None) == (attempts >= most)
    if at is not None:
        bound_s = min(initial.total_seconds() * multiplier ** (attempts - 1), longest.total_seconds())
        assert 0 <= (at - NOW).total_seconds() <= bound_s + 1e-6
        assert at == policy.next_at(timer_id, attempts, first_at=NOW, now=NOW)


def test_delays_use_the_whole_range_and_differ_between_timers_and_attempts() -> None:
    """Full jitter: those that failed together do not come back together."""
    policy = RetryPolicy(initial=100 * SECOND, multiplier=1.0, most_attempts=100)
    at = [policy.next_at(UUID(int=n), 1 + n % 5, first_at=NOW, now=NOW) for n in range(1_000)]
    delays_s = sorted((one - NOW).total_seconds() for one in at if one is not None)
    assert len(set(delays_s)) == 1_000
    assert len({policy.next_at(UUID(int=7), n, first_at=NOW, now=NOW) for n in range(1, 100)}) == 99
    assert delays_s[0] < 2
    assert delays_s[-1] > 98
    assert 45 < sum(delays_s) / 1_000 < 55


def test_no_attempt_begins_later_than_the_greatest_age() -> None:
    """Counted from the first attempt; then it has failed."""
    table = Table()
    policy = RetryPolicy(initial=MINUTE, multiplier=1.0, most_attempts=100, most_age=HOUR)
    table.turn(one := table.event(NOW, retry=policy))
    table.go(NOW + DAY)
    assert table.state_of(one.id) is State.FAILED
    assert 1 < len(table.attempts) < 100
    assert max(attempt.started_at for attempt in table.attempts) <= NOW + HOUR


def test_every_attempt_is_on_record_and_none_is_made_beyond_the_most() -> None:
    """By default there are eight."""
    table = Table()
    table.turn(one := table.event(NOW))
    table.go(NOW + 3 * DAY)
    assert ids(table.fired) == [one.id] * 8
    assert [number for number, _ in _told(table, one.id)] == list(range(1, 9))
    assert [each.attempts for each in table.fired] == list(
        range(8)
    )  # What is told of an attempt counts those before it.


def test_a_condition_is_decided_again_at_each_attempt() -> None:
    """What has been settled meanwhile is not tried again."""
    table, one = _at_attempt(1, condition="!has(facts.paid)")
    table.turn(table.report(one.id, error="no room"), table.put_facts(paid=True))
    assert table.run(until=HOUR) == []
    assert (table.state_of(one.id), _told(table, one.id)) == (State.SKIPPED, [(1, "no room")])


def test_a_timer_can_expire_while_it_is_retried() -> None:
    """Nothing is tried from its expiry on."""
    table, one = _at_attempt(1, expires_at=NOW + 2 * MINUTE, retry=RetryPolicy(initial=DAY, longest=DAY))
    table.turn(table.report(one.id, error="no room"))
    assert table.run(until=DAY) == []
    assert table.state_of(one.id) is State.EXPIRED


def test_an_awaited_report_is_taken_after_the_expiry() -> None:
    """It had fired in time."""
    table, one = _at_attempt(1, expires_at=NOW + SECOND)
    table.run(table.report(one.id), until=30 * SECOND)
    assert table.state_of(one.id) is State.DONE


def test_only_the_first_firing_of_a_step_begins_what_follows_it() -> None:
    """However often it is tried."""
    charge = step("charge", DAY, report_within=MINUTE, retry=TWICE, follow_ups=(step("thank", DAY),))
    table = Table(timelines=[timeline(charge)])
    table.turn(table.start())
    table.go(NOW + DAY + HOUR)
    assert [(row.attempts, table.state_of(row.id)) for row in table.rows.values()] == [
        (2, State.FAILED),
        (0, State.SCHEDULED),
    ]


# Orders


def test_a_cancel_while_a_report_is_awaited_says_that_it_has_left_and_stops_the_retries() -> None:
    """It counts apart from those that had not fired."""
    table, one = _at_attempt(1)
    (outcome,) = table.turn(table.schedule(NOW + DAY), table.cancel()).outcomes[1:]
    assert (outcome.changed, outcome.already_left, table.state_of(one.id)) == (1, 1, State.CANCELLED)
    assert table.run(until=9 * DAY) == []


def test_a_timer_that_waits_for_its_next_attempt_counts_as_cancelled() -> None:
    """Nothing of it is under way."""
    table, one = _at_attempt(1)
    (outcome,) = table.turn(table.report(one.id, error="no room"), table.cancel()).outcomes[1:]
    assert (outcome.changed, outcome.already_left) == (1, 0)
    assert table.run(until=9 * DAY) == []


def test_a_retry_can_be_paused_resumed_and_rescheduled() -> None:
    """It goes on with its next attempt, not from the start."""
    table, one = _at_attempt(1)
    table.turn(table.report(one.id, error="no room"), table.pause())
    assert table.run(until=DAY) == []
    table.turn(table.reschedule(table.now + HOUR), table.resume())
    assert table.state_of(one.id) is State.RETRYING
    assert table.run(until=HOUR - SECOND) == []
    assert ids(table.run(until=SECOND)) == [one.id]
    assert table.rows[one.id].attempts == 2


def test_a_retry_that_is_paused_can_still_be_reported_done() -> None:
    """By the attempt before."""
    table, one = _at_attempt(1)
    table.turn(table.report(one.id, error="no room"), table.pause())
    table.turn(table.report(one.id))
    assert table.state_of(one.id) is State.DONE


def test_what_awaits_its_report_can_be_neither_paused_nor_rescheduled() -> None:
    """Its event is out; the counts say so."""
    table, one = _at_attempt(1)
    before = table.rows[one.id]
    outcomes = table.turn(table.pause(), table.reschedule(NOW + DAY), table.resume()).outcomes
    assert [outcome.changed for outcome in outcomes] == [0, 0, 0]
    assert table.rows[one.id] == before


def test_outcomes_hold_over_a_takeover() -> None:
    """Deadlines and retries are in the table, as everything is."""
    table, one = _at_attempt(1, retry=TWICE)
    for state in (State.RETRYING, State.AWAITING, State.FAILED):
        table.take_over()
        table.run(until=table.rows[one.id].fire_at)
        assert table.state_of(one.id) is state


def test_an_occurrence_that_is_retried_does_not_hold_up_the_next() -> None:
    """Unless its overlap policy says so."""
    table = Table()
    table.turn(schedule := table.event(None, recurrence=hourly(), report_within=DAY))
    table.go(NOW + 2 * HOUR)
    states = [table.state_of(row.id) for row in table.of(schedule.id)]
    assert states == [State.AWAITING, State.AWAITING, State.SCHEDULED]
