"""Explain over a real Postgres: every kind of id is found, and what it says is what then happens."""

from collections.abc import AsyncIterator
from datetime import UTC, timedelta
from typing import Any
from uuid import UUID

import pytest
from carillon.digest.v1 import digest_pb2 as pb
from carillon.link.v1 import link_pb2

from libs import explaining
from libs.ids import new_id
from libs.wire import to_timestamp
from services.digest.views import item_id
from tests.integration.digest_rig import START, Rig, migrate, replica
from tests.support.fixtures import OpenDatabase

HOUR = timedelta(hours=1)
DAILY_AT_8 = START + 19 * HOUR
"""08:00 in Berlin, the next day."""


@pytest.fixture
async def rig(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[Rig]:
    """A replica with Ann in Berlin, who is told daily at eight and is left in peace until nine."""
    migrate(postgres_url)
    async with replica(postgres_url, open_database) as rig:
        await rig.put_type()
        await rig.put_daily()
        quiet = [pb.QuietHours(from_time_of_day="22:00", until_time_of_day="09:00")]
        await rig.put_subscriber("ann", "Europe/Berlin", quiet_hours=quiet)
        await rig.subscribe("ann", "daily", type="flight.*", one_id="s1")
        yield rig


async def told(rig: Rig, text: object) -> list[Any]:
    """What Explain says of an id, in order of time."""
    entries = list((await rig.call("Explain", id=str(text))).entries)
    assert [one.time.ToDatetime() for one in entries] == sorted(one.time.ToDatetime() for one in entries)
    return entries


def saying(entries: list[Any], kind: str) -> list[str]:
    """The sentences of one kind."""
    return [one.sentence for one in entries if one.kind == kind]


async def test_what_is_foretold_is_what_happens(rig: Rig) -> None:
    """The end of the quiet hours is named while the window is open, and while it is held; then the digest left then."""
    one_id = new_id()
    await rig.apply(rig.notification("ann", entity="UA1", one_id=one_id))
    (_, waits) = await told(rig, one_id)
    assert waits.sentence == (
        "For ann it waits for the digest Daily by email, which closes on Tue 3 Mar 2026, 08:00 (Europe/Berlin); then"
        " quiet hours hold it until Tue 3 Mar 2026, 09:00 (Europe/Berlin)."
    )
    foretold = waits.time.ToDatetime(tzinfo=UTC)
    rig.clock.at = DAILY_AT_8
    await rig.due()
    await rig.close()
    (_, held) = await told(rig, one_id)
    assert "is held by the quiet hours of ann until Tue 3 Mar 2026, 09:00 (Europe/Berlin)." in held.sentence
    assert (held.is_expected, held.time.ToDatetime(tzinfo=UTC)) == (True, foretold)
    rig.clock.at = foretold
    await rig.due()
    await rig.close()
    entries = await told(rig, one_id)
    (digest,) = (await rig.call("ListDigests")).digests
    assert digest.close_time.ToDatetime(tzinfo=UTC) == foretold
    assert [one.kind for one in entries] == [
        "notification_received",
        "item_digested",
        "digest_rendered",
        "delivery_pending",
        "notification_forgotten",
    ]


async def test_every_kind_of_id_is_found(rig: Rig) -> None:
    """Notification, item, window and digest, subscriber, entity; of somebody else's tenant nothing."""
    one_id = new_id()
    await rig.apply(rig.notification("ann", "bob", entity="UA1", one_id=one_id))
    (window,) = await rig.windows()
    item = item_id(one_id, "ann", "daily/email/html/summary")
    assert saying(await told(rig, one_id), "item_suppressed") == [
        "For bob it was not sent: there was no subscriber bob."
    ]
    assert [one.kind for one in await told(rig, item)] == ["item_pending"]
    assert [one.kind for one in await told(rig, window.id)] == ["window_opened", "window_due"]
    assert [one.kind for one in await told(rig, "UA1")] == [
        "notification_received",
        "item_suppressed",
        "item_pending",
    ]
    ids = (one_id, item, window.id, "UA1", "ann")
    rig.tenant = "other"
    assert [await told(rig, one) for one in ids] == [[], [], [], [], []]


async def test_a_subscriber_is_told_as_things_stand(rig: Rig) -> None:
    """Addresses, quiet hours, subscriptions with their next close, what waits, and what went out last."""
    await rig.put_external()
    await rig.subscribe("ann", "rebooking", topic="news", one_id="s2", filter="payload.n > 3")
    await rig.apply(rig.notification("ann"))
    rig.clock.at = DAILY_AT_8 + HOUR
    await rig.due()
    await rig.close()
    await rig.apply(rig.notification("ann"), rig.notification(topics=["news"], payload={"n": 4}))
    entries = await told(rig, "ann")
    assert saying(entries, "subscriber") == ["ann has an email address, and lives in the zone Europe/Berlin."]
    assert saying(entries, "quiet_hours") == ["Quiet hours of ann are 22:00–09:00; it is not quiet now."]
    assert sorted(saying(entries, "subscription")) == [
        "Of flight.*, ann is told in the digest Daily, next on Wed 4 Mar 2026, 08:00 (Europe/Berlin).",
        "Of flight.delayed, by the topic news, ann is told in the digest rebooking, when the batch rebooking is"
        " triggered. What the filter says no to is left out: payload.n > 3",
    ]
    assert len(saying(entries, "window_due")) == 2
    assert saying(entries, "digest_rendered") == [
        "A digest (Daily) of 1 item for ann was handed to the dispatcher for email and is with the dispatcher, which"
        " has not said yet what became of it."
    ]


async def test_the_cancel_that_hit_is_named_by_its_number(rig: Rig) -> None:
    """Also for what comes after it and was accepted before."""
    first, second = new_id(), new_id()
    await rig.apply(rig.notification("ann", entity="UA1", one_id=first, sequence=3))
    await rig.apply(rig.cancel("UA1", sequence=17))
    await rig.apply(rig.notification("ann", entity="UA1", one_id=second, sequence=4))
    assert saying(await told(rig, first), "item_cancelled") == [
        "For ann it was cancelled before it left, by the cancel number 17 of UA1."
    ]
    assert saying(await told(rig, second), "item_cancelled") == [
        "For ann it had been cancelled before it came, by the cancel number 17 of UA1."
    ]
    (window,) = await rig.windows()
    (due,) = saying(await told(rig, window.id), "window_due")
    assert due.endswith(" 1 item was cancelled already.")


async def test_the_subscription_that_decided_is_named(rig: Rig) -> None:
    """Off, and a filter, with its words; a mandatory type overrides both."""
    await rig.subscribe("ann", "off", type="flight.cancelled", one_id="s2")
    await rig.subscribe("ann", "daily", type="flight.moved", one_id="s3", filter="payload.minutes > 30")
    for kind in ("flight.cancelled", "flight.moved"):
        await rig.put_type(kind)
    by_type = {kind: new_id() for kind in ("flight.cancelled", "flight.moved")}
    for kind, one_id in by_type.items():
        await rig.apply(rig.notification("ann", type=kind, one_id=one_id, payload={"minutes": 5}))
    assert saying(await told(rig, by_type["flight.cancelled"]), "item_suppressed") == [
        "For ann it was not sent: ann has turned it off, by the subscription s2 to flight.cancelled."
    ]
    assert saying(await told(rig, by_type["flight.moved"]), "item_suppressed") == [
        "For ann it was not sent: the filter of the subscription s3 left it out: payload.minutes > 30."
    ]
    await rig.put_type("flight.cancelled", is_mandatory=True, default_cadence="daily")
    one_id = new_id()
    await rig.apply(rig.notification("ann", type="flight.cancelled", one_id=one_id))
    (waits,) = saying(await told(rig, one_id), "item_pending")
    assert waits.endswith(" ann has turned this type off, but it is mandatory.")


async def test_what_the_dispatcher_said_is_told_with_its_reason(rig: Rig) -> None:
    """Of the notification, and of its digest."""
    one_id = new_id()
    await rig.apply(rig.notification("ann", one_id=one_id))
    rig.clock.at = DAILY_AT_8 + HOUR
    await rig.due()
    await rig.close()
    (delivery,) = await rig.deliveries()
    outcome = link_pb2.DeliveryOutcome(
        delivery_id=delivery.id,
        digest_id=delivery.digest_id,
        outcome="dead",
        reason="550 5.1.1 no such user",
        end_time=to_timestamp(rig.clock.at + HOUR),
    )
    await rig.apply(link_pb2.Entry(tenant=rig.tenant, delivery_outcome=outcome))
    for one in (one_id, UUID(bytes=delivery.digest_id)):
        assert saying(await told(rig, one), "delivery_dead") == [
            "It could not be delivered, the dispatcher reported: 550 5.1.1 no such user."
        ]
    (out,) = saying(await told(rig, one_id), "item_digested")
    assert out.endswith(" but could not be delivered: 550 5.1.1 no such user.")


async def test_a_notification_with_very_many_items_is_explained_in_part(rig: Rig) -> None:
    """An answer has its bound, and says nothing of retention then."""
    one_id = new_id()
    await rig.apply(rig.notification(*[f"nobody-{n}" for n in range(400)], one_id=one_id))
    entries = await told(rig, one_id)
    assert len(entries) == 301
    assert not saying(entries, "notification_forgotten")
    assert (await rig.call("Explain", id=str(one_id))).is_cut


async def test_of_a_story_that_is_too_long_the_part_nearest_to_now_is_told(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not its beginning; and the answer says that it is not all."""
    one_id = new_id()
    await rig.apply(rig.notification("ann", one_id=one_id))
    whole = await told(rig, one_id)
    assert not (await rig.call("Explain", id=str(one_id))).is_cut
    monkeypatch.setattr(explaining, "MOST_ENTRIES", 1)
    now = rig.clock.at.replace(tzinfo=None)
    by_distance = sorted(whole, key=lambda one: abs(one.time.ToDatetime() - now))
    assert await told(rig, one_id) == [one for one in whole if one in by_distance[:1]]
    assert (await rig.call("Explain", id=str(one_id))).is_cut
