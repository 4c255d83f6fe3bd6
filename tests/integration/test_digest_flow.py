"""Notifications on their way through digest: expansion, windows, closing, over a real Postgres."""

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from carillon.digest.v1 import digest_pb2 as pb
from carillon.link.v1 import link_pb2
from pydantic import SecretStr

from libs import migrations
from libs.ids import derived_id, new_id
from libs.links.receiver import PoisonFrame
from libs.settings import PostgresSettings
from libs.sharding import shard_of
from libs.wire import to_timestamp
from local.stack import PROJECT
from services.digest.store_tables import metadata
from tests.integration.digest_rig import SHARDS, START, Rig, migrate, replica
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


async def test_the_migrations_add_up_to_the_tables(postgres_url: str) -> None:
    """What the revisions leave behind is what the code says the tables are."""
    settings = PostgresSettings(url=SecretStr(postgres_url))
    migrations.upgrade(settings, "digest", PROJECT / "services" / "digest" / "migrations")
    migrations.check_models_match(settings, "digest", metadata)


async def test_a_notification_without_a_subscription_goes_out_alone_by_default(rig: Rig) -> None:
    """Directly told, nothing chosen: the type's default cadence and channel, at once."""
    await rig.apply(rig.notification("ann", entity="UA1", payload={"delay": 40}))
    assert await rig.close() == 1
    (delivery,) = await rig.deliveries()
    assert (delivery.subscriber, delivery.channel, delivery.address) == ("ann", "email", "ann@example.com")
    assert delivery.id == derived_id("delivery", UUID(bytes=delivery.digest_id), 1).bytes
    assert delivery.subject == "UA1"
    assert "Delay: 40" in delivery.text
    assert "<html" in delivery.html
    assert await rig.items() == [("ann", "immediate/email/html/full", ALONE, "")]


async def test_a_daily_digest_collects_until_eight_in_the_subscribers_zone(rig: Rig) -> None:
    """Two items, one window, one timer at 08:00 New York time, one message when it fires."""
    await rig.subscribe("ann", "daily")
    await rig.apply(rig.notification("ann", entity="UA1"), rig.notification("ann", entity="UA2"))
    (window,) = await rig.windows()
    assert window.items == 2
    assert window.due_time.ToDatetime(tzinfo=UTC) == datetime(2026, 3, 2, 13, 0, tzinfo=UTC)
    (timer,) = await rig.outgoing("scheduler")
    assert timer.schedule_timer.entity == f"carillon:window:{window.id}"
    assert await rig.close() == 0
    rig.clock.at = datetime(2026, 3, 2, 13, 0, tzinfo=UTC)
    assert await rig.due() == 1
    assert await rig.close() == 1
    (delivery,) = await rig.deliveries()
    assert delivery.subject == "Daily: 2 × Flight delayed"
    assert await rig.ledger() == {("digested", ""): 2}
    (digest,) = (await rig.call("ListDigests")).digests
    assert (digest.id, digest.item_count, digest.outcome) == (window.id, 2, "pending")


async def test_a_timer_goes_to_the_shard_of_its_window(rig: Rig) -> None:
    """The scheduler's partition is the shard of the window's reserved entity."""
    await rig.subscribe("ann", "daily")
    await rig.apply(rig.notification("ann"))
    (timer,) = await rig.outgoing("scheduler")
    async with rig.db.read() as tx:
        (row,) = await (await tx.raw.execute("SELECT partition FROM outbox")).fetchall()
    assert row[0] == shard_of("acme", timer.schedule_timer.entity, SHARDS)


async def test_an_item_on_the_boundary_belongs_to_the_next_window(rig: Rig) -> None:
    """A window is [start, end): what happens at 08:00 sharp is told tomorrow."""
    await rig.subscribe("ann", "daily")
    at_eight = datetime(2026, 3, 2, 13, 0, tzinfo=UTC)
    await rig.apply(rig.notification("ann", at=at_eight), rig.notification("ann", at=at_eight - timedelta(seconds=1)))
    dues = sorted(window.due_time.ToDatetime(tzinfo=UTC) for window in await rig.windows())
    assert dues == [at_eight, at_eight + timedelta(days=1)]


