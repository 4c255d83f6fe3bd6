"""The facts that the simulation relies on hold for its fakes and for Postgres and NATS alike."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing, suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from libs.errors import Unavailable
from libs.ids import derived_id, new_id
from libs.links import inbox, outbox
from libs.links.frames import OutgoingFrame
from libs.postgres import is_transient
from services.scheduler.commands import Changes, Tombstone
from services.scheduler.needs import Needs
from services.scheduler.orders import Action, Order, Selection
from services.scheduler.timer import BEGINNING, Mark, State, TargetKind, Timer
from tests.contract.rigs import SHARDS, TTL, Rig, Scenario, on_fakes, on_servers
from tests.support.fixtures import OpenBus, OpenDatabase

AT = datetime(2013, 7, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)

SCENARIOS: list[Scenario] = []


def scenario(function: Scenario) -> Scenario:
    """Try this on both."""
    SCENARIOS.append(function)
    return function


def _name(function: Callable[..., Any]) -> str:
    return function.__name__


@pytest.mark.parametrize("given", SCENARIOS, ids=_name)
def test_the_fakes_keep_the_contract(given: Scenario) -> None:
    """In virtual time."""
    on_fakes(given)


@pytest.mark.parametrize("given", SCENARIOS, ids=_name)
async def test_the_servers_keep_the_contract(
    given: Scenario, postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus
) -> None:
    """As the simulation believes."""
    await on_servers(given, postgres_url, open_database, open_bus)


def timer(number: int, *, shard: int = 0, state: State = State.SCHEDULED) -> Timer:
    """A one-shot timer, due so many seconds after AT."""
    timer_id = derived_id("contract", shard, number)
    due_at = AT + number * SECOND
    return Timer(
        id=timer_id,
        shard=shard,
        tenant="acme",
        entity="e",
        type="",
        due_at=due_at,
        fire_at=due_at,
        target_kind=TargetKind.NOTIFICATION,
        target=b"",
        sequence=1,
        schedule_id=timer_id,
        state=state,
    )


def changes(*timers: Timer, watermark: Mark | None = None) -> list[Changes]:
    """New timers of shard 0."""
    return [Changes(shard=0, inserts={one.id: one for one in timers}, watermark=watermark)]


async def _store(rig: Rig, *timers: Timer, watermark: Mark | None = None) -> None:
    async with rig.db.transaction() as tx:
        await rig.turns.write(tx, changes(*timers, watermark=watermark), AT)


async def _waiting(rig: Rig) -> list[UUID]:
    async with rig.db.read() as tx:
        known = await rig.turns.load(tx, Needs(waiting={("acme", "e")}))
    return [one.id for one in known.waiting.get(("acme", "e"), [])]


# Leases and the fence


@scenario
async def a_shard_is_taken_once_and_under_a_new_epoch_each_time(rig: Rig) -> None:
    """By whom it is free for: nobody's, released by its holder, or our own."""
    a, b = rig.leases("a"), rig.leases("b")
    assert {(one.shard, one.epoch) for one in await a.take(range(SHARDS))} == {(n, 1) for n in range(SHARDS)}
    assert await b.take(range(SHARDS)) == []
    assert {(one.shard, one.epoch) for one in await a.take([0])} == {(0, 2)}  # Lost here, and taken anew.
    await b.release([1])  # Not b's to give back.
    await a.release([0])
    assert [(one.shard, one.epoch) for one in await b.take(range(SHARDS))] == [(0, 3)]


@scenario
async def a_lease_ends_unless_it_is_renewed_in_its_epoch(rig: Rig) -> None:
    """By the server's clock; renewing under another epoch does nothing."""
    a, b = rig.leases("a"), rig.leases("b")
    await a.take([0, 1])
    await asyncio.sleep(TTL.total_seconds() * 0.6)
    assert await a.renew({0: 1, 1: 9}) == {0}
    await asyncio.sleep(TTL.total_seconds() * 0.6)
    assert await b.renew({}) == set()
    situation = await b.look()
    assert situation.members.keys() == {"a", "b"}
    assert {shard for shard, left in situation.lease_ends_in.items() if left > timedelta(0)} == {0}
    assert [one.shard for one in await b.take([0, 1])] == [1]
    assert await a.renew({0: 1, 1: 1}) == {0}


@scenario
async def who_takes_a_shard_hears_of_its_newest_orders_by_origin_and_how_long_it_was_free(rig: Rig) -> None:
    """Of each origin that left a tombstone there, and of no other shard; a schedule older than these must look."""
    a, b = rig.leases("a"), rig.leases("b")
    cancel = Order(action=Action.CANCEL, selection=Selection())
    windows = [("carillon:window:v", 3), ("carillon:window:w", 2)]
    left = {0: [("e", 5), ("e", 9), ("f", 7), ("carillon:request:r", 8), *windows], 1: [("g", 11)]}
    stones = [
        Changes(shard=n, tombstones=[Tombstone(tenant="acme", entity=e, sequence=s, order=cancel) for e, s in some])
        for n, some in left.items()
    ]
    async with rig.db.transaction() as tx:
        await rig.turns.write(tx, stones, AT)
    first = {one.shard: one for one in await a.take([0, 1, 2])}
    assert first[0].newest_tombstones == {"": 9, "window": 3, "request": 8}
    assert first[1].newest_tombstones == {"": 11}
    assert first[2].newest_tombstones == {}
    assert first[0].unheld == timedelta(0)
    await a.release([0])
    await asyncio.sleep(0.1)
    [again] = await b.take([0])
    assert 0.1 * SECOND <= again.unheld < 10 * SECOND


