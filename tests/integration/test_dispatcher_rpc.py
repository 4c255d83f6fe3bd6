"""The dispatcher's gRPC service, as its callers see it."""

from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import grpc
import pytest
from carillon.dispatcher.v1 import dispatcher_pb2 as pb
from carillon.dispatcher.v1 import dispatcher_pb2_grpc as pb_grpc
from carillon.scheduler.v1 import timer_pb2
from prometheus_client import CollectorRegistry

from libs.rpc import build_server
from libs.rpc_client import connect, refusal_of
from libs.settings import AuthSettings, GrpcSettings
from libs.wire import to_timestamp
from services.dispatcher.delivery import Permanent, Reason, Retryable, Sent, State
from services.dispatcher.rpc import DispatcherRpc, servicer
from services.dispatcher.store_settings import KeyStore
from services.dispatcher.store_suppressions import SuppressionStore
from tests.support.dispatcher_world import (
    DIGEST,
    NOON,
    SECOND,
    TENANT,
    Rig,
    ScriptedChannel,
    delivery,
    id_of,
    migrated_database,
)
from tests.support.fixtures import OpenDatabase


class Dispatcher:
    """A rig with a server in front of it, and stubs for two tenants."""

    def __init__(self, rig: Rig, ours: Any, theirs: Any) -> None:
        self.rig, self.ours, self.theirs = rig, ours, theirs


@pytest.fixture
async def dispatcher(open_database: OpenDatabase, postgres_server_url: str) -> AsyncIterator[Dispatcher]:
    """A dispatcher that listens."""
    async with AsyncExitStack() as stack:
        url = stack.enter_context(migrated_database(postgres_server_url))
        rig = Rig(await open_database("dispatcher", url))
        rpc = DispatcherRpc(
            db=rig.db,
            clock=rig.clock,
            deliveries=rig.deliveries,
            dead_letters=rig.dead_letters,
            suppressions=SuppressionStore(),
            keys=KeyStore(),
            on_work=rig.wake,
        )
        server = await stack.enter_async_context(
            build_server(
                GrpcSettings(drain_timeout=timedelta(seconds=1)),
                auth=AuthSettings(),
                servicers=[servicer(rpc)],
                registry=CollectorRegistry(),
            )
        )
        ours = await stack.enter_async_context(connect(server.address, tenant=TENANT))
        theirs = await stack.enter_async_context(connect(server.address, tenant="rival"))
        yield Dispatcher(rig, pb_grpc.DispatcherServiceStub(ours), pb_grpc.DispatcherServiceStub(theirs))


