"""Frames in and out: link entries become a shard's commands, fired timers become entries for other services."""

import json
from collections.abc import Iterable, Sequence
from uuid import UUID

from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from libs.ids import derived_id
from libs.links.frames import Addressed
from libs.links.receiver import IncomingFrame, PoisonFrame
from libs.recurrence import Fold, Gap, Rule
from libs.wire import from_timestamp, to_timestamp
from services.scheduler.commands import (
    CancelTimers,
    Command,
    Outcome,
    PutFacts,
    ScheduleTimer,
    Selection,
    StartTimeline,
)
from services.scheduler.recurrence import Recurrence
from services.scheduler.timer import TargetKind, Timer

_KINDS = {
    "notification": TargetKind.NOTIFICATION,
    "event": TargetKind.EVENT,
    "close_window": TargetKind.CLOSE_WINDOW,
    "request_due": TargetKind.REQUEST_DUE,
    "retry_delivery": TargetKind.RETRY_DELIVERY,
}


def commands_of(incoming: IncomingFrame) -> list[Command]:
    """The commands in a frame, in order. Raises PoisonFrame when one cannot be understood."""
    try:
        return [_command(incoming.id, index, entry) for index, entry in enumerate(incoming.frame.entries)]
    except PoisonFrame:
        raise
    except Exception as err:
        raise PoisonFrame(f"an entry cannot be understood: {type(err).__name__}: {err}") from err


def _command(frame_id: UUID, index: int, entry: link_pb2.Entry) -> Command:
    match entry.WhichOneof("kind"):
        case "schedule_timer":
            return _schedule_timer(frame_id, index, entry, entry.schedule_timer)
        case "cancel_timers":
            selector = entry.cancel_timers.selector
            return CancelTimers(
                frame_id=frame_id,
                index=index,
                tenant=entry.tenant,
                entity=selector.entity,
                sequence=entry.sequence,
                selection=Selection(
                    type=selector.type,
                    ids=frozenset(UUID(bytes=one) for one in selector.ids),
                    timeline=selector.timeline,
                ),
                cause=entry.cancel_timers.cause,
            )
        case "put_facts":
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
        case "start_timeline":
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
        case kind:
            raise PoisonFrame(f"entry {index} is of a kind the scheduler does not know: {kind}")


def _schedule_timer(frame_id: UUID, index: int, entry: link_pb2.Entry, timer: link_pb2.ScheduleTimer) -> ScheduleTimer:
    accepted_at = from_timestamp(timer.accept_time)
    recurrence = recurrence_of(timer.recurrence, timer.accept_time) if timer.HasField("recurrence") else None
    if recurrence is None and not timer.HasField("due_time"):
        raise PoisonFrame(f"entry {index} says neither when nor how often")
    return ScheduleTimer(
        frame_id=frame_id,
        index=index,
        tenant=entry.tenant,
        entity=timer.entity,
        sequence=entry.sequence,
        id=UUID(bytes=timer.id),
        type=timer.type,
        due_at=from_timestamp(timer.due_time) if timer.HasField("due_time") else None,
        recurrence=recurrence,
        target_kind=target_kind_of(timer.target),
        target=timer.target.SerializeToString(),
        condition=timer.condition.cel,
        expires_at=from_timestamp(timer.expire_time) if timer.HasField("expire_time") else None,
        accepted_at=accepted_at,
    )


def target_kind_of(target: link_pb2.TimerTarget) -> TargetKind:
    """Which kind of target it is; KeyError when there is none."""
    return _KINDS[target.WhichOneof("kind") or ""]


def recurrence_of(message: timer_pb2.Recurrence, accepted: Timestamp) -> Recurrence:
    """The recurrence in a message; one without a start starts when it was accepted."""
    start = message.start_time if message.HasField("start_time") else accepted
    is_skipping = message.gap_policy == timer_pb2.GAP_POLICY_SKIP
    is_twice = message.fold_policy == timer_pb2.FOLD_POLICY_BOTH
    return Recurrence(
        rule=Rule(
            cron=message.cron,
            rrule=message.rrule,
            zone=message.zone or "UTC",
            start=from_timestamp(start),
            end=from_timestamp(message.end_time) if message.HasField("end_time") else None,
            count=message.count,
            exclusions=frozenset(from_timestamp(one) for one in message.exclusions),
            gap=Gap.SKIP if is_skipping else Gap.SHIFT,
            fold=Fold.BOTH if is_twice else Fold.FIRST,
        )
    )


def encode(due: Iterable[Timer]) -> tuple[dict[UUID, Addressed], dict[UUID, str]]:
    """What timers send if they fire, one entry each; and those that cannot, with the reason."""
    encoded: dict[UUID, Addressed] = {}
    broken: dict[UUID, str] = {}
    for timer in due:
        try:
            encoded[timer.id] = _addressed(timer, link_pb2.TimerTarget.FromString(timer.target))
        except Exception as err:  # noqa: BLE001 - outermost frame of a timer: its siblings must fire all the same.
            broken[timer.id] = f"cannot be sent: {type(err).__name__}: {err}"
    return encoded, broken


def _addressed(timer: Timer, target: link_pb2.TimerTarget) -> Addressed:
    entry = link_pb2.Entry(tenant=timer.tenant, sequence=timer.sequence)
    match timer.target_kind:
        case TargetKind.NOTIFICATION:
            entry.notification.CopyFrom(_notification(timer, target))
            return Addressed(receiver="digest", entry=entry)
        case TargetKind.CLOSE_WINDOW:
            entry.close_window.window_id = target.close_window.window_id
            entry.close_window.due_time.CopyFrom(to_timestamp(timer.due_at))
            return Addressed(receiver="digest", entry=entry)
        case TargetKind.REQUEST_DUE:
            entry.request_due.CopyFrom(target.request_due)
            return Addressed(receiver="intake", entry=entry)
        case TargetKind.RETRY_DELIVERY:
            entry.retry_delivery.CopyFrom(target.retry_delivery)
            return Addressed(receiver="dispatcher", entry=entry)
        case TargetKind.EVENT:
            raise NotImplementedError("event targets are refused by intake until the EVENTS stream exists")


def _notification(timer: Timer, target: link_pb2.TimerTarget) -> link_pb2.Notification:
    notification = link_pb2.Notification(
        id=derived_id("timer-notification", timer.id).bytes,
        content=target.notification,
        entity=timer.entity,
        occur_time=to_timestamp(timer.due_at),
        timer_id=timer.id.bytes,
        schedule_id=timer.schedule_id.bytes,
        timer_type=timer.type,
        timeline=timer.step_of.timeline if timer.step_of else "",
    )
    if timer.expires_at is not None:
        notification.expire_time.CopyFrom(to_timestamp(timer.expires_at))
    return notification


def results_of(outcomes: Sequence[Outcome]) -> dict[UUID, list[link_pb2.EntryResult]]:
    """Per frame the results worth telling: counts and refusals."""
    results: dict[UUID, list[link_pb2.EntryResult]] = {}
    for outcome in outcomes:
        if not outcome.changed and outcome.error is None:
            continue
        code, reason, message = outcome.error or (0, "", "")
        results.setdefault(outcome.frame_id, []).append(
            link_pb2.EntryResult(
                index=outcome.index,
                changed=outcome.changed,
                error_code=code,
                error_reason=reason,
                error_message=message,
            )
        )
    return results
