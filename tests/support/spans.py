"""Spans made in a test, although OpenTelemetry lets a process set its provider only once."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from libs.settings import TelemetrySettings
from libs.telemetry.traces_export import provider_of
from libs.trace_points import Point, point_at


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch, *, ratio: float = 1.0) -> Iterator[InMemorySpanExporter]:
    """Everything that ends is kept; sampled as a process with this `trace_ratio` does."""
    exporter = InMemorySpanExporter()
    settings = TelemetrySettings(trace_ratio=ratio)
    provider = provider_of(settings, Resource.get_empty(), SimpleSpanProcessor(exporter))
    monkeypatch.setattr("libs.telemetry.traces.trace.get_tracer", provider.get_tracer)
    monkeypatch.setattr("libs.telemetry.traces.trace.get_tracer_provider", lambda: provider)
    yield exporter
    provider.shutdown()


def point_of_span(span: ReadableSpan) -> Point:
    """Where it is."""
    return _point(span.context)


def parent_of(span: ReadableSpan) -> Point:
    """Where its parent is; empty at the beginning of a trace."""
    return b"" if span.parent is None else _point(span.parent)


def links_of(span: ReadableSpan) -> list[Point]:
    """Where its links lead."""
    return [_point(link.context) for link in span.links]


def _point(context: trace.SpanContext | None) -> Point:
    assert context is not None
    return point_at(context.trace_id, context.span_id)
