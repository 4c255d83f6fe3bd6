"""Channels to Carillon's services, for the command line, business services and tests.

    async with connect("127.0.0.1:7001", token="crl_…") as channel:
        stub = IntakeServiceStub(channel)

A call that the server never saw is repeated by gRPC itself. A call that may have been seen is repeated only where the
caller says that repeating is harmless: `retried` names services or methods that only read, or whose every request
carries an idempotency key.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from libs.auth import AUTHORIZATION, TENANT
from libs.errors import FieldViolation
from libs.telemetry.traces import inject

Token = str | Callable[[], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientTls:
    """How to check the server, and how to prove who we are. `ca` None: the system's CAs."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """The details of a call's error, for programs; see `refusal_of`."""

    reason: str = ""
    metadata: dict[str, str]
    violations: tuple[FieldViolation, ...] = ()
    retry_after: timedelta | None = None


def connect(
    address: str,
    *,
    token: Token | None = None,
    tenant: str | None = None,
    tls: ClientTls | None = None,
    max_message_bytes: int = 4 << 20,
    retried: Sequence[str] = (),
    is_many: bool = False,
) -> grpc.aio.Channel:
    """A channel; connects when first used. Close it, or use it as `async with`.

    A callable `token` is asked before each call, for tokens that are replaced in their file. `retried` holds full
    names, `carillon.intake.v1.IntakeService` or with `/Method`; those are tried up to four times when UNAVAILABLE.

    `is_many`: the address stands for each of several processes (`dns:///` of a headless Service, `ipv4:` with several),
    and not for something in front of them. Then health is watched, and a process that is about to stop gets no more
    calls from the moment it says so (CARILLON_GRPC_DRAIN_DELAY); with one address there would be nobody else to call.
    """
    options = _options(max_message_bytes, _service_config(retried, is_many=is_many))
    interceptors = _interceptors(_Credential(token, tenant))
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    if tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    credentials = grpc.ssl_channel_credentials(
        root_certificates=None if tls.ca is None else tls.ca.read_bytes(),
        private_key=None if tls.key is None else tls.key.read_bytes(),
        certificate_chain=None if tls.cert is None else tls.cert.read_bytes(),
    )
    return grpc.aio.secure_channel(address, credentials, options=options, interceptors=interceptors)


def refusal_of(error: grpc.RpcError) -> Refusal:
    """What the server said beside code and message; empty when it said no more."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    info, request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for detail in status.details if status is not None else ():
        for message in (info, request, retry):
            detail.Unpack(message)
    return Refusal(
        reason=info.reason,
        metadata=dict(info.metadata),
        violations=tuple(FieldViolation(one.field, one.description) for one in request.field_violations),
        retry_after=retry.retry_delay.ToTimedelta() if retry.HasField("retry_delay") else None,
    )


def _options(max_message_bytes: int, service_config: dict[str, object]) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # Notice a connection that died silently within half a minute; the server permits a ping every 10 s.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # A new channel tries anew: a shared pool would begin it with the failure, and the wait, of one before it.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        # A pod that is replaced has a new address. With the usual 30 s a rollout leaves nobody to call meanwhile.
        ("grpc.dns_min_time_between_resolutions_ms", 1_000),
        ("grpc.service_config", json.dumps(service_config)),
    ]


def _service_config(retried: Sequence[str], *, is_many: bool) -> dict[str, object]:
    """Retries as in gRFC A6, with round robin over all addresses of a name; health as in A17."""
    config: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if is_many:
        config["healthCheckConfig"] = {"serviceName": ""}
    if not retried:
        return config
    names = [
        {"service": service, **({"method": method} if method else {})} for service, _, method in map(_split, retried)
    ]
    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return {**config, "methodConfig": [{"name": names, "retryPolicy": policy}]}


def _split(name: str) -> tuple[str, str, str]:
    return name.partition("/")


class _Credential:
    """Adds credential, tenant and trace context to a call's metadata."""

    def __init__(self, token: Token | None, tenant: str | None) -> None:
        self._token, self._tenant = token, tenant

    def added_to(self, details: Any) -> Any:
        """The details (a named tuple, which the stubs do not know) with more metadata."""
        metadata = grpc.aio.Metadata(*(details.metadata or ()))
        if self._token is not None:
            token = self._token if isinstance(self._token, str) else self._token()
            metadata.add(AUTHORIZATION, f"Bearer {token}")
        if self._tenant is not None:
            metadata.add(TENANT, self._tenant)
        for key, value in inject().items():
            metadata.add(key, value)
        return details._replace(metadata=metadata)


class _UnaryUnary(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, credential: _Credential) -> None:
        self._credential = credential

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self._credential.added_to(client_call_details), request)


class _UnaryStream(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, credential: _Credential) -> None:
        self._credential = credential

    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self._credential.added_to(client_call_details), request)


class _StreamUnary(grpc.aio.StreamUnaryClientInterceptor):
    def __init__(self, credential: _Credential) -> None:
        self._credential = credential

    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await continuation(self._credential.added_to(client_call_details), request_iterator)


class _StreamStream(grpc.aio.StreamStreamClientInterceptor):
    def __init__(self, credential: _Credential) -> None:
        self._credential = credential

    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await continuation(self._credential.added_to(client_call_details), request_iterator)


def _interceptors(credential: _Credential) -> list[grpc.aio.ClientInterceptor]:
    """One per shape of call: gRPC takes an interceptor for the first shape it fits only."""
    return [_UnaryUnary(credential), _UnaryStream(credential), _StreamUnary(credential), _StreamStream(credential)]
