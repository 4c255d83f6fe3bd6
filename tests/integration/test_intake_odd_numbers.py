"""Whatever number arrives in whatever field of intake: an answer or a clear refusal, never INTERNAL.

Every number, enum, time and duration of a sample of every RPC gets every odd value. For texts see test_odd_values.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from libs.rpc_client import refusal_of
from tests.support import every_rpc
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.intake_world import IntakeWorld, intake_world

ODD = [
    0,
    1,
    -1,
    999_999_999,
    1_000_000_000,
    1 << 31,
    253_402_300_800,
    (1 << 31) - 1,
    (1 << 63) - 1,
    -(1 << 63),
    -(1 << 31),
]
ODD_FLOATS = [0.0, -0.0, -1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")]

INTEGERS = {
    FieldDescriptor.TYPE_INT32: range(-(1 << 31), 1 << 31),
    FieldDescriptor.TYPE_INT64: range(-(1 << 63), 1 << 63),
    FieldDescriptor.TYPE_UINT32: range(1 << 32),
    FieldDescriptor.TYPE_UINT64: range(1 << 64),
    FieldDescriptor.TYPE_ENUM: range(-(1 << 31), 1 << 31),
}
BROKEN = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}
BROKEN_ITEMS = {code.value[0] for code in BROKEN}

Place = tuple[str, ...]


@pytest.fixture
async def world(postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus) -> AsyncIterator[IntakeWorld]:
    """Intake and its peers."""
    async with intake_world(postgres_url, open_database, open_bus) as it:
        yield it


def odd_ones(message: Message, before: Place = ()) -> Iterator[tuple[Place, int | float]]:
    """(place, value): the path to a number, and what it is to be. Absent times and durations are places too."""
    for field in message.DESCRIPTOR.fields:
        here = (*before, field.name)
        if field.containing_oneof is not None and not message.HasField(field.name):
            continue
        if field.type in INTEGERS:
            yield from ((here, value) for value in ODD if value in INTEGERS[field.type])
        elif field.type == FieldDescriptor.TYPE_DOUBLE:
            yield from ((here, value) for value in ODD_FLOATS)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            inner = getattr(message, field.name)
            if field.is_repeated:
                yield from odd_ones(inner[0], here) if len(inner) else ()
            elif isinstance(inner, (Timestamp, Duration)) or message.HasField(field.name):
                yield from odd_ones(inner, here)


def with_number(message: Message, place: Place, value: float) -> Message:
    """A copy with this number there; of what is repeated in the first."""
    copy = type(message)()
    copy.CopyFrom(message)
    inner: Any = copy
    for name in place[:-1]:
        inner = getattr(inner, name)
        inner = inner if isinstance(inner, Message) else inner[0]
    if inner.DESCRIPTOR.fields_by_name[place[-1]].is_repeated:
        getattr(inner, place[-1])[:] = [value]
    else:
        setattr(inner, place[-1], value)
    return copy


async def problem(world: IntakeWorld, method: str, request: Message) -> str:
    """What an answer says that no answer may say; empty when all is well."""
    (descriptor,) = [one for one in every_rpc.methods("intake") if one.name == method]
    try:
        answer = await every_rpc.call(world.channel, descriptor, request)
    except grpc.aio.AioRpcError as error:
        if error.code() in BROKEN:
            return f"{error.code().name}: {error.details()}"
        if error.code() is grpc.StatusCode.INVALID_ARGUMENT and not refusal_of(error).violations:
            return f"no field is named: {error.details()}"
        return ""
    results = getattr(getattr(answer, "batch", answer), "results", ())
    errors = [result.error for result in results if result.HasField("error")]
    unclear = [error for error in errors if error.code in BROKEN_ITEMS or not error.field]
    return f"items failed with {unclear}" if unclear else ""


async def test_odd_numbers_are_taken_or_refused(world: IntakeWorld) -> None:
    """Every number × every odd value."""
    limit = asyncio.Semaphore(16)

    async def one(method: str, request: Message, place: Place, value: float) -> str:
        async with limit:
            found = await problem(world, method, with_number(request, place, value))
        return f"{method} {'.'.join(place)} = {value}: {found}" if found else ""

    work = [
        one(method, request, place, value)
        for service, method, request in every_rpc.samples("odd")
        if service == "intake"
        for place, value in odd_ones(request)
    ]
    assert len(work) > 500
    assert [found for found in await asyncio.gather(*work) if found] == []
