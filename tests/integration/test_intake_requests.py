"""Requests and responses: what is logged, who is told what, and when a request is over."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import grpc
import pytest
from carillon.intake.v1 import intake_pb2
from carillon.link.v1 import link_pb2

from libs.errors import Unavailable
from libs.ids import derived_id
from libs.links import inbox
from libs.links.frames import MAX_FRAME_BYTES
from libs.rpc_client import connect, refusal_of
from libs.sharding import shard_of
from libs.wire import to_duration, to_timestamp
from services.intake.payloads import MAX_SUMMARY_BYTES
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.intake_world import NOW, TENANT, IntakeWorld, intake_world, request
from tests.support.link_world import until
from tests.support.metrics import Since

ANSWER_BY = NOW + timedelta(days=3)
THREE_DAYS = to_duration(timedelta(days=3))


@pytest.fixture
async def world(postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus) -> AsyncIterator[IntakeWorld]:
    """Intake and its peers."""
    async with intake_world(postgres_url, open_database, open_bus) as it:
        yield it


async def submit(world: IntakeWorld, **more: Any) -> str:
    """Submit one request and return its id."""
    item = request(**({"answer_within": THREE_DAYS} | more))
    answer = await world.stub.SubmitRequest(intake_pb2.SubmitRequestRequest(requests=[item]))
    assert answer.is_applied, answer
    return str(answer.results[0].id)


async def respond(world: IntakeWorld, *responses: tuple[str, str, str]) -> intake_pb2.RecordResponseResponse:
    """Record responses, (request id, provider, payload) each."""
    items = [intake_pb2.Response(request_id=one, provider=by, payload=payload) for one, by, payload in responses]
    answer: intake_pb2.RecordResponseResponse = await world.stub.RecordResponse(
        intake_pb2.RecordResponseRequest(responses=items)
    )
    return answer


def due(request_id: str, tenant: str = TENANT) -> link_pb2.Entry:
    """What the scheduler sends at the answer-by date."""
    return link_pb2.Entry(tenant=tenant, request_due=link_pb2.RequestDue(request_id=UUID(request_id).bytes))


def told(world: IntakeWorld, kind: str) -> list[tuple[str, dict[str, Any]]]:
    """Who was told `deals/<kind>`, and what."""
    notifications = [entry.notification for entry in world.digest.entries]
    return [
        (who, json.loads(one.content.payload))
        for one in notifications
        if one.content.type == f"deals/{kind}"
        for who in one.content.subscribers
    ]


async def test_a_request_tells_each_provider_and_sets_a_timer(world: IntakeWorld) -> None:
    """One transaction: the log, the answer-by timer, and one notification for all providers."""
    request_id = await submit(world)
    about = {"request_id": request_id, "item": "lamp", "customer": "carl", "payload": {"count": 2}}
    payload = about | {"answer_by": ANSWER_BY.isoformat()}
    assert told(world, "request") == [("paul", payload), ("petra", payload)]
    (entry,) = world.digest.entries
    assert entry.notification.id == derived_id("request-notification", request_id).bytes
    assert entry.notification.entity == f"carillon:request:{request_id}"
    assert entry.notification.occur_time == to_timestamp(NOW)
    assert entry.notification.expire_time == to_timestamp(ANSWER_BY)
    (timer,) = world.scheduler.entries
    assert timer.schedule_timer == link_pb2.ScheduleTimer(
        id=derived_id("request-timer", request_id).bytes,
        entity=f"carillon:request:{request_id}",
        type="request_due",
        due_time=to_timestamp(ANSWER_BY),
        target=link_pb2.TimerTarget(request_due=link_pb2.RequestDue(request_id=UUID(request_id).bytes)),
        accept_time=to_timestamp(NOW),
    )
    assert world.scheduler.partitions == [shard_of(TENANT, timer.schedule_timer.entity, 8)]


async def test_inv9_what_a_call_sends_does_not_grow_with_its_providers_times_its_payload(world: IntakeWorld) -> None:
    """A payload for a hundred providers goes out once: a call of 4 MiB would be 400 MiB of frames else."""
    payload = json.dumps({"text": secrets.token_hex(32_000)})
    request_id = await submit(world, providers=[f"p{number}" for number in range(100)], payload=payload)
    (entry,) = world.digest.entries
    assert len(entry.notification.content.subscribers) == 100
    assert entry.ByteSize() < 80 << 10
    assert request_id in entry.notification.content.payload


async def test_a_batch_of_requests_is_logged_beside_what_is_wrong(world: IntakeWorld) -> None:
    """Wrong items have their errors; the others are in the log."""
    items = [request(), request(batch="Deals!", payload="nope"), request(providers=[]), request(customer="cora")]
    answer = await world.stub.SubmitRequest(intake_pb2.SubmitRequestRequest(requests=items))
    assert [result.error.field for result in answer.results] == [
        "",
        "requests[1].batch",
        "requests[2].providers",
        "",
    ]
    assert answer.results[2].error.code == 9
    assert answer.results[2].error.reason == "NO_PROVIDERS"
    assert await world.count("request") == 2


async def test_providers_are_looked_up_exact_id_first_then_the_longest_pattern(world: IntakeWorld) -> None:
    """And an entry put again replaces the one before; an empty one removes it."""

    async def put(**items: list[str]) -> None:
        entries = [intake_pb2.ItemProviders(item=item, providers=names) for item, names in items.items()]
        await world.stub.PutItemProviders(intake_pb2.PutItemProvidersRequest(items=entries))

    async def asked(item: str) -> list[str]:
        await submit(world, item=item, providers=[])
        entries = [one.notification for one in world.digest.entries if one.WhichOneof("kind") == "notification"]
        found = [who for one in entries for who in one.content.subscribers]
        world.digest.entries.clear()
        return found

    await put(**{"*": ["all"], "lamp*": ["lamps"], "lamp-floor*": ["floors", "more"], "lamp": ["exact"]})
    assert await asked("lamp") == ["exact"]
    assert await asked("lamp-1") == ["lamps"]
    assert await asked("lamp-floor-7") == ["floors", "more"]
    assert await asked("chair") == ["all"]
    await put(**{"lamp": [], "lamp*": ["others"]})
    assert await asked("lamp") == ["others"]


async def test_a_response_reaches_the_customer(world: IntakeWorld) -> None:
    """The request becomes answered, and the customer hears who said what."""
    request_id = await submit(world)
    world.clock.advance(timedelta(hours=1))
    answer = await respond(world, (request_id, "paul", '{"price": 7}'))
    assert answer.is_applied
    payload = {
        "request_id": request_id,
        "item": "lamp",
        "provider": "paul",
        "payload": {"price": 7},
        "time": (NOW + timedelta(hours=1)).isoformat(),
    }
    assert told(world, "response") == [("carl", payload)]
    notification = world.digest.entries[-1].notification
    assert notification.id == derived_id("response-notification", answer.results[0].id).bytes
    logged = (await world.stub.GetRequest(intake_pb2.GetRequestRequest(id=request_id))).request
    assert logged.state == intake_pb2.REQUEST_STATE_ANSWERED
    assert [(one.provider, one.payload) for one in logged.responses] == [("paul", '{"price": 7}')]


async def test_responses_that_are_not_welcome_say_why(world: IntakeWorld) -> None:
    """Unknown request, provider not asked, request over, and a wrong id: each has its code; the good one is logged."""
    request_id, short = await submit(world), await submit(world, answer_within=to_duration(timedelta(minutes=1)))
    world.clock.advance(timedelta(minutes=1))
    answer = await respond(
        world,
        (str(uuid4()), "paul", "{}"),
        (request_id, "nobody", "{}"),
        (short, "paul", "{}"),
        ("no-uuid", "paul", "[]"),
        (request_id, "paul", ""),
    )
    assert [(result.error.code, result.error.reason, result.error.field) for result in answer.results] == [
        (5, "REQUEST_UNKNOWN", "responses[0].request_id"),
        (7, "PROVIDER_NOT_ASKED", "responses[1].provider"),
        (9, "REQUEST_OVER", "responses[2].request_id"),
        (3, "INVALID_ARGUMENT", "responses[3].request_id"),
        (0, "", ""),
    ]
    assert await world.count("response") == 1


async def test_another_tenants_request_is_unknown(world: IntakeWorld) -> None:
    """INV-8: not forbidden, not over: unknown."""
    request_id = await submit(world)
    async with connect(world.address, tenant="other") as channel:
        stub = type(world.stub)(channel)
        item = intake_pb2.Response(request_id=request_id, provider="paul")
        answer = await stub.RecordResponse(intake_pb2.RecordResponseRequest(responses=[item]))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.GetRequest(intake_pb2.GetRequestRequest(id=request_id))
        listed = await stub.ListRequests(intake_pb2.ListRequestsRequest())
        explained = await stub.Explain(intake_pb2.ExplainRequest(id=request_id))
    assert answer.results[0].error.reason == "REQUEST_UNKNOWN"
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    assert not listed.requests
    assert not explained.entries
    await world.scheduler.send(due(request_id, tenant="other"))
    logged = (await world.stub.GetRequest(intake_pb2.GetRequestRequest(id=request_id))).request
    assert logged.state == intake_pb2.REQUEST_STATE_OPEN


async def test_at_the_answer_by_date_the_customer_gets_the_summary(world: IntakeWorld) -> None:
    """Closed with answers, expired without; the latest answer of each provider counts."""
    answered, silent = await submit(world), await submit(world, item="chair")
    await respond(world, (answered, "petra", '{"price": 9}'), (answered, "paul", '{"price": 8}'))
    await respond(world, (answered, "petra", '{"price": 7}'))
    world.clock.set(ANSWER_BY + timedelta(seconds=5))
    results = await world.scheduler.send(due(answered), due(silent))
    assert [result.changed for result in results] == [1, 1]
    await world.digest.received(7)
    summaries = {payload["request_id"]: payload for _, payload in told(world, "summary")}
    assert summaries[answered] == {
        "request_id": answered,
        "item": "lamp",
        "customer": "carl",
        "payload": {"count": 2},
        "state": "closed",
        "answers": [
            {"provider": "paul", "payload": {"price": 8}, "time": NOW.isoformat()},
            {"provider": "petra", "payload": {"price": 7}, "time": NOW.isoformat()},
        ],
        "unanswered": [],
    }
    assert summaries[silent]["state"] == "expired"
    assert summaries[silent]["unanswered"] == ["paul", "petra"]
    last = world.digest.entries[-1].notification
    assert last.occur_time == to_timestamp(ANSWER_BY)
    assert last.content.subscribers == ["carl"]
    logged = (await world.stub.GetRequest(intake_pb2.GetRequestRequest(id=answered))).request
    assert logged.state == intake_pb2.REQUEST_STATE_CLOSED
    assert logged.close_time == to_timestamp(ANSWER_BY + timedelta(seconds=5))
    assert len(logged.responses) == 3


async def test_a_request_is_closed_once(world: IntakeWorld) -> None:
    """The same due date in two frames, and twice in one, gives one summary."""
    request_id = await submit(world)
    world.clock.set(ANSWER_BY)
    await world.scheduler.send(due(request_id), due(request_id))
    again = await world.scheduler.send(due(request_id))
    assert again == []
    await world.digest.received(2)

    async def is_confirmed() -> bool:
        return await world.rows("SELECT count(*) FROM outbox WHERE receiver = 'digest'") == [(0,)]

    await until(is_confirmed)
    assert len(told(world, "summary")) == 1


async def test_a_request_whose_closing_is_rolled_back_is_counted_once(
    world: IntakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its frame comes again; what was not committed is not counted."""
    keep, failures, moved = inbox.keep_results, iter([True]), Since()

    async def keep_results(*arguments: Any) -> None:
        if next(failures, False):
            raise Unavailable("Postgres went away.")
        await keep(*arguments)

    request_id = await submit(world)
    monkeypatch.setattr(inbox, "keep_results", keep_results)
    world.clock.set(ANSWER_BY)
    (result,) = await world.scheduler.send(due(request_id))
    assert result.changed == 1
    assert next(failures, None) is None
    assert moved("carillon_intake_closed_requests_total", state="expired") == 1


