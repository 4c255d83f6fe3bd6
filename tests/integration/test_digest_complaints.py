"""What users of other digests complain about, each complaint with its number, shown not to happen here."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from carillon.digest.v1 import digest_pb2 as pb
from carillon.link.v1 import link_pb2

from libs.errors import Unavailable
from libs.wire import to_duration
from tests.integration.digest_rig import START, HandClock, Rig, migrate, replica
from tests.support.fixtures import OpenDatabase

DAY, HOUR, SECOND = timedelta(days=1), timedelta(hours=1), timedelta(seconds=1)


def utc(day: int, hour: int, minute: int = 0, *, month: int = 3) -> datetime:
    """A time in 2026."""
    return datetime(2026, month, day, hour, minute, tzinfo=UTC)


async def fill(rig: Rig) -> None:
    """A type, and subscribers in four places."""
    await rig.put_type()
    for name, zone in [("ann", "America/New_York"), ("bea", "Europe/Berlin"), ("jun", "Asia/Tokyo"), ("uma", "UTC")]:
        await rig.put_subscriber(name, zone, webhook_url=f"https://example.com/{name}")


@pytest.fixture
async def rig(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[Rig]:
    """A replica."""
    migrate(postgres_url)
    async with replica(postgres_url, open_database) as rig:
        await fill(rig)
        yield rig


@pytest.fixture
async def rigs(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[list[Rig]]:
    """Two replicas over one database and one clock."""
    migrate(postgres_url)
    clock = HandClock()
    async with AsyncExitStack() as stack:
        found = [await stack.enter_async_context(replica(postgres_url, open_database, clock=clock)) for _ in range(2)]
        await fill(found[0])
        yield found


async def until(rig: Rig, at: datetime) -> None:
    """Let time pass, every timer fire at its time, and everything that closes be rendered."""
    while True:
        windows = [*await rig.windows(), *await rig.windows(pb.WINDOW_STATE_CLOSING)]
        due = min((one.due_time.ToDatetime(tzinfo=UTC) for one in windows), default=at)
        rig.clock.at = max(rig.clock.at, min(due, at))
        await rig.due()
        if not await rig.close() and due >= at:
            rig.clock.at = at
            return


async def digests(rig: Rig, subscriber: str = "") -> list[tuple[str, datetime, int]]:
    """Cadence, time and number of items of what went out, oldest first."""
    found = (await rig.call("ListDigests", subscriber=subscriber)).digests
    return [(one.cadence, one.close_time.ToDatetime(tzinfo=UTC), one.item_count) for one in reversed(found)]


async def told(rig: Rig) -> Counter[tuple[str, str]]:
    """How often each subscriber was told of each notification by webhook."""
    return Counter(
        (delivery.subscriber, item["notification_id"])
        for delivery in await rig.deliveries()
        for item in json.loads(delivery.json)["items"]
    )


def id_of(entry: link_pb2.Entry) -> str:
    """A notification's id, as it is shown."""
    return str(UUID(bytes=entry.notification.id))


async def test_a_digest_comes_at_a_fixed_time_by_the_clock_on_the_receivers_wall(rig: Rig) -> None:
    """novu #2628, #2808, sentry #43365 (and novu's timed digests run in UTC): 08:00 is 08:00 where each of them is."""
    await rig.put_daily()
    for name in ("ann", "bea", "jun"):
        await rig.subscribe(name, "daily")
    await rig.apply(rig.notification("ann", "bea", "jun"))
    await until(rig, START + DAY)
    assert await digests(rig, "ann") == [("daily", utc(2, 13), 1)]
    assert await digests(rig, "jun") == [("daily", utc(2, 23), 1)]
    assert await digests(rig, "bea") == [("daily", utc(3, 7), 1)]


