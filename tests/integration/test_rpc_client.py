"""The client's channel: credentials on every shape of call, and retries only where repeating is harmless."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from socket import inet_aton
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import StringValue

from libs.errors import Unavailable
from libs.rpc import tenant_of
from libs.rpc_client import connect, refusal_of
from libs.settings import GrpcSettings
from local.processes import free_port
from tests.integration.rpc_probe import SERVICE, ProbeStub
from tests.integration.test_rpc_server import refused, running


class FailingOnce:
    """A behaviour that is unavailable for the first call only."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, request: StringValue, _context: Any) -> StringValue:
        self.calls += 1
        if self.calls == 1:
            raise Unavailable("Starting.")
        return request


class NameServer(asyncio.DatagramProtocol):
    """DNS that knows one IPv4 address for every name (RFC 1035, 4.1)."""

    def __init__(self, answer: str) -> None:
        self.answer = answer
        self.address = ""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.address = "{}:{}".format(*transport.get_extra_info("sockname"))

    def datagram_received(self, data: bytes, addr: Any) -> None:
        question = data[12 : data.index(b"\0", 12) + 5]
        is_known = question[-4:] == b"\0\1\0\1"  # A, IN; of AAAA it knows none.
        record = b"\xc0\x0c\0\1\0\1" + b"\0\0\0\0" + b"\0\4" + inet_aton(self.answer) if is_known else b""
        head = data[:2] + b"\x81\x80" + b"\0\1" + (b"\0\1" if is_known else b"\0\0") + b"\0\0\0\0"
        self._transport.sendto(head + question + record, addr)


@asynccontextmanager
async def name_server(answer: str) -> AsyncIterator[NameServer]:
    """One that runs for the block, and says `answer` until it is told another."""
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(lambda: NameServer(answer), local_addr=("127.0.0.1", 0))
    try:
        yield protocol
    finally:
        transport.close()


async def say_tenant(_request: StringValue, context: Any) -> StringValue:
    """Answer the caller's tenant."""
    return StringValue(value=tenant_of(context))


async def test_credentials_go_with_every_shape_of_call() -> None:
    """Unary and streams alike."""
    async with running(tenant="acme") as rpc:
        rpc.probe.behave = say_tenant
        assert (await rpc.stub.Say(StringValue())).value == "acme"
        assert [one.value async for one in rpc.stub.SayThrice(StringValue())] == ["acme"] * 3
        assert [one.value async for one in rpc.stub.SayEach(iter([StringValue()] * 2))] == ["acme"] * 2


async def test_an_unavailable_call_is_not_repeated_by_itself() -> None:
    """It may have been seen; only the caller knows whether repeating is harmless."""
    async with running() as rpc:
        rpc.probe.behave = FailingOnce()
        assert (await refused(rpc.stub.Say(StringValue()))).code() is grpc.StatusCode.UNAVAILABLE


async def test_an_unavailable_call_is_repeated_where_the_caller_says_so() -> None:
    """By service, or by service and method."""
    for name in (SERVICE, f"{SERVICE}/Say"):
        async with running(retried=[name]) as rpc:
            rpc.probe.behave = behave = FailingOnce()
            assert (await rpc.stub.Say(StringValue(value="again"))).value == "again"
            assert behave.calls == 2


async def test_of_many_processes_those_that_stop_get_no_more_calls() -> None:
    """From the moment they say so, while they would still answer; and nobody repeats anything."""
    settings = GrpcSettings(drain_delay=timedelta(seconds=1), drain_timeout=timedelta(seconds=3))
    async with running(settings) as stopping, running(settings) as staying:
        address = f"ipv4:{stopping.server.address},{staying.server.address}"
        async with connect(address, is_many=True) as channel:
            stub = ProbeStub(channel)
            async with asyncio.timeout(10):
                while not (stopping.probe.requests and staying.probe.requests):
                    await stub.Say(StringValue(value="both"))
            drain = asyncio.create_task(stopping.server.drain())
            while not drain.done():
                assert (await stub.Say(StringValue(value="one"))).value == "one"
                await asyncio.sleep(0.005)
        await drain


async def test_pods_that_were_replaced_are_found_soon() -> None:
    """Under new addresses: when the last known one is gone the name is asked again at once, and not 30 s later."""
    port = free_port()
    async with AsyncExitStack() as stack:
        names = await stack.enter_async_context(name_server("127.0.0.2"))
        channel = await stack.enter_async_context(connect(f"dns://{names.address}/pods.test:{port}", is_many=True))
        stub = ProbeStub(channel)
        async with running(GrpcSettings(host="127.0.0.2", port=port)):
            await stub.Say(StringValue(), wait_for_ready=True)
        names.answer = "127.0.0.3"
        async with running(GrpcSettings(host="127.0.0.3", port=port)):
            await stub.Say(StringValue(), wait_for_ready=True, timeout=15)


async def test_a_token_that_changes_is_asked_for_each_call() -> None:
    """Kubernetes replaces service-account tokens in their file."""
    asked: list[str] = []

    def token() -> str:
        asked.append("asked")
        return "any"

    async with running(token=token) as rpc:
        await rpc.stub.Say(StringValue())
        await rpc.stub.Say(StringValue())
    assert asked == ["asked", "asked"]


async def test_an_error_without_details_reads_as_empty() -> None:
    """Such as gRPC's own, for a method that is not there."""
    async with running() as rpc:
        unknown: Any = rpc.channel.unary_unary("/nowhere.Service/Method")
        refusal = refusal_of(await refused(unknown(b"")))
        assert (refusal.reason, refusal.violations, refusal.retry_after) == ("", (), None)


async def test_a_new_channel_knows_nothing_of_an_older_ones_failure() -> None:
    """It tries at once, though another one of this process waits before it tries that address again."""
    port = free_port()
    async with connect(f"127.0.0.1:{port}") as early:
        assert (await refused(ProbeStub(early).Say(StringValue()))).code() is grpc.StatusCode.UNAVAILABLE
        async with running(GrpcSettings(port=port)) as rpc:
            assert (await rpc.stub.Say(StringValue(value="there"))).value == "there"
