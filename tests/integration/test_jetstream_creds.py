"""A .creds file: what it opens, and that a bad one is told and stops nothing for good."""

import asyncio
import base64
import gc
import hashlib
import json
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import nkeys  # type: ignore[import-untyped]
import pytest

from libs.errors import SettingsError
from libs.jetstream import Bus
from libs.settings import NatsSettings
from local.servers import NatsServer
from tests.support.fixtures import OpenBus

SOON = timedelta(seconds=10)


def _key(prefix: int) -> tuple[bytes, Any]:
    """A new seed, and its pair of keys."""
    seed: bytes = nkeys.encode_seed(os.urandom(32), prefix)
    return seed, nkeys.from_seed(bytearray(seed))


def _public(pair: Any) -> str:
    return bytes(pair.public_key).decode()


def _jwt(issuer: Any, subject: Any, name: str, claims: dict[str, Any]) -> str:
    """A JWT as NATS wants it (github.com/nats-io/jwt, version 2)."""

    def encoded(part: bytes) -> bytes:
        return base64.urlsafe_b64encode(part).rstrip(b"=")

    body = {"iat": 1, "iss": _public(issuer), "sub": _public(subject), "name": name, "nats": {"version": 2, **claims}}
    body["jti"] = base64.b32encode(hashlib.sha256(json.dumps(body).encode()).digest()).decode().rstrip("=")
    header = {"typ": "JWT", "alg": "ed25519-nkey"}
    signed = encoded(json.dumps(header).encode()) + b"." + encoded(json.dumps(body).encode())
    return (signed + b"." + encoded(issuer.sign(signed))).decode()


@pytest.fixture
def creds(tmp_path: Path) -> Path:
    """A user's .creds file; `guarded_nats` knows the account."""
    return tmp_path / "user.creds"


@pytest.fixture
def guarded_nats(tmp_path: Path, creds: Path) -> Iterator[NatsServer]:
    """A server with an operator, an account and the user of the file."""
    _, operator = _key(nkeys.PREFIX_BYTE_OPERATOR)
    (_, account), (_, system) = _key(nkeys.PREFIX_BYTE_ACCOUNT), _key(nkeys.PREFIX_BYTE_ACCOUNT)
    seed, user = _key(nkeys.PREFIX_BYTE_USER)
    anything = {"subs": -1, "data": -1, "payload": -1}
    limits = {**anything, "conn": -1, "leaf": -1, "imports": -1, "exports": -1, "wildcards": True}
    by_operator = _jwt(operator, operator, "carillon", {"type": "operator"})
    accounts = {
        _public(one): _jwt(operator, one, "carillon", {"type": "account", "limits": limits})
        for one in (account, system)
    }
    of_user = _jwt(account, user, "intake", {"type": "user", **anything})
    creds.write_text(
        f"-----BEGIN NATS USER JWT-----\n{of_user}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed.decode()}\n------END USER NKEY SEED------\n"
    )
    known = ", ".join(f"{key}: {of_account}" for key, of_account in accounts.items())
    config = (
        f"operator: {by_operator}\nsystem_account: {_public(system)}\n"
        f"resolver: MEMORY\nresolver_preload: {{ {known} }}\n"
    )
    with NatsServer(tmp_path, config=config) as server:
        yield server


async def test_a_creds_file_opens_a_connection(open_bus: OpenBus, guarded_nats: NatsServer, creds: Path) -> None:
    """And nothing else does."""
    bus = await open_bus("bus", guarded_nats.url, creds_file=creds)
    assert bus.is_connected
    stranger = await open_bus("stranger", guarded_nats.url, connect_timeout=timedelta(seconds=0.2))
    assert not stranger.is_connected


# nats-py leaves the socket of a failed try to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_creds_file_that_goes_bad_and_is_mended_is_connected_with_again(
    open_bus: OpenBus, guarded_nats: NatsServer, creds: Path
) -> None:
    """It is read for each connection, and neither what is missing nor a wrong seed ends the tries."""
    bus = await open_bus("bus", guarded_nats.url, creds_file=creds)
    good = creds.read_text()
    for bad in ("", good.replace("-----BEGIN NATS USER JWT-----", ""), good.replace("\nSU", "\nnot a seed ")):
        creds.write_text(bad)
        guarded_nats.kill()
        async with asyncio.timeout(SOON.total_seconds()):
            while bus.is_connected:  # noqa: ASYNC110 - it is NATS that goes.
                await asyncio.sleep(0.01)
        await asyncio.to_thread(guarded_nats.start)
        with pytest.raises(TimeoutError):
            await bus.wait_connected(timedelta(seconds=1))
        creds.write_text(good)
        await bus.wait_connected(SOON)
    await bus.close()
    gc.collect()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file"),
        ("", "no line after BEGIN NATS USER JWT"),
        ("-----BEGIN NATS USER JWT-----\neyJ\n", "no line after BEGIN USER NKEY SEED"),
        ("-----BEGIN NATS USER JWT-----\neyJ\n-----BEGIN USER NKEY SEED-----\nnonsense\n", "seed"),
        ("-----BEGIN NATS USER JWT-----\neyJ\n-----BEGIN USER NKEY SEED-----\nSUAA\n", "seed"),
    ],
)
async def test_a_file_that_is_none_stops_the_start(tmp_path: Path, content: str | None, why: str) -> None:
    """And the setting is named."""
    file = tmp_path / "user.creds"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match=f"CARILLON_NATS_CREDS_FILE.*{why}"):
        await Bus.connect(NatsSettings(url=("nats://127.0.0.1:1",), creds_file=file), "bus")


async def test_whatever_keeps_it_from_connecting_it_tries_again(
    open_bus: OpenBus, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task that keeps the connection is nobody's to watch: what nobody has foreseen must not end it."""
    tries = 0

    def options(settings: NatsSettings) -> dict[str, Any]:
        nonlocal tries
        if (tries := tries + 1) == 1:
            raise ValueError("not foreseen")
        return {"servers": list(settings.url)}

    monkeypatch.setattr("libs.jetstream.connection_options", options)
    bus = await open_bus("bus", nats_url)
    await bus.wait_connected(SOON)
    assert tries == 2