async def test_a_frame_of_a_kind_intake_does_not_know_is_put_aside(world: IntakeWorld) -> None:
    """It is receipted as dead, and kept with the reason."""
    await world.scheduler.send(link_pb2.Entry(tenant=TENANT, close_window=link_pb2.CloseWindow()))
    ((reason,),) = await world.rows("SELECT reason FROM dead_frame")
    assert "entry 0 is a close_window" in reason


async def test_the_largest_summary_stays_within_its_bound(world: IntakeWorld) -> None:
    """100 providers with the longest names and 64 KiB answers: who answered is all there, small payloads are whole."""
    providers = [f"{number:03d}" + "名" * 253 for number in range(100)]
    large = json.dumps({"text": "x" * 65_000})
    request_id = await submit(world, providers=providers, payload=large, customer="客" * 256)
    for number, provider in enumerate(providers[:99]):
        payload = '{"price": 1}' if number == 98 else large
        await respond(world, (request_id, provider, payload))
    world.clock.set(ANSWER_BY)
    await world.scheduler.send(due(request_id))
    await world.digest.received(1 + 99 + 1)
    entry = world.digest.entries[-1]
    content = entry.notification.content
    assert len(content.payload.encode()) <= MAX_SUMMARY_BYTES
    assert entry.ByteSize() <= MAX_FRAME_BYTES
    payload = json.loads(content.payload)
    whole = [answer for answer in payload["answers"] if answer["payload"] is not None]
    assert len(payload["answers"]) == 99
    assert payload["unanswered"] == [providers[99]]
    assert {"price": 1} in [answer["payload"] for answer in whole]
    assert len(whole) == 3
    assert sum(answer.get("is_cut", False) for answer in payload["answers"]) == 96


