"""The shard's pure actor: what it decides, and that reading ahead never loses a timer."""

import json
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.ids import derived_id, new_id
from services.scheduler import verdicts
from services.scheduler.commands import ScheduleTimer, StartTimeline
from services.scheduler.facts import MAX_FACTS_CHARACTERS, merge_patch
from services.scheduler.timer import Mark, State
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

# Firing


def test_a_timer_fires_when_it_is_due_and_the_watermark_is_its_mark() -> None:
    """Not a microsecond earlier."""
    table = Table()
    table.turn(one := table.schedule(NOW + MINUTE))
    assert table.run(until=NOW + MINUTE - MICROSECOND) == []
    assert ids(table.run(until=NOW + MINUTE)) == [one.id]
    assert table.watermark == Mark(NOW + MINUTE, one.id)


def test_inv5_timers_fire_by_time_and_then_by_id() -> None:
    """Whatever order they arrived in."""
    table = Table()
    a, b, c = (new_id() for _ in range(3))
    commands = [table.schedule(NOW + 2 * SECOND, id=a), table.schedule(NOW + SECOND, id=c)]
    table.turn(*commands, table.schedule(NOW + SECOND, id=b))
    assert ids(table.run(until=NOW + MINUTE)) == [b, c, a]


def test_inv5_a_late_timer_takes_its_turn_just_after_the_watermark() -> None:
    """Due at or before what has fired: its place is one microsecond behind, its due time stays."""
    table = Table()
    table.run(table.schedule(NOW))
    for due_at in (NOW, NOW - DAY):
        watermark = table.watermark
        (late,) = table.run(table.schedule(due_at), until=NOW + SECOND)
        assert (late.due_at, late.fire_at) == (due_at, watermark.at + MICROSECOND)


def test_a_timer_on_time_keeps_its_time() -> None:
    """Only what is late is moved."""
    table = Table()
    table.run(table.schedule(NOW))
    table.turn(one := table.schedule(NOW + MICROSECOND))
    assert table.rows[one.id].fire_at == NOW + MICROSECOND


def test_a_turn_fires_at_most_its_limit_and_the_next_goes_on() -> None:
    """No timer is passed over by the watermark."""
    table = Table()
    commands = [table.schedule(NOW - MINUTE + n * SECOND) for n in range(5)]
    assert ids(table.turn(*commands, most_timers=2).fired) == ids(commands[:2])
    assert ids(table.turn(most_timers=9).fired) == ids(commands[2:])


def test_a_timer_whose_time_has_run_out_expires_and_its_siblings_fire() -> None:
    """An expiry counts from the instant itself on."""
    table = Table()
    gone = table.schedule(NOW, expires_at=NOW + MINUTE)
    fine = table.schedule(NOW, expires_at=NOW + MINUTE + MICROSECOND)
    table.now = NOW - MINUTE
    table.turn(gone, fine)
    assert ids(table.run(until=NOW + MINUTE)) == [fine.id]
    assert table.state_of(gone.id) is State.EXPIRED


def test_a_timer_that_cannot_be_sent_is_recorded_as_failed_and_its_siblings_fire() -> None:
    """The shell says what it could not encode."""
    table = Table()
    bad, good = table.schedule(NOW), table.schedule(NOW)
    changes = table.turn(bad, good, broken={bad.id: "no such target"})
    assert ids(changes.fired) == [good.id]
    assert (table.state_of(bad.id), table.rows[bad.id].last_error) == (State.FAILED, "no such target")


def test_a_timer_whose_firing_raises_is_recorded_as_failed_and_its_siblings_fire() -> None:
    """A step whose timeline is gone cannot say what follows it."""
    table = Table(timelines=[timeline(step("a", MINUTE))])
    table.turn(table.start(), plain := table.schedule(NOW + MINUTE))
    (bad,) = (row for row in table.waiting() if row.step_of)
    table.timelines.clear()
    assert ids(table.run(until=NOW + DAY)) == [plain.id]
    assert table.state_of(bad.id) is State.FAILED
    assert "KeyError" in (table.rows[bad.id].last_error or "")


# Ids


def test_inv2_a_derived_id_that_comes_twice_makes_one_timer() -> None:
    """In the same turn, in a later one, and after it has fired."""
    table = Table()
    again = table.schedule(NOW, id=derived_id("window-timer", 1))
    outcomes = table.turn(again, again).outcomes + table.turn(again).outcomes
    assert [outcome.changed for outcome in outcomes] == [1, 0, 0]
    assert len(table.fired) == 1


def test_inv2_a_derived_schedule_that_comes_twice_makes_one_chain_of_occurrences() -> None:
    """Also when its first occurrence has fired already."""
    table = Table()
    again = table.schedule(None, id=derived_id("schedule", 1), recurrence=hourly())
    outcomes = table.turn(again, again).outcomes
    table.run(until=NOW + HOUR)
    outcomes += table.turn(again).outcomes
    assert [outcome.changed for outcome in outcomes] == [1, 0, 0]
    assert len(table.waiting()) == 1


