"""libs.telemetry.traces_export: what happens when the collector is away."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from libs.settings import TelemetrySettings
from libs.telemetry.traces_export import Reporting, Traces
from local.processes import free_port

SPAN: Any = object()


class Flaky(SpanExporter):
    """Takes spans while it is up."""

    def __init__(self) -> None:
        self.is_up = True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS if self.is_up else SpanExportResult.FAILURE


def test_an_outage_is_told_when_it_begins_and_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    """Once each, however many batches are lost meanwhile."""
    caplog.set_level(logging.INFO)
    flaky = Flaky()
    exporter = Reporting(flaky, endpoint="http://collector:4317")
    for is_up in (True, False, False, False, True, True, False):
        flaky.is_up = is_up
        exporter.export([SPAN, SPAN])
    assert [record.getMessage() for record in caplog.records] == [
        "Traces are not taken; going on without them.",
        "Traces are taken again.",
        "Traces are not taken; going on without them.",
    ]
    assert caplog.records[1].lost_spans == 6  # type: ignore[attr-defined]


async def test_a_process_stops_in_time_without_its_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last spans are given up; the library alone would go on trying for ten seconds."""
    providers: list[Any] = []
    monkeypatch.setattr("libs.telemetry.traces_export.trace.set_tracer_provider", providers.append)
    monkeypatch.setattr("libs.telemetry.traces_export._FLUSH_S", 0.1)
    monkeypatch.setattr(logging.getLogger("opentelemetry"), "level", logging.CRITICAL)
    endpoint = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    async with asyncio.timeout(5):
        async with Traces(TelemetrySettings(otlp_endpoint=endpoint), service="intake"):
            providers[0].get_tracer("test").start_span("lost").end()
