"""Commands on timers that exist: cancel, move, hold back, fire once more, and what came of their events.

As in rpc_items everything is decided from the request and `now` alone. Whether there are such timers only the scheduler
knows: what it says comes back with the receipts (rpc_answers).
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol
from uuid import UUID

from carillon.intake.v1 import intake_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from libs.errors import FieldViolation, Violations
from libs.ids import new_id
from libs.links.frames import Addressed
from libs.wire import to_timestamp
from services.intake import rpc_checks as checks
from services.intake.commands import Selection
from services.intake.rpc_answers import BackfillAnswer, BatchAnswer, CancelAnswer, TimersAnswer, refusal_of

MAX_IDS = 1_000
MAX_BACKFILLS = 100
MAX_CAUSE = 512
MAX_ERROR = 2_048
MAX_ATTEMPT = 100
"""No retry policy allows more."""


class Entries(Protocol):
    """See services.intake.stream_entries."""

    def cancel(self, tenant: str, selection: Selection, *, cause: str) -> list[Addressed]: ...
    def reschedule(self, tenant: str, selection: Selection, *, due_time: Timestamp) -> Addressed: ...
    def pause(self, tenant: str, selection: Selection, *, is_paused: bool) -> Addressed: ...
    def trigger_schedule(
        self, tenant: str, timer_id: UUID, *, schedule_id: UUID, entity: str, due_time: Timestamp
    ) -> Addressed: ...
    def backfill(
        self, tenant: str, schedule_id: UUID, *, entity: str, start_time: Timestamp, end_time: Timestamp
    ) -> Addressed: ...
    def outcome(
        self, tenant: str, timer_id: UUID, *, entity: str, attempt: int, is_done: bool, error: str
    ) -> Addressed: ...


def cancel(request: intake_pb2.CancelRequest, *, tenant: str, entries: Entries) -> CancelAnswer:
    """A cancel, by any selector. Raises InvalidArgument."""
    found: list[FieldViolation] = []
    checks.check_optional_text(found, "cause", request.cause, MAX_CAUSE)
    selection = _selected(found, request.selector)
    _raise_if_any(found)
    return CancelAnswer(entries.cancel(tenant, selection, cause=request.cause))


def reschedule(
    request: intake_pb2.RescheduleRequest, *, tenant: str, now: datetime, entries: Entries
) -> TimersAnswer[intake_pb2.RescheduleResponse]:
    """A new due time; `after` counts from now, not from when the scheduler hears of it. Raises InvalidArgument."""
    found: list[FieldViolation] = []
    selection = _selected(found, request.selector)
    due_time: Timestamp | None = None
    match request.WhichOneof("when"):
        case "at_time":
            due_time = request.at_time
            checks.check_instant(found, "at_time", due_time)
        case "after":
            due_time = checks.check_after(found, "after", request.after, now)
        case _:
            found.append(FieldViolation("at_time", "one of at_time and after must be given"))
    _raise_if_any(found)
    assert due_time is not None
    entry = entries.reschedule(tenant, selection, due_time=due_time)
    return TimersAnswer(intake_pb2.RescheduleResponse(), entry)


def pause(request: intake_pb2.PauseRequest, *, tenant: str, entries: Entries) -> TimersAnswer[intake_pb2.PauseResponse]:
    """Timers to be held back. Raises InvalidArgument."""
    entry = _pause(request.selector, tenant=tenant, entries=entries, is_paused=True)
    return TimersAnswer(intake_pb2.PauseResponse(), entry)


def resume(
    request: intake_pb2.ResumeRequest, *, tenant: str, entries: Entries
) -> TimersAnswer[intake_pb2.ResumeResponse]:
    """Timers to go on. Raises InvalidArgument."""
    entry = _pause(request.selector, tenant=tenant, entries=entries, is_paused=False)
    return TimersAnswer(intake_pb2.ResumeResponse(), entry)


def _pause(selector: intake_pb2.Selector, *, tenant: str, entries: Entries, is_paused: bool) -> Addressed:
    found: list[FieldViolation] = []
    selection = _selected(found, selector)
    _raise_if_any(found)
    return entries.pause(tenant, selection, is_paused=is_paused)


def trigger_schedule(
    request: intake_pb2.TriggerScheduleRequest, *, tenant: str, now: datetime, entries: Entries
) -> BatchAnswer[intake_pb2.TriggerScheduleResponse]:
    """Schedules to fire now; each firing is a new timer."""
    answer = BatchAnswer(intake_pb2.TriggerScheduleResponse(), "triggers")
    due_time = to_timestamp(now)
    for item in request.triggers:
        found: list[FieldViolation] = []
        schedule_id = checks.check_id(found, "schedule_id", item.schedule_id)
        checks.check_entity(found, "entity", item.entity)
        if found or schedule_id is None:
            answer.refuse(refusal_of(found))
            continue
        timer_id = new_id()
        entry = entries.trigger_schedule(
            tenant, timer_id, schedule_id=schedule_id, entity=item.entity, due_time=due_time
        )
        answer.accept(str(timer_id), (entry,))
    return answer


def backfill(
    request: intake_pb2.BackfillScheduleRequest, *, tenant: str, now: datetime, entries: Entries
) -> BackfillAnswer:
    """Ranges to make up for. How many occurrences are in one only the scheduler can count: it knows the rule."""
    answer = BackfillAnswer(intake_pb2.BackfillScheduleResponse(), "backfills")
    now_us = checks.microseconds_of(now)
    for item in request.backfills:
        found: list[FieldViolation] = []
        schedule_id = checks.check_id(found, "schedule_id", item.schedule_id)
        checks.check_entity(found, "entity", item.entity)
        _check_range(found, item, now_us)
        if found or schedule_id is None:
            answer.refuse(refusal_of(found))
            continue
        entry = entries.backfill(
            tenant, schedule_id, entity=item.entity, start_time=item.start_time, end_time=item.end_time
        )
        answer.accept("", (entry,))
    return answer


def _check_range(found: checks.Found, item: intake_pb2.ScheduleBackfill, now_us: int) -> None:
    start_us = end_us = -1
    if item.HasField("start_time"):
        start_us = checks.check_instant(found, "start_time", item.start_time)
    else:
        found.append(FieldViolation("start_time", "must be given"))
    if item.HasField("end_time"):
        end_us = checks.check_instant(found, "end_time", item.end_time, most_us=now_us)
    else:
        found.append(FieldViolation("end_time", "must be given"))
    if start_us >= end_us >= 0:
        found.append(FieldViolation("start_time", "must be before end_time"))


def report_outcome(
    request: intake_pb2.ReportOutcomeRequest, *, tenant: str, entries: Entries
) -> BatchAnswer[intake_pb2.ReportOutcomeResponse]:
    """What business services report."""
    answer = BatchAnswer(intake_pb2.ReportOutcomeResponse(), "outcomes")
    for item in request.outcomes:
        found: list[FieldViolation] = []
        timer_id = checks.check_id(found, "timer_id", item.timer_id)
        checks.check_entity(found, "entity", item.entity)
        checks.check_optional_text(found, "error", item.error, MAX_ERROR)
        if not 1 <= item.attempt <= MAX_ATTEMPT:
            what = f"must be the event's carillonattempt, 1-{MAX_ATTEMPT}, got {item.attempt:,}"
            found.append(FieldViolation("attempt", what))
        if found or timer_id is None:
            answer.refuse(refusal_of(found))
            continue
        entry = entries.outcome(
            tenant, timer_id, entity=item.entity, attempt=item.attempt, is_done=item.is_done, error=item.error
        )
        answer.accept("", (entry,))
    return answer


def _selected(found: checks.Found, selector: intake_pb2.Selector) -> Selection:
    match selector.WhichOneof("by"):
        case "ids":
            entity = selector.ids.entity
            checks.check_entity(found, "selector.ids.entity", entity)
            return Selection(entity=entity, ids=_checked_ids(found, selector.ids.ids))
        case "entity":
            entity, kind = selector.entity.entity, selector.entity.type
            checks.check_entity(found, "selector.entity.entity", entity)
            checks.check_timer_type(found, "selector.entity.type", kind)
            return Selection(entity=entity, type=kind)
        case "timeline":
            entity, timeline = selector.timeline.entity, selector.timeline.timeline
            checks.check_entity(found, "selector.timeline.entity", entity)
            checks.check_timeline_name(found, "selector.timeline.timeline", timeline)
            return Selection(entity=entity, timeline=timeline)
        case _:
            found.append(FieldViolation("selector", "must have one of ids, entity and timeline"))
            return Selection(entity="")


def _checked_ids(found: checks.Found, texts: Sequence[str]) -> tuple[UUID, ...]:
    if not 1 <= len(texts) <= MAX_IDS:
        found.append(FieldViolation("selector.ids.ids", f"must have 1-{MAX_IDS:,} entries, got {len(texts):,}"))
        return ()
    ids = (checks.check_id(found, f"selector.ids.ids[{index}]", text) for index, text in enumerate(texts))
    return tuple(one for one in ids if one is not None)


def _raise_if_any(found: checks.Found) -> None:
    violations = Violations()
    violations.extend(found)
    violations.raise_if_any()
