"""The processes of a history: scheduler replicas as app.py wires them, an intake that sends, a digest that receives."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from random import Random
from typing import Any, cast
from uuid import UUID

from libs.clock import wait_at_most
from libs.errors import Unavailable
from libs.links.frames import Addressed, stream_name, subject_of
from libs.links.receiver import Applied, IncomingFrame, Message, Receiver, Settlement
from libs.links.sender import Sender
from libs.settings import LinkSettings
from libs.sharding import shard_of
from services.scheduler import stream, stream_fired
from services.scheduler.conditions import Answer, Question
from services.scheduler.loops_engine import Engine
from services.scheduler.loops_events import EventPublisher
from services.scheduler.loops_leases import Leases
from services.scheduler.settings import SchedulerSettings
from tests.simulation.broker import Broker, Bus
from tests.simulation.commands import TENANT, Draft
from tests.simulation.history import History, Returned
from tests.simulation.loop import Process, VirtualLoop
from tests.simulation.network import Line
from tests.simulation.plan import RATE
from tests.simulation.postgres import Database, Key, Postgres, Session, Tx
from tests.simulation.stores import FakeEventStore, FakeLeaseStore, FakeTurnStore

SHARDS = 4
TTL = timedelta(seconds=2)
ACK_WAIT = timedelta(seconds=4)

LINKS = LinkSettings(
    sweep_interval=timedelta(seconds=0.5),
    republish_after=timedelta(seconds=1),
    republish_max=timedelta(seconds=4),
    receipt_timeout=timedelta(seconds=5),
    fetch_frames=8,
)
SETTINGS = SchedulerSettings(lease_ttl=TTL, wheel_timers=64, turn_timers=12, turn_entries=40, max_mailbox_frames=64)

_LONGEST_WAIT = timedelta(seconds=1)
_SHORTEST_WAIT = timedelta(microseconds=1)  # Or time would stand still for who looks again and again.

_NUDGES = "carillon.scheduler.nudge"


class Clock:
    """Business time of one process: it runs `RATE` times as fast, hears late of corrections, and never goes back."""

    def __init__(
        self, loop: VirtualLoop, begin_at: datetime, steps: list[tuple[float, timedelta]], rng: Random
    ) -> None:
        self._loop = loop
        self._begin_at = begin_at + timedelta(seconds=rng.uniform(-0.1, 0.1))
        self._steps = steps  # Grows while the history goes on.
        self._hears_after_s = rng.uniform(0, 2)
        self._latest = self._begin_at

    def now(self) -> datetime:
        """See libs.clock.Clock."""
        time_s = self._loop.time()
        heard = sum((by for at_s, by in self._steps if at_s + self._hears_after_s <= time_s), timedelta(0))
        self._latest = max(self._latest, self._begin_at + timedelta(seconds=RATE * time_s) + heard)
        return self._latest

    async def wait_until(self, at: datetime | None, wake: asyncio.Event) -> None:
        """See libs.clock.Clock."""
        left = _LONGEST_WAIT if at is None else min((at - self.now()) / RATE, _LONGEST_WAIT)
        await wait_at_most(max(left, _SHORTEST_WAIT), wake)


@dataclass(kw_only=True)
class Place:
    """What there is besides a process."""

    loop: VirtualLoop
    postgres: Postgres
    broker: Broker
    history: History
    begin_at: datetime
    clock_steps: list[tuple[float, timedelta]]
    rng_of: Callable[[str], Random]
    report: Callable[[UUID, str, int, bool], None]


class Machine:
    """A process and its lines. `run` starts its tasks; `leave` ends it gracefully."""

    def __init__(self, place: Place, name: str) -> None:
        self.place = place
        self.process = Process(name)
        self.postgres_line = Line(place.loop, self.process, place.rng_of(f"{name} postgres"))
        self.nats_line = Line(place.loop, self.process, place.rng_of(f"{name} nats"))
        self.bus = Bus(place.broker, self.nats_line, self.process)
        self.clock = Clock(place.loop, place.begin_at, place.clock_steps, place.rng_of(f"{name} clock"))

    def database(self, schema: str) -> Any:
        """Access to a schema."""
        return Database(self.place.postgres, self.postgres_line, schema)

    def start(self) -> None:
        """Start its tasks."""
        self.spawn(self.run)

    def spawn(self, work: Callable[[], Awaitable[None]]) -> "asyncio.Task[None]":
        """Start a task; one that ends by an error would end the process."""
        return self.place.loop.spawn(self.process, self._watched(work))

    async def _watched(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception as err:  # noqa: BLE001 - outermost frame of a simulated process.
            if not self.process.is_buried:
                self.place.history.note(f"a task of {self.process} ended with {_told(err)}")

    async def run(self) -> None:
        """What it does."""
        raise NotImplementedError

    async def leave(self) -> None:
        """End gracefully."""


class _Codec:
    """As app.py puts it together."""

    commands_of = staticmethod(stream.commands_of)
    encode = staticmethod(stream_fired.encode)
    results_of = staticmethod(stream.results_of)


class _Asker:
    """Business services that decide conditions: they answer sooner or later, or fail, or say nothing."""

    def __init__(self, place: Place, name: str) -> None:
        self._loop = place.loop
        self._rng = place.rng_of(f"{name} asked")
        self.on_answer: Callable[[Answer], None] = lambda _: None

    def ask(self, questions: Sequence[Question]) -> None:
        """See services.scheduler.loops_asking.Asker."""
        for one in questions:
            draw, later_s = self._rng.random(), self._rng.expovariate(10)
            if draw < 0.8:
                holds = holds_by_service(one.timer_id) if draw < 0.6 else None
                answer = Answer(
                    shard=one.shard, timer_id=one.timer_id, number=one.number, holds=holds, reason="it says so"
                )
                self._loop.call_later(later_s, self.on_answer, answer)


def holds_by_service(timer_id: UUID) -> bool:
    """What a business service decides about a timer, whenever it answers."""
    return timer_id.int % 2 == 0


class Replica(Machine):
    """A scheduler replica; wired as in services.scheduler.app."""

    def __init__(self, place: Place, name: str) -> None:
        super().__init__(place, name)
        db = self.database("scheduler")
        self.sender = Sender(
            db=db, bus=self.bus, service="scheduler", replica=name, receivers=["digest"], settings=LINKS
        )
        self.settlement = Settlement(db=db, bus=cast(Any, self.bus), service="scheduler", settings=LINKS)
        asker = _Asker(place, name)
        self.events = EventPublisher(
            db=db, bus=self.bus, store=cast(Any, FakeEventStore()), settings=SETTINGS, links=LINKS
        )
        self.engine = Engine(
            db=db,
            store=cast(Any, FakeTurnStore(replica=name)),
            codec=_Codec(),
            settlement=self.settlement,
            sender=self.sender,
            events=self.events,
            asker=asker,
            clock=self.clock,
            settings=SETTINGS,
            shard_count=SHARDS,
            receivers=["digest"],
        )
        asker.on_answer = self.engine.answer
        self.leases = Leases(
            engine=self.engine,
            store=FakeLeaseStore(db, replica=name, ttl=TTL),
            replica=name,
            shard_count=SHARDS,
            ttl=TTL,
            tombstones_after=timedelta(days=1),
            consume=self._consume,
            nudge=self._nudge,
            monotonic_s=place.loop.time,
        )
        self.engine.is_trusted = self._is_trusted
        self._tasks: list[asyncio.Task[None]] = []
        self._leases_task: asyncio.Task[None]

    def _consume(self, shard: int) -> AsyncGenerator[Sequence[Message], None]:
        return self.bus.consume(
            stream_name("scheduler"),
            filter_subject=subject_of("scheduler", shard),
            batch=LINKS.fetch_frames,
            ack_wait=ACK_WAIT,
        )

    async def _nudge(self) -> None:
        await self.bus.send(_NUDGES, b"")

    async def _on_nudge(self, _payload: bytes) -> None:
        self.leases.wake.set()

    def _is_trusted(self) -> bool:
        """Ask the leases loop, and look over its shoulder: who trusts a lease must have it (DESIGN §5)."""
        is_trusted = self.leases.is_trusted()
        if is_trusted:
            now, shards = self.place.postgres.now(), self.place.postgres.rows("shard")
            for number, epoch in self.engine.epochs.items():
                row = shards[number]
                if row.epoch != epoch or (row.lease_until or now) < now:
                    self.place.history.note(f"{self.process} trusted its lease on shard {number} after it had ended")
        return is_trusted

    async def run(self) -> None:
        """All loops."""
        await self.bus.subscribe(_NUDGES, self._on_nudge)
        loops = (self.sender.run, self.events.run, self.engine.run, self.leases.run_housekeeping)
        self._tasks = [self.spawn(one) for one in loops]
        self._leases_task = self.spawn(self.leases.run)

    async def leave(self) -> None:
        """Give the shards back while the engine still runs, then end."""
        self._leases_task.cancel()
        await asyncio.wait([self._leases_task])
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)


class Intake(Machine):
    """Takes commands as services.intake does: a sequence and an outbox row in one transaction, then the receipt."""

    def __init__(self, place: Place, name: str) -> None:
        super().__init__(place, name)
        self.db = self.database("intake")
        self.sender = Sender(
            db=self.db, bus=self.bus, service="intake", replica=name, receivers=["scheduler"], settings=LINKS
        )

    async def run(self) -> None:
        """The sender's loops."""
        await self.sender.run()

    async def take(self, drafts: Sequence[Draft]) -> None:
        """Accept commands as one call: (entity, entry, what to record). What the caller hears goes to the history."""
        history = self.place.history
        called_after = history.now
        try:
            async with self.db.transaction() as tx:
                sequence = await _next_sequence(tx)
                addressed = []
                for entity, entry, _ in drafts:
                    entry.sequence = sequence
                    partition = shard_of(TENANT, entity, SHARDS)
                    addressed.append(Addressed(receiver="scheduler", entry=entry, partition=partition))
                frames, positions = self.sender.pack(addressed)
                for place, (_, _, sent) in zip(positions, drafts, strict=True):
                    told = replace(sent, frame_id=place.frame_id, index=place.index, sequence=sequence)
                    history.sent.setdefault(place.frame_id, []).append(told)
                await self.sender.insert(tx, frames)
        except Unavailable:
            return  # Nobody knows; the caller may not count on it.
        for frame in frames:
            history.returned[frame.id] = Returned(called_after=called_after, acknowledged_after=history.now)
        for frame_id, receipt in (await self.sender.wait(frames, timedelta(seconds=5))).items():
            history.returned[frame_id].applied_after = history.now
            history.returned[frame_id].receipt = receipt


