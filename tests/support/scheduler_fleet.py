"""Replicas of the scheduler as processes, to be killed, paused and looked at."""

import asyncio
import signal
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Self
from uuid import UUID

import psycopg
from pydantic import SecretStr

import services.scheduler
from libs import migrations
from libs.postgres import Database
from libs.settings import PostgresSettings
from services.scheduler.timer import State
from tests.support.link_world import until
from tests.support.scheduler_books import Row
from tests.support.scheduler_process import SchedulerProcess

_READY_TIMEOUT_S = 60
_HELD_TIMEOUT_S = 30
_FIRED = r'carillon_scheduler_timers_fired_total\{target="notification"\}'
_REFUSED = ("carillon_scheduler_fenced_writes_total", r'carillon_scheduler_turns_total\{result="failed"\}')

# In one snapshot: a frame that has come and is not confirmed counts at its sender.
_UNDER_WAY = f"""
    SELECT (SELECT count(*) FROM timer JOIN shard USING (shard) WHERE state IN (9, 10, 11, 12)
            OR (state = {State.SCHEDULED:d} AND (fire_at, id) > (watermark_at, watermark_id))),
        (SELECT count(*) FROM scheduler.outbox), (SELECT count(*) FROM digest.outbox)"""
_ROWS = f"""
    SELECT id, schedule_id, entity, shard, due_at, fire_at, watermark_at, note,
        CASE WHEN state = {State.SCHEDULED:d} AND (fire_at, id) <= (watermark_at, watermark_id)
            THEN {State.FIRED:d} ELSE state END
    FROM timer JOIN shard USING (shard)"""
_DEAD = "SELECT frame_id, reason FROM scheduler.dead_frame UNION ALL SELECT frame_id, reason FROM digest.dead_frame"


class Fleet:
    """Some replicas on one database. Replicas are numbered as they were started; a number is not used again."""

    def __init__(self, *, db: Database, url: str, nats_url: str, directory: Path, shards: int, ttl: timedelta) -> None:
        self._db = db
        self._url = url
        self._nats_url = nats_url
        self._directory = directory
        self._shards = shards
        self._ttl = ttl
        self._started = 0
        self.replicas: list[SchedulerProcess] = []

    @classmethod
    @asynccontextmanager
    async def assembled(
        cls, *, url: str, nats_url: str, directory: Path, shards: int, ttl: timedelta
    ) -> AsyncIterator[Self]:
        """The tables, and no replica yet; at the end all are killed."""
        async with await psycopg.AsyncConnection.connect(url) as connection:
            await connection.execute("CREATE SCHEMA scheduler")
        settings = PostgresSettings(url=SecretStr(url))
        own = Path(services.scheduler.__file__).parent / "migrations"
        await asyncio.to_thread(migrations.upgrade, settings, "scheduler", own)
        db = await Database.connect(settings, "scheduler")
        fleet = cls(db=db, url=url, nats_url=nats_url, directory=directory, shards=shards, ttl=ttl)
        try:
            yield fleet
        except BaseException as err:
            err.add_note("\n".join([f"Logs are in {directory}.", *fleet.ended()]))
            raise
        finally:
            for one in fleet.replicas:
                await asyncio.to_thread(one.kill)
            await db.close()

    # Replicas

    async def start(self, count: int) -> None:
        """Start so many more, and wait until they serve."""
        new = []
        for _ in range(count):
            self._started += 1
            new.append(
                SchedulerProcess(
                    f"scheduler-{self._started}",
                    self._directory,
                    url=self._url,
                    nats_url=self._nats_url,
                    shards=self._shards,
                    ttl=self._ttl,
                )
            )
        self.replicas += new
        for one in new:
            one.start()
        for one in new:
            await asyncio.to_thread(one.wait_until, one.is_ready, timeout_s=_READY_TIMEOUT_S)

    async def busiest(self) -> SchedulerProcess:
        """The replica that has fired most."""
        fired = [await asyncio.to_thread(one.metric, _FIRED) for one in self.replicas]
        return self.replicas[fired.index(max(fired))]

    async def kill(self, replica: SchedulerProcess) -> None:
        """SIGKILL, and forget it."""
        await asyncio.to_thread(replica.kill)
        assert replica.exit_status == -signal.SIGKILL, replica.log_tail()
        self.replicas.remove(replica)

    async def refused_writes(self, replica: SchedulerProcess) -> float:
        """How often a replica found a shard to be another's by now, or its transaction ended from outside (INV-3)."""
        return sum([await asyncio.to_thread(replica.metric, name) for name in _REFUSED])

    def ended(self) -> list[str]:
        """The ends of the logs of replicas that ended by themselves."""
        return [one.log_tail() for one in self.replicas if not one.is_running]

    # What Postgres says

    async def epochs(self, replica: SchedulerProcess) -> dict[int, int]:
        """The shards it holds, with their epochs."""
        return {shard: epoch for shard, (holder, epoch) in (await self._holders()).items() if replica.word in holder}

    async def until_held(self, replicas: Collection[SchedulerProcess]) -> dict[int, int]:
        """Wait until all shards are held by these replicas, and each holds some; the epochs then."""

        async def are_held() -> dict[int, int]:
            holders = await self._holders()
            held = [sum(one.word in holder for holder, _ in holders.values()) for one in replicas]
            are_theirs = all(held) and sum(held) == self._shards
            return {shard: epoch for shard, (_, epoch) in holders.items()} if are_theirs else {}

        return await until(are_held, timeout_s=_HELD_TIMEOUT_S)

    async def _holders(self) -> dict[int, tuple[str, int]]:
        async with self._db.read() as tx:
            cursor = await tx.raw.execute("SELECT shard, coalesce(holder, ''), epoch FROM shard")
            return {shard: (holder, epoch) for shard, holder, epoch in await cursor.fetchall()}

    async def under_way(self) -> tuple[int, int, int]:
        """Timers that wait, unconfirmed frames of the scheduler, and of its peer; all at the same moment."""
        async with self._db.read() as tx:
            row = await (await tx.raw.execute(_UNDER_WAY)).fetchone()
        assert row is not None
        return row[0], row[1], row[2]

    async def rows(self) -> dict[UUID, Row]:
        """All timers there ever were."""
        async with self._db.read() as tx:
            rows = await (await tx.raw.execute(_ROWS)).fetchall()
        return {
            timer_id: Row(
                timer_id=timer_id,
                schedule_id=schedule_id,
                entity=entity,
                shard=shard,
                state=State(state),
                due_at=due_at,
                fire_at=fire_at,
                watermark_at=watermark_at,
                note=note,
            )
            for timer_id, schedule_id, entity, shard, due_at, fire_at, watermark_at, note, state in rows
        }

    async def dead_frames(self) -> list[str]:
        """Frames put aside, at either side, and why."""
        async with self._db.read() as tx:
            rows = await (await tx.raw.execute(_DEAD)).fetchall()
        return [f"frame {frame_id} is dead: {reason}" for frame_id, reason in rows]
