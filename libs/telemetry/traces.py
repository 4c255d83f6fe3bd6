"""Traces: one trace follows a command through gRPC, outbox rows, NATS and receivers (W3C Trace Context).

What happens at once because of a call belongs to the call's trace, from the server's span to the attempt to deliver.
What waits first (timers, windows, retries) begins a trace of its own, with links to those that caused it: a trace that
is open for a month can be looked at by nobody. Between the two lies a `Point` (libs.trace_points), kept in the row that
waits, or in the entry that travels.

Only what a sampled trace has caused is traced: who calls decides (`trace_ratio` for callers that say nothing), and the
decision holds for everything that follows, so stories are whole or absent. Loops that nobody has asked to run make no
spans.

Without an OTLP endpoint in the settings no spans are made, but a caller's trace context still travels.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from uuid import UUID

import grpc
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN, Link, NonRecordingSpan, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from libs.errors import CarillonError
from libs.trace_points import NOWHERE, Point, ids_of, point_at

log = logging.getLogger(__name__)

MOST_LINKS = 32
"""Links of one span, and traces that one transaction is seen in; what is beyond is counted in LEFT_OUT."""

LEFT_OUT = "carillon.links_left_out"

_PROPAGATOR = TraceContextTextMapPropagator()
_MAX_TRACESTATE = 512
_SAMPLED = trace.TraceFlags(trace.TraceFlags.SAMPLED)
_NO_SPAN = nullcontext(INVALID_SPAN)
_PROBES = "grpc."
"""Health and reflection: asked all day long by nobody who wants to know."""
_SERVER_ERRORS = (
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
)

Attributes = Mapping[str, str | int | bool]


def is_on() -> bool:
    """Whether spans are made in this process. Not to be asked for each call: it looks at the environment each time."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


# Contexts and points


def inject() -> dict[str, str]:
    """The current trace context as a carrier, for headers; empty when there is none."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    if len(carrier.get("tracestate", "")) > _MAX_TRACESTATE:
        del carrier["tracestate"]
    return carrier


def carried() -> dict[str, str]:
    """The same for frames, which many calls share: of a context that is not sampled nobody wants to hear again."""
    return inject() if trace.get_current_span().get_span_context().trace_flags.sampled else {}


def extract(carrier: Mapping[str, str]) -> otel_context.Context:
    """The trace context in a carrier; an empty one when it holds none, or nonsense."""
    return _PROPAGATOR.extract(dict(carrier), context=otel_context.Context())


def here() -> Point:
    """The current span's point; NOWHERE when it is not sampled, or there is none."""
    return point_in(trace.get_current_span())


def point_in(span: Span) -> Point:
    """A span's point."""
    context = span.get_span_context()
    return point_at(context.trace_id, context.span_id) if context.trace_flags.sampled else NOWHERE


def _span_context(point: Point) -> trace.SpanContext:
    trace_id, span_id = ids_of(point)
    return trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=_SAMPLED)


def _context_at(point: Point) -> otel_context.Context:
    return trace.set_span_in_context(NonRecordingSpan(_span_context(point)), otel_context.Context())


# Spans


@contextmanager
def span(name: str, *, carrier: Mapping[str, str] | None = None, kind: SpanKind = SpanKind.INTERNAL) -> Iterator[Span]:
    """A span around a block: a child of the carrier's where one is given, else of the current one."""
    parent = None if carrier is None else extract(carrier)
    with doing(trace.get_tracer("carillon").start_span(name, context=parent, kind=kind)) as current:
        yield current


def begin(
    name: str,
    *,
    parent: Point = NOWHERE,
    causes: Iterable[Point] = (),
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Attributes | None = None,
) -> Span:
    """A span that somebody ends, with `doing` or by hand: in the parent's trace, or without one in a new trace.

    It links to `causes`, each once, at most MOST_LINKS. INVALID_SPAN, which costs nothing, when spans are not made
    here or there is neither parent nor cause.
    """
    distinct = [cause for cause in dict.fromkeys(causes) if cause]
    if not (parent or distinct) or not is_on():
        return INVALID_SPAN
    begun = trace.get_tracer("carillon").start_span(
        name,
        context=_context_at(parent) if parent else otel_context.Context(),
        kind=kind,
        attributes=attributes,
        links=[Link(_span_context(cause)) for cause in distinct[:MOST_LINKS]],
    )
    if len(distinct) > MOST_LINKS:
        begun.set_attribute(LEFT_OUT, len(distinct) - MOST_LINKS)
    return begun