@scenario
async def who_resigns_is_no_member_and_holds_on_until_it_releases(rig: Rig) -> None:
    """So the others want what it holds, and take none of it before."""
    a, b = rig.leases("a"), rig.leases("b")
    assert await a.renew({}) == set()
    await a.take([0])
    assert (await b.look()).members.keys() == {"a"}
    await a.resign()
    situation = await b.look()
    assert situation.members == {}
    assert situation.lease_ends_in[0] > timedelta(0)
    assert await b.take([0]) == []
    await a.release([0])
    assert (await b.look()).lease_ends_in[0] <= timedelta(0)


@scenario
async def the_fence_lets_in_its_epoch_only_and_holds_until_the_end(rig: Rig) -> None:
    """INV-3; whoever takes skips what it locks."""
    a = rig.leases("a")
    await a.take([0, 1])
    async with rig.db.transaction() as tx:
        assert await rig.turns.fence(tx, {0: 1, 1: 8}, longest_pause=TTL) == {0}
        assert [one.shard for one in await a.take([0, 1])] == [1]
    assert [one.epoch for one in await a.take([0])] == [2]
    async with rig.db.transaction() as tx:
        assert await rig.turns.fence(tx, {0: 1}, longest_pause=TTL) == set()


@scenario
async def an_epoch_that_comes_again_after_a_failover_is_its_new_holders_alone(rig: Rig) -> None:
    """INV-3; the failover lost that a had taken the shard, and b takes it under the same number."""
    a, b = rig.leases("a"), rig.leases("b")
    assert [one.epoch for one in await a.take([0])] == [1]
    await rig.lose_takeovers()
    assert [one.epoch for one in await b.take([0])] == [1]
    async with rig.db.transaction() as tx:
        assert await rig.turns.fence(tx, {0: 1}, longest_pause=TTL) == set()
    assert await a.renew({0: 1}) == set()
    await a.release([0])
    assert await a.take([0]) == []
    assert await b.renew({0: 1}) == {0}
    await b.release([0])
    async with rig.db.transaction() as tx:
        assert await rig.turns.fence(tx, {0: 1}, longest_pause=TTL) == set()
    assert [one.epoch for one in await a.take([0])] == [2]


@scenario
async def who_waits_at_the_fence_sees_what_was_committed_meanwhile(rig: Rig) -> None:
    """It waits in line, and is let in when the first has ended."""
    await rig.leases("a").take([0])

    async def fence() -> set[int]:
        async with rig.db.transaction() as tx:
            held: set[int] = await rig.turns.fence(tx, {0: 1}, longest_pause=TTL)
            return held

    async with rig.db.transaction() as tx:
        await rig.turns.fence(tx, {0: 1}, longest_pause=TTL)
        waiting = asyncio.create_task(fence())
        await asyncio.sleep(0.2)
        assert not waiting.done()
    assert await waiting == {0}


@scenario
async def a_transaction_that_stands_still_is_ended_and_its_locks_with_it(rig: Rig) -> None:
    """Its shards can be taken, what it wrote is undone, and it hears so."""
    a = rig.leases("a")
    await a.take([0])
    error: Exception | None = None
    try:
        async with rig.db.transaction() as tx:
            await rig.turns.write(tx, changes(timer(1)), AT)
            assert await rig.turns.fence(tx, {0: 1}, longest_pause=0.5 * SECOND) == {0}
            await asyncio.sleep(1.5)
            assert [one.shard for one in await a.take([0])] == [0]
    except Unavailable as err:
        error = err
    assert error is not None
    assert await _waiting(rig) == []


# Turns


@scenario
async def pages_come_in_firing_order_after_a_mark(rig: Rig) -> None:
    """Those that have a turn to come, as many as asked for, per shard."""
    await _store(rig, timer(3), timer(1), timer(2, state=State.CANCELLED), timer(4), timer(5), timer(0, shard=1))
    async with rig.db.read() as tx:
        first = await rig.turns.pages(tx, {0: BEGINNING, 1: BEGINNING, 2: BEGINNING}, 2)
        second = await rig.turns.pages(tx, {0: first[0][-1].mark}, 5)
    assert [one.id for one in first[0]] == [timer(1).id, timer(3).id]
    assert [one.id for one in first[1]] == [timer(0, shard=1).id]
    assert first[2] == []
    assert [one.id for one in second[0]] == [timer(4).id, timer(5).id]


