"""Bad input at the front door: a clear status or item error that names the field, and nothing stored.

Schedules and commands on timers have modules of their own. Bad UTF-8 in headers is the server's business for all
services alike: test_rpc_headers.
"""

import hashlib
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from carillon.intake.v1 import intake_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from libs.rpc_client import connect, refusal_of
from libs.settings import AuthMode, AuthSettings
from libs.wire import to_duration
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.intake_world import (
    IntakeWorld,
    assert_all_refused,
    content,
    days,
    intake_world,
    notification,
    request,
)


@pytest.fixture
async def world(postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus) -> AsyncIterator[IntakeWorld]:
    """Intake; nobody takes its frames, so what it stores can be counted."""
    async with intake_world(postgres_url, open_database, open_bus, peers_run=False) as it:
        yield it
        assert await it.stored() == {}


HUGE = json.dumps({"text": "x" * 65_536})
DEEP = '{"a":' * 100 + "1" + "}" * 100
PAYLOADS = [
    ("not json", "must be a JSON object: "),
    ("[1, 2]", "must be a JSON object"),
    ("null", "must be a JSON object"),
    ('{"a": NaN}', "must be a JSON object: "),
    ('{"a": "\\ud800"}', "must be a JSON object: "),
    ('{"a": ["\\u0000"]}', "must not hold NUL characters"),
    (DEEP, "must not be nested deeper than 64"),
    (HUGE, "must be at most 64 KiB, got 65,548 bytes"),
]

NOTIFICATIONS = [
    (notification(content=None), "content.type", "must be 1-128 characters of [a-z0-9._/-]"),
    (notification(content=content(type="Shop Sale")), "content.type", "must be 1-128 characters of [a-z0-9._/-]"),
    (notification(content=content(subscribers=[])), "content.subscribers", "must have at least one entry"),
    (notification(content=content(subscribers=["a"] * 1_001)), "content.subscribers", "must have 0-1,000 entries"),
    (notification(content=content(subscribers=["a", ""])), "content.subscribers[1]", "must be 1-256 characters"),
    (notification(content=content(topics=["a"] * 17)), "content.topics", "must have 0-16 entries, got 17"),
    (notification(content=content(topics=["\x07"])), "content.topics[0]", "must not hold control characters"),
    (notification(content=content(group_key="g" * 257)), "content.group_key", "must be 0-256 characters, got 257"),
    (notification(content=content(priority=4)), "content.priority", "must be one of PRIORITY_LOW, PRIORITY_NORMAL, P"),
    (notification(content=content(priority=-1)), "content.priority", "must be one of PRIORITY_LOW, PRIORITY_NORMAL, P"),
    *((notification(content=content(payload=text)), "content.payload", why) for text, why in PAYLOADS),
    (notification(entity="e" * 257), "entity", "must be 1-256 characters, got 257"),
    (notification(entity="a\x00b"), "entity", "must not hold control characters"),
    (notification(entity="carillon:window:1"), "entity", 'must not start with "carillon:"'),
    (notification(occur_time=days(-31)), "occur_time", "must not be before 2026-01-31T12:00:00+00:00"),
    (notification(occur_time=days(0.01)), "occur_time", "must not be after 2026-03-02T12:05:00+00:00"),
    (notification(expire_time=days(0)), "expire_time", "must be after 2026-03-02T12:00:00+00:00"),
    (notification(expire_time=Timestamp(seconds=1 << 40)), "expire_time", "must be a valid time, year 1970 to 2199"),
    (notification(expire_time=Timestamp(nanos=-1)), "expire_time", "must be a valid time, year 1970 to 2199"),
    (
        notification(content=content(subscribers=["\U0001f514" * 256] * 400)),
        "content",
        "must be at most 384 KiB in all",
    ),
]

REQUESTS = [
    (request(batch="Deals"), "batch", "must be 1-64 characters of [a-z0-9._-]"),
    (request(customer=""), "customer", "must be 1-256 characters, got 0"),
    (request(item="i" * 257), "item", "must be 1-256 characters, got 257"),
    (request(providers=["p"] * 101), "providers", "must have 0-100 entries, got 101"),
    (request(providers=["a", "\x00"]), "providers[1]", "must not hold control characters"),
    (request(payload=HUGE), "payload", "must be at most 64 KiB"),
    (request(answer_within=to_duration(timedelta(seconds=59))), "answer_within", "must be 60s to"),
    (request(answer_within=to_duration(timedelta(days=367))), "answer_within", "must be 60s to"),
]


async def test_wrong_notifications_name_their_fields(world: IntakeWorld) -> None:
    """Every bound of the contract, all in one batch."""
    items = [item for item, _, _ in NOTIFICATIONS]
    answer = await world.stub.Notify(intake_pb2.NotifyRequest(notifications=items, idempotency_key="k"))
    assert_all_refused(answer.results, "notifications", NOTIFICATIONS)


async def test_wrong_requests_name_their_fields(world: IntakeWorld) -> None:
    """Names, providers, payload and the answer-by date."""
    items = [item for item, _, _ in REQUESTS]
    answer = await world.stub.SubmitRequest(intake_pb2.SubmitRequestRequest(requests=items, idempotency_key="k"))
    assert_all_refused(answer.results, "requests", REQUESTS)


