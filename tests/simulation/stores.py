"""The scheduler's tables in the fake Postgres: what services.scheduler.{store,store_leases} do in SQL."""

from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from uuid import UUID

from services.scheduler.commands import Changes
from services.scheduler.events import EventBacklog, OutgoingEvent
from services.scheduler.needs import Known, Needs, Past
from services.scheduler.store_leases import Grant, Situation
from services.scheduler.timer import BEGINNING, HAS_TURN, UNDER_WAY, Mark, State, Timer, origin_of
from tests.simulation.postgres import Database, Key, Session, Tx, UniqueViolation


@dataclass(frozen=True, slots=True)
class EventRow:
    """A row of `event_outbox`."""

    event: OutgoingEvent
    published_at: datetime
    sweeps: int = 0


@dataclass(frozen=True, slots=True)
class ShardRow:
    """A row of `shard`."""

    holder: str | None = None
    epoch: int = 0
    lease_until: datetime | None = None
    watermark: Mark = BEGINNING

    def is_held(self, replica: str, epoch: int) -> bool:
        """Whether it is this replica's in this epoch; another's may have the same number after a failover."""
        return self.holder == replica and self.epoch == epoch


def waits(timer: Timer, watermark: Mark) -> bool:
    """Whether it may still do something."""
    is_ahead = timer.state is State.SCHEDULED and timer.mark > watermark
    return is_ahead or timer.state is State.PAUSED or timer.state in UNDER_WAY


class FakeTurnStore:
    """Stands for services.scheduler.store.TurnStore."""

    def __init__(self, *, replica: str) -> None:
        self._replica = replica

    async def fence(self, tx: Tx, epochs: Mapping[int, int], *, longest_pause: timedelta) -> set[int]:
        """Lock the shards that are ours in these epochs."""

        def statement(session: Session) -> Generator[Key, None, set[int]]:
            session.idle_timeout = longest_pause
            held = set()
            for number, epoch in sorted(epochs.items()):
                if not session.get("shard", number).is_held(self._replica, epoch):
                    continue
                yield "shard", number
                if session.get("shard", number).is_held(self._replica, epoch):  # It may have changed while we waited.
                    held.add(number)
            return held

        found: set[int] = await tx.run(statement)
        return found

    async def pages(self, tx: Tx, after: Mapping[int, Mark], limit: int) -> dict[int, list[Timer]]:
        """The next timers after a mark, per shard."""

        def statement(session: Session) -> Generator[Key, None, dict[int, list[Timer]]]:
            yield from ()
            found: dict[int, list[Timer]] = {shard: [] for shard in after}
            for _, timer in session.scan("timer"):
                if timer.shard in after and timer.state in HAS_TURN and timer.mark > after[timer.shard]:
                    found[timer.shard].append(timer)
            return {shard: sorted(timers, key=_mark)[:limit] for shard, timers in found.items()}

        pages: dict[int, list[Timer]] = await tx.run(statement)
        return pages

    async def load(self, tx: Tx, needs: Needs) -> Known:
        """What a decision must know."""

        def statement(session: Session) -> Generator[Key, None, Known]:
            yield from ()
            return known_of(session, needs)

        if not any(getattr(needs, one.name) for one in fields(needs)):
            return Known()
        known: Known = await tx.run(statement)
        return known

    async def write(self, tx: Tx, changes: Sequence[Changes], now: datetime) -> None:
        """Make decisions true."""

        def statement(session: Session) -> Generator[Key, None, None]:
            for one in changes:
                yield from write_changes(session, one)

        await tx.run(statement)


def _mark(timer: Timer) -> Mark:
    return timer.mark


def _nominal(timer: Timer) -> datetime:
    assert timer.nominal_at is not None
    return timer.nominal_at


def known_of(session: Session, needs: Needs) -> Known:
    """Answers to all needs."""
    known = Known()
    timers = sorted((timer for _, timer in session.scan("timer")), key=_mark)
    for timer in timers:
        key = (timer.tenant, timer.entity)
        known.ids |= {timer.id, timer.schedule_id} & needs.ids
        if timer.step_of is not None:
            known.ids |= {timer.step_of.run_id} & needs.runs
        if timer.id in needs.timers:
            known.timers[timer.id] = timer
        if key in needs.waiting and waits(timer, session.get("shard", timer.shard).watermark):
            known.waiting.setdefault(key, []).append(timer)
    _add_occurrences(known, needs, [timer for timer in timers if timer.schedule_id != timer.id])
    for _, stone in session.scan("tombstone"):
        if (stone.tenant, stone.entity) in needs.tombstones:
            known.tombstones.setdefault((stone.tenant, stone.entity), []).append(stone)
    known.facts = {key: facts for key, facts in session.scan("facts") if key in needs.facts}
    for (tenant, name, version), timeline in sorted(session.scan("timeline")):
        if (tenant, name) in needs.newest_timelines:
            known.newest_timelines[tenant, name] = timeline
        if (tenant, name, version) in needs.timelines:
            known.timelines[tenant, name, version] = timeline
    return known


