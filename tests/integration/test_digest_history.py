"""What went out or ended is forgotten after its type's retention, and the ledger goes on adding up."""

from collections.abc import AsyncIterator
from datetime import timedelta
from uuid import UUID

import pytest
from carillon.digest.v1 import digest_pb2 as pb
from google.protobuf.duration_pb2 import Duration

from libs.ids import new_id
from services.digest import store_history
from services.digest.loops_history import History
from tests.integration.digest_rig import START, Rig, migrate, replica
from tests.support.fixtures import OpenDatabase

DAY = timedelta(days=1)
TABLES = ("notification", "item", "digest_window", "digest", "delivery", "batch_run", "ended")


@pytest.fixture
async def rig(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[Rig]:
    """A replica with a type kept for two days, one kept for ever so long, and two subscribers."""
    migrate(postgres_url)
    async with replica(postgres_url, open_database) as rig:
        await rig.put_type("short", retention=Duration(seconds=2 * 86400))
        await rig.put_type("long", retention=Duration(seconds=200 * 86400))
        await rig.put_type("plain")
        await rig.put_subscriber("ann")
        await rig.put_subscriber("bob")
        await rig.put_daily()
        yield rig


async def forget(rig: Rig, at_once: int = 5_000) -> None:
    """Forget everything that is over now, and check that nothing is unaccounted for."""
    await History(db=rig.db, store=store_history, clock=rig.clock).forget_once(at_once=at_once)
    await rig.ledger()


async def rows(rig: Rig) -> dict[str, int]:
    """How many rows there are, tables without any left out."""
    found: dict[str, int] = {}
    async with rig.db.read() as tx:
        for table in TABLES:
            row = await (await tx.raw.execute(f"SELECT count(*) FROM {table}")).fetchone()
            assert row is not None
            found |= {table: row[0]} if row[0] else {}
    return found


async def test_retention_is_kept_as_it_was_put_and_is_90_days_otherwise(rig: Rig) -> None:
    """Get answers with the retention that holds."""
    kept = {one.id: one.retention for one in (await rig.call("ListNotificationTypes")).notification_types}
    assert kept["short"] == Duration(seconds=2 * 86400)
    assert kept["plain"] == Duration(seconds=90 * 86400)


async def test_what_was_sent_alone_is_forgotten_when_its_time_is_over(rig: Rig) -> None:
    """Until then everything is there; then nothing of it is."""
    await rig.apply(rig.notification("ann", "bob", type="short"))
    assert await rig.close() == 2
    rig.clock.at = START + 2 * DAY - timedelta(seconds=1)
    await forget(rig)
    assert await rig.ledger() == {("sent_alone", ""): 2}
    rig.clock.at = START + 2 * DAY
    await forget(rig)
    assert await rows(rig) == {}


async def test_what_still_waits_is_never_forgotten(rig: Rig) -> None:
    """Retention counts from when something went out, not from when it came."""
    await rig.subscribe("ann", "daily", type="short")
    await rig.apply(rig.notification("ann", type="short"))
    rig.clock.at = START + 30 * DAY
    await forget(rig)
    assert await rig.ledger() == {("pending", ""): 1}
    await rig.due()
    await rig.close()
    await forget(rig)
    assert await rig.ledger() == {("digested", ""): 1}
    rig.clock.at += 2 * DAY
    await forget(rig)
    assert await rows(rig) == {}


async def test_a_digest_goes_when_its_last_item_has_gone(rig: Rig) -> None:
    """A digest of two types loses the items of one after two days, and is there until the other's are over."""
    await rig.subscribe("ann", "daily", type="*")
    await rig.apply(rig.notification("ann", type="short"), rig.notification("ann", type="long"))
    rig.clock.at = closed_at = START + DAY
    await rig.due()
    await rig.close()
    (digest,) = (await rig.call("ListDigests")).digests
    rig.clock.at = closed_at + 2 * DAY
    await forget(rig)
    left: pb.GetDigestResponse = await rig.call("GetDigest", id=digest.id)
    assert (left.digest.item_count, [one.type for one in left.items]) == (2, ["long"])
    rig.clock.at = closed_at + 200 * DAY
    await forget(rig)
    assert await rows(rig) == {}


async def test_a_notification_goes_with_the_last_of_its_items(rig: Rig) -> None:
    """Sent to one at once and to another tomorrow: it is forgotten in two steps, and always accounted for."""
    await rig.subscribe("bob", "daily", type="short")
    one_id = new_id()
    await rig.apply(rig.notification("ann", "bob", type="short", one_id=one_id))
    await rig.close()
    rig.clock.at = START + DAY
    await rig.due()
    await rig.close()
    rig.clock.at = START + 2 * DAY
    await forget(rig)
    assert [item[0] for item in await rig.items()] == ["bob"]
    rig.clock.at = START + 3 * DAY
    await forget(rig)
    assert await rows(rig) == {}


async def test_what_was_suppressed_or_cancelled_is_forgotten_too(rig: Rig) -> None:
    """Unknown subscribers, topics nobody listens to, expired and cancelled items end at once, and go in their time."""
    await rig.subscribe("ann", "daily", type="short")
    await rig.apply(
        rig.notification("nobody", topics=["unheard"], type="short"),
        rig.notification("bob", type="short", expires=START - DAY),
        rig.notification("ann", type="short", entity="UA1"),
        rig.cancel("UA1"),
    )
    rig.clock.at = START + DAY
    await rig.due()
    await rig.close()
    assert sum((await rig.ledger()).values()) == 4
    rig.clock.at = START + 3 * DAY
    await forget(rig)
    assert await rows(rig) == {}


async def test_windows_that_became_one_are_forgotten_with_it(rig: Rig) -> None:
    """A change of zone that merges windows leaves an empty one, which goes as well."""
    await rig.put_subscriber("ann", "Asia/Tokyo")
    await rig.subscribe("ann", "daily", type="short")
    await rig.apply(rig.notification("ann", type="short", at=START), rig.notification("ann", type="short"))
    rig.clock.at = START + timedelta(hours=11, minutes=30)
    await rig.apply(rig.notification("ann", type="short"))
    await rig.put_subscriber("ann", "UTC")
    rig.clock.at = START + DAY
    await rig.due()
    await rig.close()
    rig.clock.at = START + 3 * DAY
    await forget(rig)
    assert await rows(rig) == {}


async def test_a_longer_retention_counts_at_once(rig: Rig) -> None:
    """What is looked at is judged by the retention that its type has then."""
    await rig.apply(rig.notification("ann", type="short"))
    await rig.close()
    await rig.put_type("short", retention=Duration(seconds=4 * 86400))
    rig.clock.at = START + 3 * DAY
    await forget(rig)
    assert await rig.ledger() == {("sent_alone", ""): 1}
    rig.clock.at = START + 4 * DAY
    await forget(rig)
    assert await rows(rig) == {}


async def test_what_lost_its_type_is_kept_for_90_days(rig: Rig) -> None:
    """Nobody can say any more how long it was to be kept."""
    await rig.apply(rig.notification("ann", type="short"))
    await rig.close()
    await rig.call("DeleteNotificationType", id="short")
    rig.clock.at = START + 89 * DAY
    await forget(rig)
    assert (await rows(rig))["item"] == 1
    rig.clock.at = START + 90 * DAY
    await forget(rig)
    assert await rows(rig) == {}


async def test_much_is_forgotten_in_small_steps(rig: Rig) -> None:
    """A topic's hundred suppressed and sent items go three at a time, and nothing is left over."""
    await rig.apply(*(rig.notification("ann", "nobody", type="short") for _ in range(50)))
    await rig.close()
    rig.clock.at = START + 2 * DAY
    await forget(rig, at_once=3)
    assert await rows(rig) == {}


async def test_runs_of_batches_are_forgotten_after_90_days(rig: Rig) -> None:
    """By then no trigger for that window can come any more that would find something to close."""
    await rig.apply(rig.trigger("rebooking", START))
    rig.clock.at = START + 90 * DAY - timedelta(seconds=1)
    await forget(rig)
    assert await rows(rig) == {"batch_run": 1}
    rig.clock.at = START + 90 * DAY
    await forget(rig)
    assert await rows(rig) == {}


async def test_replicas_skip_what_another_one_is_forgetting(rig: Rig) -> None:
    """A row that somebody else has claimed is left to them; nobody waits."""
    await rig.apply(rig.notification("ann", type="short"))
    await rig.close()
    rig.clock.at = START + 2 * DAY
    async with rig.db.transaction() as tx:
        first = await store_history.forget(tx, now=rig.clock.at, limit=10)
        async with rig.db.transaction() as other:
            second = await store_history.forget(other, now=rig.clock.at, limit=10)
    assert (first.items, first.is_all, second.items, second.is_all) == (1, False, 0, True)


async def test_a_tenants_retention_is_its_own(rig: Rig) -> None:
    """The same type id of another tenant keeps its items for as long as that one says (INV-8)."""
    rig.tenant = "other"
    await rig.put_type("short")
    await rig.put_subscriber("ann")
    await rig.apply(rig.notification("ann", type="short", one_id=UUID(int=7)))
    await rig.close()
    rig.clock.at = START + 50 * DAY
    await forget(rig)
    assert await rig.ledger() == {("sent_alone", ""): 1}
