"""How urgent what leaves digest is: what is sent alone as its notification, a digest never more or less than normal."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2

from tests.integration.digest_rig import Rig, migrate, replica
from tests.support.fixtures import OpenDatabase

LOW, NORMAL, HIGH = timer_pb2.PRIORITY_LOW, timer_pb2.PRIORITY_NORMAL, timer_pb2.PRIORITY_HIGH
NEWER = timer_pb2.Priority.ValueType(9)


@pytest.fixture
async def rig(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[Rig]:
    """A replica with a type, a daily cadence and a subscriber, which closes ten windows at a time."""
    migrate(postgres_url)
    async with replica(postgres_url, open_database, render_windows=10) as rig:
        await rig.put_type()
        await rig.put_daily()
        await rig.put_subscriber("ann")
        yield rig


@pytest.mark.parametrize(
    ("told", "sent"), [(LOW, LOW), (timer_pb2.PRIORITY_UNSPECIFIED, NORMAL), (NORMAL, NORMAL), (HIGH, HIGH)]
)
async def test_what_is_sent_alone_is_as_urgent_as_its_notification(
    rig: Rig, told: timer_pb2.Priority.ValueType, sent: timer_pb2.Priority.ValueType
) -> None:
    """Through expansion, its window and rendering; what was left open is normal."""
    await rig.apply(rig.notification("ann", priority=told))
    await rig.close()
    assert [delivery.priority for delivery in await rig.deliveries()] == [sent]


async def test_a_priority_that_only_a_newer_sender_knows_is_normal(rig: Rig) -> None:
    """It costs nobody the frame."""
    await rig.apply(rig.notification("ann", priority=NEWER))
    await rig.close()
    assert [delivery.priority for delivery in await rig.deliveries()] == [NORMAL]


@pytest.mark.parametrize("told", [LOW, HIGH])
async def test_a_digest_is_of_normal_priority(rig: Rig, told: timer_pb2.Priority.ValueType) -> None:
    """One notification by two choices: alone it keeps its priority, in the digest it has none."""
    await rig.subscribe("ann", "immediate", "daily")
    await rig.apply(rig.notification("ann", priority=told))
    await rig.close()
    rig.clock.at = datetime(2026, 3, 3, 8, tzinfo=UTC)
    await rig.due()
    await rig.close()
    assert [delivery.priority for delivery in await rig.deliveries()] == [told, NORMAL]


async def test_an_urgent_notification_is_rendered_before_what_came_earlier(rig: Rig) -> None:
    """Whatever waits to be closed, it is in the next batch; the least urgent is in the last."""
    await rig.apply(rig.notification("ann", priority=LOW))
    await rig.apply(*(rig.notification("ann") for _ in range(30)))
    await rig.apply(rig.notification("ann", priority=HIGH))
    batches: list[list[link_pb2.Delivery]] = []
    while await rig.closing.close_once():
        batches.append((await rig.deliveries())[sum(map(len, batches)) :])
    assert [len(batch) for batch in batches] == [10, 10, 10, 2]
    assert HIGH in {delivery.priority for delivery in batches[0]}
    assert [delivery.priority for batch in batches for delivery in batch].count(HIGH) == 1
    assert LOW in {delivery.priority for delivery in batches[-1]}
