"""The scheduler against real Postgres and NATS: frames in, notifications out."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from pydantic import SecretStr

from libs.ids import new_id
from libs.migrations import check_models_match, upgrade
from libs.settings import PostgresSettings
from local.stack import PROJECT
from services.scheduler.store_schema import metadata
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.scheduler_world import START, SchedulerWorld, scheduler_world

MINUTE = timedelta(minutes=1)


@pytest.fixture
async def world(postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus) -> AsyncIterator[SchedulerWorld]:
    """A world with one replica."""
    async with scheduler_world(postgres_url, open_database, open_bus) as it:
        await it.start("a")
        yield it


async def test_a_timer_fires_when_its_time_has_come_and_not_before(world: SchedulerWorld) -> None:
    """Nothing comes at 59 s; the notification comes at 60 s and tells its due time and entity."""
    await world.peer.send(world.peer.timer("order-1", START + MINUTE))
    world.clock.advance(timedelta(seconds=59))
    await world.peer.send(world.peer.timer("order-2", START))  # A turn passes, and fires only this one.
    assert [one.entity for one in await world.peer.received(1)] == ["order-2"]
    world.clock.advance(timedelta(seconds=1))
    second = (await world.peer.received(2))[1]
    assert (second.entity, second.occur_time.ToDatetime(tzinfo=START.tzinfo)) == ("order-1", START + MINUTE)


async def test_inv4_a_cancel_by_entity_stops_all_its_timers_and_counts_them(world: SchedulerWorld) -> None:
    """Three timers wait, two of them the cancelled entity's: the answer is 2, and only the third ever fires."""
    peer = world.peer
    await peer.send(*(peer.timer(entity, START + MINUTE) for entity in ("a", "b", "a")))
    (result,) = await peer.send(peer.cancel("a"))
    assert result.changed == 2
    world.clock.advance(2 * MINUTE)
    await peer.send(peer.timer("a", START))  # Accepted after the cancel: it fires.
    assert sorted(one.entity for one in await peer.received(2)) == ["a", "b"]


async def test_inv4_a_schedule_accepted_before_a_cancel_and_arriving_after_it_is_born_cancelled(
    world: SchedulerWorld,
) -> None:
    """The tombstone catches the late frame; the next schedule of the same entity is not caught."""
    peer = world.peer
    late = peer.timer("a", START, id=(late_id := new_id()))
    await peer.send(peer.cancel("a"))
    await peer.send(late)
    await peer.send(peer.timer("a", START, text='{"n": 2}'))
    assert [one.content.payload for one in await peer.received(1)] == ['{"n": 2}']
    assert await world.stored(late_id) == (5, "a test says so")


async def test_inv2_a_thousand_timers_fire_once_each_over_a_graceful_handover(world: SchedulerWorld) -> None:
    """A second replica joins and the first leaves while timers come due: nothing is lost and nothing doubled."""
    peer = world.peer
    ids = [new_id() for _ in range(1000)]
    await peer.send(*(peer.timer(f"e{n}", START + timedelta(seconds=n), id=timer_id) for n, timer_id in enumerate(ids)))
    for step in range(20):
        world.clock.advance(timedelta(seconds=50))
        if step == 5:
            await world.start("b")
        if step == 12:
            await world.stop("a")
        await asyncio.sleep(0)
    got = await peer.received(1000)
    assert sorted(one.timer_id for one in got) == sorted(timer_id.bytes for timer_id in ids)


def test_the_migrations_add_up_to_the_schema(postgres_url: str) -> None:
    """Tables, columns, types and indexes, as store_schema has them."""
    settings = PostgresSettings(url=SecretStr(postgres_url))
    upgrade(settings, "scheduler", PROJECT / "services" / "scheduler" / "migrations")
    check_models_match(settings, "scheduler", metadata)
