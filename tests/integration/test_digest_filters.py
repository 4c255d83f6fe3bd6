"""Subscriptions' filters over a real Postgres: who is told, and what the ledger says of the others."""

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest
from prometheus_client import REGISTRY

from libs.errors import InvalidArgument
from services.digest import filters, store_expansion, store_filters
from services.digest.filters import Answer, Question
from tests.integration.digest_rig import Rig, migrate, replica
from tests.support.fixtures import OpenDatabase

PENDING, SUPPRESSED = 1, 4
LONG = "payload.delay > 30"


@pytest.fixture
async def rig(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[Rig]:
    """A replica with a type, a daily cadence and a subscriber."""
    migrate(postgres_url)
    async with replica(postgres_url, open_database) as rig:
        await rig.put_type()
        await rig.put_daily()
        await rig.put_subscriber("ann")
        yield rig


async def states(rig: Rig) -> list[tuple[str, int, str]]:
    """Every item's subscriber, state and reason, sorted."""
    return sorted((subscriber, state, reason) for subscriber, _, state, reason in await rig.items())


async def test_what_a_filter_leaves_out_is_suppressed_with_the_reason(rig: Rig) -> None:
    """INV-6: told or suppressed (filter), and Explain says so; the filter is shown as it was put."""
    await rig.subscribe("ann", "daily", filter=LONG)
    short = rig.notification("ann", payload={"delay": 5})
    await rig.apply(rig.notification("ann", payload={"delay": 40}), short)
    assert await states(rig) == [("ann", PENDING, ""), ("ann", SUPPRESSED, "filter")]
    assert await rig.ledger() == {("pending", ""): 1, ("suppressed", "filter"): 1}
    (stored,) = (await rig.call("ListSubscriptions")).subscriptions
    assert stored.filter == LONG


async def test_a_filter_that_cannot_be_decided_lets_through_and_is_counted(rig: Rig) -> None:
    """The payload has no delay: the notification is told, the metric says that the filter failed."""
    before = REGISTRY.get_sample_value("carillon_digest_filter_errors_total") or 0
    await rig.subscribe("ann", "immediate", filter=LONG)
    await rig.apply(rig.notification("ann"))
    assert await states(rig) == [("ann", PENDING, "")]
    assert REGISTRY.get_sample_value("carillon_digest_filter_errors_total") == before + 1


async def test_a_listener_of_a_topic_has_a_filter_of_its_own(rig: Rig) -> None:
    """The same notification is wanted by one and not by the other; who has none is not asked."""
    for name, text in (("bob", "payload.delay > 60"), ("cid", LONG), ("dee", "")):
        await rig.put_subscriber(name)
        await rig.subscribe(name, "daily", topic="UA", filter=text)
    await rig.apply(rig.notification(topics=["UA"], payload={"delay": 40}))
    assert await states(rig) == [("bob", SUPPRESSED, "filter"), ("cid", PENDING, ""), ("dee", PENDING, "")]


async def test_the_same_choice_by_several_subscriptions_is_told_once_if_one_of_them_wants_it(rig: Rig) -> None:
    """Directly with filters that refuse and by a topic without one: one item, waiting; all refuse: one, suppressed."""
    await rig.subscribe("ann", "daily", filter=LONG)
    await rig.subscribe("ann", "daily", filter="payload.delay > 20", one_id="second")
    await rig.subscribe("ann", "daily", topic="UA")
    await rig.apply(rig.notification("ann", topics=["UA"], payload={"delay": 5}))
    assert await states(rig) == [("ann", PENDING, "")]
    await rig.apply(rig.notification("ann", payload={"delay": 5}))
    assert await states(rig) == [("ann", PENDING, ""), ("ann", SUPPRESSED, "filter")]
    await rig.apply(rig.notification("ann", payload={"delay": 40}))
    assert await states(rig) == [("ann", PENDING, ""), ("ann", PENDING, ""), ("ann", SUPPRESSED, "filter")]


async def test_a_refused_filter_does_not_make_a_less_specific_subscription_count(rig: Rig) -> None:
    """The most specific subscription decides, with its filter."""
    await rig.subscribe("ann", "daily", type="*")
    await rig.subscribe("ann", "immediate", filter=LONG)
    await rig.apply(rig.notification("ann", payload={"delay": 5}))
    assert await states(rig) == [("ann", SUPPRESSED, "filter")]


async def test_a_mandatory_type_is_told_whatever_the_filter_says(rig: Rig) -> None:
    """A filter that is always false would turn it off, which subscribers cannot."""
    await rig.put_type("account.closed", is_mandatory=True)
    await rig.subscribe("ann", "daily", type="*", filter="false")
    await rig.apply(rig.notification("ann", type="account.closed"))
    assert await states(rig) == [("ann", PENDING, "")]


async def test_without_filters_nobody_asks_for_any(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of most notifications has no statement more, not even while somebody else has a filter."""

    async def never(*_: Any) -> None:
        raise AssertionError

    await rig.put_subscriber("bob")
    await rig.subscribe("bob", "daily", filter=LONG)
    await rig.subscribe("ann", "daily")
    monkeypatch.setattr(store_expansion, "apply_filters", never)
    await rig.apply(rig.notification("ann"))
    assert await states(rig) == [("ann", PENDING, "")]


async def test_a_filter_is_asked_once_about_a_notification_for_all_who_share_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifty listeners with the same filter are one question."""
    asked: list[int] = []
    real = filters.answers

    def counted(questions: Sequence[Question], known: Any) -> Iterator[Answer]:
        asked.append(len(questions))
        return real(questions, known)

    monkeypatch.setattr(store_filters, "answers", counted)
    for number in range(50):
        await rig.put_subscriber(f"s{number}")
        await rig.subscribe(f"s{number}", "daily", topic="UA", filter=LONG)
    await rig.apply(rig.notification(topics=["UA"], payload={"delay": 5}))
    assert asked == [1]
    assert await rig.ledger() == {("suppressed", "filter"): 50}


@pytest.mark.parametrize("text", ["payload.delay >", "facts.x", "'text'", "x" * 2049])
async def test_what_is_no_filter_is_refused_when_it_is_put(rig: Rig, text: str) -> None:
    """INVALID_ARGUMENT names the field; nothing is stored."""
    with pytest.raises(InvalidArgument) as caught:
        await rig.subscribe("ann", "daily", filter=text)
    assert [one.field for one in caught.value.violations] == ["subscriptions[0].filter"]
    assert list((await rig.call("ListSubscriptions")).subscriptions) == []


async def test_a_changed_filter_counts_from_then_on(rig: Rig) -> None:
    """What waits stays where it is; the next notification follows the new filter."""
    await rig.subscribe("ann", "daily")
    await rig.apply(rig.notification("ann", payload={"delay": 5}))
    await rig.subscribe("ann", "daily", filter=LONG)
    await rig.apply(rig.notification("ann", payload={"delay": 5}))
    assert await states(rig) == [("ann", PENDING, ""), ("ann", SUPPRESSED, "filter")]
