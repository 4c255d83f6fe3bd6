"""A collector of traces: takes OTLP over gRPC, as the real ones do, and keeps every span."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from local.processes import free_port

HOST = "127.0.0.1"
_ERROR = trace_pb2.Status.STATUS_CODE_ERROR


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A span as it came. `links` and its own place are points: trace id and span id; `text` is all of it, to search."""

    service: str
    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    links: tuple[tuple[str, str], ...]
    attributes: Mapping[str, Any]
    is_error: bool
    text: str

    @property
    def point(self) -> tuple[str, str]:
        """Where others lead to."""
        return self.trace_id, self.span_id


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Listens while the block lasts, and again after `start`, on the same port."""

    def __init__(self) -> None:
        self.port = free_port(HOST)
        self.seen: dict[tuple[str, str], Seen] = {}
        self.resources: dict[str, set[tuple[tuple[str, str], ...]]] = {}
        self._server: Any = None

    @property
    def endpoint(self) -> str:
        """For the setting."""
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Take spans."""
        self._server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
        add(self, self._server)
        self._server.add_insecure_port(f"{HOST}:{self.port}")
        self._server.start()

    def stop(self) -> None:
        """Be away."""
        if self._server is not None:
            self._server.stop(None).wait()
        self._server = None

    def Export(self, request: Any, context: Any) -> Any:
        """The one method of the protocol."""
        for group in request.resource_spans:
            resource = {one.key: one.value.string_value for one in group.resource.attributes}
            service = resource["service.name"]
            self.resources.setdefault(service, set()).add(tuple(sorted(resource.items())))
            for scope in group.scope_spans:
                for span in scope.spans:
                    one = _seen(service, span)
                    self.seen[one.point] = one
        return trace_service_pb2.ExportTraceServiceResponse()

    def all(self) -> list[Seen]:
        """Every span so far; safe while more come."""
        return list(self.seen.values())

    def trace(self, trace_id: str) -> list[Seen]:
        """The spans of a trace so far."""
        return [one for one in self.all() if one.trace_id == trace_id]

    def broken(self, strangers: Iterable[tuple[str, str]]) -> list[str]:
        """Parents and links that lead to no span that has come, other than to these of callers."""
        known = {*self.seen, *strangers}
        return [
            f"{one.service} {one.name}: {what} {point}"
            for one in self.all()
            for what, point in (
                *([("parent", (one.trace_id, one.parent_id))] if one.parent_id else []),
                *(("link", link) for link in one.links),
            )
            if point not in known
        ]


def _seen(service: str, span: trace_pb2.Span) -> Seen:
    return Seen(
        service=service,
        name=span.name,
        kind=span.kind,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        attributes={one.key: _value(one.value) for one in span.attributes},
        is_error=span.status.code == _ERROR,
        text=str(span),
    )


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))