async def refused(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def dead(rig: Rig, *names: str) -> None:
    """Deliveries of these names, given up."""
    channel = ScriptedChannel(*[Permanent(Reason.REJECTED, f"550 {name}") for name in names])
    async with rig.sending(log=channel) as outcomes:
        for name in names:
            await rig.accept(delivery(name))
            await outcomes.until(names.index(name) + 1)
            rig.clock.at += SECOND


async def test_deliveries_are_listed_newest_first_in_pages(dispatcher: Dispatcher) -> None:
    """Pages follow each other without gaps; filters hold; another tenant sees nothing."""
    for n in range(5):
        dispatcher.rig.clock.at = NOON + n * SECOND
        await dispatcher.rig.accept(delivery(str(n), subscriber="ann" if n % 2 else "bob"))
    seen, token = [], ""
    for _ in range(3):
        page = await dispatcher.ours.ListDeliveries(pb.ListDeliveriesRequest(page_size=2, page_token=token))
        seen += [one.id for one in page.deliveries]
        token = page.next_page_token
    assert seen == [str(id_of(str(n))) for n in (4, 3, 2, 1, 0)]
    assert token == ""
    bobs = await dispatcher.ours.ListDeliveries(pb.ListDeliveriesRequest(subscriber="bob", digest_id=str(DIGEST)))
    assert len(bobs.deliveries) == 3
    sent = await dispatcher.ours.ListDeliveries(pb.ListDeliveriesRequest(states=[pb.DELIVERY_STATE_SENT]))
    assert list(sent.deliveries) == []
    theirs = await dispatcher.theirs.ListDeliveries(pb.ListDeliveriesRequest())
    assert list(theirs.deliveries) == []


async def test_a_delivery_is_shown_with_its_priority(dispatcher: Dispatcher) -> None:
    """As digest gave it; what was left open, or is not known here, is normal and shown as that."""
    newer = timer_pb2.Priority.ValueType(9)
    given = {"urgent": timer_pb2.PRIORITY_HIGH, "idle": timer_pb2.PRIORITY_LOW, "open": 0, "newer": newer}
    await dispatcher.rig.accept(*(delivery(name, priority=priority) for name, priority in given.items()))
    listed = (await dispatcher.ours.ListDeliveries(pb.ListDeliveriesRequest())).deliveries
    assert {one.id: one.priority for one in listed} == {
        str(id_of("urgent")): timer_pb2.PRIORITY_HIGH,
        str(id_of("idle")): timer_pb2.PRIORITY_LOW,
        str(id_of("open")): timer_pb2.PRIORITY_NORMAL,
        str(id_of("newer")): timer_pb2.PRIORITY_NORMAL,
    }
    shown = await dispatcher.ours.GetDelivery(pb.GetDeliveryRequest(id=str(id_of("urgent"))))
    assert shown.delivery.priority == timer_pb2.PRIORITY_HIGH
    (entry,) = (await dispatcher.ours.Explain(pb.ExplainRequest(id=str(id_of("urgent"))))).entries
    assert entry.details["priority"] == "high"


async def test_a_delivery_is_shown_with_its_attempts(dispatcher: Dispatcher) -> None:
    """State, last error, when it is tried next, and every attempt; to its own tenant alone."""
    channel = ScriptedChannel(Retryable(Reason.DEFERRED, "451 later"))
    async with dispatcher.rig.sending(log=channel) as outcomes:
        await dispatcher.rig.accept(delivery())
        await outcomes.until(1)
    request = pb.GetDeliveryRequest(id=str(id_of("one")))
    shown = await dispatcher.ours.GetDelivery(request)
    assert shown.delivery.state == pb.DELIVERY_STATE_RETRYING
    assert shown.delivery.last_error == "deferred: 451 later"
    assert shown.delivery.HasField("next_attempt_time")
    assert not shown.delivery.HasField("end_time")
    (attempt,) = shown.attempts
    assert (attempt.number, attempt.is_sent, attempt.reason, attempt.reply) == (1, False, "deferred", "451 later")
    assert (await refused(dispatcher.theirs.GetDelivery(request))).code() is grpc.StatusCode.NOT_FOUND


async def test_dead_letters_are_listed_and_redriven_once(dispatcher: Dispatcher) -> None:
    """Redriving queues a delivery again with a fresh budget; the same key answers the same and does nothing more."""
    rig = dispatcher.rig
    await dead(rig, "one", "two", "three")
    page = await dispatcher.ours.ListDeadLetters(pb.ListDeadLettersRequest(page_size=2))
    rest = await dispatcher.ours.ListDeadLetters(pb.ListDeadLettersRequest(page_token=page.next_page_token))
    listed = [one.id for one in (*page.deliveries, *rest.deliveries)]
    assert listed == [str(id_of(name)) for name in ("three", "two", "one")]
    assert page.deliveries[0].last_error == "rejected: 550 three"

    request = pb.RedriveRequest(delivery_ids=[str(id_of("one")), str(id_of("two"))], idempotency_key="again")
    async with rig.sending(log=ScriptedChannel(Retryable(Reason.TIMEOUT), Sent()), max_attempts=1) as outcomes:
        assert (await dispatcher.ours.Redrive(request)).redriven == 2
        await outcomes.until(2)
        assert (await dispatcher.ours.Redrive(request)).redriven == 2  # Answered from the key.
    assert await rig.states() == {State.SENT: 1, State.DEAD: 2}
    assert sorted(await rig.outcomes_told()) == [
        ("dead", "attempts_exhausted"),
        ("dead", "rejected"),
        ("dead", "rejected"),
        ("dead", "rejected"),
        ("sent", ""),
    ]
    assert [one.number for one in await rig.attempts(id_of("one"))] == [1, 2]

    other = pb.RedriveRequest(delivery_ids=[str(id_of("three"))], idempotency_key="again")
    assert (await refused(dispatcher.ours.Redrive(other))).code() is grpc.StatusCode.ALREADY_EXISTS


async def test_only_dead_and_held_deliveries_are_redriven_and_all_or_none(dispatcher: Dispatcher) -> None:
    """One that is neither, or not there, or another tenant's, refuses the whole call and leaves the key unused."""
    rig = dispatcher.rig
    await dead(rig, "dead")
    await rig.accept(delivery("pending"))
    ids = [str(id_of("dead")), str(id_of("pending"))]
    error = await refused(dispatcher.ours.Redrive(pb.RedriveRequest(delivery_ids=ids, idempotency_key="k")))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert refusal_of(error).metadata == {str(id_of("pending")): "pending"}
    theirs = pb.RedriveRequest(delivery_ids=ids[:1], idempotency_key="k")
    assert (await refused(dispatcher.theirs.Redrive(theirs))).code() is grpc.StatusCode.NOT_FOUND
    assert (await rig.record(id_of("dead"))).state is State.DEAD
    assert (await dispatcher.ours.Redrive(theirs)).redriven == 1


async def test_suppressions_are_put_listed_and_lifted(dispatcher: Dispatcher) -> None:
    """Putting twice keeps the date and takes the new reason; e-mail addresses have no case; lifting twice is fine."""
    for reason in ("bounced", "asked us to stop"):
        given = pb.Suppression(channel="email", address="Ann@Example.com", reason=reason)
        await dispatcher.ours.PutSuppression(pb.PutSuppressionRequest(suppression=given))
        dispatcher.rig.clock.at += SECOND
    hook = pb.Suppression(channel="webhook", address="https://x.example/A", reason="gone")
    await dispatcher.ours.PutSuppression(pb.PutSuppressionRequest(suppression=hook))
    first = await dispatcher.ours.ListSuppressions(pb.ListSuppressionsRequest(page_size=1))
    (kept,) = first.suppressions
    assert (kept.address, kept.reason, kept.create_time.ToDatetime(tzinfo=NOON.tzinfo)) == (
        "ann@example.com",
        "asked us to stop",
        NOON,
    )
    second = await dispatcher.ours.ListSuppressions(pb.ListSuppressionsRequest(page_token=first.next_page_token))
    assert [one.address for one in second.suppressions] == ["https://x.example/A"]
    assert not (await dispatcher.theirs.ListSuppressions(pb.ListSuppressionsRequest())).suppressions
    for _ in range(2):
        lifted = pb.DeleteSuppressionRequest(channel="email", address="ANN@example.com")
        await dispatcher.ours.DeleteSuppression(lifted)
    assert len((await dispatcher.ours.ListSuppressions(pb.ListSuppressionsRequest())).suppressions) == 1


async def test_explain_tells_the_story_of_a_delivery_and_of_a_digest(dispatcher: Dispatcher) -> None:
    """In order of time, with what will happen; nothing for what is unknown, or another tenant's."""
    rig = dispatcher.rig
    async with rig.sending(log=ScriptedChannel(Retryable(Reason.DEFERRED, "451 later"))) as outcomes:
        await rig.accept(delivery("one"))
        await outcomes.until(1)
        await rig.accept(delivery("two"))
        await outcomes.until(2)
    of_one = ["delivery_accepted", "delivery_attempt_failed", "delivery_retry_expected"]
    of_two = ["delivery_accepted", "delivery_sent"]
    for id_, kinds in ((id_of("one"), of_one), (id_of("two"), of_two), (DIGEST, of_one + of_two)):
        story = (await dispatcher.ours.Explain(pb.ExplainRequest(id=str(id_)))).entries
        assert sorted(entry.kind for entry in story) == sorted(kinds)
        assert [entry.time.ToDatetime() for entry in story] == sorted(entry.time.ToDatetime() for entry in story)
        assert all(entry.service == "dispatcher" and entry.sentence for entry in story)
    for stub, id_text in ((dispatcher.theirs, str(DIGEST)), (dispatcher.ours, "carillon:delivery:x")):
        assert not (await stub.Explain(pb.ExplainRequest(id=id_text))).entries


BAD_REQUESTS: list[tuple[str, object, str]] = [
    ("GetDelivery", pb.GetDeliveryRequest(id="x"), "id"),
    ("ListDeliveries", pb.ListDeliveriesRequest(page_size=1001), "page_size"),
    ("ListDeliveries", pb.ListDeliveriesRequest(digest_id="x"), "digest_id"),
    ("ListDeliveries", pb.ListDeliveriesRequest(page_token="x"), "page_token"),
    ("Redrive", pb.RedriveRequest(idempotency_key="k"), "delivery_ids"),
    ("Redrive", pb.RedriveRequest(delivery_ids=["x"], idempotency_key="k"), "delivery_ids[0]"),
    ("Redrive", pb.RedriveRequest(delivery_ids=[str(DIGEST)] * 1001, idempotency_key="k"), "delivery_ids"),
    ("Redrive", pb.RedriveRequest(delivery_ids=[str(DIGEST)]), "idempotency_key"),
    (
        "PutSuppression",
        pb.PutSuppressionRequest(suppression=pb.Suppression(channel="fax", address="1", reason="r")),
        "suppression.channel",
    ),
    (
        "PutSuppression",
        pb.PutSuppressionRequest(suppression=pb.Suppression(channel="email", address="a\r\nb", reason="r")),
        "suppression.address",
    ),
    ("Explain", pb.ExplainRequest(), "id"),
]


async def test_bad_requests_name_the_field(dispatcher: Dispatcher) -> None:
    """INVALID_ARGUMENT with the path of what is wrong."""
    for method, request, field in BAD_REQUESTS:
        error = await refused(getattr(dispatcher.ours, method)(request))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert field in [violation.field for violation in refusal_of(error).violations]


async def buried(rig: Rig) -> None:
    """Five dead letters a second apart, of two channels, and one that is held."""
    rejected, doubtful = Permanent(Reason.REJECTED, "550 no"), Retryable(Reason.TIMEOUT, is_in_doubt=True)
    hook = ScriptedChannel(rejected, rejected, doubtful)
    mail = ScriptedChannel(Permanent(Reason.ADDRESS_REJECTED, "550 5.1.1 who?"), rejected)
    given = [*(("webhook", f"w{n}", f"s{n}") for n in range(3)), *(("email", f"m{n}", f"s{n}") for n in range(2))]
    async with rig.sending(webhook=hook, email=mail, webhook_in_doubt="hold") as outcomes:
        for n, (channel, name, subscriber) in enumerate(given):
            address = "ann@example.com" if channel == "email" else "https://example.com/x"
            await rig.accept(
                delivery(name, channel=channel, address=address, subscriber=subscriber, json="{}", html="<p>Hi</p>")
            )
            await outcomes.until(n + 1)
            rig.clock.at += SECOND


async def test_dead_letters_are_counted_by_channel_state_and_reason(dispatcher: Dispatcher) -> None:
    """With the first and the last instant of each; another tenant counts nothing."""
    await buried(dispatcher.rig)
    counted = await dispatcher.ours.CountDeadLetters(pb.CountDeadLettersRequest())
    found = [(one.channel, one.state, one.reason, one.count) for one in counted.counts]
    assert counted.total == 5
    assert found == [
        ("webhook", pb.DELIVERY_STATE_DEAD, "rejected", 2),
        ("email", pb.DELIVERY_STATE_DEAD, "address_rejected", 1),
        ("email", pb.DELIVERY_STATE_DEAD, "rejected", 1),
        ("webhook", pb.DELIVERY_STATE_HELD, "in_doubt", 1),
    ]
    assert (counted.counts[0].first_time, counted.counts[0].last_time) == (
        to_timestamp(NOON),
        to_timestamp(NOON + SECOND),
    )
    assert (await dispatcher.theirs.CountDeadLetters(pb.CountDeadLettersRequest())).total == 0


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({}, {"w0", "w1", "w2", "m0", "m1"}),
        ({"channel": "email"}, {"m0", "m1"}),
        ({"reason": "rejected"}, {"w0", "w1", "m1"}),
        ({"subscriber": "s1"}, {"w1", "m1"}),
        ({"state": pb.DELIVERY_STATE_HELD}, {"w2"}),
        ({"start_time": to_timestamp(NOON + SECOND), "end_time": to_timestamp(NOON + 3 * SECOND)}, {"w1", "w2"}),
        ({"channel": "email", "reason": "timeout"}, set()),
    ],
)
async def test_dead_letters_are_chosen_by_a_filter(
    dispatcher: Dispatcher, given: dict[str, Any], names: set[str]
) -> None:
    """List, count and redrive mean the same ones; of another tenant's nothing moves."""
    await buried(dispatcher.rig)
    wanted = pb.DeadLetterFilter(**given)
    listed = await dispatcher.ours.ListDeadLetters(pb.ListDeadLettersRequest(filter=wanted))
    assert {one.id for one in listed.deliveries} == {str(id_of(name)) for name in names}
    request = pb.RedriveRequest(filter=wanted, idempotency_key="again")
    assert (await dispatcher.theirs.Redrive(request)).redriven == 0
    assert (await dispatcher.ours.Redrive(request)).redriven == len(names)
    left = await dispatcher.ours.ListDeadLetters(pb.ListDeadLettersRequest(filter=wanted))
    assert not left.deliveries
    assert await dispatcher.rig.queued() == len(names)
    async with dispatcher.rig.sending(webhook=ScriptedChannel(), email=ScriptedChannel()) as outcomes:
        await outcomes.until(len(names))
    assert (await dispatcher.ours.CountDeadLetters(pb.CountDeadLettersRequest())).total == 5 - len(names)


