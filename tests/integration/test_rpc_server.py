"""The gRPC server as its callers see it: every refusal is a clear status."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from prometheus_client import CollectorRegistry

from libs import errors
from libs.errors import SettingsError, Violations
from libs.rpc import RpcServer, Servicer, build_server, deadline_of, principal_of, remaining_of, require_role, tenant_of
from libs.rpc_client import connect, refusal_of
from libs.settings import AuthMode, AuthSettings, GrpcSettings
from tests.integration.rpc_probe import SERVICE, Probe, ProbeStub, Standstill, add_probe_to_server

TOKEN = "crl_a-token-of-the-shop"


class Running:
    """A server with a probe, and a stub connected to it."""

    def __init__(self, server: RpcServer, channel: grpc.aio.Channel, probe: Probe, registry: CollectorRegistry) -> None:
        self.server, self.channel, self.probe, self.registry = server, channel, probe, registry
        self.stub = ProbeStub(channel)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, {"rpc_service": SERVICE, "method": "Say", **labels})


@asynccontextmanager
async def running(
    settings: GrpcSettings | None = None, *, auth: AuthSettings | None = None, **channel: Any
) -> AsyncIterator[Running]:
    """A running server and a client, for the block."""
    probe, registry = Probe(), CollectorRegistry()
    server = build_server(
        settings or GrpcSettings(drain_timeout=timedelta(seconds=1)),
        auth=auth or AuthSettings(),
        servicers=[Servicer(add_probe_to_server, probe)],
        registry=registry,
    )
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(server)
        client = await stack.enter_async_context(connect(server.address, **channel))
        yield Running(server, client, probe, registry)


@pytest.fixture
def tokens(tmp_path: Path) -> AuthSettings:
    """Mode tokens with one token, of the tenant `shop`."""
    file = tmp_path / "tokens.json"
    entry = {"name": "backend", "sha256": hashlib.sha256(TOKEN.encode()).hexdigest(), "tenant": "shop"}
    file.write_text(json.dumps({"tokens": [entry]}))
    return AuthSettings(mode=AuthMode.TOKENS, tokens_file=file)


async def refused(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def behaving(behave: Callable[[Any], Any]) -> Callable[[StringValue, Any], Awaitable[StringValue]]:
    """A probe's behaviour from a plain function of the context, whose result is answered as text."""

    async def say(_request: StringValue, context: Any) -> StringValue:
        return StringValue(value=str(behave(context)))

    return say


def raising(error: Exception) -> Callable[[StringValue, Any], Awaitable[StringValue]]:
    """A probe's behaviour that always fails."""

    async def say(_request: StringValue, _context: Any) -> StringValue:
        raise error

    return say


class TestWhoCalls:
    """Authentication and tenants."""

    async def test_without_auth_the_caller_has_the_default_tenant(self) -> None:
        """Mode none takes the default tenant when none is named."""
        async with running() as rpc:
            rpc.probe.behave = behaving(tenant_of)
            assert (await rpc.stub.Say(StringValue())).value == "default"

    async def test_without_auth_the_caller_names_its_tenant(self) -> None:
        """Mode none believes the metadata."""
        async with running(tenant="acme") as rpc:
            rpc.probe.behave = behaving(tenant_of)
            assert (await rpc.stub.Say(StringValue())).value == "acme"

    async def test_a_token_stands_for_its_tenant(self, tokens: AuthSettings) -> None:
        """INV-8: the tenant comes from the credential."""
        async with running(auth=tokens, token=TOKEN) as rpc:
            rpc.probe.behave = behaving(lambda context: (tenant_of(context), principal_of(context).subject))
            assert (await rpc.stub.Say(StringValue())).value == "('shop', 'backend')"

    async def test_a_missing_token_is_unauthenticated_and_names_the_metadata_key(self, tokens: AuthSettings) -> None:
        """The caller learns where the token belongs, and the handler never runs."""
        async with running(auth=tokens) as rpc:
            error = await refused(rpc.stub.Say(StringValue()))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert "authorization" in (error.details() or "")
            assert refusal_of(error).reason == "CREDENTIAL_MISSING"
            assert refusal_of(error).metadata == {"key": "authorization"}
            assert rpc.probe.requests == []

    async def test_an_unknown_token_is_unauthenticated(self, tokens: AuthSettings) -> None:
        """A wrong token is not told apart from one that never was."""
        async with running(auth=tokens, token="crl_wrong") as rpc:
            error = await refused(rpc.stub.Say(StringValue()))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert refusal_of(error).reason == "CREDENTIAL_INVALID"

    async def test_another_tenant_than_the_credentials_is_denied(self, tokens: AuthSettings) -> None:
        """INV-8: naming another tenant is refused, and the handler never runs."""
        async with running(auth=tokens, token=TOKEN, tenant="acme") as rpc:
            error = await refused(rpc.stub.Say(StringValue()))
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert refusal_of(error).reason == "WRONG_TENANT"
            assert rpc.probe.requests == []

    async def test_a_tenant_that_cannot_be_one_is_an_invalid_argument(self) -> None:
        """The violation names the metadata key."""
        async with running(tenant="a/b") as rpc:
            error = await refused(rpc.stub.Say(StringValue()))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert [one.field for one in refusal_of(error).violations] == ["metadata['carillon-tenant']"]

    async def test_a_missing_role_is_denied(self, tokens: AuthSettings) -> None:
        """The caller learns which role it lacks."""
        async with running(auth=tokens, token=TOKEN) as rpc:
            rpc.probe.behave = behaving(lambda context: require_role(context, "operator"))
            error = await refused(rpc.stub.Say(StringValue()))
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert refusal_of(error).metadata == {"role": "operator"}

    async def test_streams_are_authenticated_too(self, tokens: AuthSettings) -> None:
        """A stream without a token ends before its handler sees anything."""
        async with running(auth=tokens) as rpc:
            error = await refused(anext(aiter(rpc.stub.SayEach(iter([StringValue(value="x")])))))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert rpc.probe.requests == []

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "carillon.example"])
    def test_an_open_server_is_refused_where_others_can_reach_it(self, host: str) -> None:
        """Mode none is for loopback only."""
        with pytest.raises(SettingsError, match="CARILLON_AUTH_MODE"):
            build_server(GrpcSettings(host=host), auth=AuthSettings(), servicers=[], registry=CollectorRegistry())


