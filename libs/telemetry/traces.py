"""Traces: one trace follows a command through gRPC, outbox rows and NATS headers (W3C Trace Context).

Without an OTLP endpoint in the settings no spans are recorded, but a caller's trace context still travels: `extract`
and `inject` carry it on. A carrier is a plain dict of at most two short strings, `traceparent` and `tracestate`.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Self

import grpc
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import INVALID_SPAN, Link, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from libs.errors import CarillonError
from libs.settings import TelemetrySettings

_PROPAGATOR = TraceContextTextMapPropagator()
_MAX_TRACESTATE = 512
_NO_SPAN = nullcontext(INVALID_SPAN)
_SERVER_ERRORS = (
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
)


class Traces:
    """The process's trace exporter, for as long as the block lasts: `async with Traces(settings, service=…):`."""

    def __init__(self, settings: TelemetrySettings, *, service: str, version: str = "") -> None:
        self._settings = settings
        self._resource = Resource.create({"service.name": f"carillon-{service}", "service.version": version})
        self._provider: TracerProvider | None = None

    async def __aenter__(self) -> Self:
        if self._settings.otlp_endpoint is not None:
            self._provider = provider_of(self._settings, self._resource, _exporting_to(self._settings.otlp_endpoint))
            trace.set_tracer_provider(self._provider)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._provider is not None:
            self._provider.shutdown()


def provider_of(settings: TelemetrySettings, resource: Resource, processor: SpanProcessor) -> TracerProvider:
    """A provider that samples as the settings say; a caller's own decision wins over the ratio."""
    provider = TracerProvider(
        resource=resource, sampler=ParentBased(TraceIdRatioBased(settings.trace_ratio)), shutdown_on_exit=False
    )
    provider.add_span_processor(processor)
    return provider


def inject() -> dict[str, str]:
    """The current trace context as a carrier, for an outbox row or headers; empty when there is none."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    if len(carrier.get("tracestate", "")) > _MAX_TRACESTATE:
        del carrier["tracestate"]
    return carrier


def extract(carrier: Mapping[str, str]) -> otel_context.Context:
    """The trace context in a carrier; an empty one when it holds none, or nonsense."""
    return _PROPAGATOR.extract(dict(carrier), context=otel_context.Context())


@contextmanager
def span(name: str, *, carrier: Mapping[str, str] | None = None, kind: SpanKind = SpanKind.INTERNAL) -> Iterator[Span]:
    """A span around a block: a child of the carrier's where one is given, else of the current one."""
    parent = None if carrier is None else extract(carrier)
    tracer = trace.get_tracer("carillon")
    with tracer.start_as_current_span(
        name, context=parent, kind=kind, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield current
        except CarillonError as error:
            current.set_status(Status(StatusCode.ERROR, error.reason))
            raise
        except Exception as error:
            current.record_exception(error)
            current.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise


def server_span(service: str, method: str, carrier: Mapping[str, str]) -> AbstractContextManager[Span]:
    """The span of one incoming call, named as OpenTelemetry's conventions for RPC say.

    Where no traces are made, and the caller has none to be passed on, it costs nothing: a tenth of a short call else.
    """
    is_off = isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
    return _NO_SPAN if is_off and not carrier else _server_span(service, method, carrier)


@contextmanager
def _server_span(service: str, method: str, carrier: Mapping[str, str]) -> Iterator[Span]:
    with span(f"{service}/{method}", carrier=carrier, kind=SpanKind.SERVER) as current:
        current.set_attribute("rpc.system", "grpc")
        current.set_attribute("rpc.service", service)
        current.set_attribute("rpc.method", method)
        yield current


@contextmanager
def consumer_span(name: str, carriers: Iterable[Mapping[str, str]]) -> Iterator[Span]:
    """The span of work on a group of messages: a child of their one trace, or linked to the several they belong to."""
    contexts = {tuple(sorted(carrier.items())): extract(carrier) for carrier in carriers if "traceparent" in carrier}
    parents = [trace.get_current_span(context).get_span_context() for context in contexts.values()]
    parent = next(iter(contexts.values())) if len(contexts) == 1 else otel_context.Context()
    links = [Link(one) for one in parents] if len(parents) > 1 else []
    with trace.get_tracer("carillon").start_as_current_span(
        name, context=parent, kind=SpanKind.CONSUMER, links=links
    ) as current:
        yield current


def note_status(current: Span, code: grpc.StatusCode) -> None:
    """How the call ended. It is an error where the server is at fault, as OpenTelemetry's conventions list."""
    current.set_attribute("rpc.grpc.status_code", code.value[0])
    if code in _SERVER_ERRORS:
        current.set_status(Status(StatusCode.ERROR, code.name))


def _exporting_to(endpoint: str) -> SpanProcessor:
    # Imported here because it loads a gRPC exporter that most processes do not need.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://")))
