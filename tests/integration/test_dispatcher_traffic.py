"""Rates and breakers in the running loop: what is held back costs no attempt, and goes out in the end."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from services.dispatcher import loops
from services.dispatcher.delivery import Letter, Priority, Reason, Result, Retryable, Sent, State
from services.dispatcher.settings import TrafficSettings
from services.dispatcher.traffic import PATIENCE, Traffic
from tests.support.dispatcher_world import NOON, SECOND, Rig, ScriptedChannel, delivery, id_of, migrated_database
from tests.support.fixtures import OpenDatabase

MILLISECOND = timedelta(milliseconds=1)
DOWN = Retryable(Reason.UNREACHABLE, "nobody there")


@pytest.fixture
async def rig(open_database: OpenDatabase, postgres_server_url: str) -> Any:
    """A dispatcher without a process around it."""
    with migrated_database(postgres_server_url) as url:
        yield Rig(await open_database("dispatcher", url))


class Host(ScriptedChannel):
    """Down until it is up; remembers to whom it was asked to deliver."""

    def __init__(self) -> None:
        super().__init__()
        self.is_up = False

    async def send(self, letter: Letter) -> Result:
        self.letters.append(letter)
        return Sent("ok") if self.is_up or "good" in letter.delivery.address else DOWN


def hook(name: str, host: str = "bad.example") -> Any:
    """A delivery to a webhook."""
    return delivery(name, channel="webhook", address=f"https://{host}/x", json="{}")


async def parked(rig: Rig) -> int:
    """Deliveries that nobody may claim yet, though nobody has."""
    async with rig.db.read() as tx:
        cursor = await tx.raw.execute("SELECT count(*) FROM queue WHERE attempt = 0 AND claimable_at > now()")
        row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


async def until_parked(rig: Rig, count: int) -> None:
    """Return once that many are."""
    async with asyncio.timeout(10):
        while await parked(rig) != count:
            pass


async def test_a_destination_that_fails_parks_what_is_queued_for_it_and_burns_no_attempts(rig: Rig) -> None:
    """Three attempts find it out; the rest waits, other hosts are served, and all go out once it works again."""
    host, settings = Host(), TrafficSettings(breaker_failures=3, breaker_open=timedelta(minutes=5))
    async with rig.sending(webhook=host, traffic=settings, destination_concurrency=1, max_attempts=2) as outcomes:
        await rig.accept(*(hook(f"bad{n:02}") for n in range(20)), *(hook(f"g{n}", "good.example") for n in range(5)))
        await outcomes.until(3 + 5)
        await until_parked(rig, 17)
        record = await rig.record(id_of("bad19"))
        assert (record.state, record.attempts) == (State.PENDING, 0)
        assert record.parked_until is not None
        assert sum("bad" in one.delivery.address for one in host.letters) == 3
    assert await rig.states() == {State.SENT: 5, State.RETRYING: 3, State.PENDING: 17}


async def test_what_is_parked_goes_out_when_the_breaker_closes(rig: Rig) -> None:
    """The attempt that finds the destination well again lets go of everything that waits for it, at once."""
    host = Host()
    settings = TrafficSettings(
        breaker_failures=2, breaker_open=200 * MILLISECOND, breaker_open_longest=timedelta(hours=1)
    )
    async with rig.sending(webhook=host, traffic=settings, destination_concurrency=1) as outcomes:
        await rig.accept(*(hook(f"bad{n:02}") for n in range(30)))
        await outcomes.until(2)
        # Whatever is parked now would wait for an hour: only the breaker's closing can free it earlier.
        await until_parked(rig, 28)
        async with rig.db.transaction() as tx:
            await tx.raw.execute("UPDATE queue SET claimable_at = now() + interval '1 hour' WHERE attempt = 0")
        host.is_up = True
        await rig.accept(hook("fresh"))
        settled = await outcomes.until(2 + 29)
        assert len({one.delivery_id for one in settled}) == 31
    assert await rig.states() == {State.SENT: 29, State.RETRYING: 2}
    assert max(attempt.number for attempt in await rig.attempts(id_of("bad20"))) == 1


def mail(name: str) -> Any:
    """A delivery by mail."""
    return delivery(name, channel="email", address="ann@example.com")


async def have_waited(rig: Rig, time: timedelta) -> None:
    """As if what may be claimed could have been for so long."""
    async with rig.db.transaction() as tx:
        await tx.raw.execute("UPDATE queue SET claimable_at = now() - %s WHERE claimable_at <= now()", (time,))


async def test_mails_for_a_server_that_is_down_are_parked_and_go_out_when_it_is_up(rig: Rig) -> None:
    """The rest waits and costs no attempts, until one attempt finds the server well and lets all of it go."""
    server = Host()
    outcomes, at_s = rig.outcomes(), [1_000.0]
    loop = rig.loop(outcomes, email=server, email_concurrency=1)
    loop._traffic = Traffic(TrafficSettings(breaker_failures=2), now_s=lambda: at_s[0])
    for _ in range(2):
        loop._traffic.end("email", "", is_outage=True)
    await rig.accept(*(mail(str(n)) for n in range(20)))
    await have_waited(rig, PATIENCE)
    while await loop.claim_once():
        pass
    assert (await parked(rig), len(server.letters)) == (20, 0)
    # What is parked would wait for an hour: only the breaker's closing can free it earlier.
    async with rig.db.transaction() as tx:
        await tx.raw.execute("UPDATE queue SET claimable_at = now() + interval '1 hour'")
    await rig.accept(mail("fresh"))
    server.is_up = True
    at_s[0] += 30
    task = asyncio.create_task(loop.run())
    await outcomes.until(21)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await rig.states() == {State.SENT: 21}
    assert (await rig.record(id_of("19"))).attempts == 1


async def test_a_replica_that_cannot_reach_the_mail_server_leaves_mails_to_those_that_can(rig: Rig) -> None:
    """It parks none that has just come, however often it looks, and the other one sends them."""
    settings = TrafficSettings(breaker_failures=1, breaker_open=timedelta(hours=1))
    cut_off = rig.loop(rig.outcomes(), email=Host(), traffic=settings)
    cut_off._traffic.end("email", "", is_outage=True)
    await rig.accept(*(mail(str(n)) for n in range(5)))
    await have_waited(rig, PATIENCE / 2)
    assert await cut_off.claim_once() == 0
    assert await parked(rig) == 0
    async with rig.sending(email=ScriptedChannel()) as outcomes:
        await outcomes.until(5)
    assert await rig.states() == {State.SENT: 5}


async def test_what_is_parked_is_let_go_bit_by_bit(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that others are claimed for between; and no more of it once the server fails again."""
    monkeypatch.setattr(loops, "_RELEASE", 2)
    at_s = [1_000.0]
    loop = rig.loop(rig.outcomes(), email=Host())
    loop._traffic = Traffic(TrafficSettings(breaker_failures=1), now_s=lambda: at_s[0])
    await rig.accept(*(mail(str(n)) for n in range(7)))
    async with rig.db.transaction() as tx:
        await tx.raw.execute("UPDATE queue SET claimable_at = now() + interval '1 hour'")
    left = []
    for _ in range(2):
        await loop.release_closed()
        left.append(await parked(rig))
    loop._traffic.end("email", "", is_outage=True)
    await loop.release_closed()
    assert [*left, await parked(rig)] == [5, 3, 3]
    at_s[0] += 30
    loop._traffic.take("email", "", Priority.NORMAL, NOON)
    loop._traffic.end("email", "", is_outage=False)
    for _ in range(3):
        await loop.release_closed()
    assert (await parked(rig), loop._traffic.closed()) == (0, [])


