"""Intake as its own process, told to stop under load: no call is lost, and health says so first."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from carillon.intake.v1 import intake_pb2, intake_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from libs.rpc_client import connect
from tests.support.fixtures import OpenDatabase
from tests.support.intake_world import migrate, notification, request

ROOT = Path(__file__).resolve().parents[2]
CALLERS = 24

pytestmark = pytest.mark.timeout(120)


@dataclass
class Load:
    """Callers that call until they are refused. `answered` and `refused` are idempotency keys."""

    answered: set[str] = field(default_factory=set)
    refused: dict[str, grpc.StatusCode] = field(default_factory=dict)
    is_warm: asyncio.Event = field(default_factory=asyncio.Event)

    async def caller(self, stub: Any, number: int) -> None:
        """Every other one writes requests, which have transactions of their own."""
        for count in range(100_000):
            key = f"{number}-{count}"
            try:
                if number % 2:
                    await stub.SubmitRequest(
                        intake_pb2.SubmitRequestRequest(
                            requests=[request(item=key)], idempotency_key=key, wait_for=intake_pb2.WAIT_FOR_ACCEPTED
                        ),
                        timeout=30,
                    )
                else:
                    await stub.Notify(
                        intake_pb2.NotifyRequest(
                            notifications=[notification()], idempotency_key=key, wait_for=intake_pb2.WAIT_FOR_ACCEPTED
                        ),
                        timeout=30,
                    )
            except grpc.aio.AioRpcError as error:
                self.refused[key] = error.code()
                return
            self.answered.add(key)
            if len(self.answered) >= 10 * CALLERS:
                self.is_warm.set()


@asynccontextmanager
async def intake_process(postgres_url: str, nats_url: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """`python -m services.intake` and its address; killed at the end if it still runs."""
    settings = {
        "CARILLON_POSTGRES_URL": postgres_url,
        "CARILLON_NATS_URL": nats_url,
        "CARILLON_GRPC_DRAIN_DELAY": "500ms",
        "CARILLON_TELEMETRY_LOG_FORMAT": "json",
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.intake"),
        cwd=ROOT,
        env={**os.environ, **settings},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert process.stdout is not None
    reading: asyncio.Task[bytes] | None = None
    try:
        async with asyncio.timeout(60):
            found = None
            while found is None:
                line = (await process.stdout.readline()).decode()
                assert line, "intake did not start"
                found = re.search(r'"grpc": "([^"]+)"', line)
        reading = asyncio.create_task(process.stdout.read())  # Or its log would fill the pipe.
        yield process, found[1]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        if reading is not None:
            await reading


async def until_not_serving(watch: AsyncIterable[health_pb2.HealthCheckResponse]) -> None:
    """Return once health says NOT_SERVING."""
    async for told in watch:
        if told.status == health_pb2.HealthCheckResponse.NOT_SERVING:
            return


async def test_inv1_sigterm_under_load_loses_no_call(
    postgres_url: str, nats_url: str, open_database: OpenDatabase
) -> None:
    """What was answered is stored; what was refused is not, and says UNAVAILABLE; health turned before that."""
    migrate(postgres_url)
    load = Load()
    async with intake_process(postgres_url, nats_url) as (process, address), connect(address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        stub: Any = intake_pb2_grpc.IntakeServiceStub(channel)
        callers = [asyncio.create_task(load.caller(stub, number)) for number in range(CALLERS)]
        await asyncio.wait_for(load.is_warm.wait(), 60)
        process.terminate()
        await asyncio.wait_for(until_not_serving(watch), 30)
        refused_before, answered_before = len(load.refused), len(load.answered)
        await asyncio.wait_for(asyncio.gather(*callers), 60)
        assert await asyncio.wait_for(process.wait(), 60) == 0
    assert refused_before == 0
    assert len(load.answered) > answered_before  # New calls were answered while health already said NOT_SERVING.
    assert set(load.refused.values()) == {grpc.StatusCode.UNAVAILABLE}
    db = await open_database("intake", postgres_url)
    async with db.read() as tx:
        stored = {key for (key,) in await (await tx.raw.execute("SELECT key FROM idempotency")).fetchall()}
        items = {item for (item,) in await (await tx.raw.execute("SELECT item FROM request")).fetchall()}
    assert stored == load.answered
    assert items == {key for key in load.answered if int(key.split("-")[0]) % 2}