def test_only_derived_ids_are_looked_up() -> None:
    """A UUIDv7 is new, and its frame is applied once."""
    table = Table()
    derived = table.schedule(NOW, id=derived_id("x"))
    assert table.shard.needs([table.schedule(NOW), derived]).ids == {derived.id}


# Timelines


TRIAL = timeline(
    step("remind", 25 * DAY, condition="!has(facts.paid)"),
    step("check", 30 * DAY, follow_ups=(step("again", 2 * DAY, follow_ups=(step("last", DAY),)),)),
)


def test_a_timeline_makes_its_steps_and_each_step_its_follow_ups_when_it_has_fired() -> None:
    """Offsets count from the anchor, those of follow-ups from the parent's firing."""
    table = Table(timelines=[TRIAL])
    (outcome,) = table.turn(table.start()).outcomes
    assert outcome.changed == 2
    for day in (25, 30, 32, 33):
        table.run(until=NOW + day * DAY)
    told = [(one.step_of.step, (one.due_at - NOW).days) for one in table.fired if one.step_of]
    assert told == [("remind", 25), ("check", 30), ("again", 32), ("last", 33)]


def test_a_step_that_is_skipped_has_no_follow_ups() -> None:
    """What follows presumes that it happened."""
    once = timeline(step("check", DAY, condition="false", follow_ups=(step("again", DAY),)))
    table = Table(timelines=[once])
    table.turn(table.start())
    table.run(until=NOW + 9 * DAY)
    assert [row.state for row in table.rows.values()] == [State.SKIPPED]


def test_inv2_a_timeline_started_twice_runs_once() -> None:
    """In the same turn, in a later one; another anchor is another run."""
    table = Table(timelines=[TRIAL])
    outcomes = table.turn(table.start(), table.start()).outcomes
    outcomes += table.turn(table.start(), table.start(NOW + DAY)).outcomes
    assert [outcome.changed for outcome in outcomes] == [2, 0, 0, 2]


def test_a_started_timeline_keeps_its_version() -> None:
    """The follow-ups are those of the version it was started with; a new start takes the newest."""
    table = Table(timelines=[timeline(step("a", DAY, follow_ups=(step("old", DAY),)))])
    table.turn(table.start())
    table.timelines.append(timeline(step("a", DAY, follow_ups=(step("new", DAY),)), version=2))
    table.run(until=NOW + DAY)
    assert [row.step_of.step for row in table.waiting() if row.step_of] == ["old"]


def test_an_unknown_timeline_is_refused_in_the_result() -> None:
    """With a code, a reason, and what to do."""
    table = Table()
    (outcome,) = table.turn(table.start()).outcomes
    said = "there is no timeline 'trial': store it with PutTimeline first"
    assert outcome.error == (9, "TIMELINE_NOT_FOUND", said)


def test_a_timeline_accepted_before_a_cancel_and_arriving_after_it_is_born_cancelled() -> None:
    """Every step of it."""
    table = Table(timelines=[TRIAL])
    late: StartTimeline = table.start()
    table.turn(table.cancel(timeline="trial"))
    (outcome,) = table.turn(late).outcomes
    assert outcome.changed == 0
    assert [row.state for row in table.rows.values()] == 2 * [State.CANCELLED]


# Conditions


@pytest.mark.parametrize(
    ("condition", "state", "note"),
    [
        ("facts.paid", State.FIRED, {"condition": "facts.paid", "holds": True, "facts": {"paid": True}}),
        ("!facts.paid", State.SKIPPED, {"condition": "!facts.paid", "holds": False, "facts": {"paid": True}}),
        ("facts.gone", State.FAILED, {"facts": {"gone": None}}),
        ("facts.", State.FAILED, None),
    ],
)
def test_the_verdict_of_a_condition_is_on_record_with_the_facts_it_read(
    condition: str, state: State, note: dict[str, Any] | None
) -> None:
    """True fires once, false skips, what cannot be decided fails with its error; a sibling fires in any case."""
    table = Table()
    one, sibling = table.schedule(NOW, condition=condition), table.schedule(NOW + MICROSECOND)
    fired = table.run(table.put_facts(paid=True, other=1), one, sibling, until=MINUTE)
    assert ids(fired) == ([one.id] if state is State.FIRED else []) + [sibling.id]
    row = table.rows[one.id]
    assert table.state_of(one.id) is state
    assert json.loads(row.note or "null") == note
    assert (row.last_error is not None, row.decided_at) == (state is State.FAILED, NOW + MINUTE)


def test_a_condition_that_fails_says_why() -> None:
    """In words, for people."""
    table = Table()
    one = table.schedule(NOW, condition="facts.gone")
    table.run(one)
    assert table.rows[one.id].last_error == "there is no 'gone'; where it may be missing, ask has() first"


