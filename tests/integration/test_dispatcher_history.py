"""Deliveries that ended are kept for their retention and no longer; and how those of a state are found among them."""

from collections.abc import AsyncIterator
from datetime import timedelta
from itertools import combinations

import pytest

from libs.history import History
from libs.postgres import Transaction
from services.dispatcher import metrics
from services.dispatcher.delivery import Permanent, Reason, Retryable, Sent, State
from services.dispatcher.store_deliveries import FORGOTTEN_AT_ONCE, DeliveryStore
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
from tests.support.metrics import Since

DAY = timedelta(days=1)
RETENTION = 90 * DAY


@pytest.fixture
async def rig(open_database: OpenDatabase, postgres_server_url: str) -> AsyncIterator[Rig]:
    """A dispatcher on a database of its own."""
    with migrated_database(postgres_server_url) as url:
        yield Rig(await open_database("dispatcher", url))


def history(rig: Rig, *, at_once: int = FORGOTTEN_AT_ONCE) -> History:
    """That of one replica."""
    return History(
        db=rig.db,
        forget=rig.deliveries.forget,
        at_once=at_once,
        clock=rig.clock,
        retention=RETENTION,
        forgotten=metrics.FORGOTTEN,
    )


async def one_of_each(rig: Rig) -> None:
    """A delivery in every state but `sending`, named after it; `redriven` was dead, `late` was sent a day later."""
    later = Retryable(Reason.DEFERRED, "451 later")
    no = Permanent(Reason.REJECTED, "550 no")
    unclear = Retryable(Reason.TIMEOUT, "no answer", is_in_doubt=True)
    channel, outcomes = ScriptedChannel(Sent("ok"), no, no, later, unclear), rig.outcomes()
    async with rig.sending(outcomes, email=channel, email_in_doubt="hold"):
        for number, name in enumerate(("sent", "dead", "redriven", "retrying", "held", "expired", "suppressed"), 1):
            expires_at = rig.clock.at if name == "expired" else None
            mail = delivery(name, channel="email", address=f"{name}@example.com", expires_at=expires_at)
            if name == "suppressed":
                await suppress(rig, f"{name}@example.com")
            await rig.accept(mail)
            await outcomes.until(number)
            rig.clock.at += SECOND
        rig.clock.at += DAY
        await rig.accept(delivery("late", channel="email", address="late@example.com"))
        await outcomes.until(8)
    await rig.accept(delivery("pending"))
    async with rig.db.transaction() as tx:
        await rig.dead_letters.redrive(tx, TENANT, [id_of("redriven")], now=rig.clock.at)


async def suppress(rig: Rig, address: str) -> None:
    """As if somebody had asked that nothing goes there."""
    async with rig.db.transaction() as tx:
        await tx.raw.execute(
            "INSERT INTO suppression (tenant, channel, address, reason, created_at) VALUES (%s, 'email', %s, '', %s)",
            (TENANT, address, NOON),
        )


async def in_store(rig: Rig) -> dict[str, set[str]]:
    """Names of those of which there is a delivery, and of those of which there are attempts."""
    names = ("sent", "dead", "redriven", "retrying", "held", "expired", "suppressed", "pending", "late")
    by_id = {id_of(name): name for name in names}
    async with rig.db.read() as tx:
        deliveries = await (await tx.raw.execute("SELECT id FROM delivery")).fetchall()
        attempts = await (await tx.raw.execute("SELECT delivery_id FROM attempt")).fetchall()
    return {
        "deliveries": {by_id[one_id] for (one_id,) in deliveries},
        "attempts": {by_id[one_id] for (one_id,) in attempts},
    }


