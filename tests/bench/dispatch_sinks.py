"""Receivers that cost next to nothing, so that what is measured is the dispatcher: HTTP and SMTP as bare protocols.

They understand what our two clients say and no more; that these speak the protocols properly is tested against real
servers elsewhere. Both check that every message is whole, and keep its id and when it came.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: text/plain\r\n\r\nok"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_WEBHOOK_ID = re.compile(rb"\r\nwebhook-id: *([0-9a-f-]{36})", re.IGNORECASE)
_MESSAGE_ID = re.compile(rb"\r\nMessage-ID: *<([0-9a-f-]{36})@", re.IGNORECASE)


class Sink:
    """What has come: ids with the instants, ns since 1970. `repeats` counts second copies."""

    def __init__(self) -> None:
        self.came_at_ns: dict[bytes, int] = {}
        self.repeats = 0
        self.connections = 0
        self.news = asyncio.Event()

    def keep(self, found: re.Match[bytes] | None) -> None:
        """A message is here."""
        if found is None:
            raise ValueError("a message without an id")
        self.repeats += found[1] in self.came_at_ns
        self.came_at_ns[found[1]] = time.time_ns()
        self.news.set()


class _Http(asyncio.Protocol):
    def __init__(self, sink: Sink) -> None:
        self._sink, self._buffer = sink, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by type.
        self._sink.connections += 1

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[: end + 2]
            length = _LENGTH.search(head)
            size = end + 4 + (int(length[1]) if length else 0)
            if len(self._buffer) < size:
                return
            self._sink.keep(_WEBHOOK_ID.search(head))
            self._buffer = self._buffer[size:]
            self._transport.write(_OK)


class _Smtp(asyncio.Protocol):
    def __init__(self, sink: Sink) -> None:
        self._sink, self._buffer, self._is_data = sink, b"", False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by type.
        self._sink.connections += 1
        self._transport.write(b"220 sink ESMTP\r\n")

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n.\r\n" if self._is_data else b"\r\n")) >= 0:
            part = self._buffer[:end]
            self._buffer = self._buffer[end + (5 if self._is_data else 2) :]
            self._answer(part)

    def _answer(self, part: bytes) -> None:
        if self._is_data:
            self._is_data = False
            self._sink.keep(_MESSAGE_ID.search(b"\r\n" + part))
            self._transport.write(b"250 2.0.0 kept\r\n")
            return
        match part[:4].upper():
            case b"EHLO":
                self._transport.write(b"250-sink\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 SIZE 10485760\r\n")
            case b"DATA":
                self._is_data = True
                self._transport.write(b"354 go on\r\n")
            case b"QUIT":
                self._transport.write(b"221 bye\r\n")
                self._transport.close()
            case _:
                self._transport.write(b"250 2.0.0 ok\r\n")


@asynccontextmanager
async def http_sink(sink: Sink, ports: int = 1) -> AsyncIterator[list[str]]:
    """Listen, and yield the URLs that lead here."""
    async with _listening(lambda: _Http(sink), ports) as found:
        yield [f"http://127.0.0.1:{port}/hook" for port in found]


@asynccontextmanager
async def smtp_sink(sink: Sink) -> AsyncIterator[int]:
    """Listen, and yield the port."""
    async with _listening(lambda: _Smtp(sink), 1) as (port,):
        yield port


@asynccontextmanager
async def _listening(protocol: Callable[[], asyncio.Protocol], ports: int) -> AsyncIterator[list[int]]:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(protocol, "127.0.0.1", 0) for _ in range(ports)]
    try:
        yield [server.sockets[0].getsockname()[1] for server in servers]
    finally:
        for server in servers:
            server.close()