async def test_a_request_with_many_large_answers_can_still_be_read(world: IntakeWorld) -> None:
    """GetRequest stays below what clients accept; of answers beyond that it leaves the payloads out."""
    request_id = await submit(world)
    large = json.dumps({"text": "x" * 65_000})
    for _ in range(60):
        await respond(world, (request_id, "paul", large))
    logged = (await world.stub.GetRequest(intake_pb2.GetRequestRequest(id=request_id))).request
    assert len(logged.responses) == 60
    assert sum(bool(one.payload) for one in logged.responses) == 48


async def test_requests_are_listed_newest_first_in_pages(world: IntakeWorld) -> None:
    """Filters and pages; responses are listed without their payloads."""
    ids = [await submit(world, customer=f"c{number % 2}", item=f"i{number}") for number in range(5)]
    await respond(world, (ids[4], "paul", '{"price": 1}'))

    async def listed(**query: Any) -> tuple[list[str], str]:
        answer = await world.stub.ListRequests(intake_pb2.ListRequestsRequest(**query))
        return [one.id for one in answer.requests], answer.next_page_token

    first, token = await listed(page_size=2)
    second, token = await listed(page_size=2, page_token=token)
    third, end = await listed(page_size=2, page_token=token)
    assert [*first, *second, *third] == ids[::-1]
    assert end == ""
    assert (await listed(customer="c0"))[0] == [ids[4], ids[2], ids[0]]
    assert (await listed(item="i3", batch="deals"))[0] == [ids[3]]
    assert (await listed(states=[intake_pb2.REQUEST_STATE_ANSWERED]))[0] == [ids[4]]
    assert (await listed(batch="other"))[0] == []
    answer = await world.stub.ListRequests(intake_pb2.ListRequestsRequest(page_size=1))
    assert [(one.provider, one.payload) for one in answer.requests[0].responses] == [("paul", "")]
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await listed(page_token=token, customer="c0")
    assert refusal_of(raised.value).violations[0].field == "page_token"