async def _next_sequence(tx: Tx) -> int:
    def statement(session: Session) -> Any:
        yield from ()
        rows = session.server.rows("sequence")  # Not part of the transaction: nextval() is not undone.
        rows["command"] = rows.get("command", 0) + 1
        return rows["command"]

    return int(await tx.run(statement))


class Digest(Machine):
    """Receives what fires and keeps it."""

    def __init__(self, place: Place, name: str) -> None:
        super().__init__(place, name)
        self.receiver = Receiver(
            db=self.database("digest"),
            bus=cast(Any, self.bus),
            service="digest",
            apply=self._apply,
            publish=lambda _: None,
            settings=LINKS,
        )

    async def run(self) -> None:
        """Receive; the housekeeping of the inbox is left out, nothing gets that old."""
        await self.receiver._take()

    async def _apply(self, tx: Any, frames: Sequence[IncomingFrame]) -> Applied:
        def statement(session: Session) -> Any:
            for frame in frames:
                for index, entry in enumerate(frame.frame.entries):
                    key: Key = (frame.id, index)  # type: ignore[assignment]
                    yield from session.put("landed", key, UUID(bytes=entry.notification.timer_id))

        await tx.run(statement)
        return Applied()


class Shop(Machine):
    """A business service: takes events from the stream, and says of most what came of them, in its own time."""

    async def run(self) -> None:
        """Take events; each attempt is judged once, and may be reported twice."""
        rng = self.place.rng_of(f"{self.process} reports")
        self.place.broker.ensure("EVENTS")
        async for messages in self.bus.consume(
            "EVENTS", filter_subject="carillon.events.>", batch=8, ack_wait=ACK_WAIT
        ):
            for message in messages:
                event = json.loads(message.data)
                if "carillondeadline" in event:
                    self._judge(event, rng)
                await message.ack()

    def _judge(self, event: dict[str, Any], rng: Random) -> None:
        told = (UUID(event["carillontimerid"]), event["subject"], int(event["carillonattempt"]))
        verdict = rng.choice(("done", "done", "failed", "silent", "both"))
        for is_done, verdicts in ((True, ("done", "both")), (False, ("failed", "both"))):
            if verdict in verdicts:
                self.place.loop.call_later(rng.expovariate(2), self.place.report, *told, is_done)


def _told(err: BaseException) -> str:
    while isinstance(err, BaseExceptionGroup):
        err = err.exceptions[0]
    with suppress(Exception):
        return repr(err)
    return type(err).__name__
