"""Calls of one item each by 64 callers at once, beside handlers that do nothing."""

import asyncio
import statistics
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
from carillon.intake.v1 import intake_pb2
from carillon.scheduler.v1 import timer_pb2

from local.stack import Stack
from tests.bench import empty_handler
from tests.bench.machine import cpu_s
from tests.bench.report import RATIO, Figure, at_least
from tests.bench.rig import Rig, Stopwatch
from tests.bench.stand_in import StandIn

_CALLERS = 64
_NOTIFY = "/carillon.intake.v1.IntakeService/Notify"
_ROUNDS = 5

Call = Callable[..., Awaitable[bytes]]


async def unary(rig: Rig) -> list[Figure]:
    """Unary Notify, durable, against an empty handler: in turns, so that both meet the same machine."""
    count = rig.pick(8_000, 2_000)
    async with AsyncExitStack() as exits:
        stack = await exits.enter_async_context(rig.stack(["intake"]))
        for receiver in ("scheduler", "digest"):
            await exits.enter_async_context(StandIn.connect(stack.nats_url, receiver))
        bare, wrapped, empty_pid = await exits.enter_async_context(_empty_server())
        pids = {"bare": empty_pid, "wrapped": empty_pid, "durable": pid_of(stack, "intake")}
        calls: dict[str, Call] = {
            name: (await exits.enter_async_context(grpc.aio.insecure_channel(address))).unary_unary(path)
            for name, address, path in (
                ("bare", bare, empty_handler.BARE),
                ("wrapped", wrapped, _NOTIFY),
                ("durable", stack.grpc("intake"), _NOTIFY),
            )
        }
        for call in calls.values():
            await _rate(call, count // 4)  # Warm.
        rates: dict[str, list[float]] = {name: [] for name in calls}
        spent_us: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(_ROUNDS):
            rig.say(f"round {number + 1} of {_ROUNDS}: {count:,} calls each")
            for name, call in calls.items():
                before_s = cpu_s(pids[name])
                rates[name].append(await _rate(call, count))
                spent_us[name].append((cpu_s(pids[name]) - before_s) / count * 1e6)
    return _figures(rates, count, {name: statistics.median(found) for name, found in spent_us.items()})


def _figures(rates: dict[str, list[float]], count: int, spent_us: dict[str, float]) -> list[Figure]:
    ours, bare, wrapped = (statistics.median(rates[name]) for name in ("durable", "bare", "wrapped"))
    how = (
        f"{_ROUNDS} rounds of {count:,} calls each in turns, medians; {_CALLERS} callers on one connection in one "
        f"Python process, one notification per call, WAIT_FOR_ACCEPTED: answered after the commit. The empty handler "
        f"is grpc.aio alone, without decoding; the one within libs.rpc decodes, authenticates, counts, has a deadline. "
        f"Processor time of the server per call, in µs: empty {spent_us['bare']:.0f}, empty within libs.rpc "
        f"{spent_us['wrapped']:.0f}, intake {spent_us['durable']:.0f}."
    )
    return [
        Figure(
            figure="unary Notify, durable, against an empty handler",
            value=ours / bare,
            unit=RATIO,
            target=at_least(0.8),
            how=how,
        ),
        Figure(
            figure="unary Notify, durable",
            value=ours,
            unit="calls/s",
            how=how,
            peers={"empty handler": bare, "empty handler within libs.rpc": wrapped},
        ),
    ]


def pid_of(stack: Stack, service: str) -> int:
    """The process id of a service's first replica."""
    pid = stack.replicas[service, 0].process.pid
    assert pid is not None, f"{service} does not run"
    return pid


async def _rate(call: Call, count: int) -> float:
    requests = iter([_request()] * count)

    async def caller() -> None:
        for one in requests:
            await call(one, timeout=30)

    watch = Stopwatch()
    await asyncio.gather(*(caller() for _ in range(_CALLERS)))
    return count / watch.elapsed_s


def _request() -> bytes:
    content = timer_pb2.NotificationContent(
        type="flight.delayed", subscribers=["customer-417"], payload='{"order": "2013-000417"}'
    )
    item = intake_pb2.Notification(content=content, entity="flight-417")
    return intake_pb2.NotifyRequest(notifications=[item], wait_for=intake_pb2.WAIT_FOR_ACCEPTED).SerializeToString()


@asynccontextmanager
async def _empty_server() -> AsyncIterator[tuple[str, str, int]]:
    """The two addresses of tests.bench.empty_handler in a process of its own, and its id."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.bench.empty_handler"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        bare, wrapped = (await process.stdout.readline()).decode().split()
        yield bare, wrapped, process.pid
    finally:
        process.stdin.close()
        await process.wait()