async def test_a_day_of_clock_change_has_its_window_at_eight_local_time(rig: Rig) -> None:
    """New York's clocks go forward on 8 March 2026: 08:00 is then 12:00 UTC, not 13:00."""
    await rig.subscribe("ann", "daily")
    rig.clock.at = datetime(2026, 3, 8, 5, 0, tzinfo=UTC)
    await rig.apply(rig.notification("ann"))
    (window,) = await rig.windows()
    assert window.due_time.ToDatetime(tzinfo=UTC) == datetime(2026, 3, 8, 12, 0, tzinfo=UTC)


async def test_a_late_item_joins_its_window_while_that_is_open_and_the_next_one_after(rig: Rig) -> None:
    """The window's end has passed: what still comes for it goes along as long as it is open, else to the next."""
    await rig.subscribe("ann", "daily")
    await rig.apply(rig.notification("ann"))
    rig.clock.at = datetime(2026, 3, 2, 13, 1, tzinfo=UTC)
    await rig.apply(rig.notification("ann", at=START))
    (window,) = await rig.windows()
    assert window.items == 2
    await rig.due()
    await rig.apply(rig.notification("ann", at=START))
    (later,) = await rig.windows()
    assert later.due_time.ToDatetime(tzinfo=UTC) == datetime(2026, 3, 3, 13, 0, tzinfo=UTC)


async def test_a_topic_tells_everybody_who_listens_with_a_matching_type(rig: Rig) -> None:
    """Topic subscribers are told without being named; those of other topics and types are not."""
    for name, kind, topic in (("bob", "flight.*", "UA"), ("cid", "flight.diverted", "UA"), ("dee", "*", "AA")):
        await rig.put_subscriber(name)
        await rig.subscribe(name, "daily", type=kind, topic=topic)
    await rig.apply(rig.notification(topics=["UA"]))
    assert await rig.items() == [("bob", "daily/email/html/summary", PENDING, "")]


async def test_a_topic_nobody_listens_to_is_accounted_for(rig: Rig) -> None:
    """The notification is kept with the reason (INV-6)."""
    await rig.apply(rig.notification(topics=["nobody"]))
    assert await rig.items() == [("", "topic:nobody", SUPPRESSED, "no_subscriber")]
    assert await rig.ledger() == {("suppressed", "no_subscriber"): 1}


async def test_the_most_specific_subscription_wins(rig: Rig) -> None:
    """Exact type before the longest prefix before the shortest; off for all but one is one subscription each."""
    await rig.subscribe("ann", "off", type="*")
    await rig.subscribe("ann", "daily", type="flight.*")
    await rig.subscribe("ann", "immediate", type="flight.delayed")
    await rig.put_type("flight.diverted")
    await rig.put_type("hotel.full")
    for kind in ("flight.delayed", "flight.diverted", "hotel.full"):
        await rig.apply(rig.notification("ann", type=kind))
    assert [(choice.split("/")[0], state, reason) for _, choice, state, reason in await rig.items()] == [
        ("daily", PENDING, ""),
        ("immediate", PENDING, ""),
        ("off", SUPPRESSED, "off"),
    ]


async def test_two_cadences_at_once_are_two_messages(rig: Rig) -> None:
    """One subscription with an immediate webhook and a daily email gives two items for one notification."""
    await rig.put_subscriber("eve", webhook_url="https://example.com/hook")
    one = pb.Subscription(
        id="s",
        subscriber="eve",
        type="flight.delayed",
        choices=[pb.Choice(cadence="immediate", channel=pb.CHANNEL_WEBHOOK), pb.Choice(cadence="daily")],
    )
    await rig.call("PutSubscriptions", subscriptions=[one])
    await rig.apply(rig.notification("eve", entity="UA1", payload={"delay": 5}))
    assert [(choice, state) for _, choice, state, _ in await rig.items()] == [
        ("daily/email/html/summary", PENDING),
        ("immediate/webhook/json/full", PENDING),
    ]
    await rig.close()
    (delivery,) = await rig.deliveries()
    body = json.loads(delivery.json)
    assert (delivery.html, delivery.text, delivery.address) == ("", "", "https://example.com/hook")
    assert (body["subscriber"], body["cadence"], body["item_count"]) == ("eve", "immediate", 1)
    assert body["items"][0]["payload"] == {"delay": 5}


