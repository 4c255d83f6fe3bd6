"""APScheduler 3 with its SQLAlchemy job store: jobs in Postgres with a date trigger, run by threads of one process."""

import asyncio
import logging
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from apscheduler.events import EVENT_JOB_EXECUTED, EVENT_JOB_REMOVED
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
from apscheduler.schedulers.background import BackgroundScheduler

from local.servers import PostgresServer
from tests.bench.link_peer import to_ns
from tests.bench.peers import Measured, due_after, numbers_until, until, until_due

if TYPE_CHECKING:
    from tests.bench.rig import Rig

_THREADS = 10


def happen(_order: str) -> None:
    """What is scheduled; the store keeps it by its name."""


async def measure(rig: "Rig", directory: Path) -> Measured:
    """One scheduler, one job each."""
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
    server = PostgresServer(directory)
    try:
        await asyncio.to_thread(server.start)
        url = urlsplit(server.url)._replace(scheme="postgresql+psycopg").geturl()
        scheduler = BackgroundScheduler(
            jobstores={"default": SQLAlchemyJobStore(url=url)},
            executors={"default": ThreadPoolExecutor(_THREADS)},
            job_defaults={"misfire_grace_time": None},
            timezone="UTC",
        )
        await asyncio.to_thread(scheduler.start, paused=True)
        try:
            return await _measure(scheduler, due_after(rig, 12, 3), rig.pick(5_000, 500))
        finally:
            await asyncio.to_thread(scheduler.shutdown, wait=False)
    finally:
        await asyncio.to_thread(server.stop)


async def _measure(scheduler: BackgroundScheduler, due_at: datetime, most: int) -> Measured:
    happened: list[None] = []
    removed: list[None] = []
    scheduler.add_listener(lambda _: happened.append(None), EVENT_JOB_EXECUTED)
    scheduler.add_listener(lambda _: removed.append(None), EVENT_JOB_REMOVED)

    def add_all() -> int:
        count = 0
        for number in numbers_until(due_at, most):
            count += 1
            scheduler.add_job(happen, "date", run_date=due_at, args=[f"2013-{number}"], id=str(number))
        return count

    began_s = time.perf_counter()
    count = await asyncio.to_thread(add_all)
    stored_s = time.perf_counter() - began_s
    await until_due(due_at)
    await asyncio.to_thread(scheduler.resume)
    await until(lambda: min(len(happened), len(removed)) >= count)
    took_s = (time.time_ns() - to_ns(due_at)) / 1e9
    return Measured(
        version=version("apscheduler"),
        count=count,
        stored_s=stored_s,
        took_s=took_s,
        how=f"jobs with a date trigger in a SQLAlchemyJobStore on the same Postgres with fsync, {_THREADS} threads, "
        "misfire_grace_time None; until the last has run and is deleted.",
    )
