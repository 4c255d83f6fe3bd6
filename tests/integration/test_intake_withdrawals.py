"""Withdrawing requests: what is cancelled, what is counted, and what a request that was taken back still takes."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import grpc
import pytest
from carillon.intake.v1 import intake_pb2
from carillon.link.v1 import link_pb2

from libs.rpc_client import connect, refusal_of
from libs.wire import to_timestamp
from tests.integration.test_intake_requests import ANSWER_BY, due, respond, submit, told
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.intake_world import NOW, IntakeWorld, intake_world


@pytest.fixture
async def world(postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus) -> AsyncIterator[IntakeWorld]:
    """Intake and its peers."""
    async with intake_world(postgres_url, open_database, open_bus) as it:
        yield it


async def withdraw(world: IntakeWorld, *ids: str, **more: Any) -> intake_pb2.WithdrawRequestResponse:
    """Withdraw these requests."""
    answer: intake_pb2.WithdrawRequestResponse = await world.stub.WithdrawRequest(
        intake_pb2.WithdrawRequestRequest(ids=ids, **more)
    )
    return answer


async def logged(world: IntakeWorld, request_id: str) -> intake_pb2.LoggedRequest:
    """A request as GetRequest has it."""
    answer: intake_pb2.GetRequestResponse = await world.stub.GetRequest(intake_pb2.GetRequestRequest(id=request_id))
    return answer.request


async def test_a_withdrawal_cancels_what_waits_for_anybody(world: IntakeWorld) -> None:
    """Timer and items of the request's entity go, under one sequence, and digest's counts are the answer."""
    request_id = await submit(world)
    world.digest.results = lambda index, entry: (
        link_pb2.EntryResult(index=index, changed=1, already_left=1) if entry.HasField("cancel_items") else None
    )
    world.scheduler.results = lambda index, _: link_pb2.EntryResult(index=index, changed=1)
    answer = await withdraw(world, request_id, cause="bought elsewhere")
    assert [one.id for one in answer.results] == [request_id]
    assert (answer.requests, answer.items, answer.already_left, answer.is_applied) == (1, 1, 1, True)
    entity = f"carillon:request:{request_id}"
    timers, items = world.scheduler.entries[-1], world.digest.entries[-1]
    assert timers.cancel_timers == link_pb2.CancelTimers(
        selector=link_pb2.TimerSelector(entity=entity), cause="bought elsewhere"
    )
    assert items.cancel_items == link_pb2.CancelItems(entity=entity)
    assert timers.sequence == items.sequence > world.digest.entries[0].sequence


async def test_the_history_says_what_a_request_went_through(world: IntakeWorld) -> None:
    """Open, answered, withdrawn, each with its time; the cause is kept, and told by Explain."""
    request_id = await submit(world)
    world.clock.advance(timedelta(hours=1))
    await respond(world, (request_id, "paul", "{}"))
    world.clock.advance(timedelta(hours=1))
    await withdraw(world, request_id, cause="bought elsewhere")
    found = await logged(world, request_id)
    assert found.state == intake_pb2.REQUEST_STATE_WITHDRAWN
    assert found.close_time == to_timestamp(NOW + timedelta(hours=2))
    assert [(one.state, one.time, one.cause) for one in found.history] == [
        (intake_pb2.REQUEST_STATE_OPEN, to_timestamp(NOW), ""),
        (intake_pb2.REQUEST_STATE_ANSWERED, to_timestamp(NOW + timedelta(hours=1)), ""),
        (intake_pb2.REQUEST_STATE_WITHDRAWN, to_timestamp(NOW + timedelta(hours=2)), "bought elsewhere"),
    ]
    listed = await world.stub.ListRequests(intake_pb2.ListRequestsRequest(states=[intake_pb2.REQUEST_STATE_WITHDRAWN]))
    assert [one.history for one in listed.requests] == [found.history]
    story = (await world.stub.Explain(intake_pb2.ExplainRequest(id=request_id))).entries
    assert story[-1].kind == "request_withdrawn"
    assert "bought elsewhere" in story[-1].sentence


async def test_withdrawing_again_changes_nothing(world: IntakeWorld) -> None:
    """The first time and cause stay; the cancels go out again, so that whoever repeats can wait for them."""
    request_id = await submit(world)
    await withdraw(world, request_id, cause="first")
    world.clock.advance(timedelta(hours=1))
    again = await withdraw(world, request_id, request_id, cause="second")
    assert (again.requests, again.is_applied) == (0, True)
    assert [one.id for one in again.results] == [request_id, request_id]
    found = await logged(world, request_id)
    assert found.close_time == to_timestamp(NOW)
    assert found.history[-1].cause == "first"
    assert len([one for one in world.digest.entries if one.HasField("cancel_items")]) == 2


async def test_a_withdrawn_request_has_no_summary(world: IntakeWorld) -> None:
    """Also when its answer-by date was on the way already."""
    request_id = await submit(world)
    await withdraw(world, request_id)
    world.clock.set(ANSWER_BY)
    assert await world.scheduler.send(due(request_id)) == []
    assert told(world, "summary") == []
    assert (await logged(world, request_id)).state == intake_pb2.REQUEST_STATE_WITHDRAWN


async def test_an_answer_to_a_withdrawn_request_is_refused_and_not_logged(world: IntakeWorld) -> None:
    """The rule for late answers, with a reason of its own."""
    request_id = await submit(world)
    await withdraw(world, request_id)
    answer = await respond(world, (request_id, "paul", "{}"))
    assert (answer.results[0].error.code, answer.results[0].error.reason) == (9, "REQUEST_WITHDRAWN")
    assert await world.count("response") == 0


async def test_what_cannot_be_withdrawn_says_why_beside_what_can(world: IntakeWorld) -> None:
    """Unknown, over, and no id at all; the good one is withdrawn."""
    request_id, over = await submit(world), await submit(world)
    world.clock.set(ANSWER_BY - timedelta(seconds=1))
    await world.scheduler.send(due(over))
    answer = await withdraw(world, str(uuid4()), over, "no-uuid", request_id)
    assert [(one.error.code, one.error.reason, one.error.field) for one in answer.results] == [
        (5, "REQUEST_UNKNOWN", "ids[0]"),
        (9, "REQUEST_OVER", "ids[1]"),
        (3, "INVALID_ARGUMENT", "ids[2]"),
        (0, "", ""),
    ]
    assert answer.requests == 1
    assert (await logged(world, over)).state == intake_pb2.REQUEST_STATE_EXPIRED


async def test_inv8_another_tenants_request_cannot_be_withdrawn(world: IntakeWorld) -> None:
    """It is unknown, and stays open."""
    request_id = await submit(world)
    async with connect(world.address, tenant="other") as channel:
        answer = await type(world.stub)(channel).WithdrawRequest(intake_pb2.WithdrawRequestRequest(ids=[request_id]))
    assert answer.results[0].error.reason == "REQUEST_UNKNOWN"
    assert (await logged(world, request_id)).state == intake_pb2.REQUEST_STATE_OPEN


@pytest.mark.parametrize(
    ("ids", "cause", "field"), [([], "", "ids"), (["x"] * 1_001, "", "ids"), (["x"], "c" * 513, "cause")]
)
async def test_a_call_that_is_wrong_as_a_whole_is_refused(
    world: IntakeWorld, ids: list[str], cause: str, field: str
) -> None:
    """INVALID_ARGUMENT names the field; nothing is stored."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await withdraw(world, *ids, cause=cause, idempotency_key="k")
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal_of(raised.value).violations[0].field == field
    assert await world.count("idempotency") == 0
    assert not world.scheduler.entries