def doing(begun: Span) -> AbstractContextManager[Span]:
    """Have a span be the current one during a block and end with it; what the block raises is its error."""
    return _doing(begun) if begun is not INVALID_SPAN else _NO_SPAN


@contextmanager
def _doing(begun: Span) -> Iterator[Span]:
    with trace.use_span(begun, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield begun
        except Exception as error:
            fail(begun, error)
            raise


def fail(begun: Span, error: Exception) -> None:
    """Mark a span as failed. Messages of errors stay out of it: they may quote what callers sent."""
    kind = error.reason if isinstance(error, CarillonError) else type(error).__name__
    begun.set_attribute("error.type", kind)
    begun.set_status(Status(StatusCode.ERROR, kind))


class Spans:
    """Spans of single pieces of work, by their ids, all ended with the block; an error that ends it is theirs."""

    def __init__(self) -> None:
        self._spans: dict[UUID, Span] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for begun in self._spans.values():
            if isinstance(error, Exception):
                fail(begun, error)
            begun.end()


@dataclass(frozen=True, slots=True)
class Work:
    """What is done for several traces at once. `points`: for each, where in this work it goes on."""

    spans: list[Span] = field(default_factory=list)
    points: Mapping[Point, Point] = field(default_factory=dict)

    def fail(self, error: Exception) -> None:
        """It has failed, for all of them."""
        for one in self.spans:
            fail(one, error)


_UNSEEN = Work()


@contextmanager
def working(
    name: str, points: Iterable[Point], *, kind: SpanKind = SpanKind.CONSUMER, attributes: Attributes | None = None
) -> Iterator[Work]:
    """One span for each trace in which a block of work is done, at most MOST_LINKS; `points` is one for each piece.

    Where all pieces have the same one, its span is the current one: otherwise a log line would name somebody else's.
    """
    distinct = dict.fromkeys(points)
    traced = [point for point in distinct if point]
    if not traced:
        yield _UNSEEN
        return
    if not is_on():
        with _passing_on(traced[0]) if len(distinct) == 1 else nullcontext():
            yield _UNSEEN
        return
    seen = traced[:MOST_LINKS]
    given = {**(attributes or {}), **({LEFT_OUT: len(traced) - len(seen)} if len(traced) > len(seen) else {})}
    spans = [begin(name, parent=point, kind=kind, attributes=given) for point in seen]
    work = Work(spans, {point: point_in(one) for point, one in zip(seen, spans, strict=True)})
    try:
        with trace.use_span(spans[0], end_on_exit=False) if len(distinct) == 1 else nullcontext():
            yield work
    finally:
        for one in spans:
            one.end()


def _passing_on(point: Point) -> AbstractContextManager[Span]:
    return trace.use_span(NonRecordingSpan(_span_context(point)), end_on_exit=False)


# gRPC


def server_span(
    service: str, method: str, carrier: Mapping[str, str], *, is_traced: bool
) -> AbstractContextManager[Span]:
    """The span of one incoming call, named as OpenTelemetry's conventions for RPC say; `is_traced` is what is_on says.

    Where no traces are made, and the caller has none to be passed on, it costs nothing: a tenth of a short call else.
    """
    is_unseen = service.startswith(_PROBES) or not (carrier or is_traced)
    return _NO_SPAN if is_unseen else _server_span(service, method, carrier)


@contextmanager
def _server_span(service: str, method: str, carrier: Mapping[str, str]) -> Iterator[Span]:
    with span(f"{service}/{method}", carrier=carrier, kind=SpanKind.SERVER) as current:
        current.set_attribute("rpc.system", "grpc")
        current.set_attribute("rpc.service", service)
        current.set_attribute("rpc.method", method)
        log.debug("A call has come.", extra={"method": f"{service}/{method}"})
        yield current


def note_status(current: Span, code: grpc.StatusCode) -> None:
    """How the call ended. It is an error where the server is at fault, as OpenTelemetry's conventions list."""
    if current is INVALID_SPAN:
        return
    current.set_attribute("rpc.grpc.status_code", code.value[0])
    if code in _SERVER_ERRORS:
        current.set_status(Status(StatusCode.ERROR, code.name))