async def test_the_same_choice_by_two_ways_is_one_item(rig: Rig) -> None:
    """Told directly and by two topics, always daily by email: one item, one line in the digest."""
    for topic in ("", "UA", "EWR"):
        await rig.subscribe("ann", "daily", topic=topic)
    await rig.apply(rig.notification("ann", topics=["UA", "EWR"]))
    assert await rig.items() == [("ann", "daily/email/html/summary", PENDING, "")]


async def test_a_notification_that_comes_twice_has_its_effects_once(rig: Rig) -> None:
    """The same id in another frame, or twice in one, adds nothing."""
    twice = rig.notification("ann", one_id=new_id())
    await rig.apply(twice, twice)
    await rig.apply(twice)
    assert len(await rig.items()) == 1


@pytest.mark.parametrize(
    ("kind", "subscriber", "reason"),
    [
        ("unheard.of", "ann", "unknown_type"),
        ("flight.delayed", "nobody", "unknown_subscriber"),
        ("flight.delayed", "mute", "no_address"),
    ],
)
async def test_what_cannot_be_told_is_suppressed_with_its_reason(
    rig: Rig, kind: str, subscriber: str, reason: str
) -> None:
    """Unknown type, unknown subscriber, no address: kept, counted, told by Explain, and nobody else is affected."""
    await rig.put_subscriber("mute", email="")
    entry = rig.notification(subscriber, "ann", type=kind)
    await rig.apply(entry)
    assert (subscriber, SUPPRESSED, reason) in [(who, state, why) for who, _, state, why in await rig.items()]
    answer = await rig.call("Explain", id=str(UUID(bytes=entry.notification.id)))
    assert reason in [told.details.get("reason") for told in answer.entries]
    assert sum(told.kind.startswith("item_") for told in answer.entries) == len(await rig.items())


async def test_a_mandatory_type_overrides_off(rig: Rig) -> None:
    """Who turned a mandatory type off gets it by its default all the same."""
    await rig.put_type("account.closed", is_mandatory=True)
    await rig.subscribe("ann", "off", type="*")
    await rig.apply(rig.notification("ann", type="account.closed"))
    assert await rig.items() == [("ann", "immediate/email/html/full", PENDING, "")]


async def test_what_is_over_when_it_comes_or_when_its_window_closes_is_expired(rig: Rig) -> None:
    """Expiry is looked at on arrival and again at rendering; the rest of the digest goes out."""
    await rig.subscribe("ann", "daily")
    await rig.apply(
        rig.notification("ann", entity="gone", expires=START),
        rig.notification("ann", entity="soon", expires=START + timedelta(minutes=5)),
        rig.notification("ann", entity="stays"),
    )
    rig.clock.at = datetime(2026, 3, 2, 13, 0, tzinfo=UTC)
    await rig.due()
    await rig.close()
    assert await rig.ledger() == {("expired", ""): 2, ("digested", ""): 1}
    (delivery,) = await rig.deliveries()
    assert "stays" in delivery.text
    assert "soon" not in delivery.text


