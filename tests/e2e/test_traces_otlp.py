"""Traces as a collector sees them: real processes, the real exporter, OTLP over gRPC, every trace sampled.

Checked by the spans' parents and links: whole chains from the call to the attempt to deliver, across whatever waits.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any
from urllib.request import Request, urlopen

import grpc
import pytest
from carillon.digest.v1 import digest_pb2
from carillon.intake.v1 import intake_pb2
from google.protobuf.duration_pb2 import Duration

from libs.telemetry.traces import LEFT_OUT, MOST_LINKS
from local.stack import SERVICES, Stack
from tests.e2e.conftest import guarded_env, token_of
from tests.support.link_world import until
from tests.support.otlp import Collector, Seen
from tests.support.servers import scratch_directory
from tests.support.traced_caller import (
    BATCH,
    SECRET_WORDS,
    STRANGERS,
    TENANT,
    TO_DIGEST,
    TO_DISPATCHER,
    TO_SCHEDULER,
    Caller,
)

pytestmark = pytest.mark.timeout(120)

_SERVER, _PRODUCER, _CONSUMER, _CLIENT = 2, 4, 5, 3


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """One for all tests here."""
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def stack(collector: Collector) -> Iterator[Stack]:
    """The four services, which trace everything and log everything."""
    with scratch_directory() as directory:
        env = guarded_env(directory) | {
            "CARILLON_TELEMETRY_OTLP_ENDPOINT": collector.endpoint,
            "CARILLON_TELEMETRY_LOG_LEVEL": "debug",
            "CARILLON_TELEMETRY_LOG_FORMAT": "json",
            "CARILLON_DISPATCHER_BACKOFF_FIRST": "100ms",
            "CARILLON_DISPATCHER_MAX_ATTEMPTS": "2",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
        }
        with Stack(directory / "stack", env=env) as stack:
            yield stack


@pytest.fixture
async def connected(stack: Stack, collector: Collector) -> AsyncIterator[Caller]:
    """A caller."""
    async with AsyncExitStack() as exits:
        channels = {
            name: await exits.enter_async_context(grpc.aio.insecure_channel(stack.grpc(name))) for name in SERVICES
        }
        yield Caller(stack, collector, channels)


@pytest.fixture
async def caller(connected: Caller, collector: Collector) -> AsyncIterator[Caller]:
    """A caller after whose calls nothing may lead nowhere, and nothing may have leaked."""
    yield connected

    async def is_whole() -> bool:
        return not collector.broken(STRANGERS)

    try:
        await until(is_whole, timeout_s=20)
    except TimeoutError:
        pytest.fail("\n".join(collector.broken(STRANGERS)))
    leaks = [one for one in collector.all() if any(word in one.text for word in SECRET_WORDS)]
    assert leaks == []


async def descends(caller: Caller, first: Seen, *steps: tuple[str, str]) -> Seen:
    """Follow (service, name) from parent to child; returns the last span."""
    current = first
    for service, name in steps:
        parent = current

        def look(parent: Seen = parent, service: str = service, name: str = name) -> Seen | None:
            return next(
                (
                    one
                    for one in caller.collector.trace(parent.trace_id)
                    if (one.parent_id, one.service, one.name) == (parent.span_id, f"carillon-{service}", name)
                ),
                None,
            )

        try:
            current = await caller.found(look)
        except TimeoutError:
            spans = caller.collector.trace(parent.trace_id)
            tree = "\n".join(f"{one.service} {one.name} {one.span_id} <- {one.parent_id}" for one in spans)
            pytest.fail(f"{service} {name} does not follow {parent.name}:\n{tree}")
    return current


_TO_MAIL = (
    ("digest", "make digest"),
    ("digest", f"send {TO_DISPATCHER}"),
    ("dispatcher", f"process {TO_DISPATCHER}"),
)


async def test_what_is_immediate_is_one_trace_from_the_call_to_the_mail_and_back(caller: Caller) -> None:
    """Through intake's outbox, NATS and both receivers, as children of one another; the outcome comes back in it."""
    await caller.put_subscriber("at-once", type_id="traced.now")
    trace_id = await caller.notify("at-once", type_id="traced.now")
    first = await caller.span(trace_id, "intake", "carillon.intake.v1.IntakeService/Notify")
    mail = await descends(
        caller,
        first,
        ("intake", f"send {TO_DIGEST}"),
        ("digest", f"process {TO_DIGEST}"),
        *_TO_MAIL,
        ("dispatcher", "send email"),
    )
    await descends(caller, mail, ("dispatcher", f"send {TO_DIGEST}"), ("digest", f"process {TO_DIGEST}"))
    assert not any(one.is_error for one in caller.collector.trace(trace_id))


