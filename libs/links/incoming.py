"""Frames as they come in, and the traces they are part of."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol, Self
from uuid import UUID

from carillon.link.v1 import link_pb2

from libs.links.frames import TRACES_HEADER, destination_of, parse_frame
from libs.telemetry import traces
from libs.trace_points import NOWHERE, Point, is_point, point_of


class Message(Protocol):
    """What a receiver needs of a JetStream message."""

    @property
    def data(self) -> bytes: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def num_delivered(self) -> int: ...
    async def ack(self) -> None: ...
    async def nak(self, delay: timedelta) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class IncomingFrame:
    """A frame as it came, with the message that carried it.

    `trace` is what its headers say caused it; `has_traces`: its entries have some of their own. `points` says for each
    of these where it goes on in the work of applying the frame.
    """

    id: UUID
    frame: link_pb2.Frame
    message: Message
    trace: Point = NOWHERE
    has_traces: bool = False
    points: Mapping[Point, Point] = field(default_factory=dict)

    @classmethod
    def of(cls, message: Message, *, receiver: str) -> Self:
        """The frame in a message; raises BadFrame when there is none, or it is for somebody else."""
        frame_id, frame = parse_frame(message.data, receiver=receiver)
        headers = message.headers
        trace, has_traces = point_of(headers), TRACES_HEADER in headers
        return cls(id=frame_id, frame=frame, message=message, trace=trace, has_traces=has_traces)

    @property
    def headers(self) -> Mapping[str, str]:
        """Trace context and reply subject."""
        return self.message.headers

    @property
    def is_traced(self) -> bool:
        """Whether `trace_of` can say anything: where not, many entries need not be asked about one by one."""
        return self.has_traces or bool(self.trace)

    def trace_of(self, entry: link_pb2.Entry) -> Point:
        """What caused an entry: the work of applying it where that has a span, else what its sender says."""
        point = entry.trace if is_point(entry.trace) else self.trace
        return self.points.get(point, point)


def processing(service: str, frames: Sequence[IncomingFrame]) -> AbstractContextManager[traces.Work]:
    """The spans of applying frames together, named as OpenTelemetry's conventions for messaging say."""
    is_on = traces.is_on()
    attributes: traces.Attributes = {}
    if is_on:
        attributes = {
            "messaging.system": "nats",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": destination_of(service),
            "messaging.batch.message_count": len(frames),
            "carillon.entries": sum(len(one.frame.entries) for one in frames),
        }
    points = (point for one in frames for point in _points(one, is_on=is_on))
    return traces.working(f"process {destination_of(service)}", points, attributes=attributes)


def _points(one: IncomingFrame, *, is_on: bool) -> Iterable[Point]:
    if one.has_traces and is_on:
        return {one.trace_of(entry) for entry in one.frame.entries}
    return (one.trace,)