async def test_the_user_picks_hour_day_and_frequency(rig: Rig) -> None:
    """daily.dev #1118, and what Knock says it is not well suited to: daily, weekly, monthly."""
    picked = {"ann": "0 6 * * *", "bea": "0 10 * * 5", "jun": "30 21 1 * *"}
    for name, cron in picked.items():
        await rig.put_daily(f"of-{name}", cron=cron)
        await rig.subscribe(name, f"of-{name}")
    await rig.apply(rig.notification(*picked))
    await until(rig, utc(2, 12, month=4))
    assert await digests(rig, "ann") == [("of-ann", utc(3, 11), 1)]
    assert await digests(rig, "bea") == [("of-bea", utc(6, 9), 1)]
    assert await digests(rig, "jun") == [("of-jun", utc(1, 12, 30, month=4), 1)]


async def test_two_cadences_for_one_type_at_once(rig: Rig) -> None:
    """novu #2699: an hourly webhook and a daily email of the same notifications, each complete."""
    await rig.put_daily("hourly", cron="0 * * * *")
    await rig.put_daily()
    choices = [pb.Choice(cadence="hourly", channel=pb.CHANNEL_WEBHOOK), pb.Choice(cadence="daily")]
    one = pb.Subscription(id="both", subscriber="uma", type="*", choices=choices)
    await rig.call("PutSubscriptions", subscriptions=[one])
    await rig.apply(rig.notification("uma", at=START))
    await until(rig, START + HOUR)
    await rig.apply(rig.notification("uma"))
    await until(rig, START + DAY)
    assert await digests(rig) == [
        ("hourly", utc(2, 13), 1),
        ("hourly", utc(2, 14), 1),
        ("daily", utc(3, 8), 2),
    ]


async def test_no_duplicates_and_no_loss_under_concurrency(rigs: list[Rig]) -> None:
    """novu #2569, #12373: the same notifications come to two replicas at once while both trigger and close."""
    rig = rigs[0]
    await rig.put_external()
    await rig.put_type(default_cadence="rebooking", default_channel=pb.CHANNEL_WEBHOOK)
    names = ["ann", "bea", "jun", "uma"]
    entries = [rig.notification(*names) for _ in range(40)]

    async def insert(one: Rig, own: list[link_pb2.Entry]) -> None:
        for entry in own:
            with suppress(Exception):  # The other one was first: the receiver would be told so at the next try.
                await one.apply(entry)

    async def close(one: Rig, number: int) -> None:
        for turn in range(15):
            with suppress(Unavailable):
                await one.apply(one.trigger("rebooking", START + timedelta(microseconds=2 * turn + number)))
                await one.close()

    await asyncio.gather(
        insert(rigs[0], entries), insert(rigs[1], entries[::-1]), *[close(one, at) for at, one in enumerate(rigs)]
    )
    for entry in entries:
        await rig.apply(entry)
    await rig.apply(rig.trigger("rebooking", START + DAY))
    await rig.close()
    assert await told(rig) == {(name, id_of(entry)): 1 for name in names for entry in entries}
    assert await rig.ledger() == {("digested", ""): 160}


async def test_two_replicas_that_close_the_same_window_send_one_message(rigs: list[Rig]) -> None:
    """Alertmanager #4108, #3865, #2222: peers that are both awake do not both tell."""
    rig = rigs[0]
    await rig.put_daily()
    await rig.subscribe("uma", "daily")
    await rig.apply(rig.notification("uma"))
    rig.clock.at = START + DAY
    await asyncio.gather(*[one.due() for one in rigs])
    await asyncio.gather(*[one.close() for one in [*rigs, *rigs]])
    assert len(await rig.deliveries()) == 1


async def test_what_belongs_to_different_people_cadences_and_channels_is_never_merged(rig: Rig) -> None:
    """novu #2698, #3893: each digest holds its own subscriber's items of its own cadence and channel, and no others."""
    await rig.put_daily()
    await rig.put_daily("evening", cron="0 18 * * *")
    await rig.put_type("flight.landed")
    for name in ("uma", "bea"):
        await rig.subscribe(name, "daily", "evening", channel=pb.CHANNEL_WEBHOOK)
        await rig.subscribe(name, "daily", type="flight.landed", channel=pb.CHANNEL_LOG)
    mine = [rig.notification("uma", entity="mine"), rig.notification("bea", entity="hers")]
    await rig.apply(*mine, rig.notification("uma", "bea", type="flight.landed", entity="landed"))
    await until(rig, START + DAY)
    found = [(one.subscriber, one.channel, one.json or one.text) for one in await rig.deliveries()]
    assert sorted((name, channel) for name, channel, _ in found) == [
        *[(name, channel) for name in ("bea", "uma") for channel in ("log", "webhook", "webhook")]
    ]
    for name, channel, text in found:
        wanted = "landed" if channel == "log" else {"uma": "mine", "bea": "hers"}[name]
        assert [word for word in ("mine", "hers", "landed") if word in text] == [wanted]


