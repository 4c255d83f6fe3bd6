"""Events on their way to the stream EVENTS: at least once, within bounds, whoever stops or dies meanwhile."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from uuid import UUID

import pytest
from cloudevents.core.formats.json import JSONFormat

from libs.errors import ResourceExhausted, Unavailable
from libs.jetstream import Bus
from libs.postgres import Transaction
from services.scheduler import loops_events
from services.scheduler.events import STREAM, EventBacklog
from services.scheduler.loops_events import EventPublisher
from services.scheduler.store_events import EventStore
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.link_world import running, until
from tests.support.scheduler_events import (
    ONCE,
    World,
    event,
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


async def test_a_business_service_takes_what_it_filters_for(world: World, bus: Bus, nats_url: str) -> None:
    """A plain durable consumer gets the types it named, of the tenant it named, as CloudEvents; and takes them from
    nobody else."""
    publisher = world.publisher(bus, links=ONCE)
    wanted = [event(event_type="trial.over", payload='{"plan": "pro"}'), event(event_type="trial.reminder")]
    others = [event(event_type="trial"), event(event_type="payment.due"), event(tenant="other")]
    async with running(publisher.run()), jetstream(nats_url) as js:
        await until(lambda: stream_exists(js))
        consumer = await js.pull_subscribe("carillon.events.acme.trial.*", durable="billing", stream=STREAM)
        await world.fire(publisher, [*others, *wanted])
        await world.until_confirmed()
        messages = await consumer.fetch(10, timeout=1)
        for message in messages:
            await message.ack_sync()
        everything = await js.pull_subscribe("carillon.events.>", durable="audit", stream=STREAM)
        assert ids(await everything.fetch(10, timeout=1)) == ids_of([*others, *wanted])
    assert ids(messages) == ids_of(wanted)
    assert {one.header["Content-Type"] for one in messages if one.header} == {"application/cloudevents+json"}
    (over,) = [one for one in messages if one.subject == "carillon.events.acme.trial.over"]
    assert JSONFormat().read(None, over.data).get_data() == {"plan": "pro"}


async def test_an_acknowledged_event_is_deleted_and_comes_once(world: World, bus: Bus, nats_url: str) -> None:
    """Single ones and many at once; the message id is the event's."""
    publisher = world.publisher(bus, links=ONCE)
    fired = events(50)
    async with running(publisher.run()):
        await publisher.ensure_stream()
        await world.fire(publisher, fired[:1])
        await world.fire(publisher, fired[1:])
        await world.until_confirmed()
    messages = await stored(nats_url)
    assert ids(messages) == ids_of(fired)
    assert sorted((one.headers or {})["Nats-Msg-Id"] for one in messages) == ids_of(fired)


async def test_nothing_is_sent_of_a_firing_that_is_rolled_back(world: World, bus: Bus, nats_url: str) -> None:
    """INV-2: the event is part of the transaction that fires the timer."""
    publisher = world.publisher(bus)
    with suppress(RuntimeError):
        async with world.db.transaction() as tx:
            await publisher.insert(tx, events(2))
            raise RuntimeError
    kept = events(1)
    await world.commit(publisher, kept)
    await world.let_all_be_overdue()
    async with running(publisher.run()):
        await world.until_confirmed()
    assert set(ids(await stored(nats_url))) == set(ids_of(kept))


async def test_what_a_dead_process_committed_is_published_by_another(world: World, bus: Bus, nats_url: str) -> None:
    """INV-1: a crash between the commit and the publication loses nothing."""
    fired = events(3)
    await world.commit(world.publisher(bus), fired)
    async with running(world.publisher(bus).run()):
        await world.until_confirmed()
    assert set(ids(await stored(nats_url))) == set(ids_of(fired))


async def test_what_was_acknowledged_and_not_deleted_comes_again(world: World, bus: Bus, nats_url: str) -> None:
    """At least once: under a new message id, which no duplicate window swallows; a consumer goes by the event's id."""
    (fired,) = events(1)
    dead, alive = world.publisher(bus), world.publisher(bus)
    await alive.ensure_stream()
    await world.commit(dead, [fired])
    await bus.publish(fired.subject, fired.payload, headers=fired.headers, msg_id=str(fired.id))
    async with running(alive.run()):
        await world.until_confirmed()
    messages = await stored(nats_url)
    assert set(ids(messages)) == {str(fired.id)}
    assert len({(one.headers or {})["Nats-Msg-Id"] for one in messages}) >= 2


