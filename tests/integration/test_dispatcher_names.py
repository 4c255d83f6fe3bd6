"""How webhooks' names are looked up: from a real name server on loopback that says nothing of some zones."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import cast

import aiohttp
import pytest

from services.dispatcher.delivery import Permanent, Reason, Retryable, Sent
from services.dispatcher.settings import WebhookSettings
from services.dispatcher.webhook import WebhookChannel
from tests.integration.test_dispatcher_webhook import HttpReceiver, letter

_TYPE_A = 1
_LOOPBACK = bytes((127, 0, 0, 1))


class NameServer(asyncio.DatagramProtocol):
    """Says that every name leads to loopback, and nothing at all of names in the zone `dead`."""

    def __init__(self) -> None:
        self.asked_of_the_dead: set[str] = set()
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        end = data.index(0, 12)
        name, question = data[12:end].decode("latin-1"), data[12 : end + 5]
        if name.endswith("dead"):
            self.asked_of_the_dead.add(name)
            return
        is_a = struct.unpack(">H", data[end + 1 : end + 3])[0] == _TYPE_A
        answer = struct.pack(">HHHIH", 0xC00C, _TYPE_A, 1, 60, 4) + _LOOPBACK if is_a else b""
        assert self._transport is not None
        self._transport.sendto(data[:2] + struct.pack(">HHHHH", 0x8180, 1, is_a, 0, 0) + question + answer, addr)

    @asynccontextmanager
    async def channel(self, *, allow_private: bool = True) -> AsyncIterator[WebhookChannel]:
        """One that asks this name server; listening, until the block ends."""
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", 0))
        port = transport.get_extra_info("sockname")[1]
        settings = WebhookSettings(allow_private=allow_private, connect_timeout=timedelta(seconds=2))
        resolver = partial(aiohttp.AsyncResolver, nameservers=["127.0.0.1"], udp_port=port, tcp_port=port)
        channel = WebhookChannel(settings, connections=128, resolver=resolver)
        try:
            yield channel
        finally:
            await channel.close()
            transport.close()


async def test_names_that_nobody_answers_for_hold_up_no_other() -> None:
    """With sixty lookups under way, which end in their own timeouts, another host gets its webhook."""
    server = NameServer()
    async with HttpReceiver().listening() as url, server.channel() as channel:
        dead = [letter(f"http://host{n}.dead/hook") for n in range(60)]
        sends = [asyncio.ensure_future(channel.send(one)) for one in dead]
        alive = await channel.send(letter(url.replace("127.0.0.1", "alive.example")))
        assert alive == Sent("200 thanks")
        assert not any(one.done() for one in sends)
        results = await asyncio.gather(*sends)
    assert len(server.asked_of_the_dead) == 60
    assert all(isinstance(one, Retryable) and not one.is_in_doubt for one in results)
    assert {one.reason for one in results if isinstance(one, Retryable)} <= {Reason.TIMEOUT, Reason.UNREACHABLE}


async def test_names_are_not_looked_up_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs outside of tests is not getaddrinfo either; it knows /etc/hosts."""

    async def in_a_thread(*_args: object, **_options: object) -> None:
        raise AssertionError

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", in_a_thread)
    channel = WebhookChannel(WebhookSettings(allow_private=True), connections=10)
    async with HttpReceiver().listening() as url:
        assert await channel.send(letter(url.replace("127.0.0.1", "localhost"))) == Sent("200 thanks")
    await channel.close()


async def test_a_name_that_resolves_to_loopback_is_out_of_bounds() -> None:
    """What a name resolved to decides, at the moment of connecting."""
    receiver = HttpReceiver()
    async with receiver.listening() as url:
        address = url.replace("127.0.0.1", "innocent.example")
        async with NameServer().channel(allow_private=False) as channel:
            result = await channel.send(letter(address))
        async with NameServer().channel(allow_private=True) as channel:
            assert await channel.send(letter(address)) == Sent("200 thanks")
    assert result == Permanent(Reason.DESTINATION_FORBIDDEN, "it leads to a private or reserved address")
    assert len(receiver.requests) == 1