async def test_one_choice_made_in_two_ways_is_one_item(rig: Rig) -> None:
    """novu #3893, wrong merging: a leading digest with nothing said and with its summary asked for is the same one."""
    await rig.put_rolling("leading", duration=HOUR, is_leading=True)
    choices = [pb.Choice(cadence="leading"), pb.Choice(cadence="leading", style=pb.STYLE_SUMMARY)]
    one = pb.Subscription(id="both", subscriber="uma", type="*", choices=choices)
    await rig.call("PutSubscriptions", subscriptions=[one])
    await rig.apply(rig.notification("uma"), rig.notification("uma"), rig.notification("ann"))
    await until(rig, START + DAY)
    assert await digests(rig, "uma") == [("immediate", START, 1), ("leading", START + HOUR, 1)]
    assert await rig.ledger() == {("sent_alone", ""): 2, ("digested", ""): 1}


async def test_one_choice_made_in_two_ways_is_one_item_whatever_becomes_of_it(rig: Rig) -> None:
    """Cancelled, expired, suppressed or left out by all filters: one row each; told if one of the filters wants it."""
    await rig.put_rolling("leading", duration=HOUR, is_leading=True)
    choices = [pb.Choice(cadence="leading"), pb.Choice(cadence="leading", style=pb.STYLE_SUMMARY)]
    for name in ("uma", "bea"):
        ways = [
            pb.Subscription(
                id=f"{name}-{delay}", subscriber=name, type="*", choices=choices, filter=f"payload.delay > {delay}"
            )
            for delay in (5, 30)
        ]
        await rig.call("PutSubscriptions", subscriptions=ways)
    await rig.put_subscriber("bea", email="")
    await rig.apply(rig.cancel("E1", sequence=99))
    await rig.apply(
        rig.notification("uma", entity="E1", payload={"delay": 10}),
        rig.notification("uma", expires=START, payload={"delay": 10}),
        rig.notification("uma", payload={"delay": 1}),
        rig.notification("uma", payload={"delay": 10}),
        rig.notification("bea", payload={"delay": 10}),
    )
    assert await rig.ledger() == {
        ("cancelled", ""): 1,
        ("expired", ""): 1,
        ("suppressed", "filter"): 1,
        ("suppressed", "no_address"): 1,
        ("pending", ""): 1,
    }


async def test_everything_that_was_accepted_is_somewhere(rig: Rig) -> None:
    """novu #12373, lost silently: sent, waiting, left out, cancelled: the ledger has each once, none is missing."""
    await rig.put_daily()
    await rig.subscribe("uma", "daily")
    await rig.subscribe("bea", "off")
    await rig.apply(
        rig.notification("uma", "bea", "ann", "nobody", entity="E1"),
        rig.notification("uma", entity="E2"),
        rig.notification("uma", expires=START),
        rig.notification("uma", type="unheard.of"),
        rig.notification(topics=["empty"]),
    )
    await rig.close()
    await rig.apply(rig.cancel("E2"))
    assert await rig.ledger() == {
        ("pending", ""): 1,
        ("sent_alone", ""): 1,
        ("cancelled", ""): 1,
        ("expired", ""): 1,
        ("suppressed", "off"): 1,
        ("suppressed", "unknown_subscriber"): 1,
        ("suppressed", "unknown_type"): 1,
        ("suppressed", "no_subscriber"): 1,
    }


