"""Cancelling in digest: what is taken out of windows, what had left, what comes too late."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from libs.ids import new_id
from tests.integration.digest_rig import START, Rig, migrate, replica
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
