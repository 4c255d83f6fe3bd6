"""Headers that no gRPC client would send, written to the socket by hand: the server answers with a clear status."""

import asyncio
import struct

import pytest
from google.protobuf.wrappers_pb2 import StringValue

from tests.integration.rpc_probe import SERVICE, Standstill
from tests.integration.test_rpc_server import running

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 1, 4
_HELLO = StringValue(value="hello").SerializeToString()


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame (RFC 9113 §4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def header(name: bytes, value: bytes) -> bytes:
    """A header as an HPACK literal, neither indexed nor Huffman-coded (RFC 7541 §6.2.2); shorter than 127 bytes."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


async def answer_to(
    port: int, name: bytes, value: bytes, *, path: str = f"/{SERVICE}/Say", body: bytes = _HELLO
) -> bytes:
    """The bytes a server answers to one call, of Say unless said otherwise, with one header more."""
    headers = b"".join(
        [
            header(b":method", b"POST"),
            header(b":scheme", b"http"),
            header(b":path", path.encode()),
            header(b":authority", b"localhost"),
            header(b"te", b"trailers"),
            header(b"content-type", b"application/grpc"),
            header(name, value),
        ]
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(_PREFACE + frame(_SETTINGS, 0, 0, struct.pack(">HI", 1, 0)))  # No dynamic header table.
        writer.write(frame(_HEADERS, _END_HEADERS, 1, headers))
        writer.write(frame(_DATA, _END_STREAM, 1, b"\x00" + struct.pack(">I", len(body)) + body))
        answer = b""
        async with asyncio.timeout(5):
            while b"grpc-status" not in answer and (more := await reader.read(65536)):
                answer += more
        return answer
    finally:
        writer.close()
        await writer.wait_closed()


async def test_a_well_formed_header_passes() -> None:
    """The test's own HTTP/2 is good: the call succeeds."""
    async with running() as rpc:
        assert b"grpc-status\x010" in await answer_to(rpc.server.port, b"x-note", b"plain")
        assert rpc.probe.requests == ["hello"]


@pytest.mark.parametrize("name", [b"carillon-tenant", b"authorization", b"x-note"])
@pytest.mark.parametrize("value", [b"\xc3\x28", b"\xff\xfe", "türe".encode(), b"a\x01b"])
async def test_bad_utf8_in_headers_is_an_invalid_argument(name: bytes, value: bytes) -> None:
    """The status names the header, and the handler never runs."""
    async with running() as rpc:
        answer = await answer_to(rpc.server.port, name, value)
        assert rpc.probe.requests == []
        assert b"grpc-status\x013" in answer, answer
        assert name in answer


async def test_a_deadline_ends_a_call_whose_caller_says_nothing_more() -> None:
    """The server keeps the deadline by itself: a caller that lost its network cannot end anything."""
    async with running() as rpc:
        rpc.probe.behave = call = Standstill()
        answer = await answer_to(rpc.server.port, b"grpc-timeout", b"200m")
        assert b"grpc-status\x014" in answer, answer
        async with asyncio.timeout(5):
            await call.cancelled.wait()
        await rpc.server.drain()
        assert rpc.metric("carillon_rpc_requests_total", code="DEADLINE_EXCEEDED") == 1
