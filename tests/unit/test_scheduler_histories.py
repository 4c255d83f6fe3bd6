"""Random histories of a shard: everything callers can do, time, and owners that come and go."""

from collections import Counter
from datetime import timedelta
from typing import Any
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from libs.ids import derived_id
from services.scheduler.attempts import RetryPolicy
from services.scheduler.commands import Command
from services.scheduler.conditions import Answer, NoAnswer, ServiceCondition
from services.scheduler.recurrence import Misfire, Overlap
from services.scheduler.timer import HAS_TURN, UNDER_WAY, State, TargetKind
from tests.support.scheduler_table import HOUR, MINUTE, NOW, SECOND, Table, hourly, ids, step, timeline

_RETRY = RetryPolicy(initial=MINUTE, most_attempts=3)
_ASKED = [None, *(ServiceCondition(service="stock", timeout=SECOND, no_answer=one) for one in NoAnswer)]
_STEPS = timeline(
    step("tell", HOUR, follow_ups=(step("again", HOUR, condition="!has(facts.paid)"),)),
    step("charge", 2 * HOUR, target_kind=TargetKind.EVENT, report_within=HOUR, follow_ups=(step("thank", HOUR),)),
)

_number = st.integers(0, 11)
_actions = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *("schedule", "event", "every ten minutes", "every ten minutes", "start", "facts"),
                *("cancel", "pause", "resume", "reschedule", "trigger", "backfill"),
                *("done", "failed", "done", "failed", "answer", "answer", "answer"),
                *("seconds", "minutes", "hours", "minutes", "hours"),
            ]
        ),
        _number,
        _number,
    ),
    max_size=40,
)


def _orders(table: Table, name: str, first: int, second: int) -> Command | None:
    selections: list[dict[str, Any]] = [{}, {"type": "a"}, {"ids": [derived_id("timer", first)]}, {"timeline": "trial"}]
    whom = selections[second % 4]
    match name:
        case "cancel" if second < 9 or whom:  # Not everything all the time.
            return table.cancel(**whom)
        case "pause":
            return table.pause(**whom)
        case "resume":
            return table.resume(**whom)
        case "reschedule":
            return table.reschedule(table.now + (first - 3) * 10 * MINUTE, **whom)
    return None


def _command(table: Table, position: int, name: str, first: int, second: int) -> Command | None:
    """What an action comes to; ids as the position says, so that two tables have the same."""
    timer_id, at = derived_id("timer", position % 12), table.now + (first - 2) * 5 * MINUTE
    kind = "a" if second % 2 else "b"
    asked = _ASKED[second % 8] if second % 8 < len(_ASKED) else None
    expires_at = table.now + 3 * HOUR if first == 5 else None
    awaiting = sorted(row.id for row in table.rows.values() if row.attempts)
    match name:
        case "schedule":
            condition = "" if asked else ["", "has(facts.paid)", "facts.gone"][first % 3]
            return table.schedule(at, id=timer_id, type=kind, condition=condition, asked=asked, expires_at=expires_at)
        case "event":
            return table.event(at, id=timer_id, type=kind, asked=asked, retry=_RETRY, expires_at=expires_at)
        case "every ten minutes":
            rule = hourly(
                cron="*/10 * * * *",
                overlap=list(Overlap)[first % 3],
                misfire=list(Misfire)[second % 3],
                jitter=(first % 2) * 15 * MINUTE,
                catch_up=HOUR,
            )
            more = {"retry": _RETRY, "report_within": 25 * MINUTE, "expires_at": expires_at, "asked": asked}
            return table.event(None, id=timer_id, type=kind, recurrence=rule, accepted_at=table.now, **more)
        case "start":
            return table.start(NOW + position * MINUTE)
        case "facts":
            return table.put_facts(paid=True if first % 2 else None)
        case "trigger":
            schedule_id = derived_id("timer", first)
            return replace(table.trigger(schedule_id), id=derived_id("trigger", position))
        case "backfill":
            return table.backfill(derived_id("timer", first), table.now - 2 * HOUR, table.now)
        case "done" | "failed" if awaiting:
            row = table.rows[awaiting[first % len(awaiting)]]
            return table.report(row.id, max(1, row.attempts - second % 2), error="no" if name == "failed" else "")
    return _orders(table, name, first, second)


def _play(table: Table, actions: list[tuple[str, int, int]], owners: list[bool]) -> None:
    """Do it all, a turn each, and then let a day pass."""
    for position, (name, first, second) in enumerate(actions):
        if owners[position % len(owners)]:
            table.take_over()
        units = {"seconds": SECOND, "minutes": MINUTE, "hours": 20 * MINUTE}
        answers: list[Answer] = []
        if name == "answer" and table.questions:
            question = table.questions[-1 - first % min(3, len(table.questions))]
            answers = [
                Answer(
                    shard=0,
                    timer_id=question.timer_id,
                    number=question.number,
                    holds=[True, False, None][second % 3],
                    reason="",
                    was_asked=second < 9,
                )
            ]
        command = _command(table, position, name, first, second)
        table.run(
            *([command] if command is not None else []),
            answers=answers,
            until=first * units.get(name, timedelta(0)),
        )
        _check(table)
    table.go(table.now + 5 * HOUR)
    _check(table)


def _check(table: Table) -> None:
    """What holds after every turn."""
    late = [row for row in table.rows.values() if row.state in HAS_TURN - {State.SCHEDULED} and row.fire_at < table.now]
    assert [row for row in late if row.mark <= table.watermark] == [], "its turn would never come"
    marks = [one.mark for one in table.fired]
    assert marks == sorted(set(marks)), "INV-5"
    for timer_id, times in Counter(ids(table.fired)).items():
        row = table.rows[timer_id]
        assert times == (row.attempts if row.report_within is not None else 1), "INV-2"
    by_schedule: dict[UUID, list[State]] = {}
    for row in table.rows.values():
        is_under_way = row.state in UNDER_WAY or (row.state is State.PAUSED and row.attempts > 0)
        if row.schedule_id != row.id and is_under_way:
            by_schedule.setdefault(row.schedule_id, []).append(row.state)
    for states in by_schedule.values():
        assert states.count(State.BUFFERED) <= 1, "one is buffered"
        assert State.BUFFERED not in states or len(states) > 1, "nothing would release it"


@settings(max_examples=150, deadline=None)
@given(_actions, st.lists(st.booleans(), min_size=1, max_size=10))
def test_inv2_inv3_a_history_is_the_same_whoever_owns_the_shard(
    actions: list[tuple[str, int, int]], owners: list[bool]
) -> None:
    """The table, what fired and what was asked: nothing that counts is in the actor alone."""
    one_owner, many = Table(page_timers=512), Table(page_timers=512)
    _play(one_owner, actions, [False])
    _play(many, actions, owners)
    assert many.rows == one_owner.rows
    assert (many.watermark, many.attempts, many.facts) == (one_owner.watermark, one_owner.attempts, one_owner.facts)
    assert (many.fired, many.questions) == (one_owner.fired, one_owner.questions)


@settings(max_examples=100, deadline=None)
@given(_actions, st.lists(st.booleans(), min_size=1, max_size=10))
def test_inv2_inv5_small_pages_lose_and_repeat_nothing(actions: list[tuple[str, int, int]], owners: list[bool]) -> None:
    """Whatever happens at the horizon of a wheel of four."""
    _play(Table(page_timers=4), actions, owners)