async def test_why_did_i_not_get_it(rig: Rig) -> None:
    """Asked again and again everywhere: Explain has a reason for everything that was not told, and none is empty."""
    await rig.subscribe("bea", "off")
    await rig.subscribe("jun", "immediate", filter="payload.delay > 30")
    await rig.put_subscriber("uma", email="")
    entries = {
        "off": rig.notification("bea"),
        "filter": rig.notification("jun", payload={"delay": 5}),
        "no_address": rig.notification("uma"),
        "cancelled": rig.notification("ann", entity="E1"),
        "expired": rig.notification("ann", expires=START),
        "unknown_type": rig.notification("ann", type="unheard.of"),
    }
    await rig.apply(*entries.values())
    await rig.apply(rig.cancel("E1"))
    await rig.close()
    assert await rig.deliveries() == []
    for reason, entry in entries.items():
        answer = await rig.call("Explain", id=id_of(entry))
        (verdict,) = [one for one in answer.entries if one.details.get("subscriber")]
        assert verdict.details.get("reason", verdict.details["state"]) == reason
        assert verdict.details["subscriber"] in verdict.sentence


async def test_a_preference_that_changes_in_the_middle_of_a_window_loses_and_doubles_nothing(rig: Rig) -> None:
    """Nobody says what happens then; here what waits stays where it is, and the next one follows the new choice."""
    await rig.put_daily()
    await rig.put_daily("weekly", cron="0 10 * * 5")
    await rig.subscribe("uma", "daily")
    await rig.apply(rig.notification("uma"))
    await rig.subscribe("uma", "weekly")
    await rig.apply(rig.notification("uma"))
    await rig.subscribe("uma", "immediate")
    await rig.apply(rig.notification("uma"))
    await rig.call("DeleteSubscription", id="uma/flight.delayed/")
    await rig.subscribe("uma", "off")
    await rig.apply(rig.notification("uma"))
    await until(rig, START + 7 * DAY)
    assert await digests(rig) == [("immediate", START, 1), ("daily", utc(3, 8), 1), ("weekly", utc(6, 10), 1)]
    assert (await rig.ledger())["suppressed", "off"] == 1


async def test_a_zone_that_changes_in_the_middle_of_a_window_loses_and_doubles_nothing(rig: Rig) -> None:
    """She flies from Berlin to Tokyo: one digest with both items, at her next 08:00 there."""
    await rig.put_daily()
    await rig.subscribe("bea", "daily")
    await rig.apply(rig.notification("bea"))
    await rig.put_subscriber("bea", "Asia/Tokyo")
    await rig.apply(rig.notification("bea"))
    await until(rig, START + 2 * DAY)
    assert await digests(rig) == [("daily", utc(2, 23), 2)]


@pytest.mark.parametrize("count", [11, 101, 2_500])
async def test_a_digest_holds_any_number_of_items(rig: Rig, count: int) -> None:
    """Knock shows 10, 100 on its dearest plan, and closes at 1,000: here each is in a message, once, in order."""
    await rig.put_daily()
    await rig.subscribe("uma", "daily", channel=pb.CHANNEL_WEBHOOK, style=pb.STYLE_FULL)
    entries = [rig.notification("uma", at=START + number * SECOND) for number in range(count)]
    for at in range(0, count, 1_000):
        await rig.apply(*entries[at : at + 1_000])
    await until(rig, START + DAY)
    shown = [one["notification_id"] for part in await rig.deliveries() for one in json.loads(part.json)["items"]]
    assert shown == [id_of(entry) for entry in entries]
    assert await rig.ledger() == {("digested", ""): count}