async def test_a_delivery_is_not_parked_beyond_its_age(rig: Rig) -> None:
    """A destination that is gone for good does not keep what is parked for it for ever (INV-9)."""
    host, settings = Host(), TrafficSettings(breaker_failures=1, breaker_open=timedelta(hours=1))
    async with rig.sending(webhook=host, traffic=settings, max_age=timedelta(hours=2)) as outcomes:
        await rig.accept(hook("first"))
        await outcomes.until(1)
        await rig.accept(hook("old"))
        await until_parked(rig, 1)
        rig.clock.at = NOON + timedelta(hours=3)
        async with rig.db.transaction() as tx:
            await tx.raw.execute("UPDATE queue SET claimable_at = now()")
        await outcomes.until(2)
    assert await rig.outcomes_told() == [("dead", "too_old")]
    assert (await rig.record(id_of("old"))).last_error == "too_old: breaker_open"


async def test_what_is_in_doubt_stays_in_doubt_while_it_is_parked(rig: Rig) -> None:
    """Parking forgets nothing: when its turn comes the delivery is still recognised as sent perhaps."""
    await rig.accept(hook("one"))
    gone = ScriptedChannel()
    gone.gate = asyncio.Event()
    async with rig.sending(webhook=gone, drain_timeout=timedelta(0)):
        await gone.is_sending.wait()
    await rig.let_claims_run_out()
    host, settings = Host(), TrafficSettings(breaker_failures=1, breaker_open=timedelta(hours=1))
    traffic_of = rig.loop(rig.outcomes(), webhook=host, traffic=settings)
    traffic_of._traffic.end("webhook", "bad.example:443", is_outage=True)
    assert await traffic_of.claim_once() == 1
    async with rig.db.read() as tx:
        row = await (await tx.raw.execute("SELECT attempt, claimable_at > now() FROM queue")).fetchone()
    assert row == (1, True)
    await rig.let_claims_run_out()
    well = ScriptedChannel()
    async with rig.sending(webhook=well) as outcomes:
        await outcomes.until(1)
    assert [(one.number, one.reason) for one in await rig.attempts(id_of("one"))] == [(1, "in_doubt"), (2, "")]


async def test_a_rate_holds_back_and_lets_everything_through_in_the_end(rig: Rig) -> None:
    """Twenty a second with five at once: five go at once, and none costs more than one attempt."""
    channel, settings = ScriptedChannel(), TrafficSettings(destination_rate="20/s burst 5", email_rate="40/s burst 5")
    loop_time = asyncio.get_running_loop().time
    began_s = loop_time()
    async with rig.sending(webhook=channel, email=channel, traffic=settings) as outcomes:
        await rig.accept(*(hook(f"h{n}", "good.example") for n in range(15)))
        await rig.accept(*(delivery(f"m{n}", channel="email", address="ann@example.com") for n in range(15)))
        await outcomes.until(30)
    assert loop_time() - began_s >= 0.45
    assert await rig.states() == {State.SENT: 30}
    assert {(await rig.record(id_of(f"h{n}"))).attempts for n in range(15)} == {1}


async def test_replicas_keep_their_own_books(rig: Rig) -> None:
    """A second replica finds an outage out for itself, and its parked deliveries are the first one's too."""
    traffic = [Traffic(TrafficSettings(breaker_failures=1, breaker_open=30 * SECOND)) for _ in range(2)]
    traffic[0].end("webhook", "bad.example:443", is_outage=True)
    assert traffic[0].take("webhook", "bad.example:443", Priority.NORMAL, NOON) is not None
    assert traffic[1].take("webhook", "bad.example:443", Priority.NORMAL, NOON) is None
