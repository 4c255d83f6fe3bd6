"""Events whose broker is away, empty or somebody else's: they wait in Postgres until it has them."""

import asyncio

import pytest

from libs.errors import FailedPrecondition
from libs.jetstream import Bus, PublishFailed
from local.servers import NatsServer
from services.scheduler.events import STREAM
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.link_world import running, until
from tests.support.scheduler_events import (
    FAR_OFF,
    World,
    event_world,
    events,
    ids,
    ids_of,
    jetstream,
    stored,
    stream_exists,
)


@pytest.fixture
async def world(open_database: OpenDatabase) -> World:
    """The outbox of events in a fresh database."""
    return await event_world(open_database)


async def test_events_go_out_when_the_broker_is_back(world: World, open_bus: OpenBus, private_nats: NatsServer) -> None:
    """Those published in vain, and those of a process that died; at once, however often they were swept before."""
    bus = await open_bus("scheduler", private_nats.url)
    publisher = world.publisher(bus, links={"republish_max": FAR_OFF})
    first, later, orphans = events(1), events(50), events(2)
    async with running(publisher.run()):
        await world.fire(publisher, first)
        await world.until_confirmed()
        await asyncio.to_thread(private_nats.stop)

        async def has_noticed() -> bool:
            return not bus.is_connected

        await until(has_noticed)
        await world.fire(publisher, later)
        await world.commit(publisher, orphans)
        async with world.db.transaction() as tx:
            await tx.raw.execute("UPDATE event_outbox SET sweeps = 20")
        await asyncio.to_thread(private_nats.start)
        await world.until_confirmed()
    assert set(ids(await stored(private_nats.url))) == set(ids_of([*first, *later, *orphans]))


async def test_a_deleted_stream_is_made_again_and_filled_with_what_is_unconfirmed(
    world: World, bus: Bus, nats_url: str
) -> None:
    """Somebody's mistake with the admin tool; an acknowledged event was as durable as the stream."""
    publisher = world.publisher(bus, links={"republish_max": FAR_OFF})
    gone, unconfirmed, later = events(1), events(2), events(3)
    async with running(publisher.run()), jetstream(nats_url) as js:
        await until(lambda: stream_exists(js))
        await world.fire(publisher, gone)
        await world.until_confirmed()
        await world.commit(publisher, unconfirmed)
        async with world.db.transaction() as tx:
            await tx.raw.execute("UPDATE event_outbox SET sweeps = 20")
        assert await js.delete_stream(STREAM)
        await world.fire(publisher, later)
        await world.until_confirmed()
    assert set(ids(await stored(nats_url))) == set(ids_of([*unconfirmed, *later]))


async def test_a_wiped_broker_is_filled_with_what_is_unconfirmed(
    world: World, open_bus: OpenBus, private_nats: NatsServer
) -> None:
    """The disk of JetStream is lost, with the stream."""
    publisher = world.publisher(await open_bus("scheduler", private_nats.url), links={"republish_max": FAR_OFF})
    fired = events(5)
    async with running(publisher.run()):
        await world.fire(publisher, events(1))
        await world.until_confirmed()
        await asyncio.to_thread(private_nats.wipe)
        await world.fire(publisher, fired)
        await world.until_confirmed()
    assert set(ids(await stored(private_nats.url))) == set(ids_of(fired))


async def test_a_foreign_stream_acknowledges_nothing(world: World, open_bus: OpenBus, private_nats: NatsServer) -> None:
    """Its subjects overlap, so EVENTS cannot be made: events wait for it, and are not lost to where nobody looks."""
    fired = events(2)
    url = private_nats.url
    bus = await open_bus("scheduler", url)
    publisher = world.publisher(bus)
    async with jetstream(url) as js:
        await js.add_stream(name="FOREIGN", subjects=["carillon.>"])
        with pytest.raises(FailedPrecondition):
            await bus.ensure_stream(STREAM, ["carillon.events.>"], is_work_queue=False)
        with pytest.raises(PublishFailed):
            await bus.publish(fired[0].subject, fired[0].payload, headers=fired[0].headers, msg_id="1")
        await world.commit(publisher, fired)
        await js.delete_stream("FOREIGN")
    async with running(publisher.run()):
        await world.until_confirmed()
    assert set(ids(await stored(url))) == set(ids_of(fired))
