"""Fired timers as CloudEvents 1.0, in structured mode: the message is the whole event, in the JSON format.

Structured, because that is the mode of the released NATS protocol binding (1.0.2), and every SDK reads it; binary mode
is in the working draft only, and SDKs still disagree about it on the encoding of headers.

https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/nats-protocol-binding.md
"""

from datetime import UTC, datetime
from typing import Any

import orjson
from carillon.scheduler.v1 import timer_pb2

from libs.ids import derived_id
from libs.trace_points import NOWHERE, Point, carrier_at
from services.scheduler.events import STREAM, OutgoingEvent, subject_of
from services.scheduler.timer import Timer

SOURCE = "/carillon/scheduler"
"""CloudEvents `source`; ids are unique without it."""

_HEADERS = {
    "Content-Type": "application/cloudevents+json",
    # Or a foreign stream with an overlapping subject would acknowledge what no consumer of ours ever sees.
    "Nats-Expected-Stream": STREAM,
}


def encode_event(
    timer: Timer, event: timer_pb2.EventContent, *, attempt: int, deadline: datetime | None, trace: Point = NOWHERE
) -> OutgoingEvent:
    """The event of one attempt, from 1. `deadline`: when its report must have come; None when none is expected.

    The payload goes out as it came in (intake has checked that it is a JSON object), so that no number changes its
    digits. The trace of its firing goes with it as the extension Distributed Tracing.
    """
    event_id = derived_id("event", timer.id, attempt)
    attributes: dict[str, Any] = {
        "specversion": "1.0",
        "id": str(event_id),
        "source": SOURCE,
        "type": event.type,
        "subject": timer.entity,
        "time": _rfc3339(timer.due_at),
        "datacontenttype": "application/json",
        "carillontenant": timer.tenant,
        "carillontimerid": str(timer.id),
        "carillonscheduleid": str(timer.schedule_id),
        "carillonattempt": attempt,
    }
    if timer.type:
        attributes["carillontimertype"] = timer.type
    if deadline is not None:
        attributes["carillondeadline"] = _rfc3339(deadline)
    if timer.step_of is not None:
        attributes |= {"carillontimeline": timer.step_of.timeline, "carillonstep": timer.step_of.step}
    attributes |= carrier_at(trace)
    attributes["data"] = orjson.Fragment(event.payload or "{}")
    return OutgoingEvent(
        id=event_id,
        tenant=timer.tenant,
        subject=subject_of(timer.tenant, event.type),
        payload=orjson.dumps(attributes),
        headers=dict(_HEADERS),
    )


def _rfc3339(at: datetime) -> str:
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")