async def test_what_has_ended_is_deleted_after_its_retention_and_nothing_else(rig: Rig) -> None:
    """With its attempts. What waits, is held, was redriven, or ended later stays, however old it is."""
    since = Since()
    await one_of_each(rig)
    before = await in_store(rig)
    rig.clock.at = NOON + RETENTION
    await history(rig, at_once=2).forget_once()
    assert await in_store(rig) == before
    assert before["attempts"] == {"sent", "dead", "redriven", "retrying", "held", "late"}

    rig.clock.at += timedelta(minutes=1)
    await history(rig, at_once=2).forget_once()
    assert await in_store(rig) == {
        "deliveries": {"redriven", "retrying", "held", "pending", "late"},
        "attempts": {"redriven", "retrying", "held", "late"},
    }
    assert since("carillon_dispatcher_deliveries_forgotten_total") == 4


async def test_what_is_being_redriven_is_passed_over(rig: Rig) -> None:
    """It is no dead letter any more when that has committed."""
    await one_of_each(rig)
    rig.clock.at += RETENTION
    async with rig.db.transaction() as tx:
        await rig.dead_letters.redrive(tx, TENANT, [id_of("dead")], now=rig.clock.at)
        await history(rig).forget_once()
    assert (await rig.record(id_of("dead"))).state is State.RETRYING


@pytest.mark.parametrize("size", [1, 2, 8])
async def test_deliveries_are_found_by_any_states(rig: Rig, size: int) -> None:
    """Newest first, whatever it is that they are found by."""
    await one_of_each(rig)
    async with rig.db.read() as tx:
        all_of_them = await DeliveryStore().page(
            tx, TENANT, subscriber="", digest_id=DIGEST, states=[], after=None, limit=100
        )
        assert len(all_of_them) == 9
        for states in combinations(State, size):
            found = await DeliveryStore().page(
                tx, TENANT, subscriber="", digest_id=None, states=states, after=None, limit=3
            )
            assert found == [one for one in all_of_them if one.state in states][:3]


async def fill(rig: Rig) -> None:
    """A long history: of 20,000 deliveries over 100 days one in a thousand was held."""
    async with rig.db.transaction() as tx:
        await tx.raw.execute(
            "INSERT INTO delivery (tenant, id, digest_id, subscriber, channel, address, lane, destination, subject,"
            " html, text, json, created_at, fresh_since, ended_at, state, reason)"
            " SELECT 'shop', gen_random_uuid(), gen_random_uuid(), 'ann', 'log', '-', 'log', '', '', '', '', '', at,"
            " at, CASE WHEN n %% 1000 > 0 THEN at END, CASE WHEN n %% 1000 > 0 THEN 4 ELSE 7 END,"
            " CASE WHEN n %% 1000 > 0 THEN '' ELSE 'in_doubt' END"
            " FROM (SELECT n, %s::timestamptz + n * interval '432 seconds' AS at FROM generate_series(1, 20000) AS n)"
            " AS one",
            (NOON,),
        )
        await tx.raw.execute("ANALYZE delivery")


async def fetched(tx: Transaction) -> tuple[int, int]:
    """Scans of all of `delivery`, and rows fetched by an index, in this transaction."""
    counted = "SELECT seq_scan, idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'delivery'"
    row = await (await tx.raw.execute(counted)).fetchone()
    assert row is not None
    return row[0], row[1]


async def test_forgetting_reads_no_more_than_it_deletes(rig: Rig) -> None:
    """However much is due; out of the order of the index each transaction would read all of it."""
    await fill(rig)
    async with rig.db.transaction() as tx:
        scans, rows = await fetched(tx)
        assert await rig.deliveries.forget(tx, before=NOON + 20 * DAY, limit=990) == 990
        assert await fetched(tx) == (scans, rows + 990)


async def test_the_few_that_were_not_sent_are_found_without_reading_what_was(rig: Rig) -> None:
    """Of 20,000 deliveries only the twenty."""
    await fill(rig)
    states = [State.HELD, State.RETRYING]
    async with rig.db.transaction() as tx:
        scans, rows = await fetched(tx)
        found = await rig.deliveries.page(
            tx, TENANT, subscriber="", digest_id=None, states=states, after=None, limit=1_000
        )
        assert await fetched(tx) == (scans, rows + 20)
    assert len(found) == 20