async def test_sweepers_of_two_replicas_share_what_is_overdue(world: World, open_bus: OpenBus, nats_url: str) -> None:
    """Both start and sweep at once, in many small sweeps: each event is stored once."""
    fired = events(300)
    links = {"sweep_frames": 20, **ONCE}
    replicas = [world.publisher(await open_bus(name), links=links) for name in ("one", "two")]
    await world.commit(replicas[0], fired)
    await world.let_all_be_overdue()
    async with running(*(replica.run() for replica in replicas)):
        await world.until_confirmed()
    assert ids(await stored(nats_url)) == ids_of(fired)


async def test_a_full_stream_drops_its_oldest_and_goes_on(world: World, bus: Bus, nats_url: str) -> None:
    """INV-9: a reader that stays away must not keep everybody's timers from firing."""
    publisher = world.publisher(bus, events_max_bytes=100_000)
    async with running(publisher.run()), jetstream(nats_url) as js:
        await until(lambda: stream_exists(js))
        fired = [event(payload=f'{{"text": "{"x" * 30_000}"}}') for _ in range(5)]  # Three fit.
        for one in fired:
            await world.fire(publisher, [one])
            await world.until_confirmed()
    kept = ids(await stored(nats_url))
    assert 2 <= len(kept) <= 3
    assert set(ids_of(fired[-1:])) < set(kept)


async def test_a_full_backlog_says_so_until_it_is_sent(world: World, bus: Bus) -> None:
    """INV-9: nothing may fire meanwhile; another replica's events count, and one's own do at once."""
    mine, others = world.publisher(bus, events_max_backlog=4), world.publisher(bus)
    await world.commit(others, events(2))
    await mine.measure_once()
    assert mine.has_room()
    await world.commit(mine, events(2))
    assert not mine.has_room()
    with pytest.raises(ResourceExhausted, match="4 events wait"):
        mine.check_room()
    async with running(mine.run()):
        await until(lambda: _has_room(mine))
        await world.until_confirmed()
    mine.check_room()


async def _has_room(publisher: EventPublisher) -> bool:
    return publisher.has_room()


