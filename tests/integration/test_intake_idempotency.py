"""Idempotency keys: the same call again is the same command (INV-1, INV-2)."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import cast
from uuid import UUID

import grpc
import pytest
from carillon.intake.v1 import intake_pb2
from carillon.link.v1 import link_pb2

from libs.errors import Unavailable
from libs.links.frames import OutgoingFrame
from libs.postgres import Database, Transaction
from libs.rpc_client import connect, refusal_of
from libs.wire import to_timestamp
from services.intake.commands import Command
from services.intake.loops import Pruning
from services.intake.store import CommandStore
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.intake_world import NOW, TENANT, IntakeWorld, intake_world, notification, request


@pytest.fixture
async def world(postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus) -> AsyncIterator[IntakeWorld]:
    """Intake and its peers."""
    async with intake_world(postgres_url, open_database, open_bus) as it:
        yield it


def notify(key: str, **more: object) -> intake_pb2.NotifyRequest:
    """A call with one good and one bad item."""
    items = [notification(**more), notification(entity="carillon:mine")]
    return intake_pb2.NotifyRequest(notifications=items, idempotency_key=key)


async def test_the_same_call_again_gets_the_same_answer_and_does_nothing(world: IntakeWorld) -> None:
    """Ids, errors and is_applied are those of the first call."""
    first = await world.stub.Notify(notify("k"))
    second = await world.stub.Notify(notify("k"))
    assert first == second
    assert first.is_applied
    assert len(world.digest.entries) == 1


async def test_ten_calls_at_once_make_one_command(world: IntakeWorld) -> None:
    """The losers wait for the winner's commit and get its ids."""
    answers = await asyncio.gather(*(world.stub.Notify(notify("k")) for _ in range(10)))
    assert len({answer.results[0].id for answer in answers}) == 1
    assert len(await world.digest.received(1)) == 1
    assert await world.count("idempotency") == 1


async def test_a_key_that_a_stopped_process_holds_delays_no_other_call(world: IntakeWorld) -> None:
    """Its process stands still before its commit: who repeats the call waits, and nobody with him."""
    keys = [f"k{number}" for number in range(20)]
    commands = [(Command(tenant=TENANT, method="Notify", receivers=(), key=key), b"") for key in keys]
    async with asyncio.timeout(30):
        async with world.db.transaction() as stopped:
            await CommandStore().claim_all(stopped, commands)
            repeats = [world.stub.Notify(notify(key)) for key in keys]
            others = [world.stub.Notify(notify(f"other{number}")) for number in range(20)]
            assert all(answer.is_applied for answer in await asyncio.gather(*others))
            assert not any(one.done() for one in repeats)
            await stopped.raw.rollback()
        assert all(answer.is_applied for answer in await asyncio.gather(*repeats))


async def test_an_answer_that_a_stopped_process_improves_delays_no_other_call(world: IntakeWorld) -> None:
    """Its row is locked by then, and was there before."""
    await world.stub.Notify(notify("k"))
    command = Command(tenant=TENANT, method="Notify", receivers=(), key="k")
    improving, goes_on = asyncio.Event(), asyncio.Event()

    class Stopping:
        @asynccontextmanager
        async def transaction(self) -> AsyncIterator[Transaction]:
            async with world.db.transaction() as tx:
                yield tx
                improving.set()
                await goes_on.wait()
                await tx.raw.rollback()

    async with asyncio.timeout(30):
        task = asyncio.create_task(CommandStore().improve_answer(cast(Database, Stopping()), command, b""))
        await improving.wait()
        repeat = world.stub.Notify(notify("k"))
        others = [world.stub.Notify(notify(f"other{number}")) for number in range(20)]
        assert all(answer.is_applied for answer in await asyncio.gather(*others))
        goes_on.set()
        await task
        assert (await repeat).is_applied


async def test_ten_requests_at_once_are_logged_once(world: IntakeWorld) -> None:
    """Also where the command writes more than frames."""
    batch = intake_pb2.SubmitRequestRequest(requests=[request()], idempotency_key="k")
    answers = await asyncio.gather(*(world.stub.SubmitRequest(batch) for _ in range(10)))
    assert len({answer.results[0].id for answer in answers}) == 1
    assert await world.count("request") == 1


async def test_a_repeat_may_wait_differently(world: IntakeWorld) -> None:
    """How long a call waits is no part of its content; what it hears is what the first call was answered with."""
    first = notify("k")
    first.wait_for = intake_pb2.WAIT_FOR_ACCEPTED
    accepted = await world.stub.Notify(first)
    repeated = await world.stub.Notify(notify("k"))
    assert not accepted.is_applied
    assert repeated == accepted


