"""Who is sent first: the most urgent, then the one that has waited longest; also after a retry or a redrive."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2

from services.dispatcher.delivery import Permanent, Priority, Reason, Result, Retryable
from tests.support.dispatcher_world import SECOND, TENANT, Rig, ScriptedChannel, delivery, id_of, migrated_database
from tests.support.fixtures import OpenDatabase

LOW, HIGH = timer_pb2.PRIORITY_LOW, timer_pb2.PRIORITY_HIGH


@pytest.fixture
async def rig(open_database: OpenDatabase, postgres_server_url: str) -> AsyncIterator[Rig]:
    """A dispatcher on a database of its own."""
    with migrated_database(postgres_server_url) as url:
        yield Rig(await open_database("dispatcher", url))


def normal(count: int) -> list[link_pb2.Delivery]:
    """So many deliveries with nothing special about them."""
    return [delivery(f"normal {n}", subject="normal") for n in range(count)]


async def test_an_urgent_delivery_overtakes_five_hundred_that_wait(rig: Rig) -> None:
    """It takes the next place that comes free, and the least urgent goes last although it came first."""
    channel = ScriptedChannel()
    channel.gate = asyncio.Event()
    await rig.accept(delivery(subject="low", priority=LOW))
    await rig.accept(*normal(510))
    async with rig.sending(log=channel, claim_deliveries=10) as outcomes:
        await asyncio.wait_for(channel.is_sending.wait(), 20)  # Ten are under way, five hundred wait.
        await rig.accept(delivery("urgent", subject="high", priority=HIGH))
        channel.gate.set()
        await outcomes.until(512)
    assert [letter.delivery.subject for letter in channel.letters] == [
        *["normal"] * 10,
        "high",
        *["normal"] * 500,
        "low",
    ]


async def test_equally_urgent_deliveries_are_sent_in_the_order_in_which_they_came(rig: Rig) -> None:
    """Within a priority the oldest goes first."""
    channel = ScriptedChannel()
    for n in range(6):
        await rig.accept(delivery(str(n), subject=str(n), priority=HIGH if n % 2 else LOW))
    async with rig.sending(log=channel, claim_deliveries=1) as outcomes:
        await outcomes.until(6)
    assert [letter.delivery.subject for letter in channel.letters] == ["1", "3", "5", "0", "2", "4"]


@pytest.mark.parametrize("failure", [Retryable(Reason.DEFERRED, "451 later"), Permanent(Reason.REJECTED, "550 no")])
async def test_an_urgent_delivery_is_as_urgent_when_it_comes_back(rig: Rig, failure: Result) -> None:
    """Through the retry timer or by hand: the last to be queued, the first to be sent."""
    async with rig.sending(log=ScriptedChannel(failure)) as outcomes:
        await rig.accept(delivery(subject="high", priority=HIGH))
        await outcomes.until(1)
    assert await rig.queued() == 0
    await rig.accept(*normal(3))
    rig.clock.at += 60 * SECOND
    if isinstance(failure, Retryable):
        await rig.retry(id_of("one"))
    else:
        async with rig.db.transaction() as tx:
            await rig.dead_letters.redrive(tx, TENANT, [id_of("one")], now=rig.clock.now())
    channel = ScriptedChannel()
    async with rig.sending(log=channel, claim_deliveries=1) as outcomes:
        await outcomes.until(4)
    assert [letter.delivery.subject for letter in channel.letters] == ["high", *["normal"] * 3]
    assert channel.letters[0].delivery.priority is Priority.HIGH


async def test_a_claim_reads_no_more_than_it_takes(rig: Rig) -> None:
    """Neither the thousands that wait behind nor the urgent ones that are under way are fetched."""
    await rig.accept(*normal(3_000))
    await rig.accept(*(delivery(f"urgent {n}", priority=HIGH) for n in range(200)))
    async with rig.db.transaction() as tx:
        await tx.raw.execute(
            "UPDATE queue SET attempt = 1, claimable_at = now() + interval '1 hour' WHERE priority = 3"
        )
    async with rig.db.transaction() as tx:
        counted = "SELECT seq_scan, idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'queue'"
        before = await (await tx.raw.execute(counted)).fetchone()
        claimed = await rig.queue.claimable(tx, {"log": 10}, [], patience={})
        after = await (await tx.raw.execute(counted)).fetchone()
    assert [one.delivery.subject for one in claimed] == ["normal"] * 10
    assert before is not None
    assert after == (before[0], before[1] + 10)
