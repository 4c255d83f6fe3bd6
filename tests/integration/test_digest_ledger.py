"""INV-6 as the ledger and the metric see it: nothing is ever unaccounted for, and what vanishes is missed."""

import math
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import LiteralString
from uuid import UUID

import pytest
from carillon.digest.v1 import digest_pb2 as pb
from prometheus_client import REGISTRY

from libs.ids import new_id
from libs.wire import to_duration
from services.digest import store_history, store_ledger
from services.digest.loops_history import History
from services.digest.loops_ledger import LedgerCheck
from tests.integration.digest_rig import START, Rig, migrate, replica
from tests.support.fixtures import OpenDatabase

DAY = timedelta(days=1)


@pytest.fixture
async def rig(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[Rig]:
    """A replica with two subscribers, of whom one has two cadences, and one listener of a topic."""
    migrate(postgres_url)
    async with replica(postgres_url, open_database) as rig:
        await rig.put_type()
        await rig.put_daily()
        for name in ("ann", "bob", "cat"):
            await rig.put_subscriber(name)
        await rig.subscribe("ann", "immediate", "daily")
        await rig.subscribe("cat", "daily", topic="news")
        yield rig


def shown() -> float:
    """What Prometheus is told."""
    value = REGISTRY.get_sample_value("carillon_digest_unaccounted")
    assert value is not None
    return value


async def gaps(rig: Rig) -> dict[str, tuple[int, list[str]]]:
    """GetLedger's gaps by kind: how many, and examples."""
    answer: pb.GetLedgerResponse = await rig.call("GetLedger")
    assert answer.unaccounted == sum(gap.count for gap in answer.gaps)
    return {gap.kind: (gap.count, list(gap.ids)) for gap in answer.gaps}


async def execute(rig: Rig, statement: LiteralString, *values: object) -> int:
    """Change something behind digest's back."""
    async with rig.db.transaction() as tx:
        return (await tx.raw.execute(statement, values)).rowcount


async def tell_everybody(rig: Rig) -> UUID:
    """One notification with five items: two of ann's, one of bob's, one of cat's, one of a topic nobody listens to."""
    one_id = new_id()
    await rig.apply(rig.notification("ann", "bob", topics=["news", "silence"], one_id=one_id))
    return one_id


async def test_whatever_happens_to_items_nothing_is_unaccounted_for(rig: Rig) -> None:
    """Told directly, by topic, twice, filtered, cancelled, digested, forgotten in part: a round finds nothing."""
    await rig.put_type("brief", retention=to_duration(DAY))
    await rig.subscribe("bob", "immediate", type="brief", filter="payload.count > 3")
    await rig.subscribe("ann", "immediate", "daily", type="brief")
    await tell_everybody(rig)
    twice = rig.notification("ann", "ann", "bob", type="brief", entity="E", payload={"count": 1})
    await rig.apply(twice, rig.notification("nobody", type="unheard-of"))
    await rig.apply(twice, rig.notification("cat", topics=["news"]))
    check = LedgerCheck(db=rig.db, store=store_ledger, rows=2)
    await check.check_round()
    await rig.close()
    await rig.apply(rig.cancel("E"))
    await check.check_round()
    rig.clock.at = START + DAY
    await rig.due()
    await rig.close()
    await check.check_round()
    assert (shown(), await gaps(rig)) == (0, {})
    before = sum((await rig.ledger()).values())
    for days in (1, 2, 90, 91):  # Of the notification that came twice, items are forgotten one after the other.
        rig.clock.at = START + days * DAY + timedelta(hours=23)
        await History(db=rig.db, store=store_history, clock=rig.clock).forget_once(at_once=2)
        await check.check_round()
        assert (shown(), await gaps(rig)) == (0, {})
    assert before == 11
    assert await rig.ledger() == {}


@pytest.mark.parametrize(
    ("statement", "kind", "count"),
    [
        ("DELETE FROM item WHERE subscriber = 'cat'", "item_missing", 1),
        ("DELETE FROM item", "item_missing", 5),
        (
            "INSERT INTO item SELECT tenant, notification_id, 'eve', choice, 4, 'off', NULL, changed_at FROM item"
            " WHERE subscriber = 'bob'",
            "item_unexpected",
            1,
        ),
        ("DELETE FROM notification", "notification_missing", 5),
        ("DELETE FROM digest_window WHERE subscriber = 'cat'", "window_missing", 1),
        ("UPDATE digest_window SET state = 3 WHERE subscriber = 'cat'", "window_missing", 1),
        ("DELETE FROM digest WHERE subscriber = 'bob'", "digest_missing", 1),
        ("DELETE FROM delivery WHERE digest_id = (SELECT id FROM digest LIMIT 1)", "delivery_missing", 1),
    ],
)
async def test_a_row_that_vanishes_is_missed(rig: Rig, statement: LiteralString, kind: str, count: int) -> None:
    """Whichever it is: by the metric within one round, and by GetLedger, with the id to look for."""
    one_id = await tell_everybody(rig)
    await rig.close()
    await execute(rig, statement)
    check = LedgerCheck(db=rig.db, store=store_ledger)
    await check.check_round()
    assert shown() == count
    found, ids = (await gaps(rig))[kind]
    assert found == count
    assert ids == [str(one_id)] or kind == "delivery_missing"


async def test_the_metric_is_zero_again_only_after_a_round_without_findings(rig: Rig) -> None:
    """While the next round is under way, it says what the one before has found."""
    await tell_everybody(rig)
    check = LedgerCheck(db=rig.db, store=store_ledger, rows=1)
    await execute(rig, "UPDATE notification SET items = items + 1")
    await check.check_round()
    assert shown() == 1
    await execute(rig, "UPDATE notification SET items = items - 1")
    assert not await check.check_once()
    assert shown() == 1
    await check.check_round()
    assert shown() == 0


@pytest.mark.parametrize("rows", [1, 3, 100])
async def test_ranges_leave_nothing_out_and_count_nothing_twice(rig: Rig, rows: int) -> None:
    """Of three tenants with four notifications each, every one lacks one item, however long the ranges are."""
    for tenant in ("acme", "bolt", "corp"):
        rig.tenant = tenant
        for _ in range(4):
            await rig.apply(rig.notification("x", "y", "z"))
    assert await execute(rig, "DELETE FROM item WHERE subscriber = 'y'") == 12
    check = LedgerCheck(db=rig.db, store=store_ledger, rows=rows)
    steps = 1
    while not await check.check_once():
        steps += 1
    assert shown() == 12
    assert steps <= math.ceil(24 / rows) + 2
    rig.tenant = "bolt"
    assert (await gaps(rig))["item_missing"][0] == 4


async def test_what_was_taken_over_by_a_version_that_did_not_count_is_no_finding(rig: Rig) -> None:
    """But it must have an item."""
    await tell_everybody(rig)
    await execute(rig, "UPDATE notification SET items = NULL")
    assert await gaps(rig) == {}
    await execute(rig, "DELETE FROM item")
    assert (await gaps(rig))["item_missing"][0] == 1


async def test_the_ages_are_told(rig: Rig) -> None:
    """How old the metric may be grows until a round has ended."""
    await tell_everybody(rig)
    check = LedgerCheck(db=rig.db, store=store_ledger, rows=1)
    before = REGISTRY.get_sample_value("carillon_digest_unaccounted_age_seconds")
    await check.check_round()
    await check.check_round()
    after = REGISTRY.get_sample_value("carillon_digest_unaccounted_age_seconds")
    assert before is not None
    assert after is not None
    assert 0 <= after < 60
