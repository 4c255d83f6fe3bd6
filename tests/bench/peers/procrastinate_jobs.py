"""Procrastinate: jobs in Postgres, each run by a worker at its `schedule_at`."""

import asyncio
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from procrastinate import App, PsycopgConnector
from procrastinate.types import JSONValue

from local.servers import PostgresServer
from tests.bench.link_peer import to_ns
from tests.bench.peers import Measured, due_after, numbers_until, until_due

if TYPE_CHECKING:
    from tests.bench.rig import Rig

_CONCURRENCY = 20
_BATCH = 500
_POLL_S = 0.1


async def measure(rig: "Rig", directory: Path) -> Measured:
    """One worker, one job each."""
    server = PostgresServer(directory)
    try:
        await asyncio.to_thread(server.start)
        app = App(connector=PsycopgConnector(conninfo=server.url, min_size=_CONCURRENCY, max_size=_CONCURRENCY))
        async with app.open_async():
            await app.schema_manager.apply_schema_async()
            return await _measure(app, due_after(rig, 6, 3), rig.pick(10_000, 1_000))
    finally:
        await asyncio.to_thread(server.stop)


async def _measure(app: App, due_at: datetime, most: int) -> Measured:
    happened = 0

    @app.task(name="happen")
    async def happen(order: str) -> None:
        nonlocal happened
        happened += 1

    began_s = time.perf_counter()
    count = 0
    for _ in numbers_until(due_at, most // _BATCH):
        orders: list[dict[str, JSONValue]] = [{"order": f"2013-{count + number}"} for number in range(_BATCH)]
        await happen.configure(schedule_at=due_at).batch_defer_async(*orders)
        count += _BATCH
    stored_s = time.perf_counter() - began_s
    await until_due(due_at)
    worker = asyncio.create_task(
        app.run_worker_async(
            concurrency=_CONCURRENCY, fetch_job_polling_interval=_POLL_S, install_signal_handlers=False
        )
    )
    try:
        while happened < count or await _unfinished(app):
            if worker.done():
                await worker
            await asyncio.sleep(0.1)
        took_s = (time.time_ns() - to_ns(due_at)) / 1e9
    finally:
        worker.cancel()
        await asyncio.wait({worker}, timeout=10)
    return Measured(
        version=version("procrastinate"),
        count=count,
        stored_s=stored_s,
        took_s=took_s,
        how=f"jobs deferred with schedule_at, {_BATCH:,} at a time; one worker with concurrency {_CONCURRENCY} that "
        f"polls every {_POLL_S} s; until the last job is marked as succeeded, in the same Postgres with fsync.",
    )


async def _unfinished(app: App) -> bool:
    row = await app.connector.execute_query_one_async(
        "SELECT EXISTS (SELECT FROM procrastinate_jobs WHERE status <> 'succeeded') AS unfinished"
    )
    return bool(row["unfinished"])
