"""The sending loop over a real Postgres: what is sent, retried, suppressed, and told."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from carillon.link.v1 import link_pb2
from pydantic import SecretStr

from libs import migrations
from libs.links.receiver import PoisonFrame
from libs.settings import PostgresSettings
from libs.sharding import shard_of
from libs.wire import from_timestamp
from services.dispatcher import metrics, store
from services.dispatcher.delivery import LANES, Letter, Permanent, Reason, Result, Retryable, Sent, State
from services.dispatcher.loops_housekeeping import Housekeeping
from services.dispatcher.store_settings import KeyStore
from services.dispatcher.store_suppressions import BounceStore, SuppressionStore
from services.dispatcher.stream import retry_entity, retry_timer_id
from services.dispatcher.suppressions import Suppression
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


@pytest.fixture
async def rig(open_database: OpenDatabase, postgres_server_url: str) -> AsyncIterator[Rig]:
    """A dispatcher on a database of its own."""
    with migrated_database(postgres_server_url) as url:
        yield Rig(await open_database("dispatcher", url))


async def test_the_migrations_add_up_to_the_tables(postgres_server_url: str) -> None:
    """What the migrations make is what the store's metadata says."""
    with migrated_database(postgres_server_url) as url:
        settings = PostgresSettings(url=SecretStr(url))
        await asyncio.to_thread(migrations.check_models_match, settings, "dispatcher", store.metadata)


async def test_a_delivery_is_sent_and_told(rig: Rig) -> None:
    """A delivery goes out once, its attempt is on record, and digest hears of it."""
    channel = ScriptedChannel(Sent("thanks"))
    async with rig.sending(log=channel) as outcomes:
        await rig.accept(delivery())
        await outcomes.until(1)
    record = await rig.record(id_of("one"))
    assert (record.state, record.attempts, record.ended_at) == (State.SENT, 1, NOON)
    (attempt,) = await rig.attempts(id_of("one"))
    assert (attempt.number, attempt.is_sent, attempt.reply, attempt.ended_at) == (1, True, "thanks", NOON)
    (entry,) = await rig.outbox("digest")
    told = entry.delivery_outcome
    assert (entry.tenant, told.delivery_id, told.digest_id) == (TENANT, id_of("one").bytes, DIGEST.bytes)
    assert (told.outcome, told.reason, from_timestamp(told.end_time)) == ("sent", "", NOON)
    assert await rig.queued() == 0
    assert channel.is_closed


async def test_a_delivery_that_comes_twice_is_sent_once(rig: Rig) -> None:
    """An id that is known already changes nothing, in the same frame or in another, before or after sending."""
    channel = ScriptedChannel()
    await rig.accept(delivery(), delivery())
    await rig.accept(delivery(subject="other"), delivery("two"))
    async with rig.sending(log=channel) as outcomes:
        await outcomes.until(2)
        await rig.accept(delivery())
        await rig.accept(delivery("three"))
        await outcomes.until(3)
    assert sorted(letter.delivery.subject for letter in channel.letters) == ["Hello"] * 3


async def test_an_unknown_entry_is_poison(rig: Rig) -> None:
    """A frame with an entry that the dispatcher does not know can never be applied, and leaves nothing."""
    with pytest.raises(PoisonFrame, match="close_window"):
        await rig.apply(
            link_pb2.Entry(tenant=TENANT, delivery=delivery()),
            link_pb2.Entry(tenant=TENANT, close_window=link_pb2.CloseWindow()),
        )
    assert await rig.states() == {}


async def test_a_failed_attempt_waits_for_a_timer_and_is_sent_when_it_fires(rig: Rig) -> None:
    """A passing failure asks the scheduler for a timer, in the transaction that records it; its firing sends again."""
    channel = ScriptedChannel(Retryable(Reason.DEFERRED, "451 later"))
    async with rig.sending(log=channel, backoff_first=10 * SECOND) as outcomes:
        await rig.accept(delivery())
        await outcomes.until(1)
        record = await rig.record(id_of("one"))
        assert (record.state, record.last_error) == (State.RETRYING, "deferred: 451 later")
        assert record.next_attempt_at == NOON + 5 * SECOND
        assert await rig.queued() == 0

        (entry,) = await rig.outbox("scheduler")
        timer = entry.schedule_timer
        assert (entry.tenant, entry.sequence) == (TENANT, 1)
        assert timer.id == retry_timer_id(id_of("one"), 1).bytes
        assert timer.entity == retry_entity(id_of("one")) == f"carillon:delivery:{id_of('one')}"
        assert from_timestamp(timer.due_time) == NOON + 5 * SECOND
        assert timer.target.retry_delivery.delivery_id == id_of("one").bytes

        rig.clock.at = NOON + 5 * SECOND
        await rig.retry(id_of("one"))
        await outcomes.until(2)
        await rig.retry(id_of("one"))  # A second copy finds nothing to do.
    assert (await rig.record(id_of("one"))).state is State.SENT
    assert [(one.number, one.is_sent, one.reason) for one in await rig.attempts(id_of("one"))] == [
        (1, False, "deferred"),
        (2, True, ""),
    ]
    assert await rig.outcomes_told() == [("sent", "")]
    assert len(channel.letters) == 2