@scenario
async def a_transaction_sees_its_own_writes_and_others_only_committed_ones(rig: Rig) -> None:
    """READ COMMITTED."""
    async with rig.db.transaction() as tx:
        await rig.turns.write(tx, changes(timer(1)), AT)
        own = await rig.turns.load(tx, Needs(ids={timer(1).id}))
        assert own.ids == {timer(1).id}
        assert await _waiting(rig) == []
    assert await _waiting(rig) == [timer(1).id]


@scenario
async def what_is_rolled_back_was_never_there(rig: Rig) -> None:
    """And can be written again."""
    with suppress(ZeroDivisionError):
        async with rig.db.transaction() as tx:
            await rig.turns.write(tx, changes(timer(1)), AT)
            raise ZeroDivisionError
    assert await _waiting(rig) == []
    await _store(rig, timer(1))


@scenario
async def what_is_behind_the_watermark_does_not_wait(rig: Rig) -> None:
    """It has fired; what is paused waits wherever it is."""
    await _store(rig, timer(1), timer(2), timer(3, state=State.PAUSED), watermark=timer(1).mark)
    assert await _waiting(rig) == [timer(2).id, timer(3).id]
    assert [one.watermark for one in await rig.leases("a").take([0])] == [timer(1).mark]


@scenario
async def a_second_timer_with_the_same_id_is_refused_for_good(rig: Rig) -> None:
    """Trying again would not help."""
    await _store(rig, timer(1))
    with pytest.raises(Exception, match="timer_pkey") as caught:
        await _store(rig, timer(1))
    assert not is_transient(caught.value)


# Inbox and outbox


@scenario
async def a_frame_is_admitted_once_and_a_copy_waits_for_the_first_to_end(rig: Rig) -> None:
    """INV-2; after a rollback it is as new."""
    frame_id = new_id()

    async def admit() -> set[UUID]:
        async with rig.db.transaction() as tx:
            return set(await inbox.admit(tx, [frame_id]))

    with suppress(ZeroDivisionError):
        async with rig.db.transaction() as tx:
            assert set(await inbox.admit(tx, [frame_id])) == {frame_id}
            raise ZeroDivisionError  # Its effects are undone, and so is the claim.
    async with rig.db.transaction() as tx:
        assert set(await inbox.admit(tx, [frame_id])) == {frame_id}
        copy = asyncio.create_task(admit())
        await asyncio.sleep(0.2)
        assert not copy.done()
    assert await copy == set()


@scenario
async def frames_are_swept_until_they_are_confirmed(rig: Rig) -> None:
    """By one sweeper at a time, waiting longer each time."""
    frame = OutgoingFrame(id=new_id(), receiver="digest", partition=0, payload=b"x", entries=1, headers={})
    waits = {"first": 0.3 * SECOND, "longest": SECOND, "limit": 10}

    async def due() -> list[UUID]:
        async with rig.db.transaction() as tx:
            return [one.frame.id for one in await outbox.take_due(tx, **waits)]  # type: ignore[arg-type]

    async with rig.db.transaction() as tx:
        await outbox.insert_frames(tx, [frame], first_sweep=0.5 * SECOND)
    assert await due() == []
    await asyncio.sleep(0.7)
    assert await due() == [frame.id]
    assert await due() == []
    await asyncio.sleep(1)
    assert await due() == [frame.id]
    async with rig.db.transaction() as tx:
        assert await outbox.confirm(tx, [frame.id]) == {"digest": 1}
    await asyncio.sleep(1.5)
    assert await due() == []


# The broker


def _consume(rig: Rig) -> Any:
    return rig.bus.consume(
        rig.stream, durable="contract", filter_subject=rig.subject, batch=8, ack_wait=SECOND, max_ack_pending=64
    )


@scenario
async def messages_come_in_order_and_again_until_they_are_acknowledged(rig: Rig) -> None:
    """After the wait, or at once when handed back; a copy under the same id is not stored."""
    assert await rig.bus.ensure_stream(rig.stream, [f"{rig.subject[:-1]}*"])
    for number in (b"1", b"2"):
        await rig.bus.publish(rig.subject, number, headers={}, msg_id=number.decode())
    await rig.bus.publish(rig.subject, b"2", headers={}, msg_id="2")  # A duplicate, by its id.
    seen: list[tuple[bytes, int]] = []
    async with asyncio.timeout(20), aclosing(_consume(rig)) as lists:
        async for messages in lists:
            for message in messages:
                seen.append((message.data, message.num_delivered))
                if message.num_delivered == 3:
                    await message.ack()
                elif message.num_delivered == 2:
                    await message.nak(timedelta(0))
            if len(seen) == 6:
                break
    assert seen[:2] == [(b"1", 1), (b"2", 1)]
    assert sorted(seen[2:]) == [(b"1", 2), (b"1", 3), (b"2", 2), (b"2", 3)]
