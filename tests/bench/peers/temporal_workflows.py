"""Temporal's development server and Python SDK: workflows with a start delay, durable in SQLite."""

import asyncio
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from temporalio import workflow
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from local.processes import Process, accepts_connections, free_port
from local.servers import HOST
from tests.bench.link_peer import to_ns
from tests.bench.peers import Measured, due_after, numbers_until, until, until_due

if TYPE_CHECKING:
    from tests.bench.rig import Rig

_QUEUE = "bench"
_CALLERS = 50
_happened: list[str] = []
"""Where the workflow, which Temporal makes, tells this module that it ran."""


@workflow.defn
class Happen:
    """Ends as soon as it starts."""

    @workflow.run
    async def run(self, order: str) -> None:
        """Note that it happened."""
        _happened.append(order)


async def measure(rig: "Rig", directory: Path) -> Measured:
    """One server, one worker, one workflow each."""
    binary = str(Path(sys.executable).with_name("temporal"))
    port = free_port(HOST)
    arguments = ["--ip", HOST, "--port", str(port), "--headless", "--log-level", "error"]
    durable = ["--db-filename", str(directory / "temporal.db"), "--sqlite-pragma", "synchronous=FULL"]
    server = Process("temporal", [binary, "server", "start-dev", *arguments, *durable], log=directory / "temporal.log")
    try:
        await asyncio.to_thread(server.start)
        await asyncio.to_thread(server.wait_until, lambda: accepts_connections(HOST, port), timeout_s=30)
        client = await _connect(f"{HOST}:{port}")
        async with Worker(client, task_queue=_QUEUE, workflows=[Happen], workflow_runner=UnsandboxedWorkflowRunner()):
            return await _measure(client, due_after(rig, 25, 6), rig.pick(3_000, 300), _server_version(binary))
    finally:
        await asyncio.to_thread(server.stop)


async def _measure(client: Client, due_at: datetime, most: int, server_version: str) -> Measured:
    _happened.clear()
    numbers = numbers_until(due_at, most)
    stored: list[int] = []

    async def start() -> None:
        for number in numbers:
            await client.start_workflow(
                Happen.run,
                f"2013-{number}",
                id=f"order-{number}",
                task_queue=_QUEUE,
                start_delay=due_at - datetime.now(UTC),
            )
            stored.append(number)

    began_s = time.perf_counter()
    await asyncio.gather(*(start() for _ in range(_CALLERS)))
    stored_s = time.perf_counter() - began_s
    early = len(_happened)
    await until_due(due_at)
    await until(lambda: len(_happened) >= len(stored))
    took_s = (time.time_ns() - to_ns(due_at)) / 1e9
    return Measured(
        version=f"{server_version}, SDK {version('temporalio')}",
        count=len(stored),
        stored_s=stored_s,
        took_s=took_s,
        how=f"workflows with start_delay on the development server, in SQLite with synchronous=FULL, {_CALLERS} at "
        f"once; until the worker has run the last ({early} ran early).",
    )


async def _connect(address: str) -> Client:
    while True:
        try:
            return await Client.connect(address)
        except RuntimeError:
            await asyncio.sleep(0.1)


def _server_version(binary: str) -> str:
    # temporal version 1.9.1 (Server 1.32.0, UI 2.54.1)
    text = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    return text.partition("Server ")[2].partition(",")[0] or text.strip()
