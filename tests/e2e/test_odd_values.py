"""Whatever text arrives in whatever field: an answer or a clear refusal, never INTERNAL, and nothing that gets stuck.

Every string field of a sample of every RPC gets every odd value, on real processes. What was accepted must then also be
applied: fired, expanded, rendered and sent.
"""

import asyncio
import base64
import json
import random
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import psycopg
import pytest
from carillon.digest.v1 import digest_pb2
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

from libs.rpc_client import connect, refusal_of
from local.stack import SERVICES, Stack
from tests.e2e.conftest import token_of
from tests.support import every_rpc
from tests.support.link_world import until

pytestmark = pytest.mark.timeout(240)

_dice = random.Random(7)


def letters(count: int) -> str:
    """Random ideographs, which no index compresses: three bytes each."""
    return "".join(chr(_dice.randrange(0x4E00, 0x9FFF)) for _ in range(count))


ODD = {
    "empty": "",
    "NUL": "a\x00b",
    "bell": "\x07",
    "C1 control": "\x9b1m",
    "white space": "\t\r\n ",
    "line end": "a\r\nBcc: b@example.com",
    "10 kB": "x" * 10_240,
    "256 letters": letters(256),
    "256 emoji": "".join(chr(0x1F300 + number) for number in range(256)),
    "2,048 letters": letters(2_048),
    "a long URL": "https://" + letters(2_000) + "/",
    "a long email address": letters(300) + "@example.com",
    "right to left": "\u202eمرحبا",
    "byte order mark": "\ufeff",
    "no character": "\uffff\U0010ffff",
    "SQL": "'; DROP TABLE timer; --",
    "format": "%s %(x)s {0} {{ 1 / 0 }} {% for %}",
    "path": "../../etc/passwd",
    "star": "*",
    "reserved": "carillon:window:1",
    "full-width UUID": "０19c8f4e-6b1e-7cc3-98c4-dc0c0c07398f",
    "UUID in braces": "{019c8f4e-6b1e-7cc3-98c4-dc0c0c07398f}",
    "no seconds": "FREQ=SECONDLY;BYMONTH=2;BYMONTHDAY=30",
    "JSON": "{}",
    "JSON NaN": '{"a": NaN}',
    "JSON infinity": '{"a": 1e999}',
    "JSON NUL": '{"a": "\\u0000"}',
    "JSON surrogate": '{"a": "\\ud800"}',
    "JSON digits": '{"a": ' + "9" * 5_000 + "}",
    "JSON depth": '{"a":' + "[" * 30_000 + "]" * 30_000 + "}",
    "JSON unbalanced": "[" * 60_000,
}

BROKEN = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}

Place = tuple[tuple[str, int], ...]


def places(message: Message, before: Place = ()) -> Iterator[Place]:
    """Where in a message there is text, or could be: field names, with an index into repeated ones (else -1)."""
    for field in message.DESCRIPTOR.fields:
        is_absent = field.containing_oneof is not None and not message.HasField(field.name)
        if field.type == FieldDescriptor.TYPE_STRING and not is_absent:
            yield (*before, (field.name, 0 if field.is_repeated else -1))
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            if field.is_repeated and len(getattr(message, field.name)):
                yield from places(getattr(message, field.name)[0], (*before, (field.name, 0)))
            elif not field.is_repeated and message.HasField(field.name):
                yield from places(getattr(message, field.name), (*before, (field.name, -1)))


def with_text(message: Message, place: Place, text: str) -> Message:
    """A copy with this text there."""
    copy = type(message)()
    copy.CopyFrom(message)
    inner: Any = copy
    for name, index in place[:-1]:
        inner = getattr(inner, name) if index < 0 else getattr(inner, name)[index]
    name, index = place[-1]
    if index < 0:
        setattr(inner, name, text)
    else:
        getattr(inner, name)[:1] = [text]
    return copy


@pytest.fixture
async def channels(guarded: Stack) -> AsyncIterator[dict[str, grpc.aio.Channel]]:
    """A channel to each service, for the tenant odd."""
    async with AsyncExitStack() as stack:
        yield {
            service: await stack.enter_async_context(connect(guarded.grpc(service), token=token_of("odd")))
            for service in SERVICES
        }


async def problem(channel: grpc.aio.Channel, service: str, method: str, request: Message) -> str:
    """What an answer says that no answer may say; empty when all is well."""
    (descriptor,) = [one for one in every_rpc.methods(service) if one.name == method]
    try:
        answer = await every_rpc.call(channel, descriptor, request)
    except grpc.aio.AioRpcError as error:
        if error.code() in BROKEN:
            return f"{error.code().name}: {error.details()}"
        if error.code() is grpc.StatusCode.INVALID_ARGUMENT and not refusal_of(error).violations:
            return f"no field is named: {error.details()}"
        return ""
    results = getattr(getattr(answer, "batch", answer), "results", ())
    codes = {result.error.code for result in results if result.HasField("error")}
    return f"items failed with {codes & {2, 13, 15}}" if codes & {2, 13, 15} else ""