async def test_ten_withdrawals_at_once_withdraw_once(world: IntakeWorld) -> None:
    """Under one key they are one call; without keys one of them does it."""
    first, second = await submit(world), await submit(world)
    keyed = await asyncio.gather(*(withdraw(world, first, idempotency_key="k") for _ in range(10)))
    free = await asyncio.gather(*(withdraw(world, second) for _ in range(10)))
    assert [one.requests for one in keyed] == [1] * 10
    assert sum(one.requests for one in free) == 1


async def test_inv4_a_withdrawal_is_ordered_after_every_response_before_it(world: IntakeWorld) -> None:
    """Whatever the order of arrival: what a response sent has a lower sequence than the cancel, or was refused."""
    ids = [await submit(world) for _ in range(30)]
    answers, _ = await asyncio.gather(
        asyncio.gather(*(respond(world, (one, "paul", "{}")) for one in ids)),
        asyncio.gather(*(withdraw(world, one) for one in ids)),
    )
    accepted = sum(not one.results[0].HasField("error") for one in answers)
    entries = await world.digest.received(30 + accepted + 30)
    cancels = {one.cancel_items.entity: one.sequence for one in entries if one.HasField("cancel_items")}
    responses = [one for one in entries if one.notification.content.type == "deals/response"]
    assert len(responses) == accepted
    assert all(one.sequence < cancels[one.notification.entity] for one in responses)
    assert {UUID(one.removeprefix("carillon:request:")) for one in cancels} == {UUID(one) for one in ids}


async def test_inv4_the_sequence_is_taken_after_the_lock(world: IntakeWorld) -> None:
    """A withdrawal that waits for a response's lock has the higher sequence, although it came first."""
    request_id = await submit(world)
    async with world.db.transaction() as tx:
        await tx.raw.execute("SELECT FROM request WHERE id = %s FOR UPDATE", (request_id,))
        waiting = asyncio.create_task(withdraw(world, request_id))
        while not await world.rows("SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # Postgres tells nobody that somebody waits.
        row = await (await tx.raw.execute("SELECT nextval('command_seq')")).fetchone()
    assert row is not None
    await waiting
    assert world.digest.entries[-1].sequence > row[0]
