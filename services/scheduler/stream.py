"""Frames in: link entries become a shard's commands, and its outcomes the results of entries."""

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from uuid import UUID

from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2
from google.protobuf.timestamp_pb2 import Timestamp
from msgspec.structs import replace

from libs.links.receiver import IncomingFrame, PoisonFrame
from libs.recurrence import Fold, Gap, Rule, whole_second
from libs.wire import from_duration, from_timestamp
from services.scheduler.attempts import RetryPolicy
from services.scheduler.commands import (
    BackfillSchedule,
    Command,
    OrderTimers,
    Outcome,
    PutFacts,
    ReportOutcome,
    ScheduleTimer,
    StartTimeline,
    TriggerSchedule,
)
from services.scheduler.conditions import NoAnswer, ServiceCondition
from services.scheduler.orders import Action, Order, Selection
from services.scheduler.recurrence import CATCH_UP, Misfire, Overlap, Recurrence
from services.scheduler.timer import TargetKind

_KINDS = {
    "notification": TargetKind.NOTIFICATION,
    "event": TargetKind.EVENT,
    "close_window": TargetKind.CLOSE_WINDOW,
    "request_due": TargetKind.REQUEST_DUE,
    "retry_delivery": TargetKind.RETRY_DELIVERY,
}
_ASK_TIMEOUT = timedelta(seconds=5)


def commands_of(incoming: IncomingFrame) -> list[Command]:
    """The commands in a frame, in order. Raises PoisonFrame when one cannot be understood."""
    try:
        commands = [_command(incoming.id, index, entry) for index, entry in enumerate(incoming.frame.entries)]
    except PoisonFrame:
        raise
    except Exception as err:
        raise PoisonFrame(f"an entry cannot be understood: {type(err).__name__}: {err}") from err
    if not incoming.is_traced:
        return commands
    entries = incoming.frame.entries
    return [replace(one, trace=incoming.trace_of(entry)) for one, entry in zip(commands, entries, strict=True)]


def _command(frame_id: UUID, index: int, entry: link_pb2.Entry) -> Command:
    kind = entry.WhichOneof("kind") or ""
    if kind not in _COMMANDS:
        raise PoisonFrame(f"entry {index} is of a kind the scheduler does not know: {kind or 'none'}")
    return _COMMANDS[kind](frame_id, index, entry)


def _schedule_timer(frame_id: UUID, index: int, entry: link_pb2.Entry) -> ScheduleTimer:
    timer = entry.schedule_timer
    recurrence = recurrence_of(timer.recurrence, timer.accept_time) if timer.HasField("recurrence") else None
    if recurrence is None and not timer.HasField("due_time"):
        raise PoisonFrame(f"entry {index} says neither when nor how often")
    target = timer.target
    kind = target_kind_of(target)
    # Tens of thousands a second come by here: what most of them have not is not even looked at.
    condition = timer.condition if timer.HasField("condition") else None
    return ScheduleTimer(
        frame_id=frame_id,
        index=index,
        tenant=entry.tenant,
        entity=timer.entity,
        sequence=entry.sequence,
        id=UUID(bytes=timer.id),
        type=timer.type,
        due_at=from_timestamp(timer.due_time) if recurrence is None else None,
        recurrence=recurrence,
        target_kind=kind,
        target=target.SerializeToString(),
        condition=condition.cel if condition is not None else "",
        asked=asked_of(condition) if condition is not None else None,
        expires_at=from_timestamp(timer.expire_time) if timer.HasField("expire_time") else None,
        report_within=report_within_of(target.event) if kind is TargetKind.EVENT else None,
        retry=retry_of(timer.retry_policy) if timer.HasField("retry_policy") else None,
        accepted_at=None if recurrence is None else from_timestamp(timer.accept_time),
    )