@pytest.mark.parametrize("service", SERVICES)
async def test_odd_text_is_taken_or_refused(channels: dict[str, grpc.aio.Channel], service: str) -> None:
    """Every text field × every odd value."""
    limit = asyncio.Semaphore(16)

    async def one(method: str, request: Message, place: Place, name: str) -> str:
        async with limit:
            found = await problem(channels[service], service, method, with_text(request, place, ODD[name]))
        return f"{method} {'.'.join(part for part, _ in place)} = {name}: {found}" if found else ""

    samples = list(every_rpc.samples("odd"))
    for owner, method, request in samples:
        (descriptor,) = [one for one in every_rpc.methods(owner) if one.name == method]
        if method.startswith("Put") or owner != "intake":  # So that what the others name is there.
            assert await problem(channels[owner], owner, descriptor.name, request) == ""
    work = [
        one(method, request, place, name)
        for owner, method, request in samples
        if owner == service
        for place in places(request)
        for name in ODD
    ]
    assert [found for found in await asyncio.gather(*work) if found] == []


@pytest.mark.parametrize("service", SERVICES)
async def test_forged_page_tokens_are_refused(channels: dict[str, grpc.aio.Channel], service: str) -> None:
    """Tokens are not signed: ours with anything else in its fields is INVALID_ARGUMENT, or a page like any other."""
    for owner, method, request in [*every_rpc.samples("odd-a"), *every_rpc.samples("odd-b")]:
        if method.startswith(("Put", "Notify", "Schedule", "SubmitRequest")):
            assert await problem(channels[owner], owner, method, request) == ""
    found: list[str] = []
    for descriptor in every_rpc.methods(service):
        if "page_token" not in descriptor.input_type.fields_by_name:
            continue

        async def token(descriptor: MethodDescriptor = descriptor) -> str:
            return await token_from(channels[service], descriptor)

        own = "" if descriptor.name == "ListDeadLetters" else await until(token)
        for text in (*ODD.values(), *forged(own)):
            question: Any = every_rpc.empty(descriptor)
            question.page_token, question.page_size = text, 1
            if what := await problem(channels[service], service, descriptor.name, question):
                found.append(f"{descriptor.name} {text[:80]!r}: {what}")
    assert found == []


async def token_from(channel: grpc.aio.Channel, descriptor: MethodDescriptor) -> str:
    """A list's own token for its second page; empty when it has none."""
    request: Any = every_rpc.empty(descriptor)
    request.page_size = 1
    return str((await every_rpc.call(channel, descriptor, request)).next_page_token)


def forged(token: str) -> Iterator[str]:
    """The same token with one of its values replaced."""
    if not token:
        return
    cursor = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    texts = ["", "x", "\x00", "\ud800", letters(300), "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"]
    numbers: list[Any] = [-1, 1 << 15, 1 << 31, (1 << 63) - 1, 1 << 63, -(1 << 63), 1e999, True, None, [], {}]
    for name in cursor:
        for value in (*texts, *numbers, str(uuid.uuid4()), "2013-07-01T00:00:00"):
            body = json.dumps(cursor | {name: value})
            yield base64.urlsafe_b64encode(body.encode()).decode().rstrip("=")


async def test_what_was_accepted_gets_through(guarded: Stack, channels: dict[str, grpc.aio.Channel]) -> None:
    """Every frame is applied, none put aside as dead, and everything is accounted for (INV-6)."""
    async with await psycopg.AsyncConnection.connect(guarded.postgres_url, autocommit=True) as connection:

        async def is_empty() -> bool:
            return await rows(connection, "outbox") == 0

        assert await until(is_empty, timeout_s=60)
        assert await rows(connection, "dead_frame") == 0
    (ledger,) = [one for one in every_rpc.methods("digest") if one.name == "GetLedger"]
    answer = await every_rpc.call(channels["digest"], ledger, digest_pb2.GetLedgerRequest())
    assert answer.notifications > 0
    assert answer.unaccounted == 0


async def rows(connection: psycopg.AsyncConnection[Any], table: str) -> int:
    """Rows of a table that every service has, in all of them."""
    counts = " + ".join(f"(SELECT count(*) FROM {service}.{table})" for service in SERVICES)
    row = await (await connection.execute(f"SELECT {counts}")).fetchone()
    assert row is not None
    return int(row[0])
