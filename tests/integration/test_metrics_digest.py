"""What digest's metrics count, over a real Postgres: each moves when the thing happens."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from carillon.digest.v1 import digest_pb2 as pb

from libs.wire import to_duration
from services.digest import store_ledger, store_views, store_windows
from services.digest.loops import Care
from services.digest.loops_ledger import LedgerCheck
from tests.integration.digest_rig import START, Rig, migrate, replica
from tests.support.fixtures import OpenDatabase
from tests.support.metrics import Since, sample

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
BATCH_WINDOWS = "carillon_digest_batch_windows_total"
ITEMS = "carillon_digest_items_total"


@pytest.fixture
async def rig(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[Rig]:
    """A replica with subscribers to a daily digest (ann), to a batch (bob) and to an hourly one (cat)."""
    migrate(postgres_url)
    async with replica(postgres_url, open_database) as rig:
        await rig.put_type()
        await rig.put_daily()
        await rig.put_external()
        await rig.put_rolling("hourly", duration=HOUR)
        for name, cadence in (("ann", "daily"), ("bob", "rebooking"), ("cat", "hourly")):
            await rig.put_subscriber(name)
            await rig.subscribe(name, cadence)
        yield rig


async def measured(rig: Rig) -> None:
    """What the care loop does every quarter of a minute."""
    care = Care(db=rig.db, tombstones=store_windows, counts=store_views, clock=rig.clock, retention=DAY)
    await care.measure_once()


async def overdue_s(rig: Rig) -> float:
    """How long the batch that waits longest for its trigger has waited too long."""
    await measured(rig)
    return sample("carillon_digest_batch_trigger_overdue_seconds")


async def test_open_windows_are_told_by_what_closes_them(rig: Rig) -> None:
    """One each; what is sent alone is never open."""
    await rig.put_subscriber("dan")
    await rig.apply(rig.notification("ann", "bob", "cat", "dan"))
    await measured(rig)
    kinds = ("aligned", "external", "rolling")
    assert [sample("carillon_digest_open_windows", kind=kind) for kind in kinds] == [1, 1, 1]
    assert sample("carillon_digest_closing_windows") == 1
    rig.clock.at = START + DAY
    await rig.due()
    await rig.close()
    await measured(rig)
    assert [sample("carillon_digest_open_windows", kind=kind) for kind in kinds] == [0, 1, 0]
    assert sample("carillon_digest_closing_windows") == 0


async def test_an_open_window_whose_timer_does_not_come_is_overdue(rig: Rig) -> None:
    """Due at 08:00, it is 09:00, and the scheduler has said nothing."""
    await rig.apply(rig.notification("ann"))
    await measured(rig)
    assert sample("carillon_digest_overdue_seconds", state="open") == 0
    rig.clock.at = START + 21 * HOUR
    await measured(rig)
    assert sample("carillon_digest_overdue_seconds", state="open") == 3600
    await rig.due()
    await measured(rig)
    assert sample("carillon_digest_overdue_seconds", state="open") == 0
    assert sample("carillon_digest_overdue_seconds", state="closing") == 3600


async def test_windows_in_quiet_hours_are_held_and_not_overdue_before_their_end(rig: Rig) -> None:
    """They leave when the hours are over; where the timer does not come then, that shows."""
    noon = pb.QuietHours(from_time_of_day="12:00", until_time_of_day="13:00")
    await rig.put_subscriber("eve", quiet_hours=[noon])
    await rig.apply(rig.notification("eve"))
    await rig.close()
    rig.clock.at = START + HOUR / 2
    await measured(rig)
    assert sample("carillon_digest_held_windows") == 1
    assert sample("carillon_digest_closing_windows") == 0
    assert sample("carillon_digest_overdue_seconds", state="held") == 0
    rig.clock.at = START + 2 * HOUR
    await measured(rig)
    assert sample("carillon_digest_overdue_seconds", state="held") == 3600
    assert sample("carillon_digest_overdue_seconds", state="closing") == 0


async def test_a_batchs_window_waits_for_its_trigger(rig: Rig) -> None:
    """Its age is told, and the trigger counts, once for each logical window."""
    since = Since()
    await rig.apply(rig.notification("bob"))
    rig.clock.at = START + HOUR
    await measured(rig)
    assert sample("carillon_digest_oldest_batch_window_seconds") == 3600
    await rig.apply(rig.trigger("rebooking", rig.clock.at))
    await rig.apply(rig.trigger("rebooking", rig.clock.at))
    await measured(rig)
    assert sample("carillon_digest_oldest_batch_window_seconds") == 0
    assert (since(BATCH_WINDOWS, cause="trigger"), since(BATCH_WINDOWS, cause="fallback")) == (1, 0)
    runs = "carillon_digest_batch_runs_total"
    assert (since(runs, result="new"), since(runs, result="repeated")) == (1, 1)


async def test_a_batchs_trigger_is_overdue_by_its_own_cadences_measure(rig: Rig) -> None:
    """Half of fallback_after: one that runs weekly is not late for days, and hides none that should run daily."""
    weekly = pb.ExternalCadence(batch="weekly", fallback_after=to_duration(14 * DAY))
    await rig.call("PutCadence", cadence=pb.Cadence(id="weekly", external=weekly))
    await rig.put_subscriber("eve")
    await rig.subscribe("eve", "weekly")
    await rig.apply(rig.notification("eve"))
    rig.clock.at = START + 3 * DAY
    await rig.apply(rig.notification("bob"))
    assert await overdue_s(rig) == 0
    rig.clock.at = START + 4 * DAY + HOUR
    assert await overdue_s(rig) == 3600
    await rig.apply(rig.trigger("rebooking", rig.clock.at))
    assert await overdue_s(rig) == 0
    rig.clock.at = START + 7 * DAY + 2 * HOUR
    assert await overdue_s(rig) == 7200


async def test_a_batchs_window_whose_trigger_never_came_falls_back(rig: Rig) -> None:
    """Its timer closes it, which is told as a missed trigger; the timers of other windows are not."""
    since = Since()
    await rig.apply(rig.notification("ann", "bob", "cat"))
    rig.clock.at = START + 90 * DAY
    assert await rig.due() == 3
    await rig.due()
    assert (since(BATCH_WINDOWS, cause="trigger"), since(BATCH_WINDOWS, cause="fallback")) == (0, 1)


async def test_rolling_windows_that_stay_open_still_ask_for_their_next_timer(rig: Rig) -> None:
    """Beside one of a batch that falls back in the same frame."""
    await rig.put_rolling("longer", duration=HOUR, extension=HOUR, cap=DAY)
    await rig.put_subscriber("fay")
    await rig.subscribe("fay", "longer")
    await rig.apply(rig.notification("fay"))
    await rig.apply(rig.notification("fay"))
    before = len(await rig.outgoing("scheduler"))
    rig.clock.at = START + HOUR
    assert await rig.due() == 1
    assert len(await rig.outgoing("scheduler")) == before + 1
    assert len(await rig.windows()) == 1


async def test_the_items_of_a_window_are_told_when_it_is_closed(rig: Rig) -> None:
    """Three in ann's; what is sent alone is left out."""
    since = Since()
    await rig.put_subscriber("dan")
    for _ in range(3):
        await rig.apply(rig.notification("ann", "dan"))
    rig.clock.at = START + DAY
    await rig.due()
    await rig.close()
    assert since("carillon_digest_window_items_count") == 1
    assert since("carillon_digest_window_items_sum") == 3