def _cancel_timers(frame_id: UUID, index: int, entry: link_pb2.Entry) -> OrderTimers:
    cancel = entry.cancel_timers
    order = Order(action=Action.CANCEL, selection=_selection_of(cancel.selector), cause=cancel.cause)
    return _order(frame_id, index, entry, cancel.selector, order)


def _reschedule_timers(frame_id: UUID, index: int, entry: link_pb2.Entry) -> OrderTimers:
    selector, due_at = entry.reschedule_timers.selector, from_timestamp(entry.reschedule_timers.due_time)
    order = Order(action=Action.RESCHEDULE, selection=_selection_of(selector), due_at=due_at)
    return _order(frame_id, index, entry, selector, order)


def _pause_timers(frame_id: UUID, index: int, entry: link_pb2.Entry) -> OrderTimers:
    selector = entry.pause_timers.selector
    action = Action.PAUSE if entry.pause_timers.is_paused else Action.RESUME
    return _order(frame_id, index, entry, selector, Order(action=action, selection=_selection_of(selector)))


def _order(
    frame_id: UUID, index: int, entry: link_pb2.Entry, selector: link_pb2.TimerSelector, order: Order
) -> OrderTimers:
    return OrderTimers(
        frame_id=frame_id,
        index=index,
        tenant=entry.tenant,
        entity=selector.entity,
        sequence=entry.sequence,
        order=order,
    )


def _selection_of(selector: link_pb2.TimerSelector) -> Selection:
    ids = frozenset(UUID(bytes=one) for one in selector.ids)
    return Selection(type=selector.type, ids=ids, timeline=selector.timeline)


def _put_facts(frame_id: UUID, index: int, entry: link_pb2.Entry) -> PutFacts:
    patch = json.loads(entry.put_facts.facts)
    if not isinstance(patch, dict):
        raise ValueError("facts are not a JSON object")
    return PutFacts(
        frame_id=frame_id,
        index=index,
        tenant=entry.tenant,
        entity=entry.put_facts.entity,
        sequence=entry.sequence,
        patch=patch,
    )


def _start_timeline(frame_id: UUID, index: int, entry: link_pb2.Entry) -> StartTimeline:
    start = entry.start_timeline
    return StartTimeline(
        frame_id=frame_id,
        index=index,
        tenant=entry.tenant,
        entity=start.entity,
        sequence=entry.sequence,
        run_id=UUID(bytes=start.id),
        timeline=start.timeline,
        anchor_at=from_timestamp(start.anchor_time),
    )


def _trigger_schedule(frame_id: UUID, index: int, entry: link_pb2.Entry) -> TriggerSchedule:
    trigger = entry.trigger_schedule
    return TriggerSchedule(
        frame_id=frame_id,
        index=index,
        tenant=entry.tenant,
        entity=trigger.entity,
        sequence=entry.sequence,
        id=UUID(bytes=trigger.id),
        schedule_id=UUID(bytes=trigger.schedule_id),
        due_at=from_timestamp(trigger.due_time),
    )


def _backfill_schedule(frame_id: UUID, index: int, entry: link_pb2.Entry) -> BackfillSchedule:
    backfill = entry.backfill_schedule
    return BackfillSchedule(
        frame_id=frame_id,
        index=index,
        tenant=entry.tenant,
        entity=backfill.entity,
        sequence=entry.sequence,
        schedule_id=UUID(bytes=backfill.schedule_id),
        start=from_timestamp(backfill.start_time),
        end=from_timestamp(backfill.end_time),
    )


def _report_outcome(frame_id: UUID, index: int, entry: link_pb2.Entry) -> ReportOutcome:
    report = entry.report_outcome
    return ReportOutcome(
        frame_id=frame_id,
        index=index,
        tenant=entry.tenant,
        entity=report.entity,
        sequence=entry.sequence,
        timer_id=UUID(bytes=report.timer_id),
        attempt=report.attempt,
        is_done=report.is_done,
        error=report.error,
    )


