"""What a dispatcher that crashed or stopped amid an attempt leaves behind, and what the next one makes of it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import timedelta
from uuid import UUID

import pytest

from libs.errors import Unavailable
from libs.postgres import Transaction
from services.dispatcher import metrics
from services.dispatcher.delivery import Permanent, Reason, Retryable, State
from services.dispatcher.pipeline import Candidate, Settlement
from services.dispatcher.store_queue import QueueStore
from tests.support.dispatcher_world import (
    NOON,
    TENANT,
    Rig,
    ScriptedChannel,
    delivery,
    id_of,
    migrated_database,
)
from tests.support.fixtures import OpenDatabase


@pytest.fixture
async def rig(open_database: OpenDatabase, postgres_server_url: str) -> AsyncIterator[Rig]:
    """A dispatcher on a database of its own."""
    with migrated_database(postgres_server_url) as url:
        yield Rig(await open_database("dispatcher", url))


class RefusingQueue(QueueStore):
    """A queue on which nothing can be recorded: what a process that dies before its record leaves behind."""

    async def settle(self, tx: Transaction, settlements: list[Settlement]) -> set[tuple[str, UUID]]:  # type: ignore[override]
        if any(one.ended_at for one in settlements):
            raise Unavailable
        return await super().settle(tx, settlements)


class AbsentPostgres(RefusingQueue):
    """Nothing can be recorded until `is_back`; tells of rows that are put off."""

    def __init__(self) -> None:
        self.is_back = False
        self.has_put_off = asyncio.Event()

    async def settle(self, tx: Transaction, settlements: list[Settlement]) -> set[tuple[str, UUID]]:  # type: ignore[override]
        return await (QueueStore if self.is_back else RefusingQueue).settle(self, tx, settlements)

    async def postpone(self, tx: Transaction, held: Sequence[tuple[Candidate, timedelta]]) -> None:
        await super().postpone(tx, held)
        if held:
            self.has_put_off.set()


async def test_a_process_does_not_take_its_own_attempts_for_lost(rig: Rig) -> None:
    """Postgres was away for longer than the claim, and what was sent meanwhile waits for its record.

    Nor do these keep others waiting: with room for one claim at a time they are not found a second time.
    """
    channel, queue = ScriptedChannel(), AbsentPostgres()
    await rig.accept(delivery())
    async with rig.sending(log=channel, queue=queue, claim_deliveries=1) as outcomes:
        await channel.is_sending.wait()
        await rig.let_claims_run_out()
        await asyncio.wait_for(queue.has_put_off.wait(), 10)
        channel.is_sending.clear()
        await rig.accept(delivery("behind"))
        await asyncio.wait_for(channel.is_sending.wait(), 10)
        queue.is_back = True
        await outcomes.until(2)
    assert [letter.delivery.id for letter in channel.letters] == [id_of("one"), id_of("behind")]
    assert [(one.number, one.is_sent) for one in await rig.attempts(id_of("one"))] == [(1, True)]
    assert await rig.outcomes_told() == [("sent", ""), ("sent", "")]


async def test_an_attempt_that_was_not_recorded_is_in_doubt_and_sent_again(rig: Rig) -> None:
    """A crash between sending and recording: when the claim has run out another replica sends it again."""
    doubts = metrics.IN_DOUBT.labels("email", "crash")
    before = doubts._value.get()
    mail = delivery(channel="email", address="ann@example.com")
    first, second = ScriptedChannel(), ScriptedChannel()
    await rig.accept(mail)
    async with rig.sending(email=first, queue=RefusingQueue(), drain_timeout=timedelta(0)):
        await first.is_sending.wait()
    assert (await rig.record(id_of("one"))).state is State.SENDING

    async with rig.sending(email=second, replica="two") as outcomes:
        await rig.accept(delivery("behind", channel="email", address="bob@example.com"))
        await outcomes.until(1)  # The claim still holds: only the other delivery is sent.
        assert [letter.delivery.id for letter in second.letters] == [id_of("behind")]
        await rig.let_claims_run_out()
        await outcomes.until(2)
    assert second.letters[1].delivery == first.letters[0].delivery
    assert second.letters[1].created_at == first.letters[0].created_at
    assert [(one.number, one.reason, one.is_sent) for one in await rig.attempts(id_of("one"))] == [
        (1, "in_doubt", False),
        (2, "", True),
    ]
    assert doubts._value.get() == before + 1


async def test_what_is_in_doubt_is_held_where_the_policy_says_so(rig: Rig) -> None:
    """With policy hold nothing is sent a second time by itself, and digest hears that it is held."""
    first, second = ScriptedChannel(), ScriptedChannel()
    await rig.accept(delivery(channel="email", address="ann@example.com"))
    async with rig.sending(email=first, queue=RefusingQueue(), drain_timeout=timedelta(0)):
        await first.is_sending.wait()
    await rig.let_claims_run_out()
    async with rig.sending(email=second, email_in_doubt="hold") as outcomes:
        await outcomes.until(1)
    assert await rig.outcomes_told() == [("held", "in_doubt")]
    assert second.letters == []
    (attempt,) = await rig.attempts(id_of("one"))
    assert (attempt.reason, attempt.ended_at) == ("in_doubt", None)

    async with rig.db.transaction() as tx:
        await rig.dead_letters.redrive(tx, TENANT, [id_of("one")], now=NOON)
    async with rig.sending(email=second, email_in_doubt="hold") as outcomes:
        await outcomes.until(1)
    assert await rig.outcomes_told() == [("held", "in_doubt"), ("sent", "")]
    assert [letter.delivery.id for letter in second.letters] == [id_of("one")]


async def test_a_lost_reply_is_held_where_the_policy_says_so(rig: Rig) -> None:
    """An attempt whose answer was lost is in doubt too, without any crash."""
    channel = ScriptedChannel(Retryable(Reason.TIMEOUT, "no answer", is_in_doubt=True))
    async with rig.sending(webhook=channel, webhook_in_doubt="hold") as outcomes:
        await rig.accept(delivery(channel="webhook", address="https://example.com/hook"))
        await outcomes.until(1)
    assert await rig.outcomes_told() == [("held", "in_doubt")]


async def test_crashes_cannot_go_on_for_ever(rig: Rig) -> None:
    """A delivery whose every attempt ended in doubt is dead after `max_attempts` of them."""
    await rig.accept(delivery())
    for _ in range(2):
        channel = ScriptedChannel()
        async with rig.sending(log=channel, queue=RefusingQueue(), drain_timeout=timedelta(0), max_attempts=2):
            await channel.is_sending.wait()
        await rig.let_claims_run_out()
    async with rig.sending(log=ScriptedChannel(), max_attempts=2) as outcomes:
        await outcomes.until(1)
    assert await rig.outcomes_told() == [("dead", "attempts_exhausted")]


async def test_a_record_that_comes_too_late_decides_nothing(rig: Rig) -> None:
    """A process that was paused past its claim records its attempt, but not over the one that took over."""
    slow, quick = ScriptedChannel(Permanent(Reason.REJECTED, "550 late")), ScriptedChannel()
    slow.gate = asyncio.Event()
    await rig.accept(delivery())
    async with rig.sending(log=slow) as late:
        await slow.is_sending.wait()
        await rig.let_claims_run_out()
        async with rig.sending(log=quick, replica="two") as outcomes:
            await outcomes.until(1)
        slow.gate.set()
        await asyncio.wait_for(_recorded(rig, 1), 10)
    assert late.settled == []
    assert (await rig.record(id_of("one"))).state is State.SENT
    assert await rig.outcomes_told() == [("sent", "")]
    assert [(one.number, one.reason) for one in await rig.attempts(id_of("one"))] == [(1, "rejected"), (2, "")]


async def _recorded(rig: Rig, number: int) -> None:
    while (await rig.attempts(id_of("one")))[number - 1].ended_at is None:
        pass


async def test_a_graceful_stop_leaves_nothing_in_doubt(rig: Rig) -> None:
    """What is being sent when the process is told to stop is finished and recorded; the rest stays queued."""
    channel = ScriptedChannel()
    channel.gate = asyncio.Event()
    await rig.accept(*(delivery(str(n), channel="email", address="ann@example.com") for n in range(5)))
    outcomes = rig.outcomes()
    task = asyncio.create_task(rig.loop(outcomes, email=channel, email_concurrency=2).run())
    await channel.is_sending.wait()
    task.cancel()
    asyncio.get_running_loop().call_soon(channel.gate.set)
    with suppress(asyncio.CancelledError):
        await task
    assert await rig.states() == {State.SENT: 2, State.PENDING: 3}
    assert len(await rig.outcomes_told()) == 2
    assert await rig.queued() == 3


async def test_a_claim_that_was_made_while_stopping_is_given_back(rig: Rig) -> None:
    """A delivery claimed and not begun is as if it had never been claimed."""
    channel = ScriptedChannel()
    await rig.accept(delivery())
    loop = rig.loop(rig.outcomes(), log=channel)
    loop._is_stopping = True
    await loop.claim_once()
    record = await rig.record(id_of("one"))
    assert (record.state, record.attempts) == (State.PENDING, 0)
    assert await rig.attempts(id_of("one")) == []
    assert channel.letters == []
    async with rig.sending(log=channel) as outcomes:
        await outcomes.until(1)
    assert (await rig.record(id_of("one"))).attempts == 1