async def test_names_and_attributes_are_those_of_opentelemetrys_conventions(caller: Caller) -> None:
    """For RPC and messaging; our own begin with carillon."""
    await caller.put_subscriber("by-the-book", type_id="traced.book")
    trace_id = await caller.notify("by-the-book", type_id="traced.book")
    call = await caller.span(trace_id, "intake", "carillon.intake.v1.IntakeService/Notify")
    assert call.kind == _SERVER
    assert dict(call.attributes) == {
        "rpc.system": "grpc",
        "rpc.service": "carillon.intake.v1.IntakeService",
        "rpc.method": "Notify",
        "rpc.grpc.status_code": 0,
        "carillon.tenant": TENANT,
    }
    sent = await caller.span(trace_id, "intake", f"send {TO_DIGEST}")
    taken = await caller.span(trace_id, "digest", f"process {TO_DIGEST}")
    for one, kind, operation in ((sent, _PRODUCER, "send"), (taken, _CONSUMER, "process")):
        assert one.kind == kind
        assert one.attributes["messaging.system"] == "nats"
        assert one.attributes["messaging.operation.type"] == operation
        assert one.attributes["messaging.destination.name"] == TO_DIGEST
    mail = await caller.span(trace_id, "dispatcher", "send email")
    assert (mail.kind, mail.attributes["carillon.channel"], mail.attributes["carillon.attempt"]) == (
        _CLIENT,
        "email",
        1,
    )


async def test_a_timer_fires_in_a_trace_of_its_own_that_links_to_the_call_that_set_it(caller: Caller) -> None:
    """Schedule, wait, fire, webhook."""
    await caller.put_subscriber("later", type_id="traced.later", hook="later")
    trace_id = await caller.schedule("later", type_id="traced.later", after=Duration(nanos=300_000_000))
    first = await caller.span(trace_id, "intake", "carillon.intake.v1.IntakeService/Schedule")
    sent = await descends(caller, first, ("intake", f"send {TO_SCHEDULER}"))
    await descends(caller, sent, ("scheduler", f"process {TO_SCHEDULER}"))
    fired = await caller.linked_to(sent, "scheduler", "fire timer")
    assert (fired.parent_id, fired.attributes["carillon.timer.state"]) == ("", "fired")
    assert fired.trace_id != trace_id
    await descends(
        caller,
        fired,
        *(("scheduler", f"send {TO_DIGEST}"), ("digest", f"process {TO_DIGEST}")),
        *(*_TO_MAIL, ("dispatcher", "send webhook")),
    )


async def test_a_digest_links_to_the_trigger_and_to_a_bounded_number_of_its_items(caller: Caller) -> None:
    """Forty calls, one digest: it names MOST_LINKS of what caused it, and counts the rest."""
    external = digest_pb2.Cadence(id="traced/batch", external=digest_pb2.ExternalCadence(batch=BATCH))
    await caller.call(caller.digest.PutCadence, digest_pb2.PutCadenceRequest(cadence=external))
    await caller.put_subscriber("patient", type_id="traced.batch", cadence="traced/batch")
    calls = [await caller.notify("patient", type_id="traced.batch") for _ in range(40)]
    trigger = intake_pb2.TriggerBatchRequest(batch=BATCH, wait_for=intake_pb2.WAIT_FOR_APPLIED)
    closing = await caller.call(caller.intake.TriggerBatch, trigger)
    closed = await caller.span(closing, "digest", f"process {TO_DIGEST}")
    made = await caller.linked_to(closed, "digest", "make digest")
    assert made.parent_id == ""
    assert made.attributes["carillon.items"] == 40
    assert len(made.links) == MOST_LINKS
    assert made.attributes[LEFT_OUT] == 1 + 40 - MOST_LINKS
    items = [caller.collector.seen[link] for link in made.links[1:]]
    assert [one.trace_id for one in items] == calls[: MOST_LINKS - 1]
    assert {one.name for one in items} == {f"process {TO_DIGEST}"}
    await descends(caller, made, *_TO_MAIL[1:], ("dispatcher", "send email"))
    opened = await caller.span(calls[0], "digest", f"send {TO_SCHEDULER}")
    await descends(caller, opened, ("scheduler", f"process {TO_SCHEDULER}"))


