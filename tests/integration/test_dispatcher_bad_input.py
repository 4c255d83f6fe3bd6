"""Bad input at the dispatcher's edges: a clear status, and nothing sent. Addresses have unit tests of their own."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from aiohttp import web
from carillon.dispatcher.v1 import dispatcher_pb2 as pb

from services.dispatcher.delivery import Permanent, Reason, Sent, State
from tests.integration.test_dispatcher_rpc import Dispatcher, dispatcher, refused
from tests.integration.test_dispatcher_smtp import MailServer, channel_to
from tests.integration.test_dispatcher_smtp import letter as mail
from tests.integration.test_dispatcher_webhook import HttpReceiver, letter, open_channel
from tests.support.dispatcher_world import Rig, ScriptedChannel, delivery, id_of, migrated_database
from tests.support.fixtures import OpenDatabase

__all__ = ["dispatcher"]  # A fixture.

MEGABYTE = 1 << 20


@pytest.fixture
async def rig(open_database: OpenDatabase, postgres_server_url: str) -> AsyncIterator[Rig]:
    """A dispatcher on a database of its own."""
    with migrated_database(postgres_server_url) as url:
        yield Rig(await open_database("dispatcher", url))


@pytest.mark.parametrize(
    "fields",
    [
        {"channel": "email", "address": "ann@example.com\nBcc: all@example.com"},
        {"channel": "email", "address": "ann@example.com\r\n.\r\nMAIL FROM:<x@example.com>"},
        {"channel": "email", "address": "ann@example.com\u2028bob@example.com"},
        {"channel": "email", "address": "<ann@example.com>, bob@example.com"},
        {"channel": "webhook", "address": "https://example.com/\r\nHost: inside"},
        {"channel": "webhook", "address": "https://user:secret@example.com/"},
        {"channel": "apprise", "address": "tgram://1:a/2\ntgram://1:a/3"},
    ],
)
async def test_an_address_that_smuggles_something_is_dead_at_once(rig: Rig, fields: dict[str, Any]) -> None:
    """No channel ever sees it, digest hears why, and there is no attempt to retry."""
    channel = ScriptedChannel()
    async with rig.sending(email=channel, webhook=channel, apprise=channel) as outcomes:
        await rig.accept(delivery(**fields))
        await outcomes.until(1)
    assert channel.letters == []
    record = await rig.record(id_of("one"))
    assert (record.state, record.reason, record.attempts) == (State.DEAD, "address_invalid", 0)


async def test_a_mail_of_30_mb_ends_with_what_the_server_says() -> None:
    """Too large for it: dead with its reason and no bounce, and the connection's next mail arrives."""
    server = MailServer()
    huge = mail("huge", text="x" * (30 * MEGABYTE), html="")
    async with server.listening(data_size_limit=10 * MEGABYTE) as settings, channel_to(settings) as channel:
        refusal = await channel.send(huge)
        assert isinstance(refusal, Permanent)
        assert (refusal.reason, refusal.reply[:3], refusal.is_bounce) == (Reason.REJECTED, "552", False)
        assert await channel.send(mail("small")) == Sent("250 kept")
    assert len(server.mails) == 1


async def test_a_call_of_30_mb_is_refused(dispatcher: Dispatcher) -> None:
    """Before it is read as a message."""
    huge = pb.PutSuppressionRequest(suppression=pb.Suppression(address="x" * (30 * MEGABYTE)))
    error = await refused(dispatcher.ours.PutSuppression(huge))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_into_the_network_is_not_followed(status: int) -> None:
    """Even where private addresses are allowed: whoever answers does not choose where the next request goes."""
    inside = HttpReceiver()
    async with inside.listening() as secret_url, open_channel(allow_private=True) as channel:
        redirect = web.Response(status=status, headers={"Location": secret_url})
        async with HttpReceiver(redirect).listening() as url:
            result = await channel.send(letter(url))
    assert result == Permanent(Reason.REDIRECTED, str(status))
    assert inside.requests == []


@pytest.mark.parametrize(
    "host",
    [
        *("169.254.169.254", "2852039166", "0251.0376.0251.0376", "169.254.43518", "[::ffff:a9fe:a9fe]"),
        *("[64:ff9b::a9fe:a9fe]", "[2002:a9fe:a9fe::]", "[::169.254.169.254]", "0.0.0.0", "[::]", "[::ffff:0.0.0.0]"),
        *("0", "127.1", "2130706433", "100.64.0.1", "192.0.0.192", "[fd00:ec2::254]", "224.0.0.1", "255.255.255.255"),
    ],
)
async def test_no_spelling_of_an_inner_address_is_connected_to(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """Decimal, octal, mapped, translated or unspecified: no socket is ever made, and no retry will be.

    In hexadecimal it is a name like any other, which nobody has: see test_addresses_in_disguise_reach_nothing.
    """
    made: list[Any] = []
    monkeypatch.setattr("services.dispatcher.webhook.socket.socket", lambda **given: made.append(given))
    async with open_channel(allow_private=False) as channel:
        result = await channel.send(letter(f"http://{host}/latest/meta-data/"))
    assert isinstance(result, Permanent)
    assert result.reason in (Reason.DESTINATION_FORBIDDEN, Reason.ADDRESS_INVALID)
    assert made == []