async def test_a_filter_redrives_as_many_as_asked_for_oldest_first(dispatcher: Dispatcher) -> None:
    """The answer says how many are left; the same key again changes nothing, and with another filter is refused."""
    await buried(dispatcher.rig)
    request = pb.RedriveRequest(filter=pb.DeadLetterFilter(channel="webhook"), limit=2, idempotency_key="k")
    for _ in range(2):
        answer = await dispatcher.ours.Redrive(request)
        assert (answer.redriven, answer.remaining) == (2, 1)
    left = await dispatcher.ours.ListDeadLetters(pb.ListDeadLettersRequest(filter=request.filter))
    assert [one.id for one in left.deliveries] == [str(id_of("w2"))]
    other = pb.RedriveRequest(filter=pb.DeadLetterFilter(channel="email"), limit=2, idempotency_key="k")
    assert (await refused(dispatcher.ours.Redrive(other))).code() is grpc.StatusCode.ALREADY_EXISTS


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.RedriveRequest(filter=pb.DeadLetterFilter(), delivery_ids=[str(id_of("w0"))]), "delivery_ids"),
        (pb.RedriveRequest(filter=pb.DeadLetterFilter(channel="pigeon")), "filter.channel"),
        (pb.RedriveRequest(filter=pb.DeadLetterFilter(state=pb.DELIVERY_STATE_SENT)), "filter.state"),
        (pb.RedriveRequest(filter=pb.DeadLetterFilter(reason="x" * 65)), "filter.reason"),
        (pb.RedriveRequest(filter=pb.DeadLetterFilter(), limit=10_001), "limit"),
        (pb.RedriveRequest(delivery_ids=[str(id_of("w0"))], limit=1), "limit"),
    ],
)
async def test_a_filter_that_means_nothing_is_refused(
    dispatcher: Dispatcher, request_: pb.RedriveRequest, field: str
) -> None:
    """The field at fault is named, and nothing is redriven."""
    await buried(dispatcher.rig)
    request_.idempotency_key = "k"
    error = await refused(dispatcher.ours.Redrive(request_))
    assert [one.field for one in refusal_of(error).violations] == [field]
    assert await dispatcher.rig.queued() == 0


