"""A service's gRPC server: its services wrapped as `libs.rpc_calls` says, health, reflection, TLS, drain.

    server = build_server(settings, auth=auth_settings, registry=registry,
                          servicers=[Servicer(add_IntakeServiceServicer_to_server, IntakeRpc(...))])
    await life.enter(server)

On drain health says NOT_SERVING first, new calls are answered for `drain_delay` more, then refused (UNAVAILABLE), and
those in progress may end within most of what is left of `drain_timeout`. Only then gRPC itself is stopped: from that
moment on grpc.aio takes no calls from its queue, and those that have just come would wait for the whole grace period,
to be cancelled at its end.
"""

from __future__ import annotations  # gRPC's classes are generic in its stubs only.

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from libs.auth import Authenticator, authenticator_of, refuse_open_server
from libs.errors import SettingsError
from libs.rpc_calls import Calls, Method
from libs.rpc_context import (
    Deadline,
    Principal,
    acting,
    deadline_of,
    principal_of,
    remaining_of,
    require_role,
    tenant_of,
)
from libs.rpc_errors import code_number, code_of
from libs.rpc_metrics import RpcMetrics
from libs.rpc_tls import server_credentials
from libs.settings import AuthSettings, GrpcSettings, ReflectionMode, TlsMode
from libs.telemetry.logs import get_logger

__all__ = [
    "Deadline",
    "Principal",
    "RpcServer",
    "Servicer",
    "acting",
    "build_server",
    "code_number",
    "code_of",
    "deadline_of",
    "principal_of",
    "remaining_of",
    "require_role",
    "tenant_of",
]

_log = get_logger(__name__)

# Of the time to drain, the share that calls in progress get; the rest is for what closes after the server.
_CALLS_SHARE = 0.8
_QUIET_S = 0.1
"""Nobody has called for so long: then gRPC is stopped, and hardly a call is in its queue."""
_MAX_QUIET_S = 2.0

if TYPE_CHECKING:
    Handlers = Mapping[str, grpc.RpcMethodHandler[Any, Any]]


@dataclass(frozen=True, slots=True)
class Servicer:
    """A servicer and the generated function that registers it."""

    add_to_server: Callable[[Any, Any], None]
    servicer: object


class RpcServer:
    """The server, listening for as long as the `async with` block lasts."""

    def __init__(
        self, server: grpc.aio.Server, settings: GrpcSettings, *, calls: Calls, services: Sequence[str]
    ) -> None:
        self._server = server
        self._calls = calls
        self._settings = settings
        self._services = ("", *services)
        self.health = health.aio.HealthServicer()
        self.port = settings.port

    async def __aenter__(self) -> Self:
        await self.set_serving(False)
        self.port = _listen(self._server, self._settings)
        await self._server.start()
        await self.set_serving(True)
        _log.info("Listening for gRPC.", address=self.address, tls=self._settings.tls.value)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.drain()

    @property
    def address(self) -> str:
        """`host:port` with the port that was chosen."""
        return _address(self._settings.host, self.port)

    async def set_serving(self, is_serving: bool) -> None:
        """What health says of the process and of each service. After a drain has begun it has no effect."""
        status = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self.health.set(service, status)

    async def drain(self) -> None:
        """Stop as the module says; returns when every call has ended or was cancelled."""
        await self.health.enter_graceful_shutdown()
        delay = self._settings.drain_delay
        await asyncio.sleep(delay.total_seconds())
        limit_s = (self._settings.drain_timeout - delay).total_seconds() * _CALLS_SHARE
        await self._calls.drain(limit_s, quiet_s=_QUIET_S, most_quiet_s=min(_MAX_QUIET_S, limit_s))
        await self._server.stop(None)


def build_server(
    settings: GrpcSettings,
    *,
    auth: AuthSettings | Authenticator,
    servicers: Iterable[Servicer],
    registry: CollectorRegistry,
) -> RpcServer:
    """A server ready to be entered; SettingsError when the settings would leave it open, or a file cannot be used."""
    if isinstance(auth, AuthSettings):
        refuse_open_server(auth.mode, settings.host)
        auth = authenticator_of(auth)
    server = grpc.aio.server(options=_options(settings))
    calls = Calls(settings, authenticator=auth, metrics=(metrics := RpcMetrics(registry)))
    registrar = _Registrar(server, calls, metrics)
    for servicer in servicers:
        registrar.add(servicer)
    rpc = RpcServer(server, settings, calls=calls, services=tuple(registrar.services))
    registrar.is_open = True
    registrar.add(Servicer(health_pb2_grpc.add_HealthServicer_to_server, rpc.health))
    if settings.reflection is not ReflectionMode.OFF:
        registrar.is_open = settings.reflection is ReflectionMode.OPEN
        names = (*registrar.services, reflection.SERVICE_NAME)
        add = reflection_pb2_grpc.add_ServerReflectionServicer_to_server
        registrar.add(Servicer(add, reflection.aio.ReflectionServicer(names)))
    return rpc


class _Registrar:
    """Stands in for the server when generated code registers a servicer, and wraps each handler on its way."""

    def __init__(self, server: grpc.aio.Server, calls: Calls, metrics: RpcMetrics) -> None:
        self._server, self._calls, self._metrics = server, calls, metrics
        self.is_open = False
        self.services: list[str] = []

    def add(self, servicer: Servicer) -> None:
        """Register all methods of a servicer."""
        servicer.add_to_server(servicer.servicer, self)

    def add_generic_rpc_handlers(self, _handlers: object) -> None:
        """Generated code registers everything twice; the other call says the names."""

    def add_registered_method_handlers(self, service: str, handlers: Handlers) -> None:
        """Register all methods of a service, wrapped."""
        wrapped = {name: self._calls.wrap(self._method(service, name, handlers), handlers[name]) for name in handlers}
        self._metrics.know(service, handlers)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, wrapped),))
        self.services.append(service)

    def _method(self, service: str, name: str, handlers: Handlers) -> Method:
        handler = handlers[name]
        is_stream = bool(handler.request_streaming or handler.response_streaming)
        return Method(service=service, name=name, is_open=self.is_open, is_stream=is_stream)


def _options(settings: GrpcSettings) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_metadata_size", 16 * 1024),
        # Two processes on one port would share its calls at random; a second one must fail instead.
        ("grpc.so_reuseport", 0),
        # Idle clients may ping every 10 s, to notice a dead connection; more often is an attack.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]


def _listen(server: grpc.aio.Server, settings: GrpcSettings) -> int:
    address = _address(settings.host, settings.port)
    try:
        if settings.tls is TlsMode.PLAINTEXT:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, server_credentials(settings))
    except RuntimeError as err:  # gRPC's own way to say that bind failed.
        raise SettingsError(f"CARILLON_GRPC_HOST, CARILLON_GRPC_PORT: cannot listen on {address}: {err}.") from err


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
