"""Events on their way to the stream EVENTS: at least once, whatever is away, dies or is deleted meanwhile."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from carillon.scheduler.v1 import timer_pb2
from cloudevents.core.formats.json import JSONFormat
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import RawStreamMsg

from libs.errors import FailedPrecondition, ResourceExhausted, Unavailable
from libs.ids import new_id
from libs.jetstream import Bus, PublishFailed
from libs.postgres import Database, Transaction
from local.servers import NatsServer
from services.scheduler import loops_events
from services.scheduler.events import STREAM, EventBacklog, OutgoingEvent
from services.scheduler.loops_events import Broker, EventPublisher
from services.scheduler.settings import SchedulerSettings
from services.scheduler.store_events import EventStore
from services.scheduler.store_schema import event_outbox
from services.scheduler.stream_events import encode_event
from services.scheduler.timer import TargetKind, Timer
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.link_process import link_settings, scalar
from tests.support.link_world import running, until

ONCE: dict[str, object] = {"republish_after": timedelta(minutes=10), "republish_max": timedelta(minutes=10)}
"""For tests of what comes once: no sweep, however slow the machine is."""

NOON = datetime(2013, 7, 1, 12, tzinfo=UTC)
FAR_OFF = timedelta(minutes=10)


def event(*, tenant: str = "acme", event_type: str = "trial.over", payload: str = "{}") -> OutgoingEvent:
    """What a fired timer sends."""
    timer_id = new_id()
    timer = Timer(
        id=timer_id,
        shard=0,
        tenant=tenant,
        entity="account",
        type="",
        due_at=NOON,
        fire_at=NOON,
        target_kind=TargetKind.EVENT,
        target=b"",
        sequence=1,
        schedule_id=timer_id,
    )
    content = timer_pb2.EventContent(type=event_type, payload=payload)
    return encode_event(timer, content, attempt=1, deadline=None)


def events(count: int) -> list[OutgoingEvent]:
    """So many, of one type."""
    return [event() for _ in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The table, and as many publishers over it as a test makes."""

    db: Database

    def publisher(self, bus: Broker, *, links: dict[str, object] | None = None, **settings: object) -> EventPublisher:
        """A replica's publisher; it does nothing by itself."""
        return EventPublisher(
            db=self.db,
            bus=bus,
            store=EventStore(),
            settings=SchedulerSettings().model_copy(update=settings),
            links=link_settings(**(links or {})),
        )

    async def commit(self, publisher: EventPublisher, fired: Sequence[OutgoingEvent]) -> None:
        """The firing's transaction; its process dies right after it, unless `publish` follows."""
        async with self.db.transaction() as tx:
            await publisher.insert(tx, fired)

    async def fire(self, publisher: EventPublisher, fired: Sequence[OutgoingEvent]) -> None:
        """Commit and publish."""
        await self.commit(publisher, fired)
        publisher.publish(fired)

    async def unconfirmed(self) -> int:
        return int(await scalar(self.db, "SELECT count(*) FROM event_outbox"))

    async def until_confirmed(self) -> None:
        """Wait until JetStream has acknowledged everything."""

        async def is_empty() -> bool:
            return await self.unconfirmed() == 0

        await until(is_empty)

    async def let_all_be_overdue(self) -> None:
        """As if everything had waited for its acknowledgement for an hour."""
        async with self.db.transaction() as tx:
            await tx.raw.execute("UPDATE event_outbox SET published_at = published_at - interval '1 hour'")


@pytest.fixture
async def world(open_database: OpenDatabase) -> World:
    """The table in a fresh database."""
    db = await open_database("scheduler")
    async with db.transaction() as tx:
        await tx.conn.run_sync(event_outbox.create)
    return World(db=db)


@asynccontextmanager
async def jetstream(url: str) -> AsyncIterator[JetStreamContext]:
    """A business service's connection, or an administrator's: plain JetStream."""
    client = Client()
    await client.connect(url)
    try:
        yield client.jetstream()
    finally:
        await client.close()


async def stored(url: str, stream: str = STREAM) -> list[RawStreamMsg]:
    """Everything in the stream, in order."""
    async with jetstream(url) as js:
        state = (await js.stream_info(stream)).state
        return [await js.get_msg(stream, seq) for seq in range(state.first_seq, state.last_seq + 1)]


def ids(messages: Sequence[RawStreamMsg | Msg]) -> list[str]:
    """The CloudEvents' ids, sorted."""
    return sorted(JSONFormat().read(None, one.data or b"").get_id() for one in messages)


def ids_of(fired: Sequence[OutgoingEvent]) -> list[str]:
    """The same of what was fired."""
    return sorted(str(one.id) for one in fired)


async def test_a_business_service_takes_what_it_filters_for(world: World, bus: Bus, nats_url: str) -> None:
    """A plain durable consumer gets the types it named, of the tenant it named, as CloudEvents; and takes them from
    nobody else."""
    publisher = world.publisher(bus, links=ONCE)
    wanted = [event(event_type="trial.over", payload='{"plan": "pro"}'), event(event_type="trial.reminder")]
    others = [event(event_type="trial"), event(event_type="payment.due"), event(tenant="other")]
    async with running(publisher.run()), jetstream(nats_url) as js:
        await until(lambda: _exists(js))
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


async def _exists(js: JetStreamContext) -> bool:
    return STREAM in {info.config.name for info in await js.streams_info()}


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
        await until(lambda: _exists(js))
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


async def test_a_full_stream_drops_its_oldest_and_goes_on(world: World, bus: Bus, nats_url: str) -> None:
    """INV-9: a reader that stays away must not keep everybody's timers from firing."""
    publisher = world.publisher(bus, events_max_bytes=100_000)
    async with running(publisher.run()), jetstream(nats_url) as js:
        await until(lambda: _exists(js))
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
        await until(lambda: _exists(js))
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