async def test_a_dead_letter_can_be_inspected_with_its_content(dispatcher: Dispatcher) -> None:
    """What it says is shown where asked for, and only then."""
    await buried(dispatcher.rig)
    shown = await dispatcher.ours.GetDelivery(pb.GetDeliveryRequest(id=str(id_of("m0")), with_content=True))
    assert (shown.content.html, shown.content.text, shown.content.json) == ("<p>Hi</p>", "Hello, Ann.", "{}")
    assert (shown.delivery.reason, shown.delivery.last_error) == (
        "address_rejected",
        "address_rejected: 550 5.1.1 who?",
    )
    plain = await dispatcher.ours.GetDelivery(pb.GetDeliveryRequest(id=str(id_of("m0"))))
    assert not plain.HasField("content")


async def test_a_parked_delivery_says_so(dispatcher: Dispatcher) -> None:
    """Until when nobody tries it, in the list, alone, and in a sentence."""
    rig = dispatcher.rig
    await rig.accept(delivery("one", channel="webhook", address="https://example.com/x", json="{}"))
    async with rig.db.transaction() as tx:
        await tx.raw.execute("UPDATE queue SET claimable_at = now() + interval '1 hour'")
    (listed,) = (await dispatcher.ours.ListDeliveries(pb.ListDeliveriesRequest())).deliveries
    assert listed.HasField("parked_until_time")
    told = await dispatcher.ours.Explain(pb.ExplainRequest(id=str(id_of("one"))))
    assert [one.kind for one in told.entries] == ["delivery_accepted", "delivery_parked"]