async def test_a_retry_has_waited_and_links_to_what_made_the_delivery(caller: Caller) -> None:
    """The first attempt's trace leads to its timer, the timer's to the second attempt."""
    await caller.put_subscriber("broken", type_id="traced.broken", hook="broken?answer=503")
    trace_id = await caller.notify("broken", type_id="traced.broken")
    first = await caller.span(trace_id, "dispatcher", "send webhook")
    assert (first.is_error, first.attributes["error.type"]) == (True, "server_error")
    asked = await descends(caller, first, ("dispatcher", f"send {TO_SCHEDULER}"))
    fired = await caller.linked_to(asked, "scheduler", "fire timer")
    second = await descends(
        caller,
        fired,
        *(("scheduler", f"send {TO_DISPATCHER}"), ("dispatcher", f"process {TO_DISPATCHER}")),
        ("dispatcher", "send webhook"),
    )
    assert second.attributes["carillon.attempt"] == 2
    assert [link[0] for link in second.links] == [trace_id]


async def test_a_caller_that_does_not_sample_is_not_sampled_anywhere(caller: Caller) -> None:
    """Its decision holds for everything that follows, so that no trace is a fragment."""
    await caller.put_subscriber("unseen", type_id="traced.unseen")
    unseen = await caller.notify("unseen", type_id="traced.unseen", is_sampled=False)
    seen = await caller.notify("unseen", type_id="traced.unseen")
    made = await caller.span(seen, "digest", "make digest")
    digest_ids = {one.attributes["carillon.digest.id"] for one in caller.collector.all() if one.name == "make digest"}
    request = digest_pb2.ListDigestsRequest(subscriber="unseen")

    async def both() -> set[str]:
        answer = await caller.digest.ListDigests(request, metadata=(("authorization", f"Bearer {token_of(TENANT)}"),))
        ids = {one.id for one in answer.digests}
        return ids if len(ids) == 2 else set()

    assert caller.collector.trace(unseen) == []
    assert len(await until(both, timeout_s=20) & digest_ids) == 1
    assert made.attributes["carillon.digest.id"] in digest_ids


async def test_each_process_says_who_it_is(caller: Caller) -> None:
    """Service, version and instance, as OpenTelemetry's conventions for resources have them."""
    await caller.put_subscriber("somebody", type_id="traced.who")
    trace_id = await caller.notify("somebody", type_id="traced.who")
    await caller.span(trace_id, "dispatcher", "send email")
    assert caller.collector.resources.keys() == {f"carillon-{name}" for name in SERVICES}
    for name, resources in caller.collector.resources.items():
        (resource,) = (dict(one) for one in resources)
        assert resource["service.namespace"] == "carillon"
        assert resource["service.name"] == name
        assert resource["service.version"]
        assert resource["service.instance.id"]


async def test_every_services_log_leads_to_the_trace(caller: Caller) -> None:
    """A line that is written while work on a trace goes on has its id, and that of a span which is received."""
    await caller.put_subscriber("logged", type_id="traced.logged")
    trace_id = await caller.schedule("logged", type_id="traced.logged", after=Duration(nanos=1))
    sent = await caller.span(trace_id, "intake", f"send {TO_SCHEDULER}")
    fired = await caller.linked_to(sent, "scheduler", "fire timer")
    await caller.span(fired.trace_id, "dispatcher", "send email")
    wanted = {"intake": trace_id, "scheduler": fired.trace_id, "digest": fired.trace_id, "dispatcher": fired.trace_id}
    for service, expected in wanted.items():
        points = {
            (expected, line["span_id"])
            for line in log_of(caller.stack, service)
            if line.get("trace_id") == expected and line["service"] == service
        }
        assert points, service
        await until(are_received(caller, points), timeout_s=10)