class TestBadInput:
    """What is wrong with a request is told as the caller's mistake, never as ours."""

    @pytest.mark.parametrize(
        "request_bytes", [b"\xff\xff\xff", b"\x0a\x05ab", b"\x0a\x02\xc3\x28"], ids=["garbage", "cut off", "bad UTF-8"]
    )
    async def test_a_malformed_message_is_an_invalid_argument(self, request_bytes: bytes) -> None:
        """Neither INTERNAL nor UNKNOWN, which gRPC itself would say."""
        async with running() as rpc:
            error = await refused(rpc.stub.raw(request_bytes))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert refusal_of(error).reason == "MALFORMED_REQUEST"
            assert rpc.probe.requests == []

    async def test_a_malformed_message_in_a_stream_ends_it(self) -> None:
        """What came before it has been answered."""
        async with running() as rpc:
            answers = aiter(rpc.stub.raw_each(iter([StringValue(value="good").SerializeToString(), b"\xff"])))
            assert (await anext(answers)).value == "good"
            assert (await refused(anext(answers))).code() is grpc.StatusCode.INVALID_ARGUMENT

    async def test_an_oversized_payload_is_refused_and_the_limit_named(self) -> None:
        """The handler never sees it."""
        async with running(GrpcSettings(max_message_bytes=65536)) as rpc:
            error = await refused(rpc.stub.Say(StringValue(value="x" * 70_000)))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "65536" in (error.details() or "")
            assert rpc.probe.requests == []

    async def test_field_violations_reach_the_caller(self) -> None:
        """All of them, with their paths."""
        violations = Violations()
        violations.add("items[3].entity", "must be 1-256 characters, got 300")
        violations.add("zone", "must be an IANA time zone")
        async with running() as rpc:
            rpc.probe.behave = behaving(lambda _: violations.raise_if_any())
            error = await refused(rpc.stub.Say(StringValue()))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert refusal_of(error).violations == (
                errors.FieldViolation("items[3].entity", "must be 1-256 characters, got 300"),
                errors.FieldViolation("zone", "must be an IANA time zone"),
            )

    async def test_very_many_violations_still_arrive_as_a_status(self) -> None:
        """A status that outgrew its trailers would reach the caller as something else."""
        violations = Violations()
        for number in range(1000):
            violations.add(f"items[{number}].{'ü' * 200}", "muß kürzer sein " * 50)
        async with running() as rpc:
            rpc.probe.behave = behaving(lambda _: violations.raise_if_any())
            error = await refused(rpc.stub.Say(StringValue()))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert refusal_of(error).violations[0].field.startswith("items[0].")

    async def test_a_call_that_is_not_built_yet_says_so(self) -> None:
        """UNIMPLEMENTED with a sentence, from nothing but a method that nobody overrode."""
        async with running() as rpc:
            error = await refused(rpc.stub.Later(StringValue()))
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED
            assert error.details() == f"{SERVICE}/Later is part of the contract and not built yet."


