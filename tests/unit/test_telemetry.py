"""What a service tells about itself: log lines, trace context, metrics and health."""

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import aiohttp
import pytest
import structlog
from prometheus_client import CollectorRegistry, Counter
from sqlalchemy.ext.asyncio import create_async_engine

from libs.postgres_pool import CountingPool
from libs.settings import HttpSettings, LogFormat, LogLevel, TelemetrySettings
from libs.telemetry.http import Readiness, TelemetryHttp, add_build_info
from libs.telemetry.logs import configure_logs, get_logger
from libs.telemetry.traces import extract, inject, span
from libs.telemetry.traces_export import Traces

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CARRIER = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture
def _logging_restored() -> Iterator[None]:
    """Logging is the process's own; put it back."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def logs_to(stream: io.StringIO, **settings: Any) -> None:
    """Log as JSON to a text."""
    configure_logs(TelemetrySettings(log_format=LogFormat.JSON, **settings), service="intake", stream=stream)


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    """The log lines, decoded."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.usefixtures("_logging_restored")
class TestLogs:
    """A sentence plus fields, one JSON object per line."""

    def test_a_line_is_a_sentence_with_fields(self) -> None:
        """With time, level and service."""
        stream = io.StringIO()
        logs_to(stream)
        get_logger("libs.shards").info("Took over a shard.", shard=7, town="Zürich")
        (line,) = lines_of(stream)
        assert line.pop("time").endswith("Z")
        assert line == {
            "message": "Took over a shard.",
            "level": "info",
            "logger": "libs.shards",
            "service": "intake",
            "shard": 7,
            "town": "Zürich",
        }

    def test_a_line_names_the_trace_it_belongs_to(self) -> None:
        """So that a log leads to its trace."""
        stream = io.StringIO()
        logs_to(stream)
        with span("work", carrier=CARRIER):
            get_logger("x").info("Working.")
        assert lines_of(stream)[0]["trace_id"] == TRACE

    def test_lines_below_the_level_are_not_written(self) -> None:
        """By setting."""
        stream = io.StringIO()
        logs_to(stream, log_level=LogLevel.WARNING)
        get_logger("x").info("Not seen.")
        get_logger("x").warning("Seen.")
        assert [line["message"] for line in lines_of(stream)] == ["Seen."]

    def test_lines_of_libraries_look_the_same(self) -> None:
        """One format for whoever reads them."""
        stream = io.StringIO()
        logs_to(stream)
        logging.getLogger("nats").warning("Reconnecting to %s.", "nats://a")
        (line,) = lines_of(stream)
        assert (line["message"], line["service"], line["logger"]) == ("Reconnecting to nats://a.", "intake", "nats")

    def test_the_pool_of_connections_says_nothing_per_transaction(self) -> None:
        """On level debug too, where two lines for each would hide all others."""
        stream = io.StringIO()
        logs_to(stream, log_level=LogLevel.DEBUG)
        engine = create_async_engine("postgresql+psycopg://nobody@127.0.0.1:1/none", poolclass=CountingPool)
        engine.sync_engine.pool.logger.debug("Connection rolled back.")
        get_logger("libs.shards").debug("Looked.")
        assert [line["message"] for line in lines_of(stream)] == ["Looked."]

    def test_an_exception_is_one_line_with_its_traceback(self) -> None:
        """Log collectors split at line ends."""
        stream = io.StringIO()
        logs_to(stream)
        try:
            raise ValueError("broken")
        except ValueError as error:
            get_logger("x").error("It failed.", exc_info=error)
        (line,) = lines_of(stream)
        assert "ValueError: broken" in line["exception"]

    def test_the_console_form_is_for_people(self) -> None:
        """No JSON; by setting or on a terminal."""
        stream = io.StringIO()
        configure_logs(TelemetrySettings(log_format=LogFormat.CONSOLE), service="intake", stream=stream)
        get_logger("x").info("Took over a shard.", shard=7)
        assert "Took over a shard." in stream.getvalue()
        assert "shard=7" in stream.getvalue()


