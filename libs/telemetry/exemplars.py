"""Histograms whose buckets show a trace: OpenMetrics exemplars, one for each bucket, of sampled traces only.

They are shown to whoever asks /metrics for `application/openmetrics-text`.
"""

import prometheus_client
from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN, Span

from libs.trace_points import Point

Exemplar = dict[str, str]


def exemplar_of(span: Span) -> Exemplar | None:
    """The labels that lead to a span; None when it is not sampled."""
    if span is INVALID_SPAN:
        return None
    context = span.get_span_context()
    if not context.trace_flags.sampled:
        return None
    return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}


def exemplar_at(point: Point) -> Exemplar | None:
    """The labels that lead to a point; None for none."""
    return {"trace_id": point[:16].hex(), "span_id": point[16:].hex()} if point else None


class Histogram(prometheus_client.Histogram):
    """A histogram whose observations show the current span, unless they are given another."""

    def observe(self, amount: float, exemplar: Exemplar | None = None) -> None:
        """Observe; with the labels of an exemplar, or else those of the current span if it is sampled."""
        super().observe(amount, exemplar or exemplar_of(trace.get_current_span()))