async def test_memory_is_bounded_and_the_rest_is_swept(
    world: World, bus: Bus, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-9: of a herd only so much is queued, by number and by bytes; all of it gets there."""
    monkeypatch.setattr(loops_events, "_QUEUE_EVENTS", 5)
    publisher = world.publisher(bus)
    fired = events(20)
    await world.fire(publisher, fired)
    assert publisher.queued == 5
    monkeypatch.setattr(loops_events, "_QUEUE_BYTES", 1_000)
    narrow = world.publisher(bus)
    narrow.publish(fired)
    assert narrow.queued < 5
    async with running(publisher.run()):
        await world.until_confirmed()
    assert set(ids(await stored(nats_url))) == set(ids_of(fired))


class StuckBroker:
    """Takes no publication before `gate` is open."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.gate = asyncio.Event()
        self.published: list[str] = []

    async def publish(self, subject: str, payload: bytes, *, headers: Mapping[str, str], msg_id: str) -> object:
        self.published.append(msg_id)
        await self.gate.wait()
        return await self._bus.publish(subject, payload, headers=headers, msg_id=msg_id)

    async def ensure_stream(
        self, name: str, subjects: Sequence[str], *, is_work_queue: bool, max_age: timedelta, max_bytes: int
    ) -> bool:
        return await self._bus.ensure_stream(
            name, subjects, is_work_queue=is_work_queue, max_age=max_age, max_bytes=max_bytes
        )


async def test_a_stopping_replica_finishes_what_it_has_committed(world: World, bus: Bus, nats_url: str) -> None:
    """Or every rolling restart would make consumers wait for a sweep, or see events twice."""
    broker = StuckBroker(bus)
    publisher = world.publisher(broker, links=ONCE)
    fired = events(loops_events.PUBLISHERS + 20)  # Some under way, some in the queue.
    await bus.ensure_stream(STREAM, ["carillon.events.>"], is_work_queue=False)
    task = asyncio.create_task(publisher.run())
    await world.fire(publisher, fired)

    async def is_under_way() -> bool:
        return len(broker.published) == loops_events.PUBLISHERS

    await until(is_under_way)
    task.cancel()
    broker.gate.set()
    with suppress(asyncio.CancelledError):
        await task
    assert await world.unconfirmed() == 0
    assert ids(await stored(nats_url)) == ids_of(fired)


async def test_a_stopping_replica_ends_the_confirmation_under_way(
    world: World, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled, it would leave events in the table that consumers already have, and another would send them again."""
    gate, is_confirming = asyncio.Event(), asyncio.Event()
    confirm = EventStore.confirm

    async def confirm_slowly(store: EventStore, tx: Transaction, event_ids: Sequence[UUID]) -> None:
        is_confirming.set()
        await gate.wait()
        await confirm(store, tx, event_ids)

    monkeypatch.setattr(EventStore, "confirm", confirm_slowly)
    publisher = world.publisher(bus, links=ONCE)
    await publisher.ensure_stream()
    task = asyncio.create_task(publisher.run())
    await world.fire(publisher, events(3))
    async with asyncio.timeout(5):
        await is_confirming.wait()
    task.cancel()
    asyncio.get_running_loop().call_later(0.05, gate.set)
    with suppress(asyncio.CancelledError):
        await task
    assert await world.unconfirmed() == 0


async def test_a_stopping_replica_does_not_wait_for_a_broker_that_is_away(
    world: World, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends all the same, and the events are another's."""
    monkeypatch.setattr(loops_events, "_FINISH_S", 0.1)
    publisher = world.publisher(StuckBroker(bus))
    fired = events(3)
    task = asyncio.create_task(publisher.run())
    await world.fire(publisher, fired)
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.done()
    assert await world.unconfirmed() == 3


async def test_one_that_waited_in_the_queue_for_too_long_is_left_to_the_sweeper(
    world: World, bus: Bus, nats_url: str
) -> None:
    """It may have been published by another replica by now; published here as well, it would come twice."""
    publisher = world.publisher(bus, links={"republish_after": timedelta(0), "republish_max": timedelta(seconds=1)})
    fired = events(3)
    await publisher.ensure_stream()
    await world.fire(publisher, fired)
    async with running(publisher.run()):
        await world.until_confirmed()
    messages = await stored(nats_url)
    assert set(ids(messages)) == set(ids_of(fired))
    assert not {(one.headers or {})["Nats-Msg-Id"] for one in messages} & set(ids_of(fired))


async def test_an_event_is_committed_once(world: World, bus: Bus) -> None:
    """The same attempt of the same timer, fired twice by mistake, does not commit."""
    publisher = world.publisher(bus)
    (fired,) = events(1)
    await world.commit(publisher, [fired])
    with pytest.raises(Exception, match="duplicate key"):
        await world.commit(publisher, [fired])
    assert await world.unconfirmed() == 1


@pytest.mark.parametrize(
    ("tenant", "event_type"),
    [("acme.eu", ".".join("a" * 64)), ("acme", "..."), ("Käse & Söhne > *", "a/b_c-d"), ("x" * 64, "y" * 128)],
)
async def test_jetstream_takes_every_subject(
    world: World, bus: Bus, nats_url: str, tenant: str, event_type: str
) -> None:
    """The longest, the deepest and the oddest that can occur."""
    publisher = world.publisher(bus)
    fired = [event(tenant=tenant, event_type=event_type)]
    async with running(publisher.run()), jetstream(nats_url) as js:
        await until(lambda: stream_exists(js))
        await world.fire(publisher, fired)
        await world.until_confirmed()
        consumer = await js.pull_subscribe(fired[0].subject, durable="narrow", stream=STREAM)
        assert ids(await consumer.fetch(1, timeout=1)) == ids_of(fired)


async def test_confirmations_wait_for_postgres(
    world: World, bus: Bus, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are kept for when it is back: no event comes again for it."""
    publisher = world.publisher(bus, links=ONCE)
    fired = events(2)
    await publisher.ensure_stream()
    failed: list[Sequence[UUID]] = []

    async def confirm(_: EventStore, tx: Transaction, event_ids: Sequence[UUID]) -> None:
        failed.append(event_ids)
        monkeypatch.undo()
        raise Unavailable("Postgres is away.")

    monkeypatch.setattr(EventStore, "confirm", confirm)
    async with running(publisher.run()):
        await world.fire(publisher, fired)
        await world.until_confirmed()
    assert failed
    assert ids(await stored(nats_url)) == ids_of(fired)


async def test_a_cancellation_that_psycopg_loses_still_stops_the_loops(
    world: World, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `wait_for` of Python 3.11 does when the answer comes in the same moment."""
    is_asked = asyncio.Event()

    async def backlog(_: EventStore, tx: Transaction) -> EventBacklog:
        if not is_asked.is_set():
            is_asked.set()
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        return EventBacklog(events=0, oldest_s=0)

    monkeypatch.setattr(EventStore, "backlog", backlog)
    task = asyncio.create_task(world.publisher(bus).run())
    async with asyncio.timeout(5):
        await is_asked.wait()
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.done()
