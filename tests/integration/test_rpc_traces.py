"""A trace goes on through a call: from the caller's metadata to what the handler passes on."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import StringValue
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from libs.errors import NotFound
from libs.telemetry.traces import inject
from tests.integration.rpc_probe import SERVICE
from tests.integration.test_rpc_server import behaving, raising, refused, running
from tests.support.spans import recorded

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """The spans made in this test."""
    with recorded(monkeypatch) as exporter:
        yield exporter


async def test_a_callers_trace_context_passes_through_without_any_tracing() -> None:
    """What the handler injects into an outbox row belongs to the caller's trace."""
    async with running() as rpc:
        rpc.probe.behave = behaving(lambda _: json.dumps(inject()))
        answer = await rpc.stub.Say(StringValue(), metadata=[("traceparent", TRACEPARENT)])
        assert json.loads(answer.value)["traceparent"].split("-")[1] == TRACE


async def test_a_call_makes_a_span_in_the_callers_trace(spans: InMemorySpanExporter) -> None:
    """Named as OpenTelemetry's conventions say, with the tenant."""
    async with running(tenant="acme") as rpc:
        await rpc.stub.Say(StringValue(), metadata=[("traceparent", TRACEPARENT)])
    (span,) = spans.get_finished_spans()
    assert span.name == f"{SERVICE}/Say"
    assert span.kind is trace.SpanKind.SERVER
    assert trace.format_trace_id(span.get_span_context().trace_id) == TRACE  # type: ignore[union-attr]
    assert dict(span.attributes or {}) == {
        "rpc.system": "grpc",
        "rpc.service": SERVICE,
        "rpc.method": "Say",
        "rpc.grpc.status_code": 0,
        "carillon.tenant": "acme",
    }


async def test_a_refused_call_is_seen_in_its_span(spans: InMemorySpanExporter) -> None:
    """By its status code."""
    async with running() as rpc:
        rpc.probe.behave = raising(NotFound())
        await refused(rpc.stub.Say(StringValue()))
    (span,) = spans.get_finished_spans()
    attributes: dict[str, Any] = dict(span.attributes or {})
    assert attributes["rpc.grpc.status_code"] == 5


@pytest.mark.parametrize("nonsense", ["", "00-zz-1-01", "x" * 3000])
async def test_nonsense_for_a_trace_context_is_ignored(nonsense: str) -> None:
    """Tracing never fails a call."""
    async with running() as rpc:
        rpc.probe.behave = behaving(lambda _: json.dumps(inject()))
        answer = await rpc.stub.Say(StringValue(), metadata=[("traceparent", nonsense)])
        assert json.loads(answer.value) == {}