class TestTraceContext:
    """It travels as at most two strings."""

    def test_a_context_survives_an_outbox_row(self) -> None:
        """Extracted on the other side, it is the same trace."""
        with span("send", carrier=CARRIER):
            carrier = inject()
        assert carrier == CARRIER
        with span("receive", carrier=carrier) as current:
            assert f"{current.get_span_context().trace_id:032x}" == TRACE

    def test_without_a_trace_there_is_nothing_to_carry(self) -> None:
        """An empty dict, stored as such."""
        assert inject() == {}

    @pytest.mark.parametrize("carrier", [{}, {"traceparent": ""}, {"traceparent": "00-0-0-0"}, {"other": "x"}])
    def test_nonsense_extracts_as_nothing(self, carrier: Mapping[str, str]) -> None:
        """And never fails."""
        assert dict(extract(carrier)) == {}

    async def test_without_an_endpoint_nothing_is_exported(self) -> None:
        """The default."""
        async with Traces(TelemetrySettings(), service="intake"):
            with span("work") as current:
                assert not current.is_recording()


async def ready() -> Mapping[str, str | None]:
    """All is well."""
    return {"postgres": None, "nats": None}


@asynccontextmanager
async def serving(readiness: Readiness = ready) -> AsyncIterator[tuple[aiohttp.ClientSession, CollectorRegistry]]:
    """The HTTP port, and a client for it."""
    registry = CollectorRegistry()
    settings = HttpSettings(readiness_timeout=timedelta(milliseconds=100))
    async with (
        TelemetryHttp(settings, registry=registry, readiness=readiness) as http,
        aiohttp.ClientSession(f"http://{http.address}") as client,
    ):
        yield client, registry


class TestHttp:
    """What Prometheus and Kubernetes ask."""

    async def test_metrics_are_prometheus_text(self) -> None:
        """With what runs."""
        async with serving() as (client, registry):
            Counter("carillon_bells_total", "Bells.", registry=registry).inc(3)
            add_build_info(registry, service="intake", version="1.2.3")
            answer = await client.get("/metrics")
            text = await answer.text()
        assert answer.headers["Content-Type"].startswith("text/plain")
        assert "carillon_bells_total 3.0" in text
        assert 'carillon_build_info{component="intake",python="3.' in text
        assert 'version="1.2.3"' in text

    async def test_metrics_are_openmetrics_where_asked(self) -> None:
        """By the Accept header."""
        async with serving() as (client, _):
            answer = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
            assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
            assert (await answer.text()).endswith("# EOF\n")

    async def test_ready_is_when_everything_needed_is_there(self) -> None:
        """Each check is named."""
        async with serving() as (client, _):
            answer = await client.get("/readyz")
            assert answer.status == 200
            assert await answer.json() == {"is_ready": True, "checks": {"postgres": "ok", "nats": "ok"}}

    async def test_not_ready_says_why(self) -> None:
        """With the reason of each check that fails."""

        async def half_ready() -> Mapping[str, str | None]:
            return {"postgres": None, "nats": "not connected for 12 s"}

        async with serving(half_ready) as (client, _):
            answer = await client.get("/readyz")
            assert answer.status == 503
            assert (await answer.json())["checks"] == {"postgres": "ok", "nats": "not connected for 12 s"}

    async def test_a_check_that_hangs_is_not_ready(self) -> None:
        """In bounded time."""

        async def hang() -> Mapping[str, str | None]:
            await asyncio.Event().wait()
            return {}

        async with serving(hang) as (client, _):
            assert (await client.get("/readyz")).status == 503

    async def test_a_check_that_fails_is_not_ready_and_leaks_nothing(self) -> None:
        """The log has it."""

        async def fail() -> Mapping[str, str | None]:
            raise ValueError("password=hunter2")

        async with serving(fail) as (client, _):
            answer = await client.get("/readyz")
            assert answer.status == 503
            assert "hunter2" not in await answer.text()

    async def test_alive_depends_on_nothing(self) -> None:
        """Restarting a process does not mend the database it waits for."""

        async def fail() -> Mapping[str, str | None]:
            raise ConnectionRefusedError

        async with serving(fail) as (client, _):
            assert (await client.get("/livez")).status == 200
