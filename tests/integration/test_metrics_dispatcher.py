"""What the dispatcher's metrics count, over a real Postgres: each moves when the thing happens."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from carillon.dispatcher.v1 import dispatcher_pb2 as pb
from carillon.link.v1 import link_pb2

from libs.ids import new_id
from libs.links.receiver import IncomingFrame
from libs.rpc_context import Deadline, Principal, acting
from services.dispatcher.addresses import destination_of
from services.dispatcher.delivery import LANES, Permanent, Reason, Retryable, Sent
from services.dispatcher.loops_housekeeping import Housekeeping
from services.dispatcher.rpc import DispatcherRpc
from services.dispatcher.settings import TrafficSettings
from services.dispatcher.store_settings import KeyStore
from services.dispatcher.store_suppressions import BounceStore, SuppressionStore
from tests.support.dispatcher_world import (
    SECOND,
    TENANT,
    Carried,
    Rig,
    ScriptedChannel,
    delivery,
    id_of,
    migrated_database,
)
from tests.support.fixtures import OpenDatabase
from tests.support.metrics import Since, sample

HANDOVER = "carillon_dispatcher_handover_seconds"
ENDED = "carillon_dispatcher_deliveries_ended_total"
MINUTES = 60


@pytest.fixture
async def rig(open_database: OpenDatabase, postgres_server_url: str) -> AsyncIterator[Rig]:
    """A dispatcher on a database of its own."""
    with migrated_database(postgres_server_url) as url:
        yield Rig(await open_database("dispatcher", url))


async def have_waited(rig: Rig, minutes: int) -> None:
    """As if what is queued could have been claimed for so long."""
    async with rig.db.transaction() as tx:
        await tx.raw.execute(f"UPDATE queue SET claimable_at = claimable_at - interval '{minutes} minutes'")


def housekeeping(rig: Rig) -> Housekeeping:
    """That of one replica."""
    return Housekeeping(
        db=rig.db,
        queue=rig.queue,
        dead_letters=rig.dead_letters,
        keys=KeyStore(),
        bounces=BounceStore(times=1),
        lanes=LANES,
    )


async def test_what_ends_is_counted_with_its_reason(rig: Rig) -> None:
    """Sent without one; refused for good with what the other side said."""
    since, channel = Since(), ScriptedChannel(Sent("ok"), Permanent(Reason.GONE, "410"))
    async with rig.sending(log=channel) as outcomes:
        await rig.accept(delivery())
        await outcomes.until(1)
        await rig.accept(delivery("two"))
        await outcomes.until(2)
    assert since(ENDED, channel="log", outcome="sent", reason="") == 1
    assert since(ENDED, channel="log", outcome="dead", reason="gone") == 1
    assert since("carillon_dispatcher_attempts_total", channel="log", reason="gone") == 1


async def test_what_is_taken_in_counts_once_it_is_committed(rig: Rig) -> None:
    """A group of frames that fails is rolled back and tried again, frame by frame."""
    since, name = Since(), "carillon_dispatcher_deliveries_accepted_total"
    frame = link_pb2.Frame(entries=[link_pb2.Entry(tenant=TENANT, delivery=delivery())])
    async with rig.db.transaction() as tx:
        await rig.stream.apply(tx, [IncomingFrame(id=new_id(), frame=frame, message=Carried())])
        await tx.conn.rollback()
    assert since(name, channel="log") == 0
    await rig.accept(delivery())
    assert since(name, channel="log") == 1


async def test_a_wait_in_the_queue_counts_for_the_handover(rig: Rig) -> None:
    """One that is sent at once is within five minutes, one that has waited for six is not."""
    since = Since()
    await rig.accept(delivery())
    await have_waited(rig, 6)
    await rig.accept(delivery("two"))
    async with rig.sending(log=ScriptedChannel()) as outcomes:
        await outcomes.until(2)
    assert since(f"{HANDOVER}_count", channel="log") == 2
    assert since(f"{HANDOVER}_bucket", channel="log", le="300.0") == 1
    assert 6 * MINUTES <= since(f"{HANDOVER}_sum", channel="log") < 7 * MINUTES


async def test_what_ends_without_an_attempt_has_waited_as_well(rig: Rig) -> None:
    """Of a channel that nobody knows: its verdict came late."""
    since = Since()
    await rig.accept(delivery(channel="pigeon"))
    await have_waited(rig, 6)
    async with rig.sending(log=ScriptedChannel()) as outcomes:
        await outcomes.until(1)
    assert since(f"{HANDOVER}_count", channel="other") == 1
    assert since(f"{HANDOVER}_bucket", channel="other", le="300.0") == 0
    assert since(ENDED, channel="other", outcome="dead", reason="unsupported") == 1


async def test_a_retry_counts_anew_and_its_wait_does_not(rig: Rig) -> None:
    """Put off with a reason within five minutes, and so again: however long the scheduler let it wait between."""
    since, channel = Since(), ScriptedChannel(Retryable(Reason.DEFERRED, "451"))
    async with rig.sending(log=channel, backoff_first=10 * SECOND) as outcomes:
        await rig.accept(delivery())
        await outcomes.until(1)
        rig.clock.at += timedelta(minutes=30)
        await rig.retry(id_of("one"))
        rig.wake()
        await outcomes.until(2)
    assert since("carillon_dispatcher_retries_total", channel="log") == 1
    assert since(f"{HANDOVER}_count", channel="log") == 2
    assert since(f"{HANDOVER}_bucket", channel="log", le="300.0") == 2


@pytest.mark.parametrize(
    ("channel", "address"), [("webhook", "https://example.com/hook"), ("email", "ann@example.com")]
)
async def test_what_is_parked_is_put_off_with_a_reason(rig: Rig, channel: str, address: str) -> None:
    """Behind a breaker that is open: that is no lateness of ours, and nothing is older than it."""
    since = Since()
    way: dict[str, Any] = {channel: ScriptedChannel()}
    loop = rig.loop(rig.outcomes(), traffic=TrafficSettings(breaker_failures=1), **way)
    loop._traffic.end(channel, destination_of(channel, address), is_outage=True)
    await rig.accept(delivery(channel=channel, address=address))
    await have_waited(rig, 1)
    await loop.claim_once()
    assert since("carillon_dispatcher_postponed_total", channel=channel, reason="breaker_open") == 1
    assert since(f"{HANDOVER}_count", channel=channel) == 1
    assert since(f"{HANDOVER}_bucket", channel=channel, le="300.0") == 1
    await housekeeping(rig).run_once()
    assert sample("carillon_dispatcher_oldest_queued_seconds", lane=channel) == 0
    assert sample("carillon_dispatcher_queued_deliveries", lane=channel) == 1


async def test_an_attempt_lost_with_its_process_has_had_its_claim(rig: Rig) -> None:
    """Ten minutes under way, then in doubt, then sent again: not within five minutes."""
    since = Since()
    await rig.accept(delivery())
    lost = rig.loop(rig.outcomes(), log=ScriptedChannel())
    await lost.claim_once()
    for task in lost._sends:
        task.cancel()
    await rig.let_claims_run_out()
    before = Since()
    async with rig.sending(log=ScriptedChannel(), claim_time=timedelta(minutes=10)) as outcomes:
        await outcomes.until(1)
    assert since("carillon_dispatcher_in_doubt_total", channel="log", cause="crash") == 1
    assert before(f"{HANDOVER}_count", channel="log") == 1
    assert before(f"{HANDOVER}_bucket", channel="log", le="300.0") == 0


async def test_the_oldest_is_told_by_lane(rig: Rig) -> None:
    """Zero where nothing waits, and where all that waits is parked."""
    await rig.accept(delivery("one", channel="email", address="ann@example.com"))
    await have_waited(rig, 6)
    await rig.accept(delivery("two"))
    await have_waited(rig, -1)
    await housekeeping(rig).run_once()
    oldest = {lane: sample("carillon_dispatcher_oldest_queued_seconds", lane=lane) for lane in LANES}
    assert 5 * MINUTES <= oldest["email"] < 6 * MINUTES
    assert (oldest["log"], oldest["webhook"]) == (0, 0)


async def test_dead_letters_are_counted_until_they_are_redriven(rig: Rig) -> None:
    """A call that is repeated with its key has redriven nothing the second time."""
    async with rig.sending(log=ScriptedChannel(*[Permanent(Reason.REJECTED, "550")] * 2)) as outcomes:
        await rig.accept(delivery("one"), delivery("two"))
        await outcomes.until(2)
    await housekeeping(rig).run_once()
    assert sample("carillon_dispatcher_dead_letters") == 2
    rpc = DispatcherRpc(
        db=rig.db,
        clock=rig.clock,
        deliveries=rig.deliveries,
        dead_letters=rig.dead_letters,
        suppressions=SuppressionStore(),
        keys=KeyStore(),
        on_work=rig.wake,
    )
    since = Since()
    request = pb.RedriveRequest(idempotency_key="once", delivery_ids=[str(id_of("one"))])
    with acting(Principal(tenant=TENANT, subject="test"), deadline=Deadline.after(30 * SECOND)):
        for _ in range(2):
            await rpc.Redrive(request, None)  # type: ignore[arg-type]
    assert since("carillon_dispatcher_redriven_total") == 1
    await housekeeping(rig).run_once()
    assert sample("carillon_dispatcher_dead_letters") == 1


async def test_dead_letters_are_counted_every_twelfth_round_only(rig: Rig) -> None:
    """There may be many of them."""
    one = housekeeping(rig)
    await one.run_once()
    async with rig.sending(log=ScriptedChannel(Permanent(Reason.REJECTED, "550"))) as outcomes:
        await rig.accept(delivery())
        await outcomes.until(1)
    for _ in range(11):
        await one.run_once()
        assert sample("carillon_dispatcher_dead_letters") == 0
    await one.run_once()
    assert sample("carillon_dispatcher_dead_letters") == 1