async def test_an_external_window_waits_for_its_batch_and_a_second_run_changes_nothing(rig: Rig) -> None:
    """TriggerBatch closes what was opened in its logical window, once; the fallback timer then has no effect."""
    await rig.put_external()
    await rig.subscribe("ann", "rebooking")
    await rig.apply(rig.notification("ann"), rig.notification("ann"))
    (window,) = await rig.windows()
    assert window.due_time.ToDatetime(tzinfo=UTC) == START + timedelta(days=2)
    first = await rig.result(rig.trigger("rebooking", START))
    second = await rig.result(rig.trigger("rebooking", START))
    assert (first.changed, first.is_repeated) == (1, False)
    assert (second.changed, second.is_repeated) == (0, True)
    await rig.close()
    rig.clock.at = START + timedelta(days=3)
    await rig.due()
    assert await rig.close() == 0
    assert len(await rig.deliveries()) == 1


async def test_a_trigger_leaves_what_was_opened_after_its_window_and_other_batches(rig: Rig) -> None:
    """Opened after the logical window's end, or of another batch: not closed."""
    await rig.put_external()
    await rig.put_external("other", "other")
    await rig.put_subscriber("bob")
    await rig.subscribe("ann", "rebooking")
    await rig.subscribe("bob", "other")
    await rig.apply(rig.notification("ann"), rig.notification("bob"))
    assert (await rig.result(rig.trigger("rebooking", START - timedelta(seconds=1)))).changed == 0
    assert (await rig.result(rig.trigger("rebooking", START))).changed == 1
    assert [window.subscriber for window in await rig.windows()] == ["bob"]


async def test_a_window_whose_trigger_never_came_closes_by_its_fallback(rig: Rig) -> None:
    """Two days after the first item."""
    await rig.put_external()
    await rig.subscribe("ann", "rebooking")
    await rig.apply(rig.notification("ann"))
    rig.clock.at = START + timedelta(days=2)
    await rig.due()
    assert await rig.close() == 1
    assert len(await rig.deliveries()) == 1


async def test_a_changed_zone_moves_the_open_window_and_merges_what_falls_together(rig: Rig) -> None:
    """From New York to Berlin: the next 08:00 there, a new timer, the old one has no effect."""
    await rig.subscribe("ann", "daily")
    tomorrow = datetime(2026, 3, 2, 13, 30, tzinfo=UTC)
    await rig.apply(rig.notification("ann"), rig.notification("ann", at=tomorrow))
    assert len(await rig.windows()) == 2
    await rig.put_subscriber("ann", "Europe/Berlin")
    (window,) = await rig.windows()
    assert window.items == 2
    assert window.due_time.ToDatetime(tzinfo=UTC) == datetime(2026, 3, 3, 7, 0, tzinfo=UTC)
    rig.clock.at = datetime(2026, 3, 2, 13, 0, tzinfo=UTC)
    await rig.due()
    assert await rig.close() == 0
    rig.clock.at = datetime(2026, 3, 3, 7, 0, tzinfo=UTC)
    await rig.due()
    assert await rig.close() == 1
    assert await rig.ledger() == {("digested", ""): 2}


async def test_a_window_that_comes_back_to_a_due_time_asks_for_it_anew(rig: Rig) -> None:
    """From New York to Berlin and back: the first timer for 08:00 in New York may have come meanwhile."""
    await rig.subscribe("ann", "daily")
    await rig.apply(rig.notification("ann"))
    await rig.put_subscriber("ann", "Europe/Berlin")
    await rig.put_subscriber("ann", "America/New_York")
    first, _, again = (entry.schedule_timer for entry in await rig.outgoing("scheduler"))
    assert first.due_time == again.due_time
    assert first.id != again.id


async def test_a_deleted_subscriber_gets_nothing_more(rig: Rig) -> None:
    """What waits is suppressed; what comes is for somebody unknown; the window closes empty."""
    await rig.subscribe("ann", "daily")
    await rig.apply(rig.notification("ann"))
    await rig.call("DeleteSubscriber", id="ann")
    await rig.apply(rig.notification("ann"))
    rig.clock.at = START + timedelta(days=1)
    await rig.due()
    await rig.close()
    assert await rig.deliveries() == []
    assert await rig.ledger() == {("suppressed", "subscriber_deleted"): 1, ("suppressed", "unknown_subscriber"): 1}