async def test_wrong_facts_and_starts_name_their_fields(world: IntakeWorld) -> None:
    """Facts are smaller than payloads; a timeline's name has a pattern."""
    facts = await world.stub.PutFacts(
        intake_pb2.PutFactsRequest(
            facts=[
                intake_pb2.EntityFacts(entity="a", facts=json.dumps({"x": "y" * 16_384})),
                intake_pb2.EntityFacts(entity="", facts="{}"),
                intake_pb2.EntityFacts(entity="a", facts=""),
            ]
        )
    )
    assert [result.error.field for result in facts.results] == ["facts[0].facts", "facts[1].entity", "facts[2].facts"]
    starts = await world.stub.StartTimeline(
        intake_pb2.StartTimelineRequest(
            starts=[
                intake_pb2.TimelineStart(timeline="Trial", entity="a"),
                intake_pb2.TimelineStart(timeline="t", entity="a", anchor_time=Timestamp(seconds=-1)),
            ]
        )
    )
    assert [result.error.field for result in starts.results] == ["starts[0].timeline", "starts[1].anchor_time"]


CALLS: list[tuple[str, Any, str]] = [
    ("Notify", intake_pb2.NotifyRequest(), "notifications"),
    ("Notify", intake_pb2.NotifyRequest(notifications=[notification()] * 1_001), "notifications"),
    ("PutFacts", intake_pb2.PutFactsRequest(), "facts"),
    ("StartTimeline", intake_pb2.StartTimelineRequest(), "starts"),
    ("SubmitRequest", intake_pb2.SubmitRequestRequest(requests=[request()] * 1_001), "requests"),
    ("RecordResponse", intake_pb2.RecordResponseRequest(), "responses"),
    ("PutItemProviders", intake_pb2.PutItemProvidersRequest(), "items"),
    (
        "PutItemProviders",
        intake_pb2.PutItemProvidersRequest(items=[intake_pb2.ItemProviders(item="a*b", providers=["p"])]),
        "items[0].item",
    ),
    ("Notify", intake_pb2.NotifyRequest(notifications=[notification()], idempotency_key="k" * 129), "idempotency_key"),
    ("Notify", intake_pb2.NotifyRequest(notifications=[notification()], idempotency_key="\x00"), "idempotency_key"),
    ("Notify", intake_pb2.NotifyRequest(notifications=[notification()], wait_for=9), "wait_for"),  # type: ignore[arg-type]
    ("TriggerBatch", intake_pb2.TriggerBatchRequest(batch=""), "batch"),
    ("TriggerBatch", intake_pb2.TriggerBatchRequest(batch="b", window_end_time=days(1)), "window_end_time"),
    (
        "TriggerBatch",
        intake_pb2.TriggerBatchRequest(batch="b", window_start_time=days(0), window_end_time=days(0)),
        "window_start_time",
    ),
    ("GetRequest", intake_pb2.GetRequestRequest(id="x"), "id"),
    ("ListRequests", intake_pb2.ListRequestsRequest(page_size=1_001), "page_size"),
    ("ListRequests", intake_pb2.ListRequestsRequest(page_token="x"), "page_token"),
    ("ListRequests", intake_pb2.ListRequestsRequest(customer="\x00"), "customer"),
    ("Explain", intake_pb2.ExplainRequest(), "id"),
]


async def test_calls_that_are_wrong_as_a_whole_are_refused(world: IntakeWorld) -> None:
    """INVALID_ARGUMENT with the field: no items, too many, selectors, windows, keys, pages."""
    for method, call, field in CALLS:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await getattr(world.stub, method)(call)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT, method
        assert [violation.field for violation in refusal_of(raised.value).violations] == [field]


async def test_bad_utf8_in_a_field_is_an_invalid_argument(world: IntakeWorld) -> None:
    """A protobuf string that is not UTF-8 never gets further than decoding."""
    call: Any = world.channel.unary_unary("/carillon.intake.v1.IntakeService/Explain")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(b"\x0a\x02\xff\xfe")
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_message_that_is_too_large_is_refused(world: IntakeWorld) -> None:
    """4 MiB are a call's limit; it is not read further."""
    items = [notification(content=content(payload=json.dumps({"t": "x" * 65_000}))) for _ in range(70)]
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await world.stub.Notify(intake_pb2.NotifyRequest(notifications=items))
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("token", "tenant", "code"),
    [
        (None, None, grpc.StatusCode.UNAUTHENTICATED),
        ("wrong", None, grpc.StatusCode.UNAUTHENTICATED),
        ("right", "other", grpc.StatusCode.PERMISSION_DENIED),
    ],
)
async def test_callers_without_the_right_credential_store_nothing(
    postgres_url: str,
    open_database: OpenDatabase,
    open_bus: OpenBus,
    tmp_path: Path,
    token: str | None,
    tenant: str | None,
    code: grpc.StatusCode,
) -> None:
    """Missing token, unknown token, and a tenant the token does not stand for (INV-8)."""
    tokens = tmp_path / "tokens.json"
    known = {"name": "shop", "sha256": hashlib.sha256(b"right").hexdigest(), "tenant": "shop"}
    tokens.write_text(json.dumps({"tokens": [known]}))
    auth = AuthSettings(mode=AuthMode.TOKENS, tokens_file=tokens)
    async with intake_world(postgres_url, open_database, open_bus, peers_run=False, auth=auth) as world:
        async with connect(world.address, token=token, tenant=tenant) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await type(world.stub)(channel).Notify(intake_pb2.NotifyRequest(notifications=[notification()]))
        assert raised.value.code() is code
        assert await world.count("outbox") == 0
