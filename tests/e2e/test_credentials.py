"""Who may call, and what a tenant sees: tokens mode on real processes, for every RPC there is (INV-8)."""

from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import psycopg
import pytest
from carillon.digest.v1 import digest_pb2 as digest
from carillon.dispatcher.v1 import dispatcher_pb2 as dispatcher
from carillon.intake.v1 import intake_pb2 as intake
from carillon.scheduler.v1 import scheduler_pb2 as scheduler
from carillon.scheduler.v1 import timer_pb2 as timer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from psycopg import sql

from libs.rpc_client import connect, refusal_of
from local.stack import SERVICES, Stack
from tests.e2e.conftest import token_of
from tests.integration.test_rpc_headers import answer_to
from tests.support import every_rpc
from tests.support.link_world import until

pytestmark = pytest.mark.timeout(120)


@dataclass(frozen=True, slots=True)
class Caller:
    """Calls RPCs by name, with one credential."""

    channels: Mapping[str, grpc.aio.Channel]

    async def ask(self, service: str, method: str, request: Message) -> Any:
        """The answer."""
        (descriptor,) = [one for one in every_rpc.methods(service) if one.name == method]
        return await every_rpc.call(self.channels[service], descriptor, request)

    async def digest(self, method: str, **fields: Any) -> Any:
        """An answer of digest."""
        return await self.ask("digest", method, getattr(digest, f"{method}Request")(**fields))

    async def scheduler(self, method: str, **fields: Any) -> Any:
        """An answer of the scheduler."""
        return await self.ask("scheduler", method, getattr(scheduler, f"{method}Request")(**fields))

    async def dispatcher(self, method: str, **fields: Any) -> Any:
        """An answer of the dispatcher."""
        return await self.ask("dispatcher", method, getattr(dispatcher, f"{method}Request")(**fields))

    async def intake(self, method: str, **fields: Any) -> Any:
        """An answer of intake."""
        return await self.ask("intake", method, getattr(intake, f"{method}Request")(**fields))


async def caller(exits: AsyncExitStack, stack: Stack, *, token: str | None, tenant: str | None = None) -> Caller:
    """Somebody with this token who names this tenant."""
    return Caller(
        {
            service: await exits.enter_async_context(connect(stack.grpc(service), token=token, tenant=tenant))
            for service in SERVICES
        }
    )


@pytest.fixture
async def exits() -> AsyncIterator[AsyncExitStack]:
    """Closes the channels."""
    async with AsyncExitStack() as stack:
        yield stack


async def places_of(stack: Stack, mark: str) -> list[str]:
    """Tables of any service with a row in which `mark` is, as text or as bytes."""
    found = []
    async with await psycopg.AsyncConnection.connect(stack.postgres_url, autocommit=True) as connection:
        cursor = await connection.execute(
            "SELECT table_schema, table_name FROM information_schema.tables WHERE table_schema = ANY(%s)",
            (list(SERVICES),),
        )
        for schema, table in await cursor.fetchall():
            query = sql.SQL("SELECT count(*) FROM {} AS t WHERE strpos(t::text, %s) > 0 OR strpos(t::text, %s) > 0")
            row = await (
                await connection.execute(query.format(sql.Identifier(schema, table)), (mark, mark.encode().hex()))
            ).fetchone()
            if row is not None and row[0]:
                found.append(f"{schema}.{table}")
    return found


