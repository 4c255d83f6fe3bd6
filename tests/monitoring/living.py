"""The real stack under a load that touches everything, watched by a real Prometheus."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from local.processes import free_port
from local.stack import SERVICES, Stack
from tests.monitoring.load import Load
from tests.monitoring.outside import Outside
from tests.monitoring.watcher import Watcher

MOVED = (
    # What must have happened for the expressions to be tried on more than zeros. Each is a selector of counters.
    *(f'carillon_scheduler_timers_fired_total{{target="{target}"}}' for target in ("notification", "event")),
    *(f'carillon_scheduler_timers_fired_total{{target="{target}"}}' for target in ("close_window", "request_due")),
    'carillon_scheduler_timers_fired_total{target="retry_delivery"}',
    *(f'carillon_scheduler_timers_decided_total{{state="{state}"}}' for state in ("skipped", "cancelled", "failed")),
    *(f'carillon_scheduler_questions_total{{result="{result}"}}' for result in ("true", "false")),
    "carillon_scheduler_events_published_total",
    *(f'carillon_digest_items_total{{state="{state}"}}' for state in ("digested", "sent_alone", "cancelled")),
    *(f'carillon_digest_items_total{{reason="{reason}"}}' for reason in ("unknown_subscriber", "filter")),
    *(f'carillon_digest_formatted_items_total{{result="{result}"}}' for result in ("asked", "cached")),
    "carillon_digest_template_failures_total",
    "carillon_digest_windows_opened_total",
    'carillon_digest_rendered_total{result="sent"}',
    *(f'carillon_intake_closed_requests_total{{state="{state}"}}' for state in ("closed", "expired", "withdrawn")),
    'carillon_intake_items_total{method="Notify",outcome="refused"}',
    "carillon_intake_repeated_calls_total",
    'carillon_intake_limited_calls_total{limit="rate"}',
    *(f'carillon_dispatcher_deliveries_ended_total{{outcome="{one}"}}' for one in ("sent", "dead", "suppressed")),
    *(f'carillon_dispatcher_deliveries_accepted_total{{channel="{one}"}}' for one in ("email", "webhook", "log")),
    "carillon_dispatcher_retries_total",
    "carillon_dispatcher_breaker_openings_total",
    'carillon_dispatcher_postponed_total{reason="breaker_open"}',
    *(f'carillon_dispatcher_unsubscribes_total{{result="{result}"}}' for result in ("done", "bad_token")),
    *(f'carillon_rpc_requests_total{{code="{code}"}}' for code in ("OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")),
    *(f'carillon_link_applied_frames_total{{sender="{sender}"}}' for sender in SERVICES),
    "carillon_link_republished_frames_total",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """All there is. The load goes on by itself."""

    stack: Stack
    watcher: Watcher
    loading: asyncio.Task[None]

    async def wait(self, seconds: float) -> None:
        """Let the load go on for so long; raises what ended it."""
        if (await asyncio.wait({self.loading}, timeout=seconds))[0]:
            self.loading.result()

    async def wait_until_moved(self, timeout_s: float) -> list[str]:
        """Until everything in MOVED has; what has not in time."""
        deadline = time.monotonic() + timeout_s
        missing = list(MOVED)
        while missing and time.monotonic() < deadline:
            await self.wait(2)
            missing = [one for one in missing if not await asyncio.to_thread(self.watcher.now, f"{one} > 0")]
        return missing

    async def pause(self, service: str, seconds: float) -> None:
        """A service stands still for so long."""
        self.stack.pause(service)
        await self.wait(seconds)
        self.stack.resume(service)


@asynccontextmanager
async def living(directory: Path) -> AsyncIterator[World]:
    """Everything runs until the block ends."""
    async with AsyncExitStack() as exits:
        outside = await exits.enter_async_context(Outside().listening())
        page_port = free_port()
        secrets = directory / "unsubscribe"
        secrets.write_text("for tests only, and longer than 32 bytes\n")
        stack = Stack(directory / "stack", env=_settings(outside, page_port, secrets))
        exits.push_async_callback(asyncio.to_thread, stack.stop)
        await asyncio.to_thread(stack.start)
        targets = [stack.http(name).removeprefix("http://") for name in SERVICES]
        watcher = exits.enter_context(Watcher(directory / "prometheus", targets))
        load = Load(stack, outside, f"http://127.0.0.1:{page_port}")
        exits.push_async_callback(load.close)
        await load.prepare()
        loading = asyncio.create_task(load.run())
        try:
            yield World(stack=stack, watcher=watcher, loading=loading)
        finally:
            loading.cancel()
            await asyncio.wait({loading})


def _settings(outside: Outside, page_port: int, secrets: Path) -> Mapping[str, str]:
    """What is quick where a load is short."""
    services = f'{{"crm": "{outside.url}/%s"}}'
    return {
        "CARILLON_SHARDS": "8",
        "CARILLON_LINK_REPUBLISH_AFTER": "1s",
        "CARILLON_INTAKE_TENANT_RATE": "500",
        "CARILLON_INTAKE_TENANT_BURST": "1000",
        "CARILLON_SCHEDULER_CONDITION_SERVICES": services % "decide",
        "CARILLON_DIGEST_FORMATTING_SERVICES": services % "write",
        "CARILLON_DISPATCHER_BACKOFF_FIRST": "500ms",
        "CARILLON_DISPATCHER_MAX_ATTEMPTS": "4",
        "CARILLON_DISPATCHER_TRAFFIC_BREAKER_OPEN": "5s",
        "CARILLON_DISPATCHER_UNSUBSCRIBE_BASE_URL": "https://carillon.example",
        "CARILLON_DISPATCHER_UNSUBSCRIBE_SECRET_FILE": str(secrets),
        "CARILLON_DISPATCHER_UNSUBSCRIBE_PORT": str(page_port),
    }
