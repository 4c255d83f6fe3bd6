"""Cancelling in digest: what is taken out of windows, what had left, what comes too late."""

from collections.abc import AsyncIterator
from datetime import timedelta
from uuid import UUID

import pytest

from libs.ids import new_id
from services.digest import store_views, store_windows
from services.digest.commands import Cancel
from services.digest.loops import Care
from tests.integration.digest_rig import START, Rig, migrate, replica
from tests.integration.test_digest_expansion import until_blocked
from tests.support.fixtures import OpenDatabase

PENDING, DIGESTED, ALONE, SUPPRESSED, CANCELLED, EXPIRED = 1, 2, 3, 4, 5, 6


@pytest.fixture
async def rig(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[Rig]:
    """A replica with a type, a daily cadence and a subscriber in New York."""
    migrate(postgres_url)
    async with replica(postgres_url, open_database) as rig:
        await rig.put_type()
        await rig.put_daily()
        await rig.put_subscriber("ann", "America/New_York")
        yield rig


async def test_cancel_takes_items_out_of_open_windows_and_leaves_the_others(rig: Rig) -> None:
    """INV-4: counted, not in the digest; an all-cancelled window closes without one."""
    await rig.subscribe("ann", "daily")
    await rig.put_subscriber("bob")
    await rig.subscribe("bob", "daily")
    await rig.apply(rig.notification("ann", entity="N1"), rig.notification("ann", entity="N2"))
    await rig.apply(rig.notification("bob", entity="N1"))
    result = await rig.result(rig.cancel("N1"))
    assert (result.changed, result.already_left) == (2, 0)
    rig.clock.at = START + timedelta(days=1)
    await rig.due()
    assert await rig.close() == 2
    (delivery,) = await rig.deliveries()
    assert delivery.subscriber == "ann"
    assert "N1" not in delivery.text
    assert await rig.ledger() == {("cancelled", ""): 2, ("digested", ""): 1}


async def test_cancel_counts_what_had_already_left(rig: Rig) -> None:
    """Sent alone before the cancel: told as such, and still sent."""
    await rig.apply(rig.notification("ann", entity="N1"))
    await rig.close()
    result = await rig.result(rig.cancel("N1"))
    assert (result.changed, result.already_left) == (0, 1)


async def test_an_immediate_notification_can_be_cancelled_until_it_is_rendered(rig: Rig) -> None:
    """It waits in a closing window of its own for a moment, and cancel finds it there."""
    await rig.apply(rig.notification("ann", entity="N1"))
    assert (await rig.result(rig.cancel("N1"))).changed == 1
    assert await rig.close() == 1
    assert await rig.deliveries() == []


async def test_what_was_accepted_before_a_cancel_and_arrives_after_it_is_born_cancelled(rig: Rig) -> None:
    """INV-4 over frames still under way: sequences decide, not arrival."""
    await rig.apply(rig.cancel("N1", sequence=100))
    await rig.apply(
        rig.notification("ann", entity="N1", sequence=99), rig.notification("ann", entity="N1", sequence=101)
    )
    assert sorted(state for _, _, state, _ in await rig.items()) == [PENDING, CANCELLED]


async def test_inv4_a_cancel_by_schedule_takes_out_what_its_occurrences_raised(rig: Rig) -> None:
    """A recurring schedule's occurrences have timer ids of their own; cancelling the schedule hits their items."""
    schedule, occurrence = new_id(), new_id()
    await rig.subscribe("ann", "daily")
    await rig.apply(
        rig.notification("ann", entity="N1", timer_id=occurrence.bytes, schedule_id=schedule.bytes),
        rig.notification("ann", entity="N1", timer_id=(other := new_id()).bytes, schedule_id=other.bytes),
    )
    assert (await rig.result(rig.cancel("N1", timer_ids=[schedule.bytes]))).changed == 1


async def test_cancel_hits_only_the_type_timeline_or_timers_it_names(rig: Rig) -> None:
    """Each part of the selector narrows; the type is the notification's or the timer's."""
    timer = new_id()
    await rig.subscribe("ann", "daily", type="*")
    await rig.put_type("other")
    await rig.apply(
        rig.notification("ann", entity="N1"),
        rig.notification("ann", entity="N1", type="other"),
        rig.notification("ann", entity="N1", timer_type="remind"),
        rig.notification("ann", entity="N1", timeline="trial"),
        rig.notification("ann", entity="N1", timer_id=timer.bytes),
    )
    assert (await rig.result(rig.cancel("N1", type="other"))).changed == 1
    assert (await rig.result(rig.cancel("N1", type="remind"))).changed == 1
    assert (await rig.result(rig.cancel("N1", timeline="trial"))).changed == 1
    assert (await rig.result(rig.cancel("N1", timer_ids=[timer.bytes]))).changed == 1
    assert (await rig.result(rig.cancel("N2"))).changed == 0
    assert (await rig.result(rig.cancel("N1"))).changed == 1


async def test_inv4_a_cancel_locks_the_window_that_its_items_are_being_moved_to(rig: Rig) -> None:
    """A change of zone merges two windows while a cancel waits for them: it holds what is left, also from renderers."""
    await rig.subscribe("ann", "daily")
    await rig.apply(rig.notification("ann", entity="N2"))
    await rig.apply(rig.notification("ann", entity="N1", at=START + timedelta(minutes=90)))
    first, second = (UUID(window.id) for window in await rig.windows())
    locked: list[UUID] = []

    async def cancel() -> int:
        async with rig.db.transaction() as tx:
            order = Cancel(tenant="acme", entity="N1", sequence=100)
            (hits,) = await store_windows.cancel(tx, [order], now=rig.clock.now())
            async with rig.db.transaction() as other:
                cursor = await other.raw.execute("SELECT id FROM digest_window WHERE state < 3 FOR UPDATE SKIP LOCKED")
                free = {row[0] for row in await cursor.fetchall()}
            locked.extend({first, second} - free)
            return hits.items

    async with rig.db.transaction() as tx:
        await store_windows.move_windows(
            tx, "acme", {"ann": "Europe/Berlin"}, now=rig.clock.now(), boundaries=rig.boundaries
        )
        cancelling = await until_blocked(rig, cancel())
    assert await cancelling == 1
    (left,) = await rig.windows()
    assert (UUID(left.id), left.items) == (first, 1)
    assert first in locked


async def test_old_tombstones_are_forgotten_all_in_one_go_and_no_younger_one(rig: Rig) -> None:
    """However many they are (INV-9)."""
    await bury(rig, 25_000, age=timedelta(days=8))
    await bury(rig, 3, age=timedelta(days=6))
    care = Care(db=rig.db, tombstones=store_windows, counts=store_views, clock=rig.clock, retention=timedelta(days=7))
    await care.forget_once()
    assert await tombstones(rig) == 3


async def test_looking_for_old_tombstones_does_not_read_the_young_ones(rig: Rig) -> None:
    """It happens every minute in every replica; all are looked at once, when they are old."""
    await bury(rig, 20_000, age=timedelta(days=6))
    async with rig.db.transaction() as tx:
        await tx.raw.execute("ANALYZE tombstone")
    async with rig.db.transaction() as tx:
        assert await store_windows.forget_tombstones(tx, timedelta(days=7), limit=1_000) == 0
        cursor = await tx.raw.execute(
            "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'tombstone'"
        )
        ((read,),) = await cursor.fetchall()
    assert read <= 1_000


async def bury(rig: Rig, number: int, *, age: timedelta) -> None:
    """Leave tombstones of this age."""
    async with rig.db.transaction() as tx:
        await tx.raw.execute(
            "INSERT INTO tombstone (tenant, entity, type, timer_ids, timeline, sequence, recorded_at)"
            " SELECT 'acme', 'N' || number, '', '{}', '', number, clock_timestamp() - %s"
            " FROM generate_series(1, %s) AS number",
            (age, number),
        )


async def tombstones(rig: Rig) -> int:
    """How many there are."""
    async with rig.db.read() as tx:
        ((number,),) = await (await tx.raw.execute("SELECT count(*) FROM tombstone")).fetchall()
    return int(number)
