"""Quiet hours over a real Postgres: what waits for their end, and what does not."""

from collections.abc import AsyncIterator
from datetime import UTC, timedelta
from typing import Any

import pytest
from carillon.digest.v1 import digest_pb2 as pb
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2

from libs.errors import InvalidArgument
from tests.integration.digest_rig import START, Rig, migrate, replica
from tests.support.fixtures import OpenDatabase

HOUR = timedelta(hours=1)
ONE = START + HOUR
"""When the quiet hours of noon end."""


def quiet(start: str, until: str, channel: pb.Channel.ValueType = pb.CHANNEL_UNSPECIFIED) -> list[pb.QuietHours]:
    """One range."""
    return [pb.QuietHours(channel=channel, from_time_of_day=start, until_time_of_day=until)]


@pytest.fixture
async def rig(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[Rig]:
    """A replica with a type and a subscriber who has quiet hours at noon, which it is."""
    migrate(postgres_url)
    async with replica(postgres_url, open_database) as rig:
        await rig.put_type()
        await rig.put_subscriber("ann", quiet_hours=quiet("12:00", "13:00"))
        yield rig


async def test_what_is_sent_alone_waits_for_the_end(rig: Rig) -> None:
    """Held with a timer of its own for 13:00, shown as due then; sent when that comes, not before, and once."""
    await rig.apply(rig.notification("ann"))
    await rig.close()
    assert await rig.deliveries() == []
    (window,) = await rig.windows(pb.WINDOW_STATE_CLOSING)
    assert window.due_time.ToDatetime(tzinfo=UTC) == ONE
    rig.clock.at = ONE - timedelta(seconds=1)
    assert await rig.due() == 0
    assert await rig.close() == 0
    rig.clock.at = ONE
    assert await rig.due() == 1
    await rig.due()
    assert await rig.close() == 1
    await rig.due()
    assert await rig.close() == 0
    assert len(await rig.deliveries()) == 1
    assert await rig.ledger() == {("sent_alone", ""): 1}


async def test_a_digest_that_closes_in_quiet_hours_waits_and_takes_no_more_items(rig: Rig) -> None:
    """Due at 12:30, out at 13:00; what comes meanwhile opens the next window."""
    await rig.put_daily(cron="30 12 * * *")
    await rig.subscribe("ann", "daily")
    await rig.apply(rig.notification("ann"))
    rig.clock.at = START + HOUR / 2
    await rig.due()
    await rig.close()
    await rig.apply(rig.notification("ann"))
    rig.clock.at = ONE
    await rig.due()
    await rig.close()
    (digest,) = (await rig.call("ListDigests")).digests
    assert (digest.item_count, digest.close_time.ToDatetime(tzinfo=UTC)) == (1, ONE)
    assert len(await rig.windows()) == 1


async def fire(rig: Rig, fired: set[bytes]) -> int:
    """As the scheduler fires: what is due, and no id twice; returns how many timers."""
    due = [
        (timer.id, timer.target.close_window)
        for timer in (entry.schedule_timer for entry in await rig.outgoing("scheduler"))
        if timer.id not in fired and timer.due_time.ToDatetime(tzinfo=UTC) <= rig.clock.at
    ]
    fired.update(one_id for one_id, _ in due)
    if due:
        await rig.apply(*[link_pb2.Entry(tenant=rig.tenant, close_window=target) for _, target in due])
    return len(due)


@pytest.mark.parametrize("cadence", ["immediate", "daily"])
async def test_what_is_held_anew_just_before_the_end_is_woken_anew(rig: Rig, cadence: str) -> None:
    """The timer came by the scheduler's clock, and ours is a moment behind; it left for good, so another must come.

    The daily digest is due when the quiet hours end.
    """
    await rig.put_daily(cron="0 13 * * *")
    await rig.subscribe("ann", cadence)
    await rig.apply(rig.notification("ann"))
    await rig.close()
    fired: set[bytes] = set()
    for _ in range(2):
        rig.clock.at = ONE
        assert await fire(rig, fired) == 1
        rig.clock.at = ONE - timedelta(milliseconds=1)
        assert await rig.close() == 1
        assert await rig.deliveries() == []
    rig.clock.at = ONE
    assert await fire(rig, fired) == 1
    await rig.close()
    assert await rig.ledger() == {("sent_alone" if cadence == "immediate" else "digested", ""): 1}


async def test_high_priority_ignores_quiet_hours_and_mandatory_types_wait(rig: Rig) -> None:
    """Urgent is what the sender says is urgent."""
    await rig.put_type("account.closed", is_mandatory=True)
    await rig.apply(
        rig.notification("ann", entity="urgent", priority=timer_pb2.PRIORITY_HIGH),
        rig.notification("ann", entity="must", type="account.closed"),
    )
    await rig.close()
    assert [delivery.subject for delivery in await rig.deliveries()] == ["urgent"]
    assert await rig.ledger() == {("sent_alone", ""): 1, ("pending", ""): 1}


async def test_a_channel_without_quiet_hours_does_not_wait(rig: Rig) -> None:
    """Email is quiet at noon, the webhook is not."""
    await rig.put_subscriber(
        "ann", webhook_url="https://example.com", quiet_hours=quiet("12:00", "13:00", pb.CHANNEL_EMAIL)
    )
    await rig.subscribe("ann", "immediate")
    await rig.subscribe("ann", "immediate", one_id="hook", channel=pb.CHANNEL_WEBHOOK)
    await rig.apply(rig.notification("ann"))
    await rig.close()
    assert [delivery.channel for delivery in await rig.deliveries()] == ["webhook"]


async def test_what_is_held_can_be_cancelled(rig: Rig) -> None:
    """INV-4: cancelled during the quiet hours, not sent after them."""
    await rig.apply(rig.notification("ann", entity="N1"))
    await rig.close()
    assert (await rig.result(rig.cancel("N1"))).changed == 1
    rig.clock.at = ONE
    await rig.due()
    await rig.close()
    assert await rig.deliveries() == []
    assert await rig.ledger() == {("cancelled", ""): 1}


@pytest.mark.parametrize("change", [{"quiet_hours": []}, {"zone": "Asia/Tokyo"}])
async def test_changed_hours_or_zone_count_at_once_for_what_is_held(rig: Rig, change: dict[str, Any]) -> None:
    """Taken away, or noon no longer: it leaves now, and the timer that comes later does nothing."""
    await rig.apply(rig.notification("ann"))
    await rig.close()
    await rig.put_subscriber("ann", **{"quiet_hours": quiet("12:00", "13:00"), **change})
    await rig.close()
    assert len(await rig.deliveries()) == 1
    rig.clock.at = ONE
    await rig.due()
    assert await rig.close() == 0


async def test_who_closes_windows_is_woken_when_some_are_released(rig: Rig) -> None:
    """What is no longer held leaves without waiting for the next look; nobody is woken for nothing."""
    rig.rung.clear()
    await rig.put_subscriber("ann", quiet_hours=quiet("12:00", "13:30"))
    assert not rig.rung.is_set()
    await rig.apply(rig.notification("ann"))
    await rig.close()
    rig.rung.clear()
    await rig.put_subscriber("ann", quiet_hours=[])
    assert rig.rung.is_set()


async def test_longer_hours_hold_for_longer(rig: Rig) -> None:
    """The timer of the old end finds the new one and does nothing."""
    await rig.apply(rig.notification("ann"))
    await rig.close()
    await rig.put_subscriber("ann", quiet_hours=quiet("12:00", "14:00"))
    await rig.close()
    rig.clock.at = ONE
    await rig.due()
    await rig.close()
    assert await rig.deliveries() == []
    rig.clock.at = START + 2 * HOUR
    await rig.due()
    await rig.close()
    assert len(await rig.deliveries()) == 1


async def test_what_expires_during_quiet_hours_is_not_sent_after_them(rig: Rig) -> None:
    """Held is not sent."""
    await rig.apply(rig.notification("ann", expires=START + HOUR / 2))
    await rig.close()
    rig.clock.at = ONE
    await rig.due()
    await rig.close()
    assert await rig.ledger() == {("expired", ""): 1}


async def test_a_held_window_does_not_keep_others_from_closing(rig: Rig) -> None:
    """A hundred held, one for somebody else: that leaves at once."""
    await rig.put_subscriber("bob")
    await rig.apply(*[rig.notification("ann") for _ in range(100)])
    await rig.apply(rig.notification("bob"))
    await rig.close()
    assert [delivery.subscriber for delivery in await rig.deliveries()] == ["bob"]
    async with rig.db.read() as tx:
        row = await (await tx.raw.execute("SELECT count(*) FROM digest_window WHERE is_held")).fetchone()
    assert row == (100,)


async def test_quiet_hours_are_shown_as_they_were_put(rig: Rig) -> None:
    """Channel and both times."""
    given = [*quiet("22:00", "07:00"), *quiet("12:00", "13:30", pb.CHANNEL_EMAIL)]
    await rig.put_subscriber("ann", quiet_hours=given)
    answer = await rig.call("GetSubscriber", id="ann")
    assert list(answer.subscriber.quiet_hours) == given


@pytest.mark.parametrize(
    ("hours", "field"),
    [
        (quiet("24:00", "07:00"), "[0].from_time_of_day"),
        (quiet("22:00", "7:00"), "[0].until_time_of_day"),
        (quiet("22:00", "22:00"), "[0].until_time_of_day"),
        (quiet("08:00", "20:00") + quiet("20:00", "08:00"), ""),
        (quiet("08:00", "09:00") * 9, ""),
    ],
)
async def test_quiet_hours_that_make_no_sense_are_refused(rig: Rig, hours: list[pb.QuietHours], field: str) -> None:
    """No time of day, nothing, the whole day, or too many of them."""
    with pytest.raises(InvalidArgument) as caught:
        await rig.put_subscriber("ann", quiet_hours=hours)
    assert [one.field for one in caught.value.violations] == [f"subscribers[0].quiet_hours{field}"]