async def test_what_is_cancelled_is_taken_out_even_of_a_window_that_has_closed(rig: Rig) -> None:
    """Knock: a closed batch cannot be changed. Until it is rendered a cancel empties it, and says how much it hit."""
    await rig.put_daily()
    await rig.put_subscriber("uma", quiet_hours=[pb.QuietHours(from_time_of_day="07:00", until_time_of_day="09:00")])
    await rig.subscribe("uma", "daily")
    await rig.apply(rig.notification("uma", entity="open"), rig.notification("uma", entity="closing"))
    await rig.apply(rig.notification("uma", entity="held"), rig.notification("uma", entity="stays"))
    assert (await rig.result(rig.cancel("open"))).changed == 1
    rig.clock.at = utc(3, 8)
    await rig.due()
    assert (await rig.result(rig.cancel("closing"))).changed == 1
    await rig.close()
    assert (await rig.result(rig.cancel("held"))).changed == 1
    rig.clock.at = utc(3, 9)
    await rig.due()
    await rig.close()
    (delivery,) = await rig.deliveries()
    assert [word for word in ("open", "closing", "held", "stays") if word in delivery.text] == ["stays"]
    late = await rig.result(rig.cancel("stays"))
    assert (late.changed, late.already_left) == (0, 1)


async def test_days_on_which_the_clocks_change_have_one_digest_each_at_the_right_hour(rig: Rig) -> None:
    """NATS schedules may skip or fire twice then: New York on 8 March and 1 November, 08:00 each day, once."""
    await rig.put_daily()
    await rig.subscribe("ann", "daily")
    for first, month in ((6, 3), (30, 10)):
        rig.clock.at = utc(first, 15, month=month)
        for _ in range(4):
            await rig.apply(rig.notification("ann"))
            await until(rig, rig.clock.at + DAY)
    assert [at for _, at, _ in await digests(rig)] == [
        *(utc(7, 13), utc(8, 12), utc(9, 12), utc(10, 12)),
        *(utc(31, 12, month=10), utc(1, 13, month=11), utc(2, 13, month=11), utc(3, 13, month=11)),
    ]


@pytest.mark.parametrize("cron", ["30 2 * * *", "30 1 * * *"])
async def test_an_hour_that_is_skipped_or_comes_twice_gives_one_digest_a_day(rig: Rig, cron: str) -> None:
    """02:30 does not exist on 8 March in New York, 01:30 is there twice on 1 November: a digest a day all the same."""
    await rig.put_daily(cron=cron)
    await rig.subscribe("ann", "daily")
    for first, month in ((6, 3), (30, 10)):
        rig.clock.at = utc(first, 15, month=month)
        for _ in range(4):
            await rig.apply(rig.notification("ann"))
            await until(rig, rig.clock.at + DAY)
    assert [count for _, _, count in await digests(rig)] == [1] * 8


async def test_an_item_exactly_at_the_boundary_is_in_one_digest_and_the_next_one(rig: Rig) -> None:
    """Membership by a query over times takes it twice or not at all (novu); a microsecond before is this digest's."""
    await rig.put_daily()
    await rig.subscribe("uma", "daily", channel=pb.CHANNEL_WEBHOOK)
    boundary = utc(3, 8)
    before, on, after = (rig.notification("uma", at=boundary + timedelta(microseconds=number)) for number in (-1, 0, 1))
    await rig.apply(before, on, after)
    await until(rig, START + 3 * DAY)
    found = [[one["notification_id"] for one in json.loads(part.json)["items"]] for part in await rig.deliveries()]
    assert found == [[id_of(before)], [id_of(on), id_of(after)]]


@pytest.mark.parametrize("runs", [0, 1, 2])
async def test_a_cronjob_that_runs_zero_one_or_two_times_gives_the_same_digests(rig: Rig, runs: int) -> None:
    """kubernetes #79995, CronJobs run "about once": a second run changes nothing, the fallback stands in for none."""
    external = pb.ExternalCadence(batch="rebooking", fallback_after=to_duration(HOUR))
    await rig.call("PutCadence", cadence=pb.Cadence(id="rebooking", external=external))
    await rig.subscribe("uma", "rebooking")
    await rig.apply(rig.notification("uma"), rig.notification("uma"))
    results = [await rig.result(rig.trigger("rebooking", START)) for _ in range(runs)]
    assert [(one.changed, one.is_repeated) for one in results] == [(1, False), (0, True)][:runs]
    await until(rig, START + DAY)
    assert [(cadence, count) for cadence, _, count in await digests(rig)] == [("rebooking", 2)]
