"""Health, reflection and drain of the gRPC server, as load balancers and grpcurl see them."""

import asyncio
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from libs.errors import SettingsError
from libs.rpc import build_server
from libs.settings import AuthSettings, GrpcSettings, ReflectionMode
from tests.integration.rpc_probe import SERVICE, Standstill, health_of
from tests.integration.test_rpc_server import TOKEN, refused, running, tokens

__all__ = ["tokens"]  # A fixture.


class TestHealthAndReflection:
    """What infrastructure asks."""

    async def test_health_needs_no_credential(self, tokens: AuthSettings) -> None:
        """Kubernetes has none; overall and per service."""
        async with running(auth=tokens) as rpc:
            assert await health_of(rpc.channel) == health_pb2.HealthCheckResponse.SERVING
            assert await health_of(rpc.channel, SERVICE) == health_pb2.HealthCheckResponse.SERVING

    async def test_a_service_that_is_not_ready_says_so(self) -> None:
        """And serves again when it is."""
        async with running() as rpc:
            await rpc.server.set_serving(False)
            assert await health_of(rpc.channel, SERVICE) == health_pb2.HealthCheckResponse.NOT_SERVING
            await rpc.server.set_serving(True)
            assert await health_of(rpc.channel, SERVICE) == health_pb2.HealthCheckResponse.SERVING

    async def test_a_drain_says_not_serving_first_and_lets_calls_end(self) -> None:
        """During the delay new calls are still answered, and the one in progress gets its answer."""
        release, started = asyncio.Event(), asyncio.Event()

        async def wait(request: StringValue, _context: Any) -> StringValue:
            started.set()
            await release.wait()
            return request

        settings = GrpcSettings(drain_delay=timedelta(milliseconds=300), drain_timeout=timedelta(seconds=10))
        async with running(settings) as rpc:
            rpc.probe.behave = wait
            call = rpc.stub.Say(StringValue(value="mine"))
            async with asyncio.timeout(5):
                await started.wait()
                drain = asyncio.create_task(rpc.server.drain())
                await asyncio.sleep(0)
                assert await health_of(rpc.channel) == health_pb2.HealthCheckResponse.NOT_SERVING
                release.set()
                assert (await call).value == "mine"
                await drain

    async def test_a_call_that_does_not_end_is_cancelled_by_the_drain(self) -> None:
        """So that a drain ends."""
        async with asyncio.timeout(5), running(GrpcSettings(drain_timeout=timedelta(milliseconds=100))) as rpc:
            rpc.probe.behave = handler = Standstill()
            call = asyncio.ensure_future(refused(rpc.stub.Say(StringValue())))
            await handler.started.wait()
            await rpc.server.drain()
            await handler.cancelled.wait()
            assert (await call).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

    async def test_open_reflection_lists_services_without_a_credential(self, tokens: AuthSettings) -> None:
        """grpcurl works out of the box; it shows contracts, no data."""
        async with running(auth=tokens) as rpc:
            assert SERVICE in await reflected(rpc.channel)

    async def test_authenticated_reflection_needs_a_credential(self, tokens: AuthSettings) -> None:
        """By setting."""
        settings = GrpcSettings(reflection=ReflectionMode.AUTHENTICATED)
        async with running(settings, auth=tokens) as rpc:
            assert (await refused(reflected(rpc.channel))).code() is grpc.StatusCode.UNAUTHENTICATED
        async with running(settings, auth=tokens, token=TOKEN) as rpc:
            assert SERVICE in await reflected(rpc.channel)

    async def test_reflection_can_be_off(self) -> None:
        """By setting."""
        async with running(GrpcSettings(reflection=ReflectionMode.OFF)) as rpc:
            assert (await refused(reflected(rpc.channel))).code() is grpc.StatusCode.UNIMPLEMENTED

    async def test_a_port_in_use_is_a_wrong_setting(self) -> None:
        """Instead of two processes sharing its calls at random."""
        async with running() as rpc:
            settings = GrpcSettings(port=rpc.server.port)
            second = build_server(settings, auth=AuthSettings(), servicers=[], registry=CollectorRegistry())
            with pytest.raises(SettingsError, match="cannot listen"):
                await second.__aenter__()


async def reflected(channel: grpc.aio.Channel) -> set[str]:
    """The services that reflection lists."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    return {
        one.name
        async for answer in stub.ServerReflectionInfo(requests)
        for one in answer.list_services_response.service
    }
