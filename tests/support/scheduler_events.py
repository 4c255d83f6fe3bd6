"""The events' outbox, its publishers, and a look into the stream they fill."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from carillon.scheduler.v1 import timer_pb2
from cloudevents.core.formats.json import JSONFormat
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import RawStreamMsg

from libs.ids import new_id
from libs.postgres import Database
from services.scheduler.events import STREAM, OutgoingEvent
from services.scheduler.loops_events import Broker, EventPublisher
from services.scheduler.settings import SchedulerSettings
from services.scheduler.store_events import EventStore
from services.scheduler.store_schema import event_outbox
from services.scheduler.stream_events import encode_event
from services.scheduler.timer import TargetKind, Timer
from tests.support.fixtures import OpenDatabase
from tests.support.link_process import link_settings, scalar
from tests.support.link_world import until

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


async def event_world(open_database: OpenDatabase) -> World:
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


async def stream_exists(js: JetStreamContext) -> bool:
    """Whether EVENTS is there."""
    return STREAM in {info.config.name for info in await js.streams_info()}
