"""Recurrences: which occurrence follows which, what becomes of missed ones, and jitter."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import islice, pairwise
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from libs.ids import derived_id
from libs.recurrence import occurrences
from services.scheduler import births
from services.scheduler.recurrence import Misfire, Recurrence
from services.scheduler.timer import State
from tests.support.scheduler_table import DAY, HOUR, MICROSECOND, MINUTE, NOW, SECOND, Table, hourly

SCHEDULE = derived_id("schedule", 1)


def _table(**more: Any) -> Table:
    """A table with one schedule."""
    table = Table()
    table.turn(table.schedule(None, **{"id": SCHEDULE, "recurrence": hourly(), **more}))
    return table


def _hours(table: Table) -> list[float]:
    """When what has fired was due by the rule, in hours from NOW."""
    return [(one.nominal_at - NOW) / HOUR for one in table.fired if one.nominal_at]


def _states(table: Table) -> list[State]:
    return [table.state_of(row.id) for row in table.of(SCHEDULE)]


# What follows


def test_the_next_occurrence_is_after_the_last_and_after_now() -> None:
    """A shard that stood still for five and a half hours fires once for all it missed, then at the next full hour."""
    table = _table()
    table.run(until=NOW + 6.5 * HOUR)
    assert _hours(table) == [1]
    (following,) = table.waiting()
    assert (following.due_at, following.occurrence) == (NOW + 7 * HOUR, 2)


def test_inv2_an_occurrence_fires_once_when_the_clock_has_gone_back() -> None:
    """A new owner's clock is behind: the next is after the last, not after now."""
    table = _table()
    (one,) = table.run(until=NOW + HOUR)
    (following,) = births.following(one, watermark=table.watermark, now=NOW)
    assert following.nominal_at == NOW + 2 * HOUR


def test_an_occurrence_is_made_by_whoever_comes_to_it_under_the_same_id() -> None:
    """The id derives from the schedule and the nominal time."""
    first, second = _table(), _table()
    first.go(NOW + 3 * HOUR)
    second.run(until=NOW + 2.5 * HOUR)
    second.go(NOW + 3 * HOUR)
    assert [row.id for row in second.of(SCHEDULE)] == [first.of(SCHEDULE)[index].id for index in (0, 2, 3)]


def test_a_recurrence_ends_with_its_count() -> None:
    """Two occurrences and no third."""
    table = _table(recurrence=hourly(start=NOW + SECOND, count=2))
    table.go(NOW + DAY)
    assert [one.occurrence for one in table.fired] == [1, 2]
    assert table.waiting() == []


def test_a_count_is_counted_once() -> None:
    """What is kept has an end in its place; so does what follows an occurrence that an older version made."""
    table = _table(recurrence=hourly(start=NOW + SECOND, count=3))
    (first,) = table.waiting()
    assert first.recurrence is not None
    assert (first.recurrence.rule.count, first.recurrence.rule.end) == (0, NOW + 3 * HOUR + MICROSECOND)
    older = replace(first, recurrence=hourly(start=NOW + SECOND, count=3))
    (second,) = births.following(older, watermark=older.mark, now=older.due_at)
    assert second.recurrence == first.recurrence


def test_a_recurrence_ends_with_its_expiry() -> None:
    """What could not fire any more is not made."""
    table = _table(expires_at=NOW + 3 * HOUR)
    table.go(NOW + DAY)
    assert (_hours(table), _states(table)) == ([1, 2], [State.FIRED, State.FIRED])


def test_a_recurrence_that_never_fires_is_refused_in_its_result() -> None:
    """Nothing is stored."""
    table = Table()
    (outcome,) = table.turn(table.schedule(None, recurrence=hourly(end=NOW + SECOND))).outcomes
    assert outcome.error is not None
    assert outcome.error[:2] == (9, "NEVER_DUE")
    assert table.rows == {}


def test_a_cancelled_recurrence_has_no_successor_and_a_skipped_one_has() -> None:
    """A condition decides about one occurrence only."""
    table = _table(condition="has(facts.x)")
    assert table.run(until=NOW + HOUR) == []
    assert len(table.waiting()) == 1
    table.turn(table.cancel())
    assert table.waiting() == []
    assert table.run(until=NOW + DAY) == []