@pytest.mark.parametrize(
    ("token", "tenant", "code", "reason"),
    [
        (None, None, grpc.StatusCode.UNAUTHENTICATED, "CREDENTIAL_MISSING"),
        (None, "shop", grpc.StatusCode.UNAUTHENTICATED, "CREDENTIAL_MISSING"),
        ("unknown", None, grpc.StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"),
        (token_of("shop"), "bank", grpc.StatusCode.PERMISSION_DENIED, "WRONG_TENANT"),
    ],
)
async def test_without_the_right_credential_nothing_is_answered_or_stored(
    guarded: Stack, exits: AsyncExitStack, token: str | None, tenant: str | None, code: grpc.StatusCode, reason: str
) -> None:
    """Every RPC of every service, with requests that would do something."""
    somebody = await caller(exits, guarded, token=token, tenant=tenant)
    for service, method, request in every_rpc.samples("unheard-of"):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await somebody.ask(service, method, request)
        refusal = refusal_of(raised.value)
        assert (raised.value.code(), refusal.reason) == (code, reason), f"{service} {method}"
        key = "authorization" if code is grpc.StatusCode.UNAUTHENTICATED else "carillon-tenant"
        assert key in (raised.value.details() or "") or reason == "CREDENTIAL_INVALID"
    assert await places_of(guarded, "unheard-of") == []


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize(
    ("name", "value"), [(b"carillon-tenant", b"\xc3\x28"), (b"authorization", b"Bearer \xff\xfe"), (b"x-note", b"\x80")]
)
async def test_bad_utf8_in_headers_is_named(guarded: Stack, service: str, name: bytes, value: bytes) -> None:
    """INVALID_ARGUMENT with the header's name, before anything is read."""
    for method in every_rpc.methods(service)[:1]:
        port = guarded.replicas[service, 0].grpc_port
        answer = await answer_to(port, name, value, path=every_rpc.path_of(method), body=b"")
        assert b"grpc-status\x013" in answer, answer
        assert name in answer


@pytest.mark.parametrize("service", SERVICES)
async def test_bad_utf8_in_a_field_is_refused_by_every_rpc(guarded: Stack, exits: AsyncExitStack, service: str) -> None:
    """It does not get further than decoding."""
    shop = await caller(exits, guarded, token=token_of("shop"))
    for method in every_rpc.methods(service):
        if method.client_streaming or not method.input_type.fields:
            continue
        call: Any = shop.channels[service].unary_unary(every_rpc.path_of(method))
        texts = [one.number for one in method.input_type.fields if one.type == one.TYPE_STRING]
        # Field 1 is text, or a message whose field 1 is text; where it is neither, any text the request has.
        number = texts[0] if texts else 1
        bad = bytes([number << 3 | 2, 2]) + b"\xff\xfe"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call(bad, timeout=20)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT, method.name


@pytest.mark.parametrize("service", SERVICES)
async def test_what_is_too_large_is_refused_by_every_service(
    guarded: Stack, exits: AsyncExitStack, service: str
) -> None:
    """RESOURCE_EXHAUSTED above 4 MiB, whoever is asked."""
    shop = await caller(exits, guarded, token=token_of("shop"))
    channel = await exits.enter_async_context(
        connect(guarded.grpc(service), token=token_of("shop"), max_message_bytes=8 << 20)
    )
    call: Any = channel.unary_unary(every_rpc.path_of(every_rpc.methods(service)[0]))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(b"\x0a" + bytes(5 << 20), timeout=20)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert shop.channels.keys() == set(SERVICES)


# What one tenant has, and another must not see.

MARK = "shops-own"
KIND, ANN, BOB = f"{MARK}.type", f"{MARK}-ann", f"{MARK}-bob"


async def fill(shop: Caller) -> dict[str, str]:
    """Something of every noun there is; returns the ids of what was given one."""
    for service, method, request in every_rpc.samples(MARK):
        if service != "intake" and method.startswith("Put"):
            await shop.ask(service, method, request)
    bob = digest.Subscriber(id=BOB, email="bob@example.com", webhook_url="https://me@example.com/")
    await shop.digest("PutSubscribers", subscribers=[bob])
    choices = [
        digest.Choice(cadence=f"{MARK}/daily"),  # Waits in a window.
        digest.Choice(cadence="immediate", channel=digest.CHANNEL_LOG),  # Is sent.
        digest.Choice(cadence="immediate", channel=digest.CHANNEL_WEBHOOK),  # Is dead at once: its URL has a user.
    ]
    one = digest.Subscription(id=f"{MARK}-bob", subscriber=BOB, type=KIND, choices=choices)
    await shop.digest("PutSubscriptions", subscriptions=[one])
    await shop.intake("PutItemProviders", items=[intake.ItemProviders(item=MARK, providers=[BOB])])
    notify = await shop.intake(
        "Notify", notifications=[intake.Notification(entity=MARK, content=every_rpc.content(MARK, BOB))]
    )
    schedule = intake.Schedule(
        entity=MARK,
        type=MARK,
        after=Duration(seconds=86_400),
        target=timer.Target(notification=every_rpc.content(MARK, BOB)),
    )
    schedules = await shop.intake("Schedule", schedules=[schedule], idempotency_key=MARK)
    starts = await shop.intake("StartTimeline", starts=[intake.TimelineStart(timeline=MARK, entity=MARK)])
    request = intake.Request(batch=MARK, customer=ANN, item=MARK)
    requests = await shop.intake("SubmitRequest", requests=[request])
    answer = intake.Response(request_id=requests.results[0].id, provider=BOB)
    responses = await shop.intake("RecordResponse", responses=[answer])
    answers = {"notification": notify, "timer": schedules, "run": starts, "request": requests, "response": responses}
    assert all(one.is_applied for one in answers.values())
    return {noun: one.results[0].id for noun, one in answers.items()} | await leave(shop)


async def code_of(call: Awaitable[object]) -> grpc.StatusCode:
    """How a call is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code()


async def leave(shop: Caller) -> dict[str, str]:
    """Wait until the immediate messages are out; the ids of window, digest and deliveries."""

    async def ended() -> list[digest.Digest]:
        digests = list((await shop.digest("ListDigests", subscriber=BOB)).digests)
        return digests if len(digests) == 2 and all(one.outcome != "pending" for one in digests) else []

    digests = await until(ended)
    (window,) = (await shop.digest("ListWindows", subscriber=BOB, states=[digest.WINDOW_STATE_OPEN])).windows
    (dead,) = (await shop.dispatcher("ListDeadLetters")).deliveries
    (sent,) = [one for one in digests if one.outcome == "sent"]
    return {"window": window.id, "digest": sent.id, "delivery": sent.delivery_ids[0], "dead": dead.id}


def questions(ids: Mapping[str, str]) -> list[tuple[str, str, Message]]:
    """Every RPC that only reads and can tell something of what `fill` has made."""
    templates = digest.GetTemplateRequest(id=KIND, locale="en")
    asked: list[tuple[str, Message]] = [
        ("intake", intake.GetRequestRequest(id=ids["request"])),
        ("intake", intake.ListRequestsRequest()),
        ("intake", intake.ListRequestsRequest(batch=MARK, customer=ANN, item=MARK)),
        ("intake", intake.ExplainRequest(id=ids["request"])),
        ("intake", intake.ExplainRequest(id=ids["response"])),
        ("scheduler", scheduler.GetTimerRequest(id=ids["timer"])),
        ("scheduler", scheduler.ListTimersRequest()),
        ("scheduler", scheduler.ListTimersRequest(entity=MARK)),
        ("scheduler", scheduler.ListTimelinesRequest()),
        ("scheduler", scheduler.ListTimelinesRequest(name=MARK)),
        *(("scheduler", scheduler.ExplainRequest(id=one)) for one in (ids["timer"], ids["run"], MARK)),
        ("digest", digest.GetNotificationTypeRequest(id=KIND)),
        ("digest", digest.GetSubscriberRequest(id=BOB)),
        ("digest", digest.GetSubscriptionRequest(id=MARK)),
        ("digest", digest.GetCadenceRequest(id=f"{MARK}/daily")),
        ("digest", templates),
        ("digest", digest.ListNotificationTypesRequest()),
        ("digest", digest.ListSubscribersRequest()),
        ("digest", digest.ListSubscriptionsRequest()),
        ("digest", digest.ListSubscriptionsRequest(subscriber=BOB)),
        ("digest", digest.ListCadencesRequest()),
        ("digest", digest.ListTemplatesRequest()),
        ("digest", digest.ListWindowsRequest()),
        ("digest", digest.ListWindowsRequest(subscriber=BOB)),
        ("digest", digest.ListDigestsRequest()),
        ("digest", digest.ListDigestsRequest(subscriber=BOB)),
        ("digest", digest.PreviewDigestRequest(window_id=ids["window"])),
        ("digest", digest.PreviewTemplateRequest(template=digest.Template(id=KIND, locale="en"))),
        ("digest", digest.GetDigestRequest(id=ids["digest"])),
        ("digest", digest.GetLedgerRequest()),
        *(("digest", digest.ExplainRequest(id=ids[noun])) for noun in ("notification", "window", "digest")),
        ("dispatcher", dispatcher.ListDeliveriesRequest()),
        ("dispatcher", dispatcher.ListDeliveriesRequest(subscriber=BOB)),
        ("dispatcher", dispatcher.ListDeliveriesRequest(digest_id=ids["digest"])),
        ("dispatcher", dispatcher.GetDeliveryRequest(id=ids["delivery"])),
        ("dispatcher", dispatcher.ListDeadLettersRequest()),
        ("dispatcher", dispatcher.ListSuppressionsRequest()),
        *(("dispatcher", dispatcher.ExplainRequest(id=ids[noun])) for noun in ("delivery", "digest")),
    ]
    return [(service, one.DESCRIPTOR.name.removesuffix("Request"), one) for service, one in asked]


async def test_inv8_a_tenant_sees_nothing_of_another(guarded: Stack, exits: AsyncExitStack) -> None:
    """Whoever asks for its own gets it; another tenant gets NOT_FOUND or nothing, from every RPC that reads."""
    shop = await caller(exits, guarded, token=token_of("shop"))
    bank = await caller(exits, guarded, token=token_of("bank"))
    ids = await fill(shop)
    asked = questions(ids)
    reading = {
        (service, one.name)
        for service in SERVICES
        for one in every_rpc.methods(service)
        if one.name.startswith(("Get", "List", "Explain", "Preview"))
    }
    # The first tells of shards, with counts of the caller's timers; the second of rules, and nothing stored.
    elsewhere = {("scheduler", "ListShards"), ("scheduler", "PreviewOccurrences")}
    assert {(service, method) for service, method, _ in asked} == reading - elsewhere
    for service, method, request in asked:
        assert (await shop.ask(service, method, request)).ByteSize() > 0, (service, request)
        if method.startswith(("Get", "Preview")) and method != "GetLedger":
            assert await code_of(bank.ask(service, method, request)) is grpc.StatusCode.NOT_FOUND, (service, request)
        else:
            assert (await bank.ask(service, method, request)).ByteSize() == 0, (service, request)
    for somebody, pending in ((shop, 1), (bank, 0)):
        shards = (await somebody.scheduler("ListShards")).shards
        assert min(sum(shard.pending for shard in shards), 1) == pending


async def test_inv8_a_tenant_changes_nothing_of_another(guarded: Stack, exits: AsyncExitStack) -> None:
    """The same ids, entities, names and keys in another tenant's calls are other things."""
    shop = await caller(exits, guarded, token=token_of("shop"))
    bank = await caller(exits, guarded, token=token_of("bank"))
    (schedule,) = [one for _, method, one in every_rpc.samples(MARK) if method == "Schedule"][:1]
    assert isinstance(schedule, intake.ScheduleRequest)
    schedule.schedules[0].after.FromSeconds(86_400)
    schedule.idempotency_key = "the-same-key"
    schedule.wait_for = intake.WAIT_FOR_APPLIED
    theirs, ours = [(await one.ask("intake", "Schedule", schedule)).results[0].id for one in (bank, shop)]
    assert theirs != ours
    submit = await shop.intake(
        "SubmitRequest", requests=[intake.Request(batch=MARK, customer=ANN, item="i", providers=[BOB])]
    )
    before = {
        (service, method, request.SerializeToString()): await shop.ask(service, method, request)
        for service, method, request in stable_questions()
    }

    by_id = intake.Selector(ids=intake.IdSelector(ids=[ours], entity=MARK))
    assert (await bank.intake("Cancel", selector=by_id)).timers == 0
    by_entity = intake.Selector(entity=intake.EntitySelector(entity=MARK))
    assert (await bank.intake("Cancel", selector=by_entity)).timers == 1  # Its own.
    answer = intake.Response(request_id=submit.results[0].id, provider=BOB)
    (result,) = (await bank.intake("RecordResponse", responses=[answer])).results
    assert result.error.code == grpc.StatusCode.NOT_FOUND.value[0]
    assert (await bank.intake("TriggerBatch", batch=MARK)).windows == 0
    for noun, one_id in (("NotificationType", KIND), ("Subscriber", BOB), ("Subscription", MARK)):
        await bank.digest(f"Delete{noun}", id=one_id)
    await bank.digest("DeleteCadence", id=f"{MARK}/daily")
    await bank.digest("DeleteTemplate", id=KIND, locale="en")
    await bank.digest("PutSubscribers", subscribers=[digest.Subscriber(id=ANN, zone="Asia/Tokyo")])
    await bank.dispatcher("DeleteSuppression", channel="email", address=f"{MARK}@example.com")
    dead = (await shop.dispatcher("ListDeadLetters")).deliveries
    for one in dead:
        redrive = bank.dispatcher("Redrive", delivery_ids=[one.id], idempotency_key=one.id)
        assert await code_of(redrive) is grpc.StatusCode.NOT_FOUND

    for service, method, request in stable_questions():
        key = (service, method, request.SerializeToString())
        assert await shop.ask(service, method, request) == before[key], method
    assert (await shop.scheduler("GetTimer", id=ours)).timer.state == timer.TIMER_STATE_SCHEDULED


def stable_questions() -> list[tuple[str, str, Message]]:
    """Lists that only their own tenant's calls change."""
    asked: list[tuple[str, Message]] = [
        ("intake", intake.ListRequestsRequest()),
        ("scheduler", scheduler.ListTimersRequest(entity=MARK)),
        ("scheduler", scheduler.ListTimelinesRequest()),
        ("digest", digest.ListNotificationTypesRequest()),
        ("digest", digest.ListSubscribersRequest()),
        ("digest", digest.ListSubscriptionsRequest()),
        ("digest", digest.ListCadencesRequest()),
        ("digest", digest.ListTemplatesRequest()),
        ("dispatcher", dispatcher.ListSuppressionsRequest()),
        ("dispatcher", dispatcher.ListDeadLettersRequest()),
    ]
    return [(service, one.DESCRIPTOR.name.removesuffix("Request"), one) for service, one in asked]
