"""Orders: cancel, pause, resume and reschedule, whatever the order in which they arrive."""

from collections.abc import Iterator
from datetime import datetime
from itertools import permutations
from random import Random
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from libs.ids import derived_id, new_id
from services.scheduler.commands import Command, ScheduleTimer
from services.scheduler.needs import Known, Needs
from services.scheduler.recurrence import Misfire
from services.scheduler.timer import State, Timer
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

# Cancels


def test_inv4_a_cancel_hits_what_was_accepted_before_it_and_not_after() -> None:
    """In the same turn and in a later one; the count says how many."""
    table = Table()
    before, same = table.schedule(NOW + MINUTE), table.schedule(NOW + MINUTE)
    table.turn(before)
    outcomes = table.turn(same, table.cancel(), after := table.schedule(NOW + MINUTE)).outcomes
    assert [outcome.changed for outcome in outcomes] == [1, 2, 1]
    assert ids(table.run(until=NOW + DAY)) == [after.id]
    assert {table.state_of(one.id) for one in (before, same)} == {State.CANCELLED}


@pytest.mark.parametrize("is_same_turn", [True, False])
def test_inv4_what_was_accepted_before_a_cancel_and_arrives_after_it_is_born_cancelled(is_same_turn: bool) -> None:
    """The tombstone says so, with the cancel's cause."""
    table = Table()
    late, cancel = table.schedule(NOW), table.cancel()
    outcomes = table.turn(cancel, late).outcomes[1:] if is_same_turn else []
    if not is_same_turn:
        table.turn(cancel)
        assert table.shard.needs([late]).tombstones == {("acme", "e")}
        outcomes = table.turn(late).outcomes
    assert [outcome.changed for outcome in outcomes] == [0]
    assert (table.state_of(late.id), table.rows[late.id].note) == (State.CANCELLED, "a test says so")
    assert table.run(until=NOW + DAY) == []


def test_inv4_tombstones_hold_over_a_takeover() -> None:
    """The new owner learns the newest sequence with its grant."""
    table = Table()
    late = table.schedule(NOW)
    table.turn(table.cancel())
    table.take_over()
    assert table.run(late) == []


def test_inv4_a_second_cancel_of_the_same_sequence_leaves_its_own_tombstone() -> None:
    """One call may cancel several things, under one sequence."""
    table = Table()
    kinds = [table.schedule(NOW, type="a"), table.schedule(NOW, type="b")]
    same_turn = [table.schedule(NOW, type="a", sequence=8), table.schedule(NOW, type="b", sequence=8)]
    table.turn(table.cancel(type="a", sequence=9), table.cancel(type="b", sequence=9), *same_turn)
    assert table.run(*kinds) == []
    assert table.fired == []


def test_a_cancel_in_the_turn_in_which_a_timer_comes_due_wins() -> None:
    """Commands are obeyed before timers fire."""
    table = Table()
    table.turn(table.schedule(NOW + MINUTE))
    assert table.run(table.cancel(), until=NOW + MINUTE) == []


def test_a_schedule_before_any_tombstone_need_not_look() -> None:
    """Only what is older than the newest cancel of its origin may be buried."""
    table = Table()
    table.turn(table.cancel(sequence=5), table.cancel("carillon:window:1", sequence=900))
    needs = table.shard.needs([table.schedule(NOW, sequence=6), table.schedule(NOW, sequence=4, entity="f")])
    assert needs.tombstones == {("acme", "f")}


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({}, {"a", "b", "step"}),
        ({"type": "a"}, {"a"}),
        ({"ids": "b"}, {"b"}),
        ({"timeline": "trial"}, {"step"}),
        ({"type": "a", "ids": "b"}, set()),
    ],
)
def test_a_cancel_selects_by_type_ids_and_timeline(selection: dict[str, Any], expected: set[str]) -> None:
    """All parts that are given must match; other entities are never touched."""
    table = Table(timelines=[timeline(step("a", MINUTE))])
    a, b = table.schedule(NOW + MINUTE, type="a"), table.schedule(NOW + MINUTE, type="b")
    table.turn(a, b, table.start(), table.schedule(NOW + MINUTE, entity="f", type="a"))
    if "ids" in selection:
        selection = selection | {"ids": frozenset({b.id, new_id()})}
    table.turn(table.cancel(**selection))
    names = {a.id: "a", b.id: "b"}
    cancelled = {names.get(row.id, "step") for row in table.rows.values() if row.state is State.CANCELLED}
    assert cancelled == expected