def _add_occurrences(known: Known, needs: Needs, timers: Sequence[Timer]) -> None:
    schedules = needs.siblings | {one.schedule_id for one in known.timers.values()}
    for timer in timers:
        if timer.schedule_id in schedules and timer.state in UNDER_WAY:
            known.siblings.setdefault(timer.schedule_id, []).append(timer)
        if timer.nominal_at is None:
            continue
        if timer.schedule_id in needs.schedules and timer.recurrence is not None:
            newest = known.schedules.get(timer.schedule_id, timer)
            known.schedules[timer.schedule_id] = max(newest, timer, key=_nominal)
        for asked in needs.ranges:
            schedule_id, after, until = asked
            if timer.schedule_id == schedule_id and after < timer.nominal_at <= until:
                is_over = timer.state in (State.SKIPPED, State.EXPIRED)
                past = Past(timer_id=timer.id, nominal_at=timer.nominal_at, is_over=is_over)
                known.ranges.setdefault(asked, []).append(past)


def write_changes(session: Session, changes: Changes) -> Generator[Key, None, None]:
    """One shard's decisions."""
    for timer in changes.inserts.values():
        if session.get("timer", timer.id) is not None:
            raise UniqueViolation(f'duplicate key value violates unique constraint "timer_pkey": {timer.id}')
        yield from session.put("timer", timer.id, timer)
    for timer in changes.updates.values():
        yield from session.put("timer", timer.id, timer)
    for attempt in changes.attempts:
        if not (yield from session.insert("attempt", (attempt.timer_id, attempt.number), attempt)):
            raise UniqueViolation(f"attempt {attempt.number} of {attempt.timer_id} has ended before")
    for number, stone in enumerate(changes.tombstones, start=len(session.server.rows("tombstone"))):
        yield from session.put("tombstone", (changes.shard, stone.entity, stone.sequence, number), stone)
    for key, facts in changes.facts.items():
        yield from session.put("facts", key, facts)
    if changes.watermark is not None:
        yield "shard", changes.shard
        row = session.get("shard", changes.shard)
        yield from session.put("shard", changes.shard, replace(row, watermark=changes.watermark))