async def test_a_repeated_cancel_gets_the_counts(world: IntakeWorld) -> None:
    """What the receipts said is kept with the answer."""
    world.scheduler.results = lambda index, _: link_pb2.EntryResult(index=index, changed=3)
    selector = intake_pb2.Selector(entity=intake_pb2.EntitySelector(entity="shop-1"))
    call = intake_pb2.CancelRequest(selector=selector, idempotency_key="k")
    first = await world.stub.Cancel(call)
    assert first.timers == 3
    assert await world.stub.Cancel(call) == first
    assert len(world.scheduler.entries) == 1


async def test_other_content_under_the_same_key_is_refused(world: IntakeWorld) -> None:
    """ALREADY_EXISTS, for other items as for another method; nothing is stored."""
    await world.stub.Notify(notify("k"))
    facts = intake_pb2.PutFactsRequest(facts=[intake_pb2.EntityFacts(entity="shop-1", facts="{}")], idempotency_key="k")
    for call in (world.stub.Notify(notify("k", entity="shop-2")), world.stub.PutFacts(facts)):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call
        assert raised.value.code() is grpc.StatusCode.ALREADY_EXISTS
        assert refusal_of(raised.value).reason == "IDEMPOTENCY_KEY_REUSED"
    assert len(world.digest.entries) == 1
    assert not world.scheduler.entries


async def test_another_tenants_key_is_another_key(world: IntakeWorld) -> None:
    """INV-8: tenants do not hear of each other's keys."""
    first = await world.stub.Notify(notify("k"))
    async with connect(world.address, tenant="other") as channel:
        other = await type(world.stub)(channel).Notify(notify("k", entity="shop-2"))
    assert other.results[0].id != first.results[0].id
    assert {entry.tenant for entry in world.digest.entries} == {"default", "other"}


async def test_a_key_of_a_call_that_stored_nothing_is_free(world: IntakeWorld) -> None:
    """When every item was refused the same key can carry the mended call."""
    wrong = intake_pb2.NotifyRequest(notifications=[notification(entity="carillon:x")], idempotency_key="k")
    await world.stub.Notify(wrong)
    assert await world.count("idempotency") == 0
    answer = await world.stub.Notify(notify("k"))
    assert answer.results[0].id


async def test_a_repeat_is_answered_although_time_has_made_it_invalid(world: IntakeWorld) -> None:
    """A retry after the expiry gets the first call's answer, not an error about the expiry."""
    call = notify("k", expire_time=to_timestamp(NOW + timedelta(minutes=1)))
    first = await world.stub.Notify(call)
    world.clock.advance(timedelta(hours=1))
    assert await world.stub.Notify(call) == first


async def test_a_command_that_rolled_back_leaves_its_key_free(
    world: IntakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing was stored, the retry with the same key is the first call."""
    real_insert, failures = world.sender.insert, iter([True])

    async def insert(*arguments: object) -> None:
        if next(failures, False):
            raise Unavailable("Postgres went away.")
        await real_insert(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(world.sender, "insert", insert)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await world.stub.Notify(notify("k"))
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert await world.count("idempotency") == 0
    assert (await world.stub.Notify(notify("k"))).is_applied


async def test_a_call_whose_commit_got_no_answer_is_stored_and_its_repeat_gets_the_answer(
    world: IntakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """UNAVAILABLE, with the contract's "perhaps stored": with the same key it is one command."""
    transaction, insert, written, losses = world.db.transaction, world.sender.insert, [], iter([True])

    async def noted(tx: Transaction, frames: Sequence[OutgoingFrame]) -> None:
        await insert(tx, frames)
        written.append(tx)

    @asynccontextmanager
    async def broken_off() -> AsyncIterator[Transaction]:
        async with transaction() as tx:
            yield tx
        if tx in written and next(losses, False):
            raise Unavailable("The connection was lost.")

    monkeypatch.setattr(world.sender, "insert", noted)
    monkeypatch.setattr(world.db, "transaction", broken_off)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await world.stub.Notify(notify("k"))
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert await world.count("idempotency") == 1
    answer = await world.stub.Notify(notify("k"))
    assert answer.results[0].id
    (entry,) = await world.digest.received(1)
    assert entry.notification.id == UUID(answer.results[0].id).bytes


async def test_keys_are_forgotten_after_their_retention(world: IntakeWorld) -> None:
    """Seven days on the database's clock, by any replica."""
    for key in ("old", "new"):
        await world.stub.Notify(notify(key))
    await world.execute("UPDATE idempotency SET created_at = created_at - interval '8 days' WHERE key = 'old'")
    pruning = Pruning(db=world.db, store=CommandStore(), retention=timedelta(days=7), interval=timedelta(minutes=1))
    assert await pruning.run_once() == 1
    assert await world.rows("SELECT key FROM idempotency") == [("new",)]
