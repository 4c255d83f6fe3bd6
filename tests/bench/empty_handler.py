"""A gRPC server whose handlers do nothing: what calls cost before anything is done for them.

    python -m tests.bench.empty_handler

`/Empty/Bare` is answered by grpc.aio alone. The methods of IntakeService are answered by an empty handler with
everything of libs.rpc around it: decoding, deadline, authentication (mode none), metrics, trace. Prints its address;
ends when its standard input does.
"""

import asyncio
import sys
from typing import Any, cast

import grpc
import uvloop
from carillon.intake.v1 import intake_pb2, intake_pb2_grpc
from prometheus_client import CollectorRegistry

from libs.rpc import Servicer, build_server
from libs.settings import AuthSettings, GrpcSettings, LogLevel, TelemetrySettings
from libs.telemetry.logs import configure_logs

BARE = "/Empty/Bare"
_ANSWER = intake_pb2.NotifyResponse(results=[intake_pb2.ItemResult(id="x" * 36)])


class _Empty(intake_pb2_grpc.IntakeServiceServicer):
    async def Notify(self, request: object, context: object) -> intake_pb2.NotifyResponse:
        return _ANSWER


async def _bare(_request: bytes, _context: Any) -> bytes:
    return _ANSWER_BYTES


_ANSWER_BYTES = _ANSWER.SerializeToString()


async def _serve() -> None:
    configure_logs(TelemetrySettings(log_level=LogLevel.WARNING), service="bench")
    bare = grpc.aio.server()
    bare.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("Empty", {"Bare": grpc.unary_unary_rpc_method_handler(_bare)})]
    )
    port = bare.add_insecure_port("127.0.0.1:0")
    await bare.start()
    add = intake_pb2_grpc.add_IntakeServiceServicer_to_server
    servicers, registry = [Servicer(add, cast(Any, _Empty)())], CollectorRegistry()
    async with build_server(GrpcSettings(), auth=AuthSettings(), servicers=servicers, registry=registry) as wrapped:
        print(f"127.0.0.1:{port} {wrapped.address}", flush=True)
        await asyncio.to_thread(sys.stdin.read)
    await bare.stop(0)


if __name__ == "__main__":
    uvloop.run(_serve())