async def test_items_that_expire_in_their_window_are_counted(rig: Rig) -> None:
    """They were not worth telling any more when it closed."""
    since = Since()
    await rig.apply(rig.notification("ann", expires=START + HOUR), rig.notification("ann"))
    rig.clock.at = START + DAY
    await rig.due()
    await rig.close()
    assert since(ITEMS, state="expired", reason="") == 1
    assert since(ITEMS, state="digested", reason="") == 1


async def test_items_of_a_subscriber_who_is_deleted_are_counted(rig: Rig) -> None:
    """They will never be told."""
    since = Since()
    await rig.apply(rig.notification("ann"), rig.notification("ann"))
    await rig.call("DeleteSubscriber", id="ann")
    assert since(ITEMS, state="suppressed", reason="subscriber_deleted") == 2


async def test_the_ledger_is_told_when_a_round_has_ended(rig: Rig) -> None:
    """What there is by state, added up over ranges; of a round under way nothing is told."""
    await rig.apply(rig.notification("ann", "bob", entity="E"), rig.notification("nobody", type="unheard-of"))
    await rig.apply(rig.cancel("E"))
    await rig.apply(rig.notification("ann", "cat"))
    check = LedgerCheck(db=rig.db, store=store_ledger, rows=1)
    await check.check_round()
    states = ("pending", "cancelled", "suppressed", "digested")
    assert [sample("carillon_digest_ledger_items", state=state) for state in states] == [2, 2, 1, 0]
    assert sample("carillon_digest_ledger_notifications") == 3
    await rig.apply(rig.notification("ann"))
    await check.check_once()
    assert sample("carillon_digest_ledger_items", state="pending") == 2
    await check.check_round()
    assert sample("carillon_digest_ledger_items", state="pending") == 3