async def test_explain_tells_the_story_of_a_request(world: IntakeWorld) -> None:
    """By the request's id or a response's; of ids it does not know it says nothing."""
    request_id = await submit(world)
    response_id = (await respond(world, (request_id, "paul", "{}"))).results[0].id

    async def story(any_id: str) -> list[tuple[str, bool]]:
        answer = await world.stub.Explain(intake_pb2.ExplainRequest(id=any_id))
        return [(entry.kind, entry.is_expected) for entry in answer.entries]

    before = [("request_submitted", False), ("response_recorded", False), ("request_due", True)]
    assert await story(request_id) == before
    assert await story(response_id) == before
    submitted = (await world.stub.Explain(intake_pb2.ExplainRequest(id=request_id))).entries[0]
    timer_id = derived_id("request-timer", request_id)
    assert list(submitted.related_ids) == [str(timer_id), f"carillon:request:{request_id}"]
    assert await story(str(uuid4())) == []
    assert await story("anything") == []
    world.clock.set(ANSWER_BY)
    await world.scheduler.send(due(request_id))
    assert (await story(request_id))[-1] == ("request_closed", False)


async def test_a_response_and_the_answer_by_date_never_meet_halfway(world: IntakeWorld) -> None:
    """Whatever comes first: a response is in the summary, or refused; never accepted and missing."""
    ids = [await submit(world) for _ in range(20)]
    world.clock.set(ANSWER_BY - timedelta(seconds=1))
    answers, _ = await asyncio.gather(
        asyncio.gather(*(respond(world, (one, "paul", "{}")) for one in ids)),
        world.scheduler.send(*(due(one) for one in ids)),
    )
    await world.digest.received(20 + sum(not answer.results[0].HasField("error") for answer in answers) + 20)
    answered = {payload["request_id"]: len(payload["answers"]) for _, payload in told(world, "summary")}
    accepted = {one: int(not answer.results[0].HasField("error")) for one, answer in zip(ids, answers, strict=True)}
    assert answered == accepted
