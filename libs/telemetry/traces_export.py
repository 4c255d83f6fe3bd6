"""Where spans go: in batches to an OTLP collector over gRPC, from a thread of its own, which nothing waits for.

A collector that is away costs nothing but its spans: they wait in a queue of bounded length (OTEL_BSP_*), and what does
not fit is dropped. The log says so once when it begins, and once when it is over.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Self

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.util.types import Attributes
from prometheus_client import Counter

from libs.settings import TelemetrySettings

log = logging.getLogger(__name__)

SPANS = Counter(
    "carillon_trace_spans_total",
    "Spans that the collector took (sent) or did not take (lost); those that found no room in the queue are neither.",
    ["result"],
)
SENT, LOST = "sent", "lost"
for _result in (SENT, LOST):
    SPANS.labels(_result)

_FLUSH_S = 2.0
"""How long a stopping process waits for its last spans to be taken."""
_LIBRARY = "opentelemetry"


class Traces:
    """The process's trace exporter, for as long as the block lasts: `async with Traces(settings, service=…):`."""

    def __init__(self, settings: TelemetrySettings, *, service: str, version: str = "", instance: str = "") -> None:
        """`instance` is unique to the process. OTEL_RESOURCE_ATTRIBUTES adds further attributes."""
        self._settings = settings
        self._resource = Resource.create(
            {
                "service.name": f"carillon-{service}",
                "service.namespace": "carillon",
                "service.version": version,
                **({"service.instance.id": instance} if instance else {}),
            }
        )
        self._provider: TracerProvider | None = None
        self._exporter: Reporting | None = None

    async def __aenter__(self) -> Self:
        if (endpoint := self._settings.otlp_endpoint) is not None:
            # Imported here because they load a gRPC exporter that most processes do not need.
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            logging.getLogger(_LIBRARY).setLevel(logging.CRITICAL)  # A line per batch, and one per span dropped.
            otlp = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
            self._exporter = Reporting(otlp, endpoint=endpoint)
            self._provider = provider_of(self._settings, self._resource, BatchSpanProcessor(self._exporter))
            trace.set_tracer_provider(self._provider)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._provider is None or self._exporter is None:
            return
        closing = asyncio.create_task(asyncio.to_thread(self._provider.shutdown))
        await asyncio.wait({closing}, timeout=_FLUSH_S)
        if not closing.done():
            self._exporter.shutdown()  # Ends the attempt under way.
        await closing


class Reporting(SpanExporter):
    """An exporter that says when the collector takes no spans, and when it does again, instead of each time."""

    def __init__(self, exporter: SpanExporter, *, endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._lost = 0
        self._is_closed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """See SpanExporter; called from one thread at a time."""
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            SPANS.labels(SENT).inc(len(spans))
            if self._lost:
                log.info("Traces are taken again.", extra={"endpoint": self._endpoint, "lost_spans": self._lost})
            self._lost = 0
            return result
        SPANS.labels(LOST).inc(len(spans))
        if not self._lost:
            log.warning("Traces are not taken; going on without them.", extra={"endpoint": self._endpoint})
        self._lost += len(spans)
        return result

    def shutdown(self) -> None:
        """See SpanExporter; may be called again."""
        if not self._is_closed:
            self._is_closed = True
            self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """See SpanExporter."""
        return self._exporter.force_flush(timeout_millis)


def provider_of(settings: TelemetrySettings, resource: Resource, processor: SpanProcessor) -> TracerProvider:
    """A provider that samples as the settings say; a caller's own decision wins over the ratio."""
    root = _Caused(TraceIdRatioBased(settings.trace_ratio))
    provider = TracerProvider(resource=resource, sampler=ParentBased(root), shutdown_on_exit=False)
    provider.add_span_processor(processor)
    return provider


class _Caused(Sampler):
    """For spans without a parent: what others caused is sampled as they were, else `otherwise` decides.

    There are links to sampled spans only (libs.trace_points).
    """

    def __init__(self, otherwise: Sampler) -> None:
        self._otherwise = otherwise

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        sampler = ALWAYS_ON if links else self._otherwise
        return sampler.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        return f"Caused{{{self._otherwise.get_description()}}}"