def test_a_cancel_of_nothing_counts_nothing() -> None:
    """And is kept for what was accepted before it."""
    table = Table()
    (outcome,) = table.turn(table.cancel("nobody")).outcomes
    assert (outcome.changed, outcome.already_left, outcome.error) == (0, 0, None)
    assert [stone.entity for stone in table.tombstones] == ["nobody"]


def test_what_is_over_is_cancelled_no_more() -> None:
    """Fired, skipped, cancelled: the count is 0, and the verdict stays."""
    table = Table()
    fired, skipped, cancelled = table.schedule(NOW), table.schedule(NOW, condition="false"), table.schedule(NOW + DAY)
    table.turn(fired, skipped, cancelled)
    table.turn(table.cancel(ids=[cancelled.id]))
    before = dict(table.rows)
    (outcome,) = table.turn(table.cancel()).outcomes
    assert outcome.changed == 0
    assert table.rows == before


class _Counted(list[Any]):
    """A list that counts what is read of it."""

    reads = 0

    def __iter__(self) -> Iterator[Any]:
        for one in super().__iter__():
            _Counted.reads += 1
            yield one


def test_five_thousand_timers_of_one_entity_are_cancelled_by_one_order_in_linear_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where each may have to release another, and other orders came before: nobody reads all for each."""
    table = Table(page_timers=64)
    table.turn(*(table.schedule(None, recurrence=hourly(), sequence=1) for _ in range(5_000)))
    table.turn(*(table.cancel(ids=[new_id()], sequence=3) for _ in range(200)))
    load = Table.load

    def counted(self: Table, needs: Needs) -> Known:
        known = load(self, needs)
        known.waiting = {key: _Counted(timers) for key, timers in known.waiting.items()}
        known.tombstones = {key: _Counted(stones) for key, stones in known.tombstones.items()}
        return known

    monkeypatch.setattr(Table, "load", counted)
    (outcome,) = table.turn(table.cancel(sequence=2)).outcomes
    assert outcome.changed == 5_000
    assert 5_000 < _Counted.reads <= 2 * 5_000 + 200


# Pause and resume


def _selections(schedule: ScheduleTimer) -> list[dict[str, Any]]:
    return [{"ids": [schedule.id]}, {}, {"type": schedule.type}]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_paused_timer_does_not_fire_and_a_resumed_one_that_came_due_fires_at_once(which: int) -> None:
    """Paused by id, entity or type; it keeps its due time and takes its turn just after the watermark."""
    table = Table()
    one = table.schedule(NOW + MINUTE, type="a")
    others = [table.schedule(NOW + MINUTE, entity="f", type="a"), table.schedule(NOW + MINUTE, type="b")]
    table.turn(one, *others)
    selection = _selections(one)[which]
    (outcome,) = table.turn(table.pause(**selection)).outcomes
    assert outcome.changed == (1 if selection else 2)
    assert table.state_of(one.id) is State.PAUSED
    assert one.id not in ids(table.run(until=NOW + HOUR))
    watermark = table.watermark
    (fired, *_) = table.run(table.resume(**selection), until=SECOND)
    assert (fired.due_at, fired.fire_at) == (NOW + MINUTE, watermark.at + MICROSECOND)
    assert {table.state_of(each.id) for each in (one, *others)} == {State.FIRED}


def test_a_schedule_is_paused_by_its_own_id_and_by_its_occurrences() -> None:
    """No occurrence comes before it is resumed."""
    table = Table()
    table.turn(one := table.schedule(None, recurrence=hourly()), two := table.schedule(None, recurrence=hourly()))
    (occurrence,) = table.of(two.id)
    outcomes = table.turn(table.pause(ids=[one.id]), table.pause(ids=[occurrence.id])).outcomes
    assert [outcome.changed for outcome in outcomes] == [1, 1]
    assert table.run(until=NOW + 5 * HOUR) == []
    assert len(table.run(table.resume(ids=[one.id, two.id]), until=SECOND)) == 2


def test_a_timer_that_is_resumed_before_it_is_due_keeps_its_time() -> None:
    """As if nothing had been."""
    table = Table()
    table.turn(one := table.schedule(NOW + HOUR))
    before = table.rows[one.id]
    table.run(table.pause(), until=NOW + MINUTE)
    table.turn(table.resume())
    assert table.rows[one.id] == before
    assert ids(table.run(until=NOW + HOUR)) == [one.id]


def test_pausing_what_is_paused_and_resuming_what_is_not_change_nothing() -> None:
    """The counts say so, in one turn and over several."""
    table = Table()
    table.turn(table.schedule(NOW + HOUR))
    orders = [table.resume(), table.pause(), table.pause(), table.resume(), table.resume()]
    assert [outcome.changed for outcome in table.turn(*orders).outcomes] == [0, 1, 0, 1, 0]
    alone = [table.turn(order).outcomes[0].changed for order in (table.pause(), table.pause(), table.resume())]
    assert alone == [1, 0, 1]


def test_what_is_scheduled_after_a_pause_is_not_held_back() -> None:
    """A pause is an order to what was accepted before it, not a state of the entity."""
    table = Table()
    table.turn(table.schedule(NOW + MINUTE), table.pause(), after := table.schedule(NOW + MINUTE))
    assert ids(table.run(until=NOW + DAY)) == [after.id]


def test_a_paused_timer_stays_paused_over_a_takeover_and_can_be_cancelled() -> None:
    """It is in no page, and the orders still find it."""
    table = Table()
    table.turn(one := table.schedule(NOW + MINUTE), table.pause())
    table.take_over()
    assert table.run(until=NOW + DAY) == []
    (outcome,) = table.turn(table.cancel()).outcomes
    assert (outcome.changed, table.state_of(one.id)) == (1, State.CANCELLED)


# Reschedule


@pytest.mark.parametrize("due_at", [NOW + MINUTE, NOW + 3 * HOUR, NOW + 300 * DAY])
def test_a_rescheduled_timer_fires_at_its_new_time_and_not_at_the_old(due_at: datetime) -> None:
    """Earlier or later, within the wheel or beyond its horizon."""
    table = Table(page_timers=4)
    table.turn(one := table.schedule(NOW + HOUR), *(table.schedule(NOW + 9 * DAY, entity="f") for _ in range(20)))
    (outcome,) = table.turn(table.reschedule(due_at)).outcomes
    assert outcome.changed == 1
    assert one.id not in ids(table.run(until=due_at - MICROSECOND))
    assert ids(table.run(until=due_at)) == [one.id]
    assert table.rows[one.id].due_at == due_at


def test_a_timer_from_beyond_the_horizon_is_rescheduled_to_before_it() -> None:
    """The wheel has not seen it yet."""
    table = Table(page_timers=4)
    table.turn(*(table.schedule(NOW + HOUR, entity="f") for _ in range(20)))
    table.turn(far := table.schedule(NOW + 300 * DAY))
    table.turn(table.reschedule(NOW + MINUTE))
    assert ids(table.run(until=NOW + MINUTE)) == [far.id]


def test_a_timer_that_is_rescheduled_to_the_past_fires_at_once() -> None:
    """Just after the watermark, with the due time it was told; an occurrence too, whatever its misfire policy."""
    table = Table()
    table.run(table.schedule(NOW, entity="f"))
    one = table.schedule(NOW + HOUR)
    occurrence = table.schedule(None, recurrence=hourly(misfire=Misfire.SKIP, catch_up=MINUTE))
    table.turn(one, occurrence)
    watermark = table.watermark
    fired = table.run(table.reschedule(NOW - 99 * DAY), until=SECOND)
    assert sorted(ids(fired)) == sorted([one.id, table.of(occurrence.id)[0].id])
    assert {(each.due_at, each.fire_at) for each in fired} == {(NOW - 99 * DAY, watermark.at + MICROSECOND)}


def test_a_paused_timer_can_be_rescheduled_and_stays_paused() -> None:
    """The new time counts once it is resumed."""
    table = Table()
    table.turn(one := table.schedule(NOW + MINUTE), table.pause(), table.reschedule(NOW + HOUR))
    assert (table.state_of(one.id), table.rows[one.id].due_at) == (State.PAUSED, NOW + HOUR)
    assert table.run(until=NOW + 2 * MINUTE) == []
    assert table.run(table.resume()) == []
    assert ids(table.run(until=NOW + HOUR)) == [one.id]


@pytest.mark.parametrize(("due_at", "next_hour"), [(NOW + MINUTE, 2), (NOW + 90 * MINUTE, 2), (NOW - DAY, 2)])
def test_the_occurrence_after_a_rescheduled_one_follows_the_rule(due_at: datetime, next_hour: int) -> None:
    """The one that moves is still that of its nominal time, which no other occurrence takes."""
    table = Table()
    table.turn(schedule := table.schedule(None, recurrence=hourly()))
    table.turn(table.reschedule(due_at, ids=[schedule.id]))
    table.run(until=max(due_at, NOW + MINUTE))
    moved, following = table.of(schedule.id)
    assert (moved.nominal_at, moved.due_at, table.state_of(moved.id)) == (NOW + HOUR, due_at, State.FIRED)
    assert (following.nominal_at, following.due_at) == (NOW + next_hour * HOUR, NOW + next_hour * HOUR)


# Whatever the order of arrival


@pytest.mark.parametrize("order", list(permutations(range(4))))
@pytest.mark.parametrize("last", ["pause", "resume"])
def test_inv4_orders_that_overtake_each_other_come_to_the_same(order: tuple[int, ...], last: str) -> None:
    """A schedule, a reschedule, a pause and a resume (or the other way round), in all orders of arrival."""
    table = Table()
    one = table.schedule(NOW + MINUTE)
    orders = [table.reschedule(NOW + HOUR)]
    orders += [table.pause(), table.resume()] if last == "resume" else [table.resume(), table.pause()]
    commands = [one, *orders]
    for index in order:
        table.turn(commands[index])
    assert table.rows[one.id].due_at == NOW + HOUR
    assert table.state_of(one.id) is (State.SCHEDULED if last == "resume" else State.PAUSED)
    assert len(table.run(until=NOW + DAY)) == (1 if last == "resume" else 0)


_kinds = st.sampled_from(["schedule", "every hour", "start", "pause", "resume", "reschedule", "cancel"])
_whom = st.sampled_from(["all", "a", "b", "first", "trial"])
_drawn = st.lists(st.tuples(_kinds, _whom, st.integers(1, 9)), min_size=1, max_size=7)


def _commands(table: Table, drawn: list[tuple[str, str, int]]) -> list[Command]:
    """Commands in the order of their acceptance; ids as the position says, so that both tables have the same."""
    made: list[Command] = []
    for position, (kind, whom, hours) in enumerate(drawn):
        selections: dict[str, dict[str, Any]] = {
            "all": {},
            "first": {"ids": [derived_id("x", 0)]},
            "trial": {"timeline": "trial"},
        }
        selection = selections.get(whom, {"type": whom})
        at = NOW + DAY + hours * HOUR
        match kind:
            case "schedule":
                made.append(table.schedule(at, id=derived_id("x", position), type=whom))
            case "every hour":
                rule = hourly(start=at, count=2)
                made.append(table.schedule(None, id=derived_id("x", position), type=whom, recurrence=rule))
            case "start":
                made.append(table.start(NOW + position * HOUR))
            case "reschedule":
                made.append(table.reschedule(at + 5 * MINUTE, **selection))
            case _:
                made.append({"pause": table.pause, "resume": table.resume, "cancel": table.cancel}[kind](**selection))
    return made


def _told(table: Table) -> dict[UUID, Timer]:
    """The rows. What was moved before it was cancelled may be told either way."""
    return {
        timer_id: replace(row, due_at=NOW, fire_at=NOW) if row.state is State.CANCELLED else row
        for timer_id, row in table.rows.items()
    }


@settings(max_examples=200, deadline=None)
@given(_drawn, st.randoms(use_true_random=False), st.sampled_from([1, 2, 99]))
def test_inv4_the_order_of_arrival_does_not_matter(
    drawn: list[tuple[str, str, int]], random: Random, per_turn: int
) -> None:
    """However commands are shuffled, and however many come in a turn, it is as if they came as they were accepted."""
    steps = timeline(step("one", DAY), step("two", 2 * DAY))
    expected, table = Table(timelines=[steps]), Table(timelines=[steps])
    for command in _commands(expected, drawn):
        expected.turn(command)
    shuffled = _commands(table, drawn)
    random.shuffle(shuffled)
    for start in range(0, len(shuffled), per_turn):
        if random.random() < 0.3:
            table.take_over()
        table.turn(*shuffled[start : start + per_turn])
    assert _told(table) == _told(expected)
    for each in (expected, table):
        each.go(NOW + 9 * DAY)
    assert ids(table.fired) == ids(expected.fired)