async def test_retry_timers_go_to_the_shard_of_their_entity(rig: Rig) -> None:
    """The frame for the scheduler names the partition that the timer's entity belongs to."""
    async with rig.sending(log=ScriptedChannel(Retryable(Reason.TIMEOUT))) as outcomes:
        await rig.accept(delivery())
        await outcomes.until(1)
    async with rig.db.read() as tx:
        row = await (await tx.raw.execute("SELECT partition FROM outbox WHERE receiver = 'scheduler'")).fetchone()
    assert row == (shard_of(TENANT, retry_entity(id_of("one")), 64),)


async def test_the_last_attempt_that_fails_makes_a_dead_letter(rig: Rig) -> None:
    """After `max_attempts` failures a delivery is dead, with what the other side said last."""
    channel = ScriptedChannel(*[Retryable(Reason.DEFERRED, f"451 no {n}") for n in (1, 2)])
    async with rig.sending(log=channel, max_attempts=2) as outcomes:
        await rig.accept(delivery())
        await outcomes.until(1)
        await rig.retry(id_of("one"))
        await outcomes.until(2)
    record = await rig.record(id_of("one"))
    assert (record.state, record.attempts) == (State.DEAD, 2)
    assert record.last_error == "attempts_exhausted: deferred: 451 no 2"
    assert await rig.outcomes_told() == [("dead", "attempts_exhausted")]


async def test_a_permanent_error_is_not_tried_again(rig: Rig) -> None:
    """One permanent answer is enough."""
    async with rig.sending(log=ScriptedChannel(Permanent(Reason.ADDRESS_REJECTED, "550 who?"))) as outcomes:
        await rig.accept(delivery())
        await outcomes.until(1)
    assert await rig.outcomes_told() == [("dead", "address_rejected")]
    assert await rig.outbox("scheduler") == []


@pytest.mark.parametrize(
    ("fields", "outcome", "reason"),
    [
        ({"channel": "apprise", "address": "slack://x"}, "dead", "unsupported"),
        ({"channel": "pigeon", "address": "loft"}, "dead", "unsupported"),
        ({"channel": "email", "address": "ann@example.com\r\nBcc: all@example.com"}, "dead", "address_invalid"),
        ({"channel": "email", "address": "no address"}, "dead", "address_invalid"),
        ({"channel": "webhook", "address": "ftp://example.com"}, "dead", "address_invalid"),
        ({"channel": "email", "address": "Gone@Example.com"}, "suppressed", "suppressed"),
        ({"channel": "email", "address": "ann@example.com", "expires_at": NOON}, "expired", "expired"),
    ],
)
async def test_what_must_not_be_sent_is_not(rig: Rig, fields: dict[str, Any], outcome: str, reason: str) -> None:
    """The pipeline ends a delivery before anything leaves, with its reason, and digest hears of it."""
    async with rig.db.transaction() as tx:
        suppressions = SuppressionStore()
        for tenant, address in ((TENANT, "gone@example.COM"), ("other", "ann@example.com")):
            one = Suppression(channel="email", address=address, reason="asked", created_at=NOON)
            await suppressions.put(tx, tenant, one)
    channel = ScriptedChannel()
    async with rig.sending(email=channel, webhook=channel) as outcomes:
        await rig.accept(delivery(**fields))
        await outcomes.until(1)
    assert await rig.outcomes_told() == [(outcome, reason)]
    assert channel.letters == []
    assert await rig.attempts(id_of("one")) == []
    assert await rig.queued() == 0


async def test_several_replicas_send_each_delivery_once(rig: Rig) -> None:
    """Three replicas share one queue, and no delivery is sent by two of them."""
    channel, outcomes = ScriptedChannel(), rig.outcomes()
    async with (
        rig.sending(outcomes, log=channel, replica="one", claim_deliveries=7),
        rig.sending(outcomes, log=channel, replica="two", claim_deliveries=11),
        rig.sending(outcomes, log=channel, replica="three", claim_deliveries=13),
    ):
        for start in range(0, 600, 100):
            await rig.accept(*(delivery(str(n)) for n in range(start, start + 100)))
        await outcomes.until(600)
    assert len(channel.letters) == 600
    assert len({letter.delivery.id for letter in channel.letters}) == 600
    assert await rig.states() == {State.SENT: 600}
    assert len(await rig.outcomes_told()) == 600


