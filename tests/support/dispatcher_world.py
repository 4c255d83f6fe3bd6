"""A dispatcher for tests: real Postgres, real loops and stream, and frames that stay in the outbox to be looked at."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from carillon.link.v1 import link_pb2
from pydantic import SecretStr

from libs import migrations
from libs.ids import derived_id, new_id
from libs.links.frames import OutgoingFrame
from libs.links.receiver import IncomingFrame
from libs.links.sender import Sender
from libs.postgres import Database, Transaction
from libs.settings import LinkSettings, PostgresSettings
from libs.wire import to_timestamp
from local.servers import create_database, drop_database
from services.dispatcher.app import policy_of, room_of
from services.dispatcher.delivery import Channel, Letter, Reason, Result, Sent, State
from services.dispatcher.loops import SendingLoop
from services.dispatcher.pipeline import Settlement
from services.dispatcher.records import AttemptRecord, DeliveryRecord
from services.dispatcher.settings import DispatchSettings, TrafficSettings
from services.dispatcher.store_dead_letters import DeadLetterStore
from services.dispatcher.store_deliveries import DeliveryStore
from services.dispatcher.store_queue import QueueStore
from services.dispatcher.store_suppressions import BounceStore
from services.dispatcher.stream import Outcomes, Stream
from services.dispatcher.traffic import Traffic

NOON = datetime(2013, 7, 4, 12, tzinfo=UTC)
MIGRATIONS = Path(__file__).resolve().parents[2] / "services" / "dispatcher" / "migrations"
TENANT = "shop"
DIGEST = derived_id("test-digest")
SECOND = timedelta(seconds=1)


class FixedClock:
    """Business time that moves only when a test says so."""

    def __init__(self, at: datetime = NOON) -> None:
        self.at = at

    def now(self) -> datetime:
        return self.at

    async def wait_until(self, at: datetime | None, wake: asyncio.Event) -> None:
        raise NotImplementedError


class SilentBroker:
    """No NATS: frames wait in the outbox."""

    epoch = 0

    async def publish(self, subject: str, payload: bytes, *, headers: Mapping[str, str], msg_id: str) -> object:
        raise AssertionError

    async def ensure_stream(self, name: str, subjects: Sequence[str]) -> bool:
        return False

    async def subscribe(self, subject: str, callback: Callable[[bytes], Awaitable[None]]) -> object:
        return None


class Carried:
    """A JetStream message that nobody acks."""

    data = b""
    headers: Mapping[str, str] = {}
    num_delivered = 1

    async def ack(self) -> None: ...
    async def nak(self, delay: timedelta) -> None: ...


class WatchedOutcomes(Outcomes):
    """The real ones, and a place where a test can wait for them."""

    def __init__(self, sender: Sender) -> None:
        super().__init__(sender=sender, sequences=DeliveryStore(), shards=64)
        self.settled: list[Settlement] = []
        self._uncommitted: list[Settlement] = []
        self._news = asyncio.Event()

    async def insert(self, tx: Transaction, settlements: Sequence[Settlement]) -> Sequence[OutgoingFrame]:
        self._uncommitted += settlements
        return await super().insert(tx, settlements)

    def publish(self, frames: Sequence[OutgoingFrame]) -> None:
        self.settled += self._uncommitted
        self._uncommitted = []
        self._news.set()

    async def until(self, count: int, *, timeout_s: float = 20) -> list[Settlement]:
        """The settlements, once there are that many."""
        async with asyncio.timeout(timeout_s):
            while len(self.settled) < count:
                self._news.clear()
                await self._news.wait()
        return self.settled


class ScriptedChannel:
    """Answers with the next result, in the end always `Sent`; keeps what it was given."""

    outages = frozenset({Reason.UNREACHABLE, Reason.SERVER_ERROR})

    def __init__(self, *results: Result) -> None:
        self.results = list(results)
        self.letters: list[Letter] = []
        self.gate: asyncio.Event | None = None
        self.is_sending = asyncio.Event()
        self.is_closed = False

    async def send(self, letter: Letter) -> Result:
        self.letters.append(letter)
        self.is_sending.set()
        if self.gate is not None:
            await self.gate.wait()
        return self.results.pop(0) if self.results else Sent("ok")

    async def close(self) -> None:
        self.is_closed = True


class Rig:
    """One schema, and as many replicas over it as a test starts."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.clock = FixedClock()
        self.queue = QueueStore()
        self.deliveries = DeliveryStore()
        self.dead_letters = DeadLetterStore()
        self.wakes: list[Callable[[], None]] = []
        self.stream = Stream(deliveries=self.deliveries, clock=self.clock, on_work=self.wake)

    def outcomes(self) -> WatchedOutcomes:
        sender = Sender(
            db=self.db,
            bus=SilentBroker(),
            service="dispatcher",
            replica="test",
            receivers=("digest", "scheduler"),
            settings=LinkSettings(),
        )
        return WatchedOutcomes(sender)

    @asynccontextmanager
    async def sending(
        self, outcomes: WatchedOutcomes | None = None, *, queue: QueueStore | None = None, **overrides: Any
    ) -> AsyncIterator[WatchedOutcomes]:
        """A running loop; channels by name, settings by theirs. Stopped gracefully at the end of the block."""
        outcomes = outcomes or self.outcomes()
        loop = self.loop(outcomes, queue=queue, **overrides)
        self.wakes.append(loop.wake)
        task = asyncio.create_task(loop.run())
        try:
            yield outcomes
        finally:
            self.wakes.remove(loop.wake)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def loop(
        self, outcomes: WatchedOutcomes, *, queue: QueueStore | None = None, replica: str = "one", **overrides: Any
    ) -> SendingLoop:
        names = ("email", "webhook", "apprise", "log")
        channels: dict[str, Channel] = {name: overrides.pop(name) for name in names if name in overrides}
        traffic = Traffic(overrides.pop("traffic", None) or TrafficSettings())
        settings = DispatchSettings(**({"poll_interval": timedelta(milliseconds=20)} | overrides))
        return SendingLoop(
            db=self.db,
            clock=self.clock,
            queue=queue or self.queue,
            bounces=BounceStore(times=settings.email_bounces),
            outcomes=outcomes,
            channels=channels,
            policy=policy_of(settings, frozenset(channels)),
            room=room_of(settings, apprise=16),
            traffic=traffic,
            settings=settings,
            replica=replica,
            draw=lambda: 0.5,
        )

    async def accept(self, *deliveries: link_pb2.Delivery, tenant: str = TENANT) -> None:
        """As if a frame with these deliveries came in."""
        await self.apply(*(link_pb2.Entry(tenant=tenant, delivery=one) for one in deliveries))

    async def retry(self, delivery_id: UUID, *, tenant: str = TENANT) -> None:
        """As if the retry timer fired."""
        retry = link_pb2.RetryDelivery(delivery_id=delivery_id.bytes)
        await self.apply(link_pb2.Entry(tenant=tenant, retry_delivery=retry))

    async def apply(self, *entries: link_pb2.Entry) -> None:
        frame = link_pb2.Frame(id=new_id().bytes, sender="digest", receiver="dispatcher", entries=entries)
        async with self.db.transaction() as tx:
            applied = await self.stream.apply(tx, [IncomingFrame(id=new_id(), frame=frame, message=Carried())])
        applied.on_commit()

    async def record(self, delivery_id: UUID, *, tenant: str = TENANT) -> DeliveryRecord:
        async with self.db.read() as tx:
            found = await self.deliveries.get(tx, tenant, delivery_id)
        assert found is not None
        return found

    async def attempts(self, delivery_id: UUID) -> list[AttemptRecord]:
        async with self.db.read() as tx:
            return await self.deliveries.attempts(tx, TENANT, [delivery_id], limit=100)

    async def outbox(self, receiver: str) -> list[link_pb2.Entry]:
        """Every entry that waits for `receiver`, in the order in which it was written."""
        async with self.db.read() as tx:
            cursor = await tx.raw.execute(
                "SELECT payload FROM outbox WHERE receiver = %s ORDER BY frame_id", (receiver,)
            )
            return [e for (payload,) in await cursor.fetchall() for e in link_pb2.Frame.FromString(payload).entries]

    async def outcomes_told(self) -> list[tuple[str, str]]:
        """What digest is told: outcome and reason."""
        return [(e.delivery_outcome.outcome, e.delivery_outcome.reason) for e in await self.outbox("digest")]

    async def let_claims_run_out(self) -> None:
        """As if the claim time had passed on the database's clock."""
        async with self.db.transaction() as tx:
            await tx.raw.execute("UPDATE queue SET claimable_at = now() WHERE attempt > 0")

    async def states(self) -> dict[State, int]:
        async with self.db.read() as tx:
            cursor = await tx.raw.execute("SELECT state, count(*) FROM delivery GROUP BY state")
            return {State(state): count for state, count in await cursor.fetchall()}

    async def queued(self) -> int:
        async with self.db.read() as tx:
            row = await (await tx.raw.execute("SELECT count(*) FROM queue")).fetchone()
        assert row is not None
        return int(row[0])

    def wake(self) -> None:
        """Tell every running loop."""
        for wake in self.wakes:
            wake()