class TestErrors:
    """What handlers raise becomes a status."""

    async def test_a_limit_says_when_to_come_back(self) -> None:
        """INV-9: RESOURCE_EXHAUSTED carries RetryInfo."""
        async with running() as rpc:
            rpc.probe.behave = raising(errors.ResourceExhausted("Full.", retry_after=timedelta(seconds=2.5)))
            error = await refused(rpc.stub.Say(StringValue()))
            assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "Full.")
            assert refusal_of(error).retry_after == timedelta(seconds=2.5)

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (errors.NotFound(), grpc.StatusCode.NOT_FOUND),
            (errors.AlreadyExists(), grpc.StatusCode.ALREADY_EXISTS),
            (errors.FailedPrecondition(), grpc.StatusCode.FAILED_PRECONDITION),
            (errors.Aborted(), grpc.StatusCode.ABORTED),
            (errors.Unavailable(), grpc.StatusCode.UNAVAILABLE),
            (errors.Unimplemented(), grpc.StatusCode.UNIMPLEMENTED),
            (errors.PermissionDenied(), grpc.StatusCode.PERMISSION_DENIED),
        ],
    )
    async def test_each_class_of_error_has_its_code(self, error: errors.CarillonError, code: grpc.StatusCode) -> None:
        """And its reason as ErrorInfo."""
        async with running() as rpc:
            rpc.probe.behave = raising(error)
            seen = await refused(rpc.stub.Say(StringValue()))
            assert (seen.code(), refusal_of(seen).reason) == (code, error.reason)

    @pytest.mark.parametrize("error", [ValueError("password=hunter2"), TimeoutError("hunter2"), errors.SettingsError()])
    async def test_anything_unexpected_is_internal_with_an_id_and_no_more(self, error: Exception) -> None:
        """The caller gets an id to quote; the exception stays with us. It is counted."""
        async with running() as rpc:
            rpc.probe.behave = raising(error)
            seen = await refused(rpc.stub.Say(StringValue()))
            assert seen.code() is grpc.StatusCode.INTERNAL
            assert refusal_of(seen).metadata["error_id"] in (seen.details() or "")
            assert "hunter2" not in str(seen)
        assert rpc.metric("carillon_rpc_requests_total", code="INTERNAL") == 1  # Counted after it has been answered.

    async def test_an_error_within_a_stream_ends_it_with_its_status(self) -> None:
        """Streams go through the same mapping."""
        async with running() as rpc:
            rpc.probe.behave = raising(errors.NotFound("No such thing."))
            error = await refused(anext(aiter(rpc.stub.SayThrice(StringValue()))))
            assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "No such thing.")


class TestDeadlines:
    """Every wait ends."""

    async def test_a_caller_without_a_deadline_gets_the_default(self) -> None:
        """So that no call can wait for ever."""
        async with running(GrpcSettings(default_deadline=timedelta(seconds=7))) as rpc:
            rpc.probe.behave = behaving(lambda context: remaining_of(context).total_seconds())
            assert 5 < float((await rpc.stub.Say(StringValue())).value) <= 7

    async def test_a_longer_deadline_is_cut_to_the_maximum(self) -> None:
        """A caller cannot hold resources for hours."""
        settings = GrpcSettings(default_deadline=timedelta(seconds=5), max_deadline=timedelta(seconds=9))
        async with running(settings) as rpc:
            rpc.probe.behave = behaving(lambda context: remaining_of(context).total_seconds())
            assert 7 < float((await rpc.stub.Say(StringValue(), timeout=3600)).value) <= 9

    async def test_a_callers_own_deadline_is_the_calls(self) -> None:
        """One deadline per request, passed down."""
        async with running() as rpc:
            rpc.probe.behave = behaving(lambda context: deadline_of(context).remaining().total_seconds())
            assert 1 < float((await rpc.stub.Say(StringValue(), timeout=3)).value) < 4

    async def test_a_call_past_the_default_deadline_ends(self) -> None:
        """The server ends it by itself, and cancels the handler."""
        async with running(GrpcSettings(default_deadline=timedelta(milliseconds=100))) as rpc:
            rpc.probe.behave = handler = Standstill()
            error = await refused(rpc.stub.Say(StringValue()))
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert handler.cancelled.is_set()

    async def test_a_cancelled_call_cancels_its_handler(self) -> None:
        """And is counted as cancelled, not as a failure."""
        async with running() as rpc:
            rpc.probe.behave = handler = Standstill()
            call = rpc.stub.Say(StringValue())
            async with asyncio.timeout(5):
                await handler.started.wait()
                call.cancel()
                await handler.cancelled.wait()
            await rpc.server.drain()
            assert rpc.metric("carillon_rpc_requests_total", code="CANCELLED") == 1
            assert rpc.metric("carillon_rpc_in_flight") == 0