# Missed ones


def test_of_missed_occurrences_fire_all_fires_each_oldest_first() -> None:
    """And then the next in its time."""
    table = _table(recurrence=hourly(misfire=Misfire.FIRE_ALL))
    table.run(until=NOW + 3.5 * HOUR)
    assert _hours(table) == [1, 2, 3]
    table.go(NOW + 5 * HOUR)
    assert _hours(table) == [1, 2, 3, 4, 5]


def test_of_missed_occurrences_skip_fires_none_and_goes_on_with_the_next() -> None:
    """The one that waited is on record; those it would have been followed by are not even made."""
    table = _table(recurrence=hourly(misfire=Misfire.SKIP))
    assert table.run(until=NOW + 3.5 * HOUR) == []
    assert [row.nominal_at for row in table.of(SCHEDULE)] == [NOW + HOUR, NOW + 4 * HOUR]
    skipped = table.of(SCHEDULE)[0]
    assert skipped.note == '{"skipped": "it came due while nothing could fire", "late_s": 9000.0}'
    table.go(NOW + 5 * HOUR)
    assert _hours(table) == [4, 5]


@pytest.mark.parametrize(("late", "state"), [(MINUTE, State.FIRED), (MINUTE + MICROSECOND, State.SKIPPED)])
def test_skip_forgives_a_minute(late: timedelta, state: State) -> None:
    """A takeover is no reason to lose an occurrence."""
    table = _table(recurrence=hourly(misfire=Misfire.SKIP))
    table.run(until=NOW + HOUR + late)
    assert _states(table) == [state, State.SCHEDULED]


@pytest.mark.parametrize(
    ("misfire", "hours"), [(Misfire.FIRE_ONCE, [4]), (Misfire.FIRE_ALL, [4, 5, 6]), (Misfire.SKIP, [])]
)
def test_missed_occurrences_count_within_the_catch_up_window_only(misfire: Misfire, hours: list[float]) -> None:
    """Two and a half hours back, both ends included."""
    table = _table(recurrence=hourly(misfire=misfire, catch_up=2.5 * HOUR))
    table.run(until=NOW + 6.5 * HOUR)
    assert _hours(table) == hours
    assert table.waiting()[0].nominal_at == NOW + 7 * HOUR


@pytest.mark.parametrize(
    ("misfire", "hours"), [(Misfire.FIRE_ONCE, [1]), (Misfire.FIRE_ALL, [1, 2, 3]), (Misfire.SKIP, [])]
)
def test_a_recurrence_that_is_resumed_follows_its_misfire_policy(misfire: Misfire, hours: list[float]) -> None:
    """Its shard was up all the time."""
    table = _table(recurrence=hourly(misfire=misfire))
    table.turn(table.pause(ids=[SCHEDULE]))
    assert table.go(NOW + 3.5 * HOUR) == []
    table.run(table.resume(ids=[SCHEDULE]))
    assert _hours(table) == hours
    table.go(NOW + 4 * HOUR)
    assert _hours(table) == [*hours, 4]


# Jitter


@settings(deadline=None, max_examples=50)
@given(st.uuids(version=4), st.sampled_from([SECOND, 4 * MINUTE, HOUR]), st.sampled_from(["*/5", "*", "7,8"]))
def test_jitter_delays_each_occurrence_by_less_than_its_bound_and_never_past_the_next(
    schedule_id: UUID, jitter: timedelta, minutes: str
) -> None:
    """It is fixed per occurrence; jitter longer than the period neither reorders nor loses any."""
    recurrence = hourly(cron=f"{minutes} * * * *", jitter=jitter)
    nominal = list(islice(occurrences(recurrence.rule, NOW), 40))
    due = [recurrence.due_at(schedule_id, at) for at in nominal]
    assert due == [recurrence.due_at(schedule_id, at) for at in nominal]
    assert all(at <= due_at < at + jitter for at, due_at in zip(nominal, due, strict=True))
    assert all(due_at < next_at for due_at, next_at in zip(due, nominal[1:], strict=False))
    assert len({due_at - at for at, due_at in zip(nominal, due, strict=True)}) > 30