def test_a_condition_that_raises_is_recorded_as_failed_and_its_siblings_fire(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises; an occurrence has its successor all the same."""

    def broken(text: str) -> None:
        raise RuntimeError(f"no way to read {text}")

    monkeypatch.setattr(verdicts, "compile_condition", broken)
    table = Table()
    table.turn(
        schedule := table.schedule(None, recurrence=hourly(), condition="x"), sibling := table.schedule(NOW + HOUR)
    )
    assert ids(table.run(until=NOW + HOUR)) == [sibling.id]
    failed, following = table.of(schedule.id)
    assert (failed.state, failed.last_error) == (State.FAILED, "RuntimeError: no way to read x")
    assert (following.state, following.due_at) == (State.SCHEDULED, NOW + 2 * HOUR)


def test_a_recurrence_goes_on_whatever_becomes_of_an_occurrence() -> None:
    """A condition that cannot be decided, one that cannot be read, a target that cannot be sent."""
    table = Table()
    failing = [table.schedule(None, recurrence=hourly(), condition=text) for text in ("facts.gone", "facts.")]
    unsendable = table.schedule(None, recurrence=hourly())
    table.turn(*failing, unsendable)
    (first,) = table.of(unsendable.id)
    table.now = NOW + HOUR
    table.turn(broken={first.id: "no such target"})
    assert table.fired == []
    for schedule in (*failing, unsendable):
        assert [row.state for row in table.of(schedule.id)] == [State.FAILED, State.SCHEDULED]
    assert ids(table.run(until=NOW + 2 * HOUR)) == [table.of(unsendable.id)[1].id]


def test_a_condition_reads_the_facts_of_the_turn_it_is_decided_in() -> None:
    """A fact that came with the same frame counts."""
    table = Table()
    table.turn(table.put_facts(paid=False))
    one = table.schedule(NOW, condition="facts.paid")
    table.turn(table.put_facts(paid=True), one)
    assert table.state_of(one.id) is State.FIRED


# Facts


@pytest.mark.parametrize(
    ("before", "patch", "after"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({"a": "foo"}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_facts_merge_as_rfc_7396_says(before: dict[str, Any], patch: dict[str, Any], after: dict[str, Any]) -> None:
    """The examples of its appendix A that are objects."""
    assert merge_patch(before, patch) == after


def test_facts_of_one_entity_are_bounded() -> None:
    """INV-9: a patch that would make them too large changes nothing and says so."""
    table = Table()
    table.turn(table.put_facts(kept=1))
    (outcome,) = table.turn(table.put_facts(large="x" * MAX_FACTS_CHARACTERS)).outcomes
    assert outcome.error is not None
    assert outcome.error[1] == "TOO_MANY_FACTS"
    assert table.facts["acme", "e"].now == {"kept": 1}


# Reading ahead


def test_a_herd_streams_through_a_bounded_wheel() -> None:
    """A thousand due at once, pages of 16: all fire, in order, and never more than two pages are in memory."""
    table = Table()
    for _ in range(20):
        table.turn(*(table.schedule(NOW + MINUTE) for _ in range(50)))
        assert len(table.shard) <= 2 * table.page_timers
    fired = table.run(until=NOW + MINUTE)
    assert [one.mark for one in fired] == sorted(row.mark for row in table.rows.values())
    assert len(fired) == 1_000


def test_a_timer_beyond_the_horizon_is_not_read_twice_nor_forgotten() -> None:
    """It stays in the table until its page comes."""
    table = Table()
    table.turn(*(table.schedule(NOW + MINUTE + n * SECOND) for n in range(40)))
    assert table.shard.horizon is not None
    table.turn(far := table.schedule(NOW + DAY))
    assert len(table.shard) <= 2 * table.page_timers
    assert len(table.run(until=NOW + MINUTE * 2)) == 40
    assert ids(table.run(until=NOW + DAY)) == [far.id]


_steps = st.lists(
    st.one_of(
        st.tuples(st.just("schedule"), st.tuples(st.integers(-5, 60), st.integers(1, 30), st.sampled_from("ef"))),
        st.tuples(st.just("cancel"), st.sampled_from("ef")),
        st.tuples(st.just("advance"), st.integers(0, 30)),
        st.tuples(st.just("turn"), st.integers(1, 9)),
        st.tuples(st.just("take over"), st.none()),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(_steps, st.integers(1, 5))
def test_inv2_inv5_pages_horizon_and_cuts_never_lose_a_timer(steps: list[tuple[str, Any]], read_at_most: int) -> None:
    """Against a naive model: everything scheduled and not cancelled before its turn fires once, in order of marks."""
    table = Table(page_timers=4, read_at_most=read_at_most)
    expected: set[UUID] = set()
    for name, argument in steps:
        commands: list[ScheduleTimer] = []
        match name:
            case "schedule":
                offset, times, entity = argument
                commands = [table.schedule(table.now + offset * SECOND, entity=entity) for _ in range(times)]
                expected |= set(ids(commands))
                table.turn(*commands, most_timers=3)
            case "cancel":
                gone = {row.id for row in table.waiting() if row.entity == argument}
                table.turn(table.cancel(argument), most_timers=3)
                expected -= gone
            case "advance":
                table.now += argument * SECOND
            case "turn":
                table.turn(most_timers=argument)
            case _:
                table.take_over()
        assert len(table.shard) <= 2 * table.page_timers
    table.run(until=table.now + DAY)
    assert sorted(ids(table.fired)) == sorted(expected)
    marks = [one.mark for one in table.fired]
    assert marks == sorted(marks)
