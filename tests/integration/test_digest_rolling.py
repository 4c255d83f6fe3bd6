"""Rolling and leading cadences over a real Postgres: when their windows open, stay open, and close."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from carillon.digest.v1 import digest_pb2 as pb
from carillon.link.v1 import link_pb2

from libs.errors import InvalidArgument
from libs.wire import to_duration, to_timestamp
from services.digest import store_expansion
from tests.integration.digest_rig import START, Rig, migrate, replica
from tests.support.fixtures import OpenDatabase

HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)


@pytest.fixture
async def rig(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[Rig]:
    """A replica with a type and a subscriber."""
    migrate(postgres_url)
    async with replica(postgres_url, open_database) as rig:
        await rig.put_type()
        await rig.put_subscriber("ann")
        yield rig


async def rolling(rig: Rig, **fields: Any) -> None:
    """Ann is told by a rolling cadence."""
    await rig.put_rolling(**fields)
    await rig.subscribe("ann", "rolling")


async def due(rig: Rig) -> list[tuple[int, datetime]]:
    """How many items wait in each open window, and when it is due."""
    return [(int(one.items), one.due_time.ToDatetime(tzinfo=UTC)) for one in await rig.windows()]


async def sizes(rig: Rig) -> list[tuple[str, int]]:
    """Cadence and number of items of every digest that went out, sorted."""
    digests = (await rig.call("ListDigests")).digests
    return sorted((one.cadence, one.item_count) for one in digests)


def several(rig: Rig, count: int) -> list[link_pb2.Entry]:
    """So many notifications for Ann, a second apart, in order."""
    return [rig.notification("ann", entity=f"E{n}", at=START + timedelta(seconds=n)) for n in range(count)]


async def test_a_window_opens_with_its_first_item_and_closes_after_its_duration(rig: Rig) -> None:
    """Counted from when the first item came; later ones join without moving it; the next item opens the next one."""
    await rolling(rig, duration=HOUR)
    await rig.apply(rig.notification("ann", at=START - timedelta(days=1)))
    rig.clock.at += 30 * MINUTE
    await rig.apply(rig.notification("ann"))
    assert await due(rig) == [(2, START + HOUR)]
    rig.clock.at = START + HOUR
    await rig.due()
    await rig.close()
    assert await sizes(rig) == [("rolling", 2)]
    await rig.apply(rig.notification("ann"))
    assert await due(rig) == [(1, START + 2 * HOUR)]


async def test_each_further_item_keeps_it_open_up_to_the_cap(rig: Rig) -> None:
    """Ten minutes more for each; never later than the cap after the first."""
    await rolling(rig, duration=HOUR, extension=10 * MINUTE, cap=90 * MINUTE)
    await rig.apply(rig.notification("ann"))
    await rig.apply(rig.notification("ann"), rig.notification("ann"))
    assert await due(rig) == [(3, START + 80 * MINUTE)]
    await rig.apply(*several(rig, 5))
    assert await due(rig) == [(8, START + 90 * MINUTE)]


async def test_without_a_cap_it_is_four_times_the_duration(rig: Rig) -> None:
    """A thousand items cannot keep it open for longer."""
    await rolling(rig, duration=HOUR, extension=HOUR)
    await rig.apply(*several(rig, 20))
    assert await due(rig) == [(20, START + 4 * HOUR)]


async def test_the_due_time_does_not_depend_on_how_items_came_in_frames(rig: Rig) -> None:
    """Four at once or one by one: the first opens, three extend."""
    await rolling(rig, duration=HOUR, extension=5 * MINUTE)
    await rig.apply(*several(rig, 4))
    await rig.put_subscriber("bob")
    await rig.subscribe("bob", "rolling")
    for _ in range(4):
        await rig.apply(rig.notification("bob"))
    assert await due(rig) == [(4, START + 75 * MINUTE)] * 2


async def test_a_timer_that_comes_before_the_moved_due_time_asks_again_and_closes_nothing(rig: Rig) -> None:
    """One timer at a time: the first one finds the window due later, and asks for that; twice, it asks for the same."""
    await rolling(rig, duration=HOUR, extension=30 * MINUTE)
    await rig.apply(rig.notification("ann"))
    await rig.apply(rig.notification("ann"))
    assert len(await rig.outgoing("scheduler")) == 1
    rig.clock.at = START + HOUR
    assert await rig.due() == 1
    assert await rig.close() == 0
    _, again = await rig.outgoing("scheduler")
    assert again.schedule_timer.due_time.ToDatetime(tzinfo=UTC) == START + 90 * MINUTE
    await rig.due()
    assert len({entry.schedule_timer.id for entry in await rig.outgoing("scheduler")}) == 2
    rig.clock.at = START + 90 * MINUTE
    await rig.due()
    assert await rig.close() == 1
    assert await sizes(rig) == [("rolling", 2)]


async def test_a_timer_that_comes_late_or_twice_closes_once(rig: Rig) -> None:
    """A closed window stays closed, and the one opened after it is not touched by its timer."""
    await rolling(rig, duration=HOUR)
    await rig.apply(rig.notification("ann"))
    rig.clock.at = START + 2 * HOUR
    await rig.due()
    await rig.apply(rig.notification("ann"))
    rig.clock.at += MINUTE
    await rig.apply(*[_close(entry) for entry in (await rig.outgoing("scheduler"))[:1]] * 2)
    assert await rig.close() == 1
    assert await due(rig) == [(1, START + 3 * HOUR)]


def _close(entry: link_pb2.Entry) -> link_pb2.Entry:
    return link_pb2.Entry(tenant=entry.tenant, close_window=entry.schedule_timer.target.close_window)


async def test_it_closes_early_when_it_is_full(rig: Rig) -> None:
    """At the third item at once, without a timer; the fourth opens the next window."""
    await rolling(rig, duration=HOUR, maximum_items=3)
    await rig.apply(*several(rig, 2))
    assert await rig.close() == 0
    await rig.apply(*several(rig, 2))
    assert await rig.close() == 1
    assert await sizes(rig) == [("rolling", 3)]
    assert await due(rig) == [(1, START + HOUR)]


async def test_one_frame_fills_many_windows_in_order(rig: Rig) -> None:
    """Ten items by threes, two waiting already: the oldest first, the last two wait."""
    await rolling(rig, duration=HOUR, maximum_items=3)
    await rig.apply(*[rig.notification("ann", at=START - MINUTE) for _ in range(2)])
    await rig.apply(*several(rig, 9))
    await rig.close()
    assert await sizes(rig) == [("rolling", 3)] * 3
    assert [count for count, _ in await due(rig)] == [2]
    entities = {
        tuple(item.entity for item in (await rig.call("GetDigest", id=one.id)).items)
        for one in (await rig.call("ListDigests")).digests
    }
    assert entities == {("", "", "E0"), ("E1", "E2", "E3"), ("E4", "E5", "E6")}
    assert await rig.ledger() == {("digested", ""): 9, ("pending", ""): 2}


async def test_a_frame_that_fills_windows_exactly_leaves_none_open(rig: Rig) -> None:
    """Two waiting already, seven more by threes: three full windows, of which the frame made two, and nothing waits."""
    await rolling(rig, duration=HOUR, maximum_items=3)
    await rig.apply(*several(rig, 2))
    await rig.apply(*several(rig, 7))
    await rig.close()
    assert await sizes(rig) == [("rolling", 3)] * 3
    assert await due(rig) == []
    assert await rig.ledger() == {("digested", ""): 9}


async def test_the_first_item_of_a_leading_cadence_goes_out_alone_at_once(rig: Rig) -> None:
    """The oldest of the frame is sent in full; the rest of that window is digested."""
    await rolling(rig, duration=HOUR, is_leading=True)
    await rig.apply(*several(rig, 3))
    await rig.close()
    (delivery,) = await rig.deliveries()
    assert delivery.subject == "E0"
    assert await due(rig) == [(2, START + HOUR)]
    await rig.apply(rig.notification("ann"))
    rig.clock.at = START + HOUR
    await rig.due()
    await rig.close()
    assert await sizes(rig) == [("immediate", 1), ("rolling", 3)]
    assert await rig.ledger() == {("sent_alone", ""): 1, ("digested", ""): 3}


async def test_a_leading_window_without_a_rest_closes_silently(rig: Rig) -> None:
    """One message, no empty digest; the next item leads again."""
    await rolling(rig, duration=HOUR, is_leading=True)
    await rig.apply(rig.notification("ann"))
    assert await due(rig) == [(0, START + HOUR)]
    rig.clock.at = START + HOUR
    await rig.due()
    await rig.close()
    await rig.apply(rig.notification("ann"))
    await rig.close()
    assert await sizes(rig) == [("immediate", 1)] * 2
    assert await rig.ledger() == {("sent_alone", ""): 2}


async def test_a_leading_cadence_with_a_maximum_leads_every_window(rig: Rig) -> None:
    """Eight items, two digested per window: 1 + 2, 1 + 2, 1 + 1 waiting."""
    await rolling(rig, duration=HOUR, is_leading=True, maximum_items=2)
    await rig.apply(*several(rig, 8))
    await rig.close()
    assert await sizes(rig) == [("immediate", 1)] * 3 + [("rolling", 2)] * 2
    assert await due(rig) == [(1, START + HOUR)]
    assert sorted(delivery.subject for delivery in await rig.deliveries() if " × " not in delivery.subject) == [
        "E0",
        "E3",
        "E6",
    ]


async def test_a_cancel_takes_items_out_of_a_rolling_window_and_gives_no_time_back(rig: Rig) -> None:
    """INV-4: what was cancelled is not told; how long the window stays open, and its room, do not change."""
    await rolling(rig, duration=HOUR, extension=10 * MINUTE, maximum_items=4)
    await rig.apply(rig.notification("ann", entity="N1"), rig.notification("ann", entity="N2"))
    assert (await rig.result(rig.cancel("N2"))).changed == 1
    assert await due(rig) == [(1, START + 70 * MINUTE)]
    await rig.apply(*several(rig, 2))
    await rig.close()
    assert await sizes(rig) == [("rolling", 3)]


async def test_a_changed_rule_counts_for_the_next_window(rig: Rig) -> None:
    """What is open keeps its extension, cap and maximum; the window after it has the new ones."""
    await rolling(rig, duration=HOUR, extension=10 * MINUTE, maximum_items=3)
    await rig.apply(rig.notification("ann"))
    await rig.put_rolling(duration=2 * HOUR, maximum_items=5)
    await rig.apply(rig.notification("ann"))
    assert await due(rig) == [(2, START + 70 * MINUTE)]
    await rig.apply(*several(rig, 7))
    await rig.close()
    assert await sizes(rig) == [("rolling", 3), ("rolling", 5)]
    assert await due(rig) == [(1, START + 2 * HOUR)]


async def test_a_cadence_that_becomes_external_lets_its_rolling_window_end_as_it_began(rig: Rig) -> None:
    """What comes then waits for the batch, and is not counted among what keeps the old window open."""
    await rolling(rig, duration=HOUR, extension=10 * MINUTE, maximum_items=2)
    await rig.apply(rig.notification("ann"))
    await rig.put_external("rolling", "batch")
    await rig.apply(*several(rig, 3))
    assert [count for count, _ in await due(rig)] == [1, 3]
    assert (await due(rig))[0] == (1, START + HOUR)
    rig.clock.at = START + HOUR
    await rig.due()
    await rig.close()
    assert await sizes(rig) == [("rolling", 1)]
    await rig.apply(rig.trigger("batch", rig.clock.at))
    await rig.close()
    assert await sizes(rig) == [("rolling", 1), ("rolling", 3)]


async def test_a_cadence_that_becomes_rolling_leaves_what_waits_to_its_batch(rig: Rig) -> None:
    """The next item opens a rolling window; the trigger closes the other, and that one only."""
    await rig.put_external("rolling", "batch")
    await rig.subscribe("ann", "rolling")
    await rig.apply(*several(rig, 2))
    await rolling(rig, duration=HOUR, maximum_items=2)
    await rig.apply(rig.notification("ann"))
    await rig.apply(rig.trigger("batch", START))
    await rig.close()
    assert await sizes(rig) == [("rolling", 2)]
    await rig.apply(rig.notification("ann"))
    await rig.close()
    assert await sizes(rig) == [("rolling", 2), ("rolling", 2)]


async def test_a_changed_zone_leaves_a_rolling_window_alone(rig: Rig) -> None:
    """Its due time is a duration, not a time of day."""
    await rolling(rig, duration=HOUR)
    await rig.apply(rig.notification("ann"))
    await rig.put_subscriber("ann", "Asia/Tokyo")
    assert await due(rig) == [(1, START + HOUR)]


async def test_a_thousand_items_for_one_subscriber_cost_a_handful_of_statements(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many statements for a thousand items, filling a hundred windows, as for a hundred filling ten."""
    statements: list[str] = []
    real = store_expansion._Statements.__call__

    async def counted(self: Any, statement: Any, **values: object) -> Any:
        statements.append(statement)
        return await real(self, statement, **values)

    monkeypatch.setattr(store_expansion._Statements, "__call__", counted)
    await rolling(rig, duration=HOUR, is_leading=True, maximum_items=9)
    await rig.apply(*several(rig, 105))
    few = len(statements)
    await rig.apply(*several(rig, 1000))
    assert (few, len(statements) - few) == (few, few)
    assert few <= 15
    await rig.close()
    assert await rig.ledger() == {("sent_alone", ""): 111, ("digested", ""): 990, ("pending", ""): 4}


