"""The dispatcher's dead letters: counted, chosen, inspected, sent again."""

from typing import Any

import grpc
import pytest
from carillon.dispatcher.v1 import dispatcher_pb2 as pb

from libs.rpc_client import refusal_of
from libs.wire import to_timestamp
from services.dispatcher.delivery import Permanent, Reason, Retryable, Sent, State
from tests.integration.test_dispatcher_rpc import Dispatcher, dispatcher, refused
from tests.support.dispatcher_world import (
    NOON,
    SECOND,
    Rig,
    ScriptedChannel,
    delivery,
    id_of,
)

__all__ = ["dispatcher"]  # A fixture.


async def dead(rig: Rig, *names: str) -> None:
    """Deliveries of these names, given up."""
    channel = ScriptedChannel(*[Permanent(Reason.REJECTED, f"550 {name}") for name in names])
    async with rig.sending(log=channel) as outcomes:
        for name in names:
            await rig.accept(delivery(name))
            await outcomes.until(names.index(name) + 1)
            rig.clock.at += SECOND


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


async def test_pages_end_where_an_answer_would_be_too_large(dispatcher: Dispatcher) -> None:
    """A thousand of them with long answers in Cyrillic are more than gRPC takes; no one is lost between two pages."""
    await dispatcher.rig.accept(*(delivery(str(n)) for n in range(1_000)))
    async with dispatcher.rig.db.transaction() as tx:
        await tx.raw.execute(
            "UPDATE delivery SET state = 5, reason = 'rejected', last_error = repeat('Ж', 2048), dead_letter_at = %s",
            (NOON,),
        )
    for method, request in (
        (dispatcher.ours.ListDeliveries, pb.ListDeliveriesRequest(page_size=1_000)),
        (dispatcher.ours.ListDeadLetters, pb.ListDeadLettersRequest(page_size=1_000)),
    ):
        first = await method(request)
        request.page_token = first.next_page_token
        second = await method(request)
        assert 2 << 20 < first.ByteSize() < 4 << 20
        assert second.next_page_token == ""
        assert len({one.id for page in (first, second) for one in page.deliveries}) == 1_000
