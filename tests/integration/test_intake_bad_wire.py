"""What comes over the wire and must not come in: expired tokens, other tenants' tokens, bytes that are no message.

Every RPC of the contract is called, found in its descriptor, with a request that would do something.
"""

import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from libs.rpc_client import connect, refusal_of
from libs.settings import AuthMode, AuthSettings
from tests.support import every_rpc
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.intake_world import IntakeWorld, intake_world

ISSUER, AUDIENCE = "https://issuer.example", "carillon"
KEY = ec.generate_private_key(ec.SECP256R1())
METHODS = every_rpc.methods("intake")

# A length that is longer than the message; a tag with wire type 7; a group that does not end.
MALFORMED = (b"\x0a\xff\x01x", b"\x0f", b"\x0b")


def token(tenant: str, *, expires_in_s: int = 600) -> str:
    """A token of the issuer's."""
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "shop", "iat": now - 3_600, "exp": now + expires_in_s}
    return jwt.encode(claims | {"tenant": tenant}, KEY, algorithm="ES256", headers={"kid": "one"})


@pytest.fixture
async def guarded(
    postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus, tmp_path: Path
) -> AsyncIterator[IntakeWorld]:
    """Intake in mode jwt."""
    public: dict[str, Any] = jwt.algorithms.ECAlgorithm.to_jwk(KEY.public_key(), as_dict=True)
    keys = tmp_path / "jwks.json"
    keys.write_text(json.dumps({"keys": [public | {"kid": "one", "alg": "ES256", "use": "sig"}]}))
    auth = AuthSettings(
        mode=AuthMode.JWT, jwks_file=keys, jwt_issuer=ISSUER, jwt_audience=AUDIENCE, jwt_tenant_claim="tenant"
    )
    async with intake_world(postgres_url, open_database, open_bus, auth=auth) as world:
        await world.execute("DELETE FROM outbox")  # What the world itself has sent.
        yield world


def calls() -> Iterator[tuple[MethodDescriptor, Message]]:
    """At least one good request for every RPC there is."""
    by_name = {one.name: one for one in METHODS}
    samples = [(name, request) for service, name, request in every_rpc.samples("wire") if service == "intake"]
    assert {name for name, _ in samples} == by_name.keys()
    return ((by_name[name], request) for name, request in samples)


async def test_an_expired_token_is_refused_by_every_rpc(guarded: IntakeWorld) -> None:
    """UNAUTHENTICATED, and nothing is stored."""
    async with connect(guarded.address, token=token("shop", expires_in_s=-60)) as channel:
        for method, request in calls():
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await every_rpc.call(channel, method, request)
            assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED, method.name
            assert "expired" in (raised.value.details() or "")
    assert await guarded.stored() == {}


async def test_inv8_a_token_of_another_tenant_is_refused_by_every_rpc(guarded: IntakeWorld) -> None:
    """PERMISSION_DENIED where the caller names a tenant that its token does not stand for; nothing is stored."""
    async with connect(guarded.address, token=token("shop"), tenant="bank") as channel:
        for method, request in calls():
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await every_rpc.call(channel, method, request)
            assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED, method.name
            assert refusal_of(raised.value).reason == "WRONG_TENANT"
    assert await guarded.stored() == {}


async def test_a_good_token_is_taken(guarded: IntakeWorld) -> None:
    """So that the refusals above are about what was wrong with theirs."""
    async with connect(guarded.address, token=token("shop"), tenant="shop") as channel:
        for method, request in calls():
            if method.name == "Notify":
                assert (await every_rpc.call(channel, method, request)).results[0].id


@pytest.mark.parametrize("body", MALFORMED)
async def test_bytes_that_are_no_message_are_refused_by_every_rpc(guarded: IntakeWorld, body: bytes) -> None:
    """INVALID_ARGUMENT, the caller's mistake, in unary calls and streams; nothing is stored."""
    async with connect(guarded.address, token=token("shop")) as channel:
        for method in METHODS:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await _send(channel, method, body)
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT, method.name
            assert refusal_of(raised.value).reason == "MALFORMED_REQUEST"
    assert await guarded.stored() == {}


async def _send(channel: grpc.aio.Channel, method: MethodDescriptor, body: bytes) -> None:
    path = every_rpc.path_of(method)
    if not method.client_streaming:
        unary: Any = channel.unary_unary(path)
        await unary(body, timeout=20)
        return
    call: Any = channel.stream_stream(path)(timeout=20)
    await call.write(body)
    await call.read()