async def test_suppressions_of_one_address_are_told_apart(dispatcher: Dispatcher) -> None:
    """Channel, address, list and source name one; each is put, found by its address and lifted by itself."""
    ann: dict[str, Any] = {"channel": "email", "address": "ann@example.com", "reason": "why"}
    for given in (
        pb.Suppression(**ann, list_id="cadence:daily", source=pb.SUPPRESSION_SOURCE_UNSUBSCRIBE),
        pb.Suppression(**ann, source=pb.SUPPRESSION_SOURCE_BOUNCE),
        pb.Suppression(**ann),
        pb.Suppression(channel="email", address="bob@example.com", reason="why"),
    ):
        await dispatcher.ours.PutSuppression(pb.PutSuppressionRequest(suppression=given))

    async def of_ann() -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []
        token = ""
        while not found or token:
            request = pb.ListSuppressionsRequest(address="Ann@Example.com", page_size=1, page_token=token)
            page = await dispatcher.ours.ListSuppressions(request)
            found += [(one.list_id, one.source) for one in page.suppressions]
            token = page.next_page_token
        return found

    caller, bounce, unsubscribe = ("", 1), ("", 2), ("cadence:daily", 3)
    assert await of_ann() == [caller, bounce, unsubscribe]
    where: dict[str, Any] = {"channel": "email", "address": "ann@example.com"}
    one = pb.DeleteSuppressionRequest(**where, source=pb.SUPPRESSION_SOURCE_BOUNCE)
    await dispatcher.ours.DeleteSuppression(one)
    assert await of_ann() == [caller, unsubscribe]
    await dispatcher.ours.DeleteSuppression(pb.DeleteSuppressionRequest(**where))
    assert await of_ann() == [unsubscribe]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"address": "ann@example.com\r\nBcc: all@example.com"}, "suppression.address"),
        ({"address": "a" * 2_049}, "suppression.address"),
        ({"channel": "pigeon"}, "suppression.channel"),
        ({"reason": "x" * 513}, "suppression.reason"),
        ({"list_id": "daily"}, "suppression.list_id"),
        ({"list_id": f"type:{'x' * 160}"}, "suppression.list_id"),
        ({"source": 9}, "suppression.source"),
    ],
)
async def test_a_suppression_that_is_none_is_refused(
    dispatcher: Dispatcher, changes: dict[str, Any], field: str
) -> None:
    """The answer names the field, and nothing is kept."""
    given = {"channel": "email", "address": "ann@example.com", "reason": "why"} | changes
    call = dispatcher.ours.PutSuppression(pb.PutSuppressionRequest(suppression=pb.Suppression(**given)))
    error = await refused(call)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in {one.field for one in refusal_of(error).violations}
    assert not (await dispatcher.ours.ListSuppressions(pb.ListSuppressionsRequest())).suppressions
