"""Timelines and the timers they make."""

import json
from datetime import timedelta
from uuid import UUID

from services.scheduler.timelines import run_id_of, step_timer, step_timer_id, steps_from_json, steps_to_json
from services.scheduler.timer import BEGINNING, Mark
from tests.support.scheduler_table import DAY, MINUTE, NOW, step, timeline

TRIAL = timeline(
    step("remind", 25 * DAY, condition="!facts.paid"),
    step("check", 30 * DAY, follow_ups=(step("again", 2 * DAY), step("last", 3 * DAY, follow_ups=(step("x", DAY),)))),
    version=3,
)
RUN = UUID(int=7)


def test_steps_come_back_from_storage_as_they_were() -> None:
    """Follow-ups, conditions, offsets below a second and targets included."""
    steps = (*TRIAL.steps, step("b", timedelta(microseconds=1_500), follow_ups=(step("c", -MINUTE),)))
    assert steps_from_json(json.loads(steps_to_json(steps))) == steps


def test_equal_steps_are_stored_as_equal_text() -> None:
    """So that the same definition gives no new version."""
    assert steps_to_json(TRIAL.steps) == steps_to_json(steps_from_json(json.loads(steps_to_json(TRIAL.steps))))


def test_a_step_is_found_by_name_however_deep_it_is() -> None:
    """None for one that is not there."""
    assert [one.name for one in TRIAL.all_steps()] == ["remind", "check", "again", "last", "x"]
    assert TRIAL.step("x") == step("x", DAY)
    assert TRIAL.step("y") is None


def test_a_run_is_named_by_tenant_timeline_entity_and_anchor() -> None:
    """The same start again is the same run; parts cannot run into each other."""
    runs = [run_id_of("a", "t", "e", NOW), run_id_of("a", "t", "e", NOW + MINUTE), run_id_of("a", "te", "", NOW)]
    assert len({*runs, run_id_of("b", "t", "e", NOW), run_id_of("a", "t", "e", NOW)}) == 4


def test_a_steps_timer_carries_where_it_comes_from() -> None:
    """Its id derives from run and step, its type is the timeline's name; one that is late waits for nothing."""
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
        )
        for mark in (BEGINNING, watermark)
    ]
    assert made[0].id == made[0].schedule_id == step_timer_id(RUN, "remind")
    assert (made[0].type, made[0].condition, made[0].sequence, made[0].shard) == ("trial", "!facts.paid", 5, 2)
    assert made[0].step_of is not None
    assert (made[0].step_of.run_id, made[0].step_of.version, made[0].step_of.step) == (RUN, 3, "remind")
    assert [one.fire_at for one in made] == [NOW, NOW + DAY + timedelta(microseconds=1)]