async def test_rolling_aligned_and_immediate_at_once_are_three_messages(rig: Rig) -> None:
    """One subscription, three cadences, one notification: each in its own way."""
    await rig.put_rolling(duration=HOUR)
    await rig.put_daily()
    await rig.subscribe("ann", "rolling", "daily", "immediate")
    await rig.apply(rig.notification("ann"))
    rig.clock.at = START + timedelta(days=1)
    await rig.due()
    await rig.close()
    assert await sizes(rig) == [("daily", 1), ("immediate", 1), ("rolling", 1)]


async def test_an_item_that_meets_a_window_past_its_due_time_joins_it_while_it_is_open(rig: Rig) -> None:
    """The timer is late: what comes meanwhile goes along."""
    await rolling(rig, duration=HOUR)
    await rig.apply(rig.notification("ann"))
    rig.clock.at = START + 2 * HOUR
    await rig.apply(rig.notification("ann"))
    await rig.due()
    await rig.close()
    assert await sizes(rig) == [("rolling", 2)]


async def test_a_rolling_cadence_is_shown_as_it_was_put(rig: Rig) -> None:
    """With and without what may be left out."""
    await rig.put_rolling("a", duration=HOUR, extension=MINUTE, cap=2 * HOUR, maximum_items=7, is_leading=True)
    await rig.put_rolling("b", duration=HOUR)
    first, second = (await rig.call("ListCadences")).cadences
    assert first.rolling.cap.seconds == 7200
    assert (first.rolling.extension.seconds, first.rolling.maximum_items, first.rolling.is_leading) == (60, 7, True)
    assert second == pb.Cadence(id="b", rolling=pb.RollingCadence(duration=to_duration(HOUR)))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"duration": timedelta(0)}, "duration"),
        ({"duration": timedelta(days=31)}, "duration"),
        ({"duration": HOUR, "extension": timedelta(0)}, "extension"),
        ({"duration": HOUR, "cap": MINUTE}, "cap"),
        ({"duration": HOUR, "cap": timedelta(days=121)}, "cap"),
        ({"duration": HOUR, "maximum_items": 100_001}, "maximum_items"),
    ],
)
async def test_a_rolling_cadence_out_of_bounds_is_refused(rig: Rig, fields: dict[str, Any], field: str) -> None:
    """INVALID_ARGUMENT names the field."""
    with pytest.raises(InvalidArgument) as caught:
        await rig.put_rolling(**fields)
    assert [one.field for one in caught.value.violations] == [f"cadence.rolling.{field}"]


async def test_a_stray_timer_of_a_window_that_does_not_exist_changes_nothing(rig: Rig) -> None:
    """Whatever comes, nothing is asked for and nothing closes."""
    await rolling(rig, duration=HOUR)
    await rig.apply(rig.notification("ann"))
    close = link_pb2.CloseWindow(window_id=b"\1" * 16, due_time=to_timestamp(START))
    await rig.apply(link_pb2.Entry(tenant="acme", close_window=close))
    assert len(await rig.outgoing("scheduler")) == 1
    assert await rig.close() == 0