class FakeLeaseStore:
    """Stands for services.scheduler.store_leases.LeaseStore."""

    def __init__(self, db: Database, *, replica: str, ttl: timedelta) -> None:
        self._db = db
        self._replica = replica
        self._ttl = ttl

    async def look(self) -> Situation:
        """Look around."""

        def statement(session: Session) -> Generator[Key, None, Situation]:
            yield from ()
            members = {name: until - session.now for name, until in session.scan("member") if until > session.now}
            ends_in = {
                number: (row.lease_until or session.now) - session.now
                for number, row in session.scan("shard")
                if row.holder != self._replica or row.lease_until < session.now
            }
            return Situation(members=members, lease_ends_in=ends_in)

        async with self._db.read() as tx:
            situation: Situation = await tx.run(statement)
        return situation

    async def renew(self, held: Mapping[int, int]) -> frozenset[int]:
        """Renew."""

        def statement(session: Session) -> Generator[Key, None, frozenset[int]]:
            session.idle_timeout = self._ttl
            yield from session.put("member", self._replica, session.now + self._ttl)
            renewed = set()
            for number, epoch in sorted(held.items()):
                if not session.get("shard", number).is_held(self._replica, epoch):
                    continue
                yield "shard", number
                if (row := session.get("shard", number)).is_held(self._replica, epoch):
                    yield from session.put("shard", number, replace(row, lease_until=session.now + self._ttl))
                    renewed.add(number)
            return frozenset(renewed)

        async with self._db.transaction() as tx:
            renewed: frozenset[int] = await tx.run(statement)
        return renewed

    async def take(self, shards: Collection[int]) -> list[Grant]:
        """Take what is free, skip what is locked."""

        def statement(session: Session) -> Generator[Key, None, list[Grant]]:
            session.idle_timeout = self._ttl
            grants = []
            for number in sorted(shards):
                row = session.get("shard", number)
                is_free = row.holder is None or row.holder == self._replica or row.lease_until < session.now
                if not is_free or not session.try_lock("shard", number):
                    continue
                taken = ShardRow(self._replica, row.epoch + 1, session.now + self._ttl, row.watermark)
                yield from session.put("shard", number, taken)
                newest = newest_tombstones(session, number)
                unheld = max(session.now - (row.lease_until or session.now), timedelta(0))
                grants.append(
                    Grant(
                        shard=number,
                        epoch=taken.epoch,
                        watermark=taken.watermark,
                        newest_tombstones=newest,
                        unheld=unheld,
                    )
                )
            return grants

        async with self._db.transaction() as tx:
            grants: list[Grant] = await tx.run(statement)
        return grants

    async def release(self, shards: Collection[int]) -> None:
        """Give back."""

        def statement(session: Session) -> Generator[Key, None, None]:
            session.idle_timeout = self._ttl
            for number in sorted(shards):
                yield "shard", number
                if (row := session.get("shard", number)).holder == self._replica:
                    yield from session.put("shard", number, replace(row, holder=None, lease_until=session.now))

        async with self._db.transaction() as tx:
            await tx.run(statement)

    async def resign(self) -> None:
        """End the membership."""

        def statement(session: Session) -> Generator[Key, None, None]:
            yield from session.put("member", self._replica, None)

        async with self._db.transaction() as tx:
            await tx.run(statement)

    async def forget(self, *, tombstones_after: timedelta, members_after: timedelta) -> None:
        """Nothing gets that old here."""


def newest_tombstones(session: Session, shard: int) -> dict[str, int]:
    """The highest tombstone sequence per origin."""
    newest: dict[str, int] = {}
    for key, stone in session.scan("tombstone"):
        if key[0] == shard:
            origin = origin_of(stone.entity)
            newest[origin] = max(stone.sequence, newest.get(origin, 0))
    return newest


class FakeEventStore:
    """Stands for services.scheduler.store_events.EventStore."""

    async def insert(self, tx: Tx, events: Sequence[OutgoingEvent]) -> None:
        """With the firing."""

        def statement(session: Session) -> Generator[Key, None, None]:
            for event in events:
                if not (yield from session.insert("event_outbox", event.id, EventRow(event, session.now))):
                    raise UniqueViolation(f"event {event.id} is there already")

        await tx.run(statement)

    async def take_due(self, tx: Tx, *, first: timedelta, longest: timedelta, limit: int) -> Sequence[OutgoingEvent]:
        """Those without an acknowledgement."""

        def statement(session: Session) -> Generator[Key, None, list[OutgoingEvent]]:
            due: list[OutgoingEvent] = []
            for event_id, row in sorted(session.scan("event_outbox"), key=lambda one: one[0]):
                is_due = row.published_at + min(longest, first * 2**row.sweeps) <= session.now
                if is_due and len(due) < limit and session.try_lock("event_outbox", event_id):
                    yield from session.put("event_outbox", event_id, EventRow(row.event, session.now, row.sweeps + 1))
                    due.append(row.event)
            return due

        found: list[OutgoingEvent] = await tx.run(statement)
        return found

    async def hurry(self, tx: Tx) -> None:
        """Have none wait for long."""

        def statement(session: Session) -> Generator[Key, None, None]:
            for event_id, _ in sorted(session.scan("event_outbox"), key=lambda one: one[0]):
                yield "event_outbox", event_id
                if (row := session.get("event_outbox", event_id)) is not None:
                    yield from session.put("event_outbox", event_id, replace(row, sweeps=0))

        await tx.run(statement)

    async def confirm(self, tx: Tx, event_ids: Sequence[UUID]) -> None:
        """Forget what JetStream has."""

        def statement(session: Session) -> Generator[Key, None, None]:
            for event_id in sorted(event_ids):
                yield from session.put("event_outbox", event_id, None)

        await tx.run(statement)

    async def backlog(self, tx: Tx) -> EventBacklog:
        """What is not acknowledged."""

        def statement(session: Session) -> Generator[Key, None, EventBacklog]:
            yield from ()
            return EventBacklog(events=sum(1 for _ in session.scan("event_outbox")), oldest_s=0.0)

        found: EventBacklog = await tx.run(statement)
        return found