_COMMANDS: dict[str, Callable[[UUID, int, link_pb2.Entry], Command]] = {
    "schedule_timer": _schedule_timer,
    "cancel_timers": _cancel_timers,
    "reschedule_timers": _reschedule_timers,
    "pause_timers": _pause_timers,
    "put_facts": _put_facts,
    "start_timeline": _start_timeline,
    "trigger_schedule": _trigger_schedule,
    "backfill_schedule": _backfill_schedule,
    "report_outcome": _report_outcome,
}


def target_kind_of(target: link_pb2.TimerTarget) -> TargetKind:
    """Which kind of target it is; KeyError when there is none."""
    return _KINDS[target.WhichOneof("kind") or ""]


def asked_of(condition: timer_pb2.Condition) -> ServiceCondition | None:
    """The service that decides, if one does."""
    if not condition.HasField("service"):
        return None
    service = condition.service
    return ServiceCondition(
        service=service.service,
        timeout=from_duration(service.timeout) if service.HasField("timeout") else _ASK_TIMEOUT,
        no_answer=NoAnswer(service.no_answer_policy or NoAnswer.FAIL),
    )


def report_within_of(event: timer_pb2.EventContent) -> timedelta | None:
    """How long a report may take; None: none is expected. An event that is not set expects none."""
    return (from_duration(event.report_within) or None) if event.HasField("report_within") else None


def retry_of(policy: timer_pb2.RetryPolicy) -> RetryPolicy:
    """The retry policy in a message, with the defaults of what it leaves out."""
    default = RetryPolicy()
    return RetryPolicy(
        initial=from_duration(policy.initial_delay) if policy.HasField("initial_delay") else default.initial,
        longest=from_duration(policy.maximum_delay) if policy.HasField("maximum_delay") else default.longest,
        multiplier=policy.multiplier or default.multiplier,
        most_attempts=policy.maximum_attempts or default.most_attempts,
        most_age=from_duration(policy.maximum_age) if policy.HasField("maximum_age") else default.most_age,
    )


def recurrence_of(message: timer_pb2.Recurrence, accepted: Timestamp) -> Recurrence:
    """The recurrence in a message; one without a start starts when it was accepted."""
    has_start = message.HasField("start_time")
    is_skipping = message.gap_policy == timer_pb2.GAP_POLICY_SKIP
    is_twice = message.fold_policy == timer_pb2.FOLD_POLICY_BOTH
    return Recurrence(
        rule=Rule(
            cron=message.cron,
            rrule=message.rrule,
            zone=message.zone or "UTC",
            start=whole_second(from_timestamp(message.start_time)) if has_start else from_timestamp(accepted),
            end=from_timestamp(message.end_time) if message.HasField("end_time") else None,
            count=message.count,
            exclusions=frozenset(from_timestamp(one) for one in message.exclusions),
            gap=Gap.SKIP if is_skipping else Gap.SHIFT,
            fold=Fold.BOTH if is_twice else Fold.FIRST,
        ),
        jitter=from_duration(message.jitter),
        misfire=Misfire(message.misfire_policy or Misfire.FIRE_ONCE),
        catch_up=from_duration(message.catch_up_window) or CATCH_UP,
        overlap=Overlap(message.overlap_policy or Overlap.ALLOW),
    )


def results_of(outcomes: Sequence[Outcome]) -> dict[UUID, list[link_pb2.EntryResult]]:
    """Per frame the results worth telling: counts and refusals."""
    results: dict[UUID, list[link_pb2.EntryResult]] = {}
    for outcome in outcomes:
        if not outcome.is_news:
            continue
        code, reason, message = outcome.error or (0, "", "")
        results.setdefault(outcome.frame_id, []).append(
            link_pb2.EntryResult(
                index=outcome.index,
                changed=outcome.changed,
                already_left=outcome.already_left,
                error_code=code,
                error_reason=reason,
                error_message=message,
            )
        )
    return results