async def test_exemplars_lead_to_traces(caller: Caller) -> None:
    """In OpenMetrics, for who asks for it, and on histograms only; Prometheus's own text has none."""
    await caller.put_subscriber("measured", type_id="traced.measured")
    trace_id = await caller.schedule("measured", type_id="traced.measured", after=Duration(nanos=1))
    sent = await caller.span(trace_id, "intake", f"send {TO_SCHEDULER}")
    fired = await caller.linked_to(sent, "scheduler", "fire timer")
    await caller.span(fired.trace_id, "dispatcher", "send email")
    for service, histogram in (
        ("intake", "carillon_rpc_duration_seconds"),
        ("scheduler", "carillon_scheduler_lateness_seconds"),
        ("digest", "carillon_digest_render_seconds"),
        ("dispatcher", "carillon_dispatcher_attempt_seconds"),
    ):
        kind, text = await scraped(caller.stack, service, "application/openmetrics-text; version=1.0.0")
        assert kind.startswith("application/openmetrics-text")
        assert text.endswith("# EOF\n")
        shown = [line for line in text.splitlines() if " # {" in line and not line.startswith("#")]
        assert all(line.split("{")[0].endswith("_bucket") for line in shown)
        points = {_point(line) for line in shown if line.startswith(histogram)}
        assert points, service

        await until(are_received(caller, points), timeout_s=10)
        kind, text = await scraped(caller.stack, service, "text/plain")
        assert kind.startswith("text/plain")
        assert [line for line in text.splitlines() if " # {" in line and not line.startswith("#")] == []


async def test_without_a_collector_all_goes_on_and_the_log_says_so_once(connected: Caller) -> None:
    """Nothing is lost but spans; when it is back, that is said once as well. The last test, because of those spans."""
    caller = connected
    await caller.put_subscriber("dark", type_id="traced.dark", hook="dark")
    caller.collector.stop()
    try:
        for number in range(1, 4):
            await caller.notify("dark", type_id="traced.dark")
            await until(lambda number=number: hooks(caller.stack, "dark", number), timeout_s=20)  # type: ignore[misc]
        for service in ("intake", "digest", "dispatcher"):
            await until(lambda service=service: says(caller.stack, service, _AWAY, 1), timeout_s=20)  # type: ignore[misc]
    finally:
        caller.collector.start()
    for service in ("intake", "digest", "dispatcher"):

        async def is_back(service: str = service) -> bool:
            await caller.notify("dark", type_id="traced.dark")
            return await says(caller.stack, service, _BACK, 1)

        await until(is_back, timeout_s=30)
        assert await says(caller.stack, service, _AWAY, 1)
    noise = [
        line for service in SERVICES for line in log_of(caller.stack, service) if "opentelemetry" in line["logger"]
    ]
    assert noise == []


_AWAY, _BACK = "Traces are not taken; going on without them.", "Traces are taken again."


def are_received(caller: Caller, points: set[tuple[str, str]]) -> Callable[[], Awaitable[bool]]:
    """Whether spans have come."""

    async def look() -> bool:
        return points <= caller.collector.seen.keys()

    return look


async def says(stack: Stack, service: str, message: str, times: int) -> bool:
    """Whether a service's log has a line exactly so many times."""
    return [line["message"] for line in log_of(stack, service)].count(message) == times


def log_of(stack: Stack, service: str) -> list[dict[str, Any]]:
    """A service's log; what is no JSON comes from libraries in C."""
    lines = (stack.directory / "logs" / f"{service}.log").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


async def hooks(stack: Stack, name: str, number: int) -> bool:
    """Whether so many webhooks have come."""
    answer = await asyncio.to_thread(_get, f"{stack.mailbox_url}/api/counts", "*/*")
    return bool(json.loads(answer[1])["hooks"].get(name, 0) >= number)


async def scraped(stack: Stack, service: str, accept: str) -> tuple[str, str]:
    """Content type and text of /metrics."""
    return await asyncio.to_thread(_get, f"{stack.http(service)}/metrics", accept)


def _get(url: str, accept: str) -> tuple[str, str]:
    with urlopen(Request(url, headers={"Accept": accept}), timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def _point(line: str) -> tuple[str, str]:
    labels = dict(part.split("=") for part in line.split(" # {")[1].split("}")[0].split(","))
    return labels["trace_id"].strip('"'), labels["span_id"].strip('"')
