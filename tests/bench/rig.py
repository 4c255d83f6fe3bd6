"""What figures run on: fresh servers with real fsync, real service processes, a peer at their links.

Everything is below one directory, which is deleted at the end, and stops with the block that started it. Nothing is
tuned for the benchmark but the number of shards.
"""

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, LiteralString
from urllib.request import urlopen

import psycopg

from local.stack import Stack
from tests.bench.machine import children, cpu_s, own_cpu_s
from tests.bench.report import DIRECTORY

Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """What a figure is given. `pick` chooses the size for the full and for the quick run; `say` tells of progress."""

    directory: Path
    shards: int
    is_quick: bool
    say: Callable[[str], None]

    def pick(self, full: int, quick: int) -> int:
        """A size."""
        return quick if self.is_quick else full

    @asynccontextmanager
    async def stack(
        self,
        services: Sequence[str] = ("scheduler",),
        *,
        replicas: int = 1,
        shards: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Stack]:
        """Fresh Postgres and NATS, and these services with default settings but for `env`; all gone afterwards."""
        directory = Path(tempfile.mkdtemp(prefix="stack-", dir=self.directory))
        stack = Stack(
            directory,
            services=services,
            replicas={"scheduler": replicas},
            env={"CARILLON_SHARDS": str(shards or self.shards), **(env or {})},
        )
        try:
            await asyncio.to_thread(stack.start)
            yield stack
            await asyncio.to_thread(stack.raise_if_failed)
        finally:
            await asyncio.to_thread(stack.stop)
            await asyncio.to_thread(_delete, directory)


@asynccontextmanager
async def scratch() -> AsyncIterator[Path]:
    """A directory beside the results, so on the project's disk: /tmp may be memory, where fsync costs nothing."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="run-", dir=DIRECTORY)).absolute()
    directory.chmod(0o755)  # Postgres may run as another user.
    try:
        yield directory
    finally:
        _delete(directory)


def _delete(directory: Path) -> None:
    """Delete it, and Postgres's data where these are elsewhere with a link to them (local.servers)."""
    for data in directory.glob("**/postgres"):
        shutil.rmtree(data.resolve(), ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)


async def query(stack: Stack, statement: LiteralString, *parameters: object) -> list[Row]:
    """What a statement returns (nothing, if it returns no rows), in a transaction of its own."""
    async with await psycopg.AsyncConnection.connect(stack.postgres_url, autocommit=True) as connection:
        cursor = await connection.execute(statement, parameters)
        return await cursor.fetchall() if cursor.description else []


async def count_timers(stack: Stack) -> int:
    """Rows in the scheduler's timer table."""
    return int((await query(stack, "SELECT count(*) FROM scheduler.timer"))[0][0])


async def shards_by_holder(stack: Stack) -> dict[str, list[int]]:
    """Which replica holds which shards."""
    held: dict[str, list[int]] = {}
    for holder, shard in await query(stack, "SELECT holder, shard FROM scheduler.shard WHERE holder IS NOT NULL"):
        held.setdefault(holder, []).append(shard)
    return held


async def until_held(stack: Stack, *, replicas: int, shards: int, timeout_s: float = 30) -> dict[str, list[int]]:
    """Wait until all shards are held and so many replicas hold some; raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while True:
            held = await shards_by_holder(stack)
            if len(held) == replicas and sum(map(len, held.values())) == shards:
                return held
            await asyncio.sleep(0.1)


def scheduler_pid(stack: Stack, number: int = 0) -> int:
    """The process id of a replica of the scheduler."""
    pid = stack.replicas["scheduler", number].process.pid
    assert pid is not None, "the scheduler does not run"
    return pid


def metrics_text(stack: Stack, service: str = "scheduler", number: int = 0) -> str:
    """What a replica tells Prometheus. Blocks."""
    with urlopen(f"{stack.http(service, number)}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


class Spending:
    """Processor time that a service and Postgres spend from when this was made."""

    def __init__(self, stack: Stack, service: str) -> None:
        postgres = stack.postgres
        assert postgres is not None
        pids = {service: stack.replicas[service, 0].process.pid, "Postgres": postgres.pid}
        self._pids = {name: pid for name, pid in pids.items() if pid is not None}
        self._before = {name: cpu_s(pid) for name, pid in self._pids.items()}

    def per_timer_us(self, count: int) -> dict[str, float]:
        """So far, by name, in µs per timer."""
        return {name: (cpu_s(pid) - self._before[name]) / count * 1e6 for name, pid in self._pids.items()}

    def told(self, count: int, of: str = "timer") -> str:
        """The same in words."""
        spent = ", ".join(f"{name} {us:.0f}" for name, us in self.per_timer_us(count).items())
        return f"Processor time per {of}, in µs: {spent}."


class Split:
    """The same of all that take part, each by itself: what renders apart, NATS and the benchmark included."""

    def __init__(self, stack: Stack, service: str) -> None:
        self._stack, self._service = stack, service
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        service = self._stack.replicas[self._service, 0].process.pid
        postgres, nats = self._stack.postgres, self._stack.nats
        assert service is not None
        assert postgres is not None
        assert postgres.pid is not None
        assert nats is not None
        assert nats.pid is not None
        return {
            self._service: own_cpu_s(service),
            "its rendering processes": sum(map(own_cpu_s, children(service))),
            "Postgres": cpu_s(postgres.pid),
            "NATS": own_cpu_s(nats.pid),
            "the benchmark itself": time.process_time(),
        }

    def told(self, count: int, of: str) -> str:
        """In words."""
        spent = {name: (now_s - self._before[name]) / count * 1e6 for name, now_s in self._now().items()}
        each = ", ".join(f"{name} {us:.0f}" for name, us in spent.items())
        return f"Processor time per {of}, in µs: {each}; together {sum(spent.values()):.0f}."


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began_s = time.perf_counter()

    @property
    def elapsed_s(self) -> float:
        """So far."""
        return time.perf_counter() - self._began_s


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0 to 1) of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
