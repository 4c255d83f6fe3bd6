"""Frames and events out: what fired timers tell other services."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from uuid import UUID

from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2

from libs.links.frames import Addressed
from libs.trace_points import NOWHERE, Point
from libs.wire import set_timestamp
from services.scheduler.events import OutgoingEvent
from services.scheduler.stream_events import encode_event
from services.scheduler.timer import TargetKind, Timer


def encode(
    due: Iterable[Timer], now: datetime, points: Mapping[UUID, Point]
) -> tuple[dict[UUID, Addressed | OutgoingEvent], dict[UUID, str]]:
    """What timers send if they fire at `now`, one entry or event each; and those that cannot, with the reason.

    `points`: of timers that are traced, what caused what they send.
    """
    encoded: dict[UUID, Addressed | OutgoingEvent] = {}
    broken: dict[UUID, str] = {}
    for timer in due:
        trace = points.get(timer.id, NOWHERE) if points else NOWHERE
        try:
            target = link_pb2.TimerTarget.FromString(timer.target)
            if timer.target_kind is TargetKind.EVENT:
                encoded[timer.id] = _event(timer, target.event, now, trace)
            else:
                encoded[timer.id] = _addressed(timer, target, trace)
        except Exception as err:  # noqa: BLE001 - outermost frame of a timer: its siblings must fire all the same.
            broken[timer.id] = f"cannot be sent: {type(err).__name__}: {err}"
    return encoded, broken


def _addressed(timer: Timer, target: link_pb2.TimerTarget, trace: Point) -> Addressed:
    entry = link_pb2.Entry(tenant=timer.tenant, sequence=timer.sequence)
    match timer.target_kind:
        case TargetKind.NOTIFICATION:
            _fill(entry.notification, timer, target)
            return Addressed(receiver="digest", entry=entry, trace=trace)
        case TargetKind.CLOSE_WINDOW:
            entry.close_window.window_id = target.close_window.window_id
            set_timestamp(entry.close_window.due_time, timer.due_at)
            return Addressed(receiver="digest", entry=entry, trace=trace)
        case TargetKind.REQUEST_DUE:
            entry.request_due.CopyFrom(target.request_due)
            return Addressed(receiver="intake", entry=entry, trace=trace)
        case TargetKind.RETRY_DELIVERY:
            entry.retry_delivery.CopyFrom(target.retry_delivery)
            return Addressed(receiver="dispatcher", entry=entry, trace=trace)
        case kind:
            raise ValueError(f"{kind.name} goes nowhere")


def _event(timer: Timer, event: timer_pb2.EventContent, now: datetime, trace: Point) -> OutgoingEvent:
    deadline = None if timer.report_within is None else now + timer.report_within
    return encode_event(timer, event, attempt=timer.attempts + 1, deadline=deadline, trace=trace)


def _fill(notification: link_pb2.Notification, timer: Timer, target: link_pb2.TimerTarget) -> None:
    """The notification has its timer's id: a timer fires once, so whoever makes it again makes the same."""
    notification.id = notification.timer_id = timer.id.bytes
    notification.schedule_id = timer.id.bytes if timer.schedule_id is timer.id else timer.schedule_id.bytes
    notification.content.CopyFrom(target.notification)
    notification.entity = timer.entity
    notification.timer_type = timer.type
    set_timestamp(notification.occur_time, timer.due_at)
    if timer.step_of is not None:
        notification.timeline = timer.step_of.timeline
    if timer.expires_at is not None:
        set_timestamp(notification.expire_time, timer.expires_at)
