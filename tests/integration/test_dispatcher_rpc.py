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
from services.dispatcher.delivery import Reason, Retryable
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


async def test_of_a_digest_with_more_deliveries_than_are_told_the_answer_says_so(dispatcher: Dispatcher) -> None:
    """A hundred of them are told, and that there are more."""
    await dispatcher.rig.accept(*(delivery(str(n)) for n in range(99)))
    assert not (await dispatcher.ours.Explain(pb.ExplainRequest(id=str(DIGEST)))).is_cut
    await dispatcher.rig.accept(delivery("99"), delivery("100"))
    story = await dispatcher.ours.Explain(pb.ExplainRequest(id=str(DIGEST)))
    assert (len(story.entries), story.is_cut) == (100, True)


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