def delivery(name: str = "one", *, expires_at: datetime | None = None, **fields: Any) -> link_pb2.Delivery:
    """A delivery whose id follows from its name; by default a log line."""
    given = {"subscriber": "ann", "channel": "log", "address": "-", "subject": "Hello", "text": "Hello, Ann."} | fields
    return link_pb2.Delivery(
        id=id_of(name).bytes,
        digest_id=DIGEST.bytes,
        expire_time=to_timestamp(expires_at) if expires_at else None,
        **given,
    )


def id_of(name: str) -> UUID:
    """The id of the delivery of that name."""
    return derived_id("test-delivery", name)


@contextmanager
def migrated_database(server_url: str) -> Iterator[str]:
    """A new database with the dispatcher's schema, copied from one that is migrated once a run; dropped in the end."""
    with _a_name(server_url) as url:
        create_database(url, template=_template(server_url), strategy="file_copy")
        yield url


@cache
def _template(server_url: str) -> str:
    url = urlsplit(server_url)._replace(path="/test_dispatcher_template").geturl()
    drop_database(url)
    create_database(url)
    migrations.upgrade(PostgresSettings(url=SecretStr(url)), "dispatcher", MIGRATIONS)
    return "test_dispatcher_template"


@contextmanager
def _a_name(server_url: str) -> Iterator[str]:
    url = urlsplit(server_url)._replace(path=f"/test_{new_id().hex}").geturl()
    try:
        yield url
    finally:
        drop_database(url)
