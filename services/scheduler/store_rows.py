"""Between timers and their rows."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import msgspec
from psycopg.types.json import Jsonb

from libs.trace_points import NOWHERE
from services.scheduler.attempts import RetryPolicy
from services.scheduler.conditions import ServiceCondition
from services.scheduler.recurrence import Recurrence
from services.scheduler.timelines import Step, Timeline
from services.scheduler.timer import State, StepOf, TargetKind, Timer

_PLAIN = (
    *(
        "id",
        "shard",
        "fire_at",
        "due_at",
        "tenant",
        "entity",
        "type",
        "target",
        "sequence",
        "schedule_id",
        "occurrence",
    ),
    *("nominal_at", "condition", "expires_at", "report_within", "asks", "holds", "attempts", "first_attempt_at"),
    *("last_error", "decided_at", "note"),
)
"""Columns that are fields as they are."""

COLUMNS = (
    *_PLAIN,
    *("state", "target_kind", "recurrence", "asked", "retry", "run_id", "timeline", "timeline_version", "step"),
    "trace",
)
TYPES = (
    *("uuid", "int4", "timestamptz", "timestamptz", "text", "text", "text", "bytea", "int8", "uuid", "int4"),
    *("timestamptz", "text", "timestamptz", "interval", "int2", "bool", "int2", "timestamptz"),
    *("text", "timestamptz", "text"),
    *("int2", "int2", "jsonb", "jsonb", "jsonb", "uuid", "text", "int4", "text"),
    "bytea",
)
SELECT = f"SELECT {', '.join(f'timer.{column}' for column in COLUMNS)} FROM timer"  # noqa: S608

_plain_of = attrgetter(*_PLAIN)
_NO_STEP = (None, None, None, None)


def timeline_of(row: Sequence[Any]) -> Timeline:
    """The timeline in (name, version, description, steps, created_at)."""
    name, version, description, stored, created_at = row
    steps = msgspec.convert(stored, tuple[Step, ...])
    return Timeline(name=name, version=version, description=description, steps=steps, created_at=created_at)


def steps_json(steps: tuple[Step, ...]) -> str:
    """For storage; equal steps give equal text."""
    return msgspec.json.encode(steps).decode()


def row_of(timer: Timer) -> tuple[object, ...]:
    """Values in the order of COLUMNS."""
    step = timer.step_of
    return (
        *_plain_of(timer),
        int(timer.state),
        int(timer.target_kind),
        _json_of(timer.recurrence),
        _json_of(timer.asked),
        _json_of(timer.retry),
        *((step.run_id, step.timeline, step.version, step.step) if step is not None else _NO_STEP),
        timer.trace or None,
    )


def _json_of(part: Recurrence | ServiceCondition | RetryPolicy | None) -> Jsonb | None:
    return None if part is None else Jsonb(msgspec.to_builtins(part, order="deterministic"))


def timer_of(row: tuple[Any, ...], *, has_fired: bool = False) -> Timer:
    """The timer in a row selected by SELECT; `has_fired` says that it is behind its shard's watermark."""
    *_, state, target_kind, recurrence, asked, retry, run_id, timeline, version, step, trace = row
    return Timer(
        # One by one: from a dictionary it costs twice as much, and a herd comes through here.
        id=row[0],
        shard=row[1],
        fire_at=row[2],
        due_at=row[3],
        tenant=row[4],
        entity=row[5],
        type=row[6],
        target=row[7],
        sequence=row[8],
        schedule_id=row[9],
        occurrence=row[10],
        nominal_at=row[11],
        condition=row[12],
        expires_at=row[13],
        report_within=row[14],
        asks=row[15],
        holds=row[16],
        attempts=row[17],
        first_attempt_at=row[18],
        last_error=row[19],
        decided_at=row[20],
        note=row[21],
        state=State.FIRED if has_fired else _STATES[state],
        target_kind=_TARGET_KINDS[target_kind],
        recurrence=None if recurrence is None else msgspec.convert(recurrence, Recurrence),
        asked=None if asked is None else msgspec.convert(asked, ServiceCondition),
        retry=None if retry is None else msgspec.convert(retry, RetryPolicy),
        step_of=None if run_id is None else StepOf(run_id=run_id, timeline=timeline, version=version, step=step),
        trace=trace or NOWHERE,
    )


_STATES = {int(state): state for state in State}
_TARGET_KINDS = {int(kind): kind for kind in TargetKind}