async def test_an_address_taken_away_while_a_window_is_open_suppresses_it(rig: Rig) -> None:
    """The address counts that is there when the digest is rendered."""
    await rig.subscribe("ann", "daily")
    await rig.apply(rig.notification("ann"))
    await rig.put_subscriber("ann", "America/New_York", email="")
    rig.clock.at = START + timedelta(days=1)
    await rig.due()
    await rig.close()
    assert await rig.ledger() == {("suppressed", "no_address"): 1}


async def test_outcomes_make_the_digests_outcome(rig: Rig) -> None:
    """Sent when its delivery was sent; failed when it was not; a later word counts, an older one does not."""
    await rig.apply(rig.notification("ann"))
    await rig.close()
    (delivery,) = await rig.deliveries()

    def outcome(word: str, at: datetime) -> link_pb2.Entry:
        told = link_pb2.DeliveryOutcome(
            delivery_id=delivery.id, digest_id=delivery.digest_id, outcome=word, reason="", end_time=to_timestamp(at)
        )
        return link_pb2.Entry(tenant="acme", delivery_outcome=told)

    async def shown() -> str:
        answer = await rig.call("GetDigest", id=str(UUID(bytes=delivery.digest_id)))
        return str(answer.digest.outcome)

    await rig.apply(outcome("dead", START))
    assert await shown() == "failed"
    await rig.apply(outcome("sent", START + timedelta(hours=1)))
    assert await shown() == "sent"
    await rig.apply(outcome("dead", START))
    assert await shown() == "sent"
    await rig.apply(outcome("dead", START + timedelta(hours=3)), outcome("sent", START + timedelta(hours=2)))
    assert await shown() == "failed"


async def test_a_tenant_never_hears_of_anothers(rig: Rig) -> None:
    """INV-8: same subscriber and type names, other tenant: nothing crosses."""
    await rig.subscribe("ann", "daily", topic="UA")
    rig.tenant = "other"
    await rig.apply(rig.notification("ann", topics=["UA"], entity="N1"))
    assert (await rig.call("ListWindows")).windows == []
    assert await rig.ledger() == {("suppressed", "unknown_type"): 1, ("suppressed", "no_subscriber"): 1}
    rig.tenant = "acme"
    assert (await rig.result(rig.cancel("N1"))).changed == 0
    assert await rig.ledger() == {}


async def test_an_entry_for_somebody_else_is_poison(rig: Rig) -> None:
    """A kind digest does not know makes the frame dead, and nothing is stored."""
    foreign = link_pb2.Entry(tenant="acme", request_due=link_pb2.RequestDue(request_id=new_id().bytes))
    with pytest.raises(PoisonFrame, match="request_due"):
        await rig.apply(rig.notification("ann"), foreign)
    assert await rig.items() == []


async def test_get_digest_shows_exactly_the_items_it_was_rendered_from(rig: Rig) -> None:
    """INV-7: in the order of the message, by type and time; explained by id from either side."""
    await rig.subscribe("ann", "daily", type="*")
    await rig.put_type("airport.closed")
    await rig.apply(
        rig.notification("ann", entity="B", at=START + timedelta(minutes=2)),
        rig.notification("ann", entity="A", at=START + timedelta(minutes=1)),
        rig.notification("ann", entity="Z", type="airport.closed", at=START + timedelta(minutes=3)),
    )
    rig.clock.at = START + timedelta(days=1)
    await rig.due()
    await rig.close()
    (digest,) = (await rig.call("ListDigests", subscriber="ann", cadence="daily")).digests
    shown = await rig.call("GetDigest", id=digest.id)
    assert [item.entity for item in shown.items] == ["Z", "A", "B"]
    of_item = await rig.call("Explain", id=shown.items[0].id)
    assert [told.kind for told in of_item.entries] == ["item_digested", "digest_rendered", "delivery_pending"]
    of_digest = await rig.call("Explain", id=digest.id)
    closed = ["window_opened", "window_closed"]
    assert [told.kind for told in of_digest.entries] == [*closed, "digest_rendered", "delivery_pending"]