async def test_a_slow_destination_holds_up_no_other(rig: Rig) -> None:
    """With all places of one webhook host taken, deliveries for others still go out."""
    slow = ScriptedChannel()
    slow.gate = asyncio.Event()

    class ByHost(ScriptedChannel):
        async def send(self, letter: Letter) -> Result:
            if "slow" in letter.delivery.address:
                return await slow.send(letter)
            return await super().send(letter)

    async with rig.sending(webhook=ByHost(), webhook_concurrency=8, destination_concurrency=2) as outcomes:
        await rig.accept(*(delivery(f"s{n}", channel="webhook", address="https://slow.example/x") for n in range(20)))
        await rig.accept(*(delivery(f"q{n}", channel="webhook", address="https://quick.example/x") for n in range(20)))
        settled = await outcomes.until(20)
        assert {one.delivery_id for one in settled} == {id_of(f"q{n}") for n in range(20)}
        assert len(slow.letters) == 2
        slow.gate.set()
        await outcomes.until(40)


async def test_a_claim_is_renewed_while_the_attempt_goes_on(rig: Rig) -> None:
    """An attempt may take longer than its claim, as long as its process lives."""
    slow, other = ScriptedChannel(), ScriptedChannel()
    slow.gate = asyncio.Event()
    await rig.accept(delivery())
    async with rig.sending(log=slow, claim_time=SECOND) as outcomes:
        await slow.is_sending.wait()
        first = await _claimable_at(rig)
        async with asyncio.timeout(10):
            while (renewed := await _claimable_at(rig)) == first:
                pass
        assert renewed > first
        async with rig.sending(log=other, replica="two"):
            pass
        slow.gate.set()
        await outcomes.until(1)
    assert other.letters == []


async def _claimable_at(rig: Rig) -> Any:
    async with rig.db.read() as tx:
        row = await (await tx.raw.execute("SELECT claimable_at FROM queue")).fetchone()
    assert row is not None
    return row[0]


async def test_a_bug_in_a_channel_costs_one_attempt(rig: Rig) -> None:
    """What a channel raises is an attempt that failed, and stops nothing else."""

    class Broken(ScriptedChannel):
        async def send(self, letter: Letter) -> Result:
            raise KeyError("oops")

    async with rig.sending(log=Broken(), webhook=ScriptedChannel()) as outcomes:
        await rig.accept(delivery(), delivery("two", channel="webhook", address="https://example.com"))
        await outcomes.until(2)
    record = await rig.record(id_of("one"))
    assert (record.state, record.last_error) == (State.RETRYING, "internal_error: KeyError")
    assert (await rig.record(id_of("two"))).state is State.SENT


async def test_a_delivery_with_nul_in_it_is_kept_without(rig: Rig) -> None:
    """Postgres stores every character but one, and a frame must not be poison for it."""
    channel = ScriptedChannel()
    async with rig.sending(log=channel) as outcomes:
        await rig.accept(delivery(subject="a\x00b", text="\x00", subscriber="ann\x00"))
        await outcomes.until(1)
    (letter,) = channel.letters
    assert (letter.delivery.subject, letter.delivery.text, letter.delivery.subscriber) == ("ab", "", "ann")


async def test_housekeeping_measures_the_queue_and_forgets_old_keys(rig: Rig) -> None:
    """The backlog is in the gauges, per lane; keys older than seven days are gone, younger ones stay."""
    await rig.accept(delivery("one"), delivery("two"), delivery("three", channel="email", address="ann@example.com"))
    async with rig.db.transaction() as tx:
        await tx.raw.execute(
            "INSERT INTO idempotency_key (tenant, method, key, fingerprint, response, stored_at)"
            " SELECT 'shop', 'Redrive', age, '', '', now() - age::interval"
            " FROM unnest(ARRAY['8 days', '6 days']) AS age"
        )
    await Housekeeping(
        db=rig.db,
        queue=rig.queue,
        dead_letters=rig.dead_letters,
        keys=KeyStore(),
        bounces=BounceStore(times=1),
        lanes=LANES,
    ).run_once()
    assert [metrics.QUEUED.labels(lane)._value.get() for lane in ("log", "email", "webhook")] == [2, 1, 0]
    assert metrics.OLDEST_QUEUED_SECONDS.labels("email")._value.get() > 0
    async with rig.db.read() as tx:
        keys = await (await tx.raw.execute("SELECT key FROM idempotency_key")).fetchall()
    assert keys == [("6 days",)]
