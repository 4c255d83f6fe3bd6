"""Limits of one tenant: how fast it may send, and how much it may have under way (INV-9)."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import grpc
import pytest
from carillon.intake.v1 import intake_pb2
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from libs.rpc_client import connect, refusal_of
from services.intake.loops import Measuring
from services.intake.rpc_limits import RateLimit
from services.intake.store import CommandStore
from services.intake.stream_backlog import TENANT_HEADER, Backlogs
from tests.support import every_rpc
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.intake_world import IntakeWorld, intake_world, notification, request


@pytest.fixture
async def slow(postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus) -> AsyncIterator[IntakeWorld]:
    """A tenant may send 1,000 items at once, then one a second: none that comes while a test runs has room."""
    async with intake_world(postgres_url, open_database, open_bus, tenant_rate=1, tenant_burst=1_000) as it:
        yield it


def batch(count: int, **more: str) -> intake_pb2.NotifyRequest:
    """So many notifications."""
    return intake_pb2.NotifyRequest(
        notifications=[notification()] * count, wait_for=intake_pb2.WAIT_FOR_ACCEPTED, **more
    )


def retry_delay_s(error: grpc.aio.AioRpcError) -> float:
    """What RetryInfo says."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    for detail in status.details:
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return float(info.retry_delay.ToTimedelta().total_seconds())
    raise AssertionError("no RetryInfo")


async def test_inv9_above_its_rate_a_tenant_hears_when_to_come_back(slow: IntakeWorld) -> None:
    """RESOURCE_EXHAUSTED with the delay until there is room; nothing is stored, and the key stays free."""
    await slow.stub.Notify(batch(1_000))
    before = await slow.stored()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await slow.stub.Notify(batch(20, idempotency_key="k"))
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refusal_of(raised.value).reason == "TENANT_RATE_EXCEEDED"
    assert 10 < retry_delay_s(raised.value) <= 20
    assert (await slow.stored()).get("idempotency") == before.get("idempotency")


async def test_inv8_a_tenants_rate_is_its_own(slow: IntakeWorld) -> None:
    """Others do not feel it."""
    await slow.stub.Notify(batch(1_000))
    async with connect(slow.address, tenant="other") as channel:
        answer = await type(slow.stub)(channel).Notify(batch(1_000))
    assert len(answer.results) == 1_000


async def test_the_rate_counts_items_of_every_command(slow: IntakeWorld) -> None:
    """Every RPC that writes is refused once the burst is spent; questions are answered."""
    await slow.stub.SubmitRequest(
        intake_pb2.SubmitRequestRequest(requests=[request()] * 1_000, wait_for=intake_pb2.WAIT_FOR_ACCEPTED)
    )
    asked, refused = set[str](), set[str]()
    for method, sample in commands():
        try:
            await every_rpc.call(slow.channel, method_named(method), sample)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                refused.add(method)
        else:
            asked.add(method)
    writing = {one.name for one in every_rpc.methods("intake") if not one.client_streaming}
    writing -= {"GetRequest", "ListRequests", "Explain"}
    assert refused == writing
    assert asked == {"ListRequests", "Explain"}


def commands() -> Iterator[tuple[str, Message]]:
    """A sample of every unary RPC of intake."""
    for service, method, sample in every_rpc.samples("limits"):
        if service == "intake" and not method.endswith("Stream"):
            yield method, sample


def method_named(name: str) -> MethodDescriptor:
    """Its descriptor."""
    (found,) = [one for one in every_rpc.methods("intake") if one.name == name]
    return found


async def test_a_stream_above_its_rate_is_not_refused(
    postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus
) -> None:
    """Flow control: all batches are accepted, as fast as the rate allows."""
    async with intake_world(postgres_url, open_database, open_bus, tenant_rate=2_000, tenant_burst=1_000) as world:
        batches = [intake_pb2.NotifyStreamRequest(batch=batch(500)) for _ in range(4)]
        answers = [one async for one in world.stub.NotifyStream(iter(batches))]
    assert [len(one.batch.results) for one in answers] == [500] * 4


async def test_a_stream_above_its_rate_is_held_back(slow: IntakeWorld) -> None:
    """The batch that is too many waits, here for minutes, and nothing of it is stored."""
    call = slow.stub.NotifyStream()
    await call.write(intake_pb2.NotifyStreamRequest(batch=batch(1_000)))
    assert len((await call.read()).batch.results) == 1_000
    await call.write(intake_pb2.NotifyStreamRequest(batch=batch(500, idempotency_key="k")))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(call.read(), 3)
    assert await slow.count("idempotency") == 0


async def test_waiting_takes_as_long_as_the_rate_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """500 items above the burst at 1,000 a second are half a second."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            raise asyncio.CancelledError

    limit = RateLimit(rate=1_000, burst=1_000)
    await limit.wait("shop", 1_000)
    monkeypatch.setattr("services.intake.rpc_limits.asyncio.sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await limit.wait("shop", 500)
    assert 0.3 < waits[0] <= 0.5


@asynccontextmanager
async def silent(
    postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus
) -> AsyncIterator[tuple[IntakeWorld, Measuring, Backlogs]]:
    """Intake whose frames nobody takes; what it has learnt of backlogs is asked for by hand."""
    async with intake_world(postgres_url, open_database, open_bus, peers_run=False, tenant_backlog=3) as world:
        backlogs = Backlogs(most=3)
        yield world, Measuring(db=world.db, store=CommandStore(), backlogs=backlogs, header=TENANT_HEADER), backlogs


async def test_inv9_what_a_tenant_has_under_way_is_bounded(
    postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus
) -> None:
    """RESOURCE_EXHAUSTED for it alone, until its frames have been applied; every replica knows from the table."""
    async with silent(postgres_url, open_database, open_bus) as (world, measuring, elsewhere):
        for _ in range(3):
            await world.stub.Notify(batch(1))
        async with asyncio.timeout(10):
            while (error := await refusal(world)) is None:  # noqa: ASYNC110 - a loop looks every second.
                await asyncio.sleep(0.05)
        assert (error.code(), refusal_of(error).reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "TENANT_BACKLOG_FULL",
        )
        assert retry_delay_s(error) == 5
        async with connect(world.address, tenant="other") as channel:
            await type(world.stub)(channel).Notify(batch(1))
        await measuring.run_once()
        with pytest.raises(Exception, match="wait to be applied"):
            elsewhere.check_room("default")
        elsewhere.check_room("other")
        await world.execute("DELETE FROM outbox")
        await measuring.run_once()
        elsewhere.check_room("default")


async def refusal(world: IntakeWorld) -> grpc.aio.AioRpcError | None:
    """How one more notification is refused, if it is."""
    try:
        await world.stub.Notify(batch(1))
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def test_requests_count_towards_their_tenants_backlog(
    postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus
) -> None:
    """Also commands that have a transaction of their own say whose their frames are."""
    async with silent(postgres_url, open_database, open_bus) as (world, _, _):
        await world.stub.SubmitRequest(
            intake_pb2.SubmitRequestRequest(requests=[request()], wait_for=intake_pb2.WAIT_FOR_ACCEPTED)
        )
        rows = await world.rows("SELECT DISTINCT headers ->> %s FROM outbox", TENANT_HEADER)
    assert rows == [("default",)]
