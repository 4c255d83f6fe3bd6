"""Timelines: named, versioned sets of steps relative to an anchor, and the timers they make. Pure."""

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from libs.ids import derived_id
from services.scheduler.timer import Mark, StepOf, TargetKind, Timer, fire_time


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step. `offset` counts from the anchor, or for follow-ups from the parent's due time."""

    name: str
    offset: timedelta
    condition: str
    target_kind: TargetKind
    target: bytes
    follow_ups: tuple["Step", ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
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


def run_id_of(tenant: str, timeline: str, entity: str, anchor_at: datetime) -> UUID:
    """The id of a started timeline: a second start of the same is the same run."""
    return derived_id("timeline-run", tenant, timeline, entity, anchor_at.isoformat())


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
        step_of=StepOf(run_id=run_id, timeline=timeline.name, version=timeline.version, step=step.name),
    )


def steps_to_json(steps: tuple[Step, ...]) -> str:
    """For storage; equal steps give equal text."""
    return json.dumps([_step_to_json(step) for step in steps], sort_keys=True)


def steps_from_json(stored: list[dict[str, Any]]) -> tuple[Step, ...]:
    """From storage."""
    return tuple(_step_from_json(one) for one in stored)


def _step_to_json(step: Step) -> dict[str, Any]:
    return {
        "name": step.name,
        "offset_s": step.offset.total_seconds(),
        "condition": step.condition,
        "target_kind": step.target_kind.name,
        "target": base64.b64encode(step.target).decode(),
        "follow_ups": [_step_to_json(one) for one in step.follow_ups],
    }


def _step_from_json(stored: Mapping[str, Any]) -> Step:
    return Step(
        name=stored["name"],
        offset=timedelta(seconds=stored["offset_s"]),
        condition=stored["condition"],
        target_kind=TargetKind[stored["target_kind"]],
        target=base64.b64decode(stored["target"]),
        follow_ups=steps_from_json(stored["follow_ups"]),
    )
