"""Timelines and the timers they make."""

from datetime import timedelta
from uuid import UUID

from libs.ids import derived_id
from services.scheduler.attempts import RetryPolicy
from services.scheduler.conditions import NoAnswer, ServiceCondition
from services.scheduler.timelines import step_timer, step_timer_id
from services.scheduler.timer import BEGINNING, Mark, State, TargetKind
from tests.support.scheduler_table import DAY, MINUTE, NOW, SECOND, Table, step, timeline

TRIAL = timeline(
    step("remind", 25 * DAY, condition="!facts.paid"),
    step("check", 30 * DAY, follow_ups=(step("again", 2 * DAY), step("last", 3 * DAY, follow_ups=(step("x", DAY),)))),
    version=3,
)
RUN = derived_id("timeline-run", "acme", "trial", "e", 1_372_680_000_000_000)


def test_a_step_is_found_by_name_however_deep_it_is() -> None:
    """None for one that is not there."""
    assert [one.name for one in TRIAL.all_steps()] == ["remind", "check", "again", "last", "x"]
    assert TRIAL.step("x") == step("x", DAY)
    assert TRIAL.step("y") is None


def test_a_step_has_one_timer_per_run() -> None:
    """Its id derives from run and step, so that whoever makes it again makes the same."""
    assert step_timer_id(RUN, "remind") == step_timer_id(RUN, "remind")
    others = [step_timer_id(RUN, "check"), step_timer_id(UUID(int=1), "remind")]
    assert len({step_timer_id(RUN, "remind"), *others}) == 3


def test_a_steps_timer_carries_where_it_comes_from() -> None:
    """Its type is the timeline's name; one that is late waits for nothing."""
    watermark = Mark(NOW + DAY, UUID(int=1))
    made = [
        step_timer(
            TRIAL.steps[0],
            timeline=TRIAL,
            run_id=RUN,
            tenant="acme",
            entity="e",
            due_at=NOW,
            sequence=5,
            watermark=mark,
            shard=2,
            trace=b"",
        )
        for mark in (BEGINNING, watermark)
    ]
    assert made[0].id == made[0].schedule_id == step_timer_id(RUN, "remind")
    assert (made[0].type, made[0].condition, made[0].sequence, made[0].shard) == ("trial", "!facts.paid", 5, 2)
    assert made[0].step_of is not None
    assert (made[0].step_of.run_id, made[0].step_of.version, made[0].step_of.step) == (RUN, 3, "remind")
    assert [one.fire_at for one in made] == [NOW, NOW + DAY + timedelta(microseconds=1)]


def test_a_step_that_sends_an_event_is_tried_asked_and_followed_as_any_timer() -> None:
    """Its service is asked, its report awaited and retried, and what follows begins with its first firing only."""
    table = Table(
        timelines=[
            timeline(
                step(
                    "charge",
                    DAY,
                    target_kind=TargetKind.EVENT,
                    report_within=MINUTE,
                    retry=RetryPolicy(initial=SECOND, most_attempts=2),
                    asked=ServiceCondition(service="billing", timeout=SECOND, no_answer=NoAnswer.FAIL),
                    follow_ups=(step("thank", DAY),),
                )
            )
        ]
    )
    table.run(table.start(), until=NOW + DAY)
    assert [row.state for row in table.rows.values()] == [State.ASKING]
    table.run(answers=[table.answer(True)], until=SECOND)
    assert [row.state for row in table.rows.values()] == [State.AWAITING, State.SCHEDULED]
    table.run(until=MINUTE)  # No report: it is to be charged again, and billing has a say again.
    table.run(until=SECOND)
    table.run(answers=[table.answer(True)], until=SECOND)
    charge, thank = table.rows.values()
    assert (charge.state, charge.attempts) == (State.AWAITING, 2)
    assert (thank.due_at, table.state_of(thank.id)) == (NOW + 2 * DAY, State.SCHEDULED)


def test_what_follows_a_step_that_was_held_back_counts_from_its_firing() -> None:
    """Due on day 25, resumed on day 40: its reminder two days later comes on day 42, not in the same instant."""
    table = Table(timelines=[timeline(step("check", 25 * DAY, follow_ups=(step("remind", 2 * DAY),)))])
    table.turn(table.start())
    table.turn(table.pause())
    table.run(until=NOW + 40 * DAY)
    table.run(table.resume(), until=SECOND)
    (check,) = table.fired
    (remind,) = table.waiting()
    assert remind.due_at == NOW + 40 * DAY + SECOND + 2 * DAY
    assert check.due_at == NOW + 25 * DAY


def test_what_follows_a_step_that_fires_in_its_time_keeps_to_the_time_of_day() -> None:
    """However deep it is, and although each fires some seconds late."""
    table = Table(
        timelines=[timeline(step("a", DAY, follow_ups=(step("b", DAY, follow_ups=(step("c", DAY),)),)))],
    )
    table.turn(table.start())
    for day in (1, 2):
        table.run(until=NOW + day * DAY + 59 * SECOND)
    assert [one.due_at for one in table.waiting()] == [NOW + 3 * DAY]
