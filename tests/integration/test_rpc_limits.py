"""What bounds and counts the calls of a gRPC server."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2, health_pb2_grpc

from libs.rpc_client import refusal_of
from libs.settings import AuthSettings, GrpcSettings
from tests.integration.rpc_probe import SERVICE, health_of
from tests.integration.test_rpc_server import Running, refused, running, tokens

__all__ = ["tokens"]  # A fixture.


def uploaded_slowly(rpc: Running) -> tuple[Any, asyncio.Event]:
    """A call of Say whose request comes when the event is set."""
    arrive = asyncio.Event()

    async def request() -> AsyncIterator[bytes]:
        await arrive.wait()
        yield StringValue(value="at last").SerializeToString()

    say: Any = rpc.channel.stream_unary(f"/{SERVICE}/Say", response_deserializer=StringValue.FromString)
    return say(request()), arrive


async def accepted(rpc: Running, calls: int) -> bool:
    """Whether so many calls of Say are in progress, soon."""
    async with asyncio.timeout(5):
        while rpc.metric("carillon_rpc_in_flight") != calls:  # noqa: ASYNC110 - it is gRPC that tells.
            await asyncio.sleep(0)
    return True


async def is_health_refused(rpc: Running) -> bool:
    """Whether there is no place for a health check."""
    try:
        await health_of(rpc.channel)
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    return False


class TestLimitsAndMetrics:
    """What bounds and counts calls."""

    async def test_one_call_too_many_is_refused_at_once(self) -> None:
        """INV-9, and health still answers."""
        release = asyncio.Event()
        started = asyncio.Event()

        async def wait(request: StringValue, _context: Any) -> StringValue:
            started.set()
            await release.wait()
            return request

        async with running(GrpcSettings(max_concurrent_rpcs=1)) as rpc:
            rpc.probe.behave = wait
            first = rpc.stub.Say(StringValue(value="first"))
            async with asyncio.timeout(5):
                await started.wait()
            error = await refused(rpc.stub.Say(StringValue()))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert refusal_of(error).retry_after == timedelta(seconds=1)
            assert await health_of(rpc.channel) == health_pb2.HealthCheckResponse.SERVING
            release.set()
            assert (await first).value == "first"
            assert (await rpc.stub.Say(StringValue(value="its place is free"))).value == "its place is free"

    async def test_inv9_a_call_whose_request_is_still_to_come_is_one_of_them(self) -> None:
        """However slowly it is uploaded: what it has sent so far is held here."""
        async with running(GrpcSettings(max_concurrent_rpcs=1)) as rpc:
            uploading, arrive = uploaded_slowly(rpc)
            assert await accepted(rpc, 1)
            assert (await refused(rpc.stub.Say(StringValue()))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            arrive.set()
            assert await uploading == StringValue(value="at last")
            assert (await rpc.stub.Say(StringValue(value="its place is free"))).value == "its place is free"

    async def test_inv9_nobody_uploads_without_a_credential(self, tokens: AuthSettings) -> None:
        """The request is not waited for."""
        async with running(auth=tokens) as rpc:
            uploading, _ = uploaded_slowly(rpc)
            async with asyncio.timeout(5):
                assert (await refused(uploading)).code() is grpc.StatusCode.UNAUTHENTICATED

    async def test_inv9_an_upload_has_the_deadline_of_its_call(self) -> None:
        """So that its place is free again, whatever the caller does."""
        async with running(GrpcSettings(default_deadline=timedelta(milliseconds=100))) as rpc:
            uploading, _ = uploaded_slowly(rpc)
            async with asyncio.timeout(5):
                assert (await refused(uploading)).code() is grpc.StatusCode.DEADLINE_EXCEEDED

    async def test_a_request_that_never_comes_is_an_invalid_argument(self) -> None:
        """Its caller has said that it has sent everything."""
        async with running() as rpc:
            nothing: Any = rpc.channel.stream_unary(f"/{SERVICE}/Say")
            assert (await refused(nothing(iter(())))).code() is grpc.StatusCode.INVALID_ARGUMENT
            assert rpc.probe.requests == []

    async def test_inv9_calls_that_need_no_credential_have_a_limit_of_their_own(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who watches health without end takes nobody else's place."""
        monkeypatch.setattr("libs.rpc_calls._MAX_OPEN_CALLS", 1)
        async with running() as rpc:
            watching: Any = health_pb2_grpc.HealthStub(rpc.channel)
            watch = watching.Watch(health_pb2.HealthCheckRequest())
            await anext(aiter(watch))
            assert (await refused(health_of(rpc.channel))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (await rpc.stub.Say(StringValue(value="all the same"))).value == "all the same"
            watch.cancel()
            async with asyncio.timeout(5):
                while await is_health_refused(rpc):  # Until the server has heard of it.
                    pass

    async def test_series_of_known_methods_start_at_zero(self) -> None:
        """The first error is an increase, which alerts can see."""
        async with running() as rpc:
            assert rpc.metric("carillon_rpc_requests_total", code="INTERNAL") == 0
            assert rpc.metric("carillon_rpc_duration_seconds_count") == 0

    async def test_calls_are_counted_and_timed(self) -> None:
        """By service, method and code."""
        async with running() as rpc:
            await rpc.stub.Say(StringValue())
        assert rpc.metric("carillon_rpc_requests_total", code="OK") == 1
        assert rpc.metric("carillon_rpc_duration_seconds_count") == 1

    async def test_an_unknown_method_makes_no_series(self) -> None:
        """Labels come from the contract, never from the wire."""
        async with running() as rpc:
            unknown: Any = rpc.channel.unary_unary(f"/{SERVICE}/Made_up_by_somebody")
            error = await refused(unknown(b""))
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED
            samples = [sample for metric in rpc.registry.collect() for sample in metric.samples]
            assert not [sample for sample in samples if "Made_up_by_somebody" in sample.labels.values()]
