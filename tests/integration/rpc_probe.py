"""A small service, in the shape generated code has, that does what a test tells it: for the tests of libs.rpc."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import BytesValue, StringValue
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = "carillon.probe.v1.ProbeService"

Behave = Callable[[StringValue, Any], Awaitable[StringValue]]


class Standstill:
    """A behaviour that never answers; knows whether it has begun, and whether it was cancelled."""

    def __init__(self) -> None:
        self.started, self.cancelled = asyncio.Event(), asyncio.Event()

    async def __call__(self, _request: StringValue, _context: Any) -> StringValue:
        self.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
        raise AssertionError


async def echo(request: StringValue, _context: Any) -> StringValue:
    """Answer what was asked."""
    return request


class Probe:
    """Counts the requests that reach it and answers with `behave`."""

    def __init__(self, behave: Behave = echo) -> None:
        self.behave = behave
        self.requests: list[str] = []

    async def Say(self, request: StringValue, context: Any) -> StringValue:
        self.requests.append(request.value)
        return await self.behave(request, context)

    async def SayThrice(self, request: StringValue, context: Any) -> AsyncIterator[StringValue]:
        for _ in range(3):
            yield await self.behave(request, context)

    async def SayEach(self, requests: AsyncIterator[StringValue], context: Any) -> AsyncIterator[StringValue]:
        async for request in requests:
            yield await self.Say(request, context)

    def Later(self, _request: StringValue, context: Any) -> StringValue:
        """As generated code does for a method that nobody overrode."""
        context.set_code(grpc.StatusCode.UNIMPLEMENTED)
        context.set_details("Method not implemented!")
        raise NotImplementedError("Method not implemented!")


def add_probe_to_server(probe: Probe, server: Any) -> None:
    """As generated code registers a servicer."""
    codec: dict[str, Any] = {
        "request_deserializer": StringValue.FromString,
        "response_serializer": StringValue.SerializeToString,
    }
    handlers: dict[str, Any] = {
        "Say": grpc.unary_unary_rpc_method_handler(probe.Say, **codec),
        "SayThrice": grpc.unary_stream_rpc_method_handler(probe.SayThrice, **codec),
        "SayEach": grpc.stream_stream_rpc_method_handler(probe.SayEach, **codec),
        "Later": grpc.unary_unary_rpc_method_handler(probe.Later, **codec),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_registered_method_handlers(SERVICE, handlers)


class ProbeStub:
    """As the generated stub, and `raw`, which sends any bytes as a request."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        def method(name: str) -> dict[str, Any]:
            return {
                "method": f"/{SERVICE}/{name}",
                "request_serializer": StringValue.SerializeToString,
                "response_deserializer": StringValue.FromString,
            }

        self.Say: Any = channel.unary_unary(**method("Say"))
        self.SayThrice: Any = channel.unary_stream(**method("SayThrice"))
        self.SayEach: Any = channel.stream_stream(**method("SayEach"))
        self.Later: Any = channel.unary_unary(**method("Later"))
        self.raw: Any = channel.unary_unary(f"/{SERVICE}/Say", response_deserializer=BytesValue.FromString)
        self.raw_each: Any = channel.stream_stream(f"/{SERVICE}/SayEach", response_deserializer=StringValue.FromString)


async def health_of(channel: grpc.aio.Channel, service: str = "") -> int:
    """What health says."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return int(answer.status)
