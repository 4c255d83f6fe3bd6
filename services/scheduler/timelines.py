"""Timelines: named, versioned sets of steps relative to an anchor, and the timers they make. Pure."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from uuid import UUID

from msgspec import Struct

from libs.ids import derived_id
from libs.trace_points import Point
from services.scheduler.attempts import RetryPolicy
from services.scheduler.conditions import ServiceCondition
from services.scheduler.timer import Mark, StepOf, TargetKind, Timer, fire_time


class Step(Struct, frozen=True, kw_only=True):
    """One step. `offset` counts from the anchor, or for follow-ups from the parent's firing (births.follow_ups)."""

    name: str
    offset: timedelta
    condition: str
    target_kind: TargetKind
    target: bytes
    asked: ServiceCondition | None = None
    report_within: timedelta | None = None
    retry: RetryPolicy | None = None
    follow_ups: tuple["Step", ...] = ()


class Timeline(Struct, frozen=True, kw_only=True):
    """One version of a timeline; never changes once stored."""

    name: str
    version: int
    description: str
    steps: tuple[Step, ...]
    created_at: datetime

    def all_steps(self) -> Iterator[Step]:
        """Every step, follow-ups included, parents first."""
        waiting = list(self.steps)
        while waiting:
            step = waiting.pop(0)
            yield step
            waiting.extend(step.follow_ups)

    def step(self, name: str) -> Step | None:
        """The step of that name."""
        return next((step for step in self.all_steps() if step.name == name), None)


def step_timer_id(run_id: UUID, step: str) -> UUID:
    """The timer id of a run's step."""
    return derived_id("timeline-step", run_id, step)


def step_timer(
    step: Step,
    *,
    timeline: Timeline,
    run_id: UUID,
    tenant: str,
    entity: str,
    due_at: datetime,
    sequence: int,
    watermark: Mark,
    shard: int,
    trace: Point,
) -> Timer:
    """The timer of a run's step, to fire at `due_at` or just after the watermark; its type is the timeline's name."""
    timer_id = step_timer_id(run_id, step.name)
    return Timer(
        id=timer_id,
        shard=shard,
        tenant=tenant,
        entity=entity,
        type=timeline.name,
        due_at=due_at,
        fire_at=fire_time(due_at, watermark),
        target_kind=step.target_kind,
        target=step.target,
        sequence=sequence,
        schedule_id=timer_id,
        condition=step.condition,
        asked=step.asked,
        report_within=step.report_within,
        retry=step.retry,
        step_of=StepOf(run_id=run_id, timeline=timeline.name, version=timeline.version, step=step.name),
        trace=trace,
    )
