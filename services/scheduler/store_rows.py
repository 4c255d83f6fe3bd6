"""Between timers and their rows."""

from collections.abc import Sequence
from typing import Any

from psycopg.types.json import Jsonb

from services.scheduler.recurrence import Recurrence
from services.scheduler.timelines import Timeline, steps_from_json
from services.scheduler.timer import State, StepOf, TargetKind, Timer

COLUMNS = (
    *("id", "shard", "fire_at", "due_at", "tenant", "entity", "type", "state", "target_kind", "target", "sequence"),
    *("schedule_id", "occurrence", "recurrence", "condition", "expires_at", "run_id", "timeline"),
    *("timeline_version", "step", "decided_at", "note"),
)
TYPES = (
    *("uuid", "int4", "timestamptz", "timestamptz", "text", "text", "text", "int2", "int2", "bytea", "int8"),
    *("uuid", "int4", "jsonb", "text", "timestamptz", "uuid", "text"),
    *("int4", "text", "timestamptz", "text"),
)
SELECT = f"SELECT {', '.join(f'timer.{column}' for column in COLUMNS)} FROM timer"  # noqa: S608


def timeline_of(row: Sequence[Any]) -> Timeline:
    """The timeline in (name, version, description, steps, created_at)."""
    name, version, description, steps, created_at = row
    return Timeline(
        name=name, version=version, description=description, steps=steps_from_json(steps), created_at=created_at
    )


def row_of(timer: Timer) -> tuple[object, ...]:
    """Values in the order of COLUMNS."""
    step = timer.step_of
    return (
        timer.id,
        timer.shard,
        timer.fire_at,
        timer.due_at,
        timer.tenant,
        timer.entity,
        timer.type,
        int(timer.state),
        int(timer.target_kind),
        timer.target,
        timer.sequence,
        timer.schedule_id,
        timer.occurrence,
        Jsonb(timer.recurrence.to_json()) if timer.recurrence else None,
        timer.condition,
        timer.expires_at,
        step.run_id if step else None,
        step.timeline if step else None,
        step.version if step else None,
        step.step if step else None,
        timer.decided_at,
        timer.note,
    )


def timer_of(row: tuple[Any, ...], *, has_fired: bool = False) -> Timer:
    """The timer in a row selected by SELECT; `has_fired` says that it is behind its shard's watermark."""
    values = dict(zip(COLUMNS, row, strict=True))
    run_id, timeline, version, step = (values.pop(name) for name in ("run_id", "timeline", "timeline_version", "step"))
    recurrence, state = values.pop("recurrence"), State(values.pop("state"))
    return Timer(
        state=State.FIRED if has_fired else state,
        target_kind=TargetKind(values.pop("target_kind")),
        recurrence=Recurrence.from_json(recurrence) if recurrence else None,
        step_of=StepOf(run_id=run_id, timeline=timeline, version=version, step=step) if run_id else None,
        **values,
    )