@pytest.mark.parametrize("misfire", Misfire)
@pytest.mark.parametrize("jitter", [2 * MINUTE, 10 * MINUTE, HOUR])
def test_with_jitter_every_occurrence_fires_once_when_nothing_is_late(misfire: Misfire, jitter: timedelta) -> None:
    """Each after its nominal time; also where the jitter is longer than the period, or than the catch-up window."""
    rule = hourly(cron="*/10 * * * *", misfire=misfire, jitter=jitter, catch_up=MINUTE)
    table = _table(recurrence=rule)
    table.go(NOW + DAY)
    assert [one.nominal_at for one in table.fired] == [NOW + n * 10 * MINUTE for n in range(1, len(table.fired) + 1)]
    assert len(table.fired) >= 143
    delays = [one.due_at - one.nominal_at for one in table.fired if one.nominal_at]
    assert all(timedelta() <= delay < min(jitter, 10 * MINUTE) for delay in delays)
    assert all(before.due_at < after.due_at for before, after in pairwise(table.fired))


# Against a naive model: look at every minute.

_EVERY = [1, 5, 10, 30]


def _model(recurrence: Recurrence, every: int, is_up: Sequence[bool]) -> list[datetime]:
    """Which nominal times fire, where each minute says whether anything could."""
    window = MINUTE if recurrence.misfire is Misfire.SKIP else recurrence.catch_up
    nominal = [NOW + n * MINUTE for n in range(1, len(is_up)) if n % every == 0]
    open_ = [(recurrence.due_at(SCHEDULE, at), at) for at in nominal]
    fires: list[datetime] = []
    for minute in (n for n, up in enumerate(is_up) if up):
        now = NOW + minute * MINUTE
        has_come = [one for one in open_ if one[0] <= now]
        open_ = open_[len(has_come) :]
        in_time = [at for due_at, at in has_come if now - due_at <= window]
        fires += in_time[:1] if recurrence.misfire is Misfire.FIRE_ONCE else in_time
    return fires


@pytest.mark.parametrize("misfire", Misfire)
def test_the_jitter_of_a_missed_occurrence_counts_for_it(misfire: Misfire) -> None:
    """Its nominal time lies before the catch-up window and it came due within: it is not missed."""
    recurrence = hourly(jitter=HOUR, misfire=misfire, catch_up=MINUTE)
    due_at = recurrence.due_at(SCHEDULE, NOW + 3 * HOUR)
    assert due_at > NOW + 3 * HOUR + 2 * MINUTE
    table = _table(recurrence=recurrence)
    table.run(until=due_at + SECOND)
    assert _hours(table) == [3]


@settings(max_examples=100, deadline=None)
@given(
    every=st.sampled_from(_EVERY),
    misfire=st.sampled_from(Misfire),
    jitter_s=st.sampled_from([0, 1, 90, 1_200]),
    catch_up=st.sampled_from([1, 7, 30, 999]),
    spans=st.lists(st.tuples(st.sampled_from(["up", "down", "paused", "other owner"]), st.integers(1, 40)), max_size=5),
)
@example(every=1, misfire=Misfire.FIRE_ONCE, jitter_s=1_200, catch_up=7, spans=[("down", 40)])
@example(every=5, misfire=Misfire.FIRE_ALL, jitter_s=0, catch_up=30, spans=[("paused", 40)])
def test_the_occurrences_that_fire_are_those_of_the_naive_model(
    every: int, misfire: Misfire, jitter_s: int, catch_up: int, spans: list[tuple[str, int]]
) -> None:
    """For every policy, with and without jitter, over downtimes, pauses and takeovers."""
    recurrence = hourly(
        cron=f"*/{every} * * * *", misfire=misfire, jitter=jitter_s * SECOND, catch_up=catch_up * MINUTE
    )
    table = _table(recurrence=recurrence)
    is_up = [True]
    for what, minutes in [*spans, ("up", 61)]:
        if what == "paused":
            table.turn(table.pause())
        elif what == "other owner":
            table.take_over()
        for minute in range(minutes):
            table.now += MINUTE
            if what == "paused" and minute == minutes - 1:
                table.turn(table.resume())
            if what != "down":
                table.run()
            is_up.append(what in {"up", "other owner"} or (what == "paused" and minute == minutes - 1))
    assert [one.nominal_at for one in table.fired] == _model(recurrence, every, is_up)
