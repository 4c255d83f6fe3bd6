"""Who holds which shard, in SQL, on the database's clock: no other clock has a say (INV-3).

Every statement that locks several shards does so in order of their numbers, as `TurnStore.fence` does: no deadlocks.
"""

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

from libs.postgres import Database, Transaction
from services.scheduler.timer import Mark

_FORGET_ROWS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """A shard that has just become ours, and where its former owner had got to."""

    shard: int
    epoch: int
    watermark: Mark
    newest_tombstones: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What a renewal found.

    `members`: live replicas and how long they count as such; `lease_ends_in`: of shards that are not ours, not positive
    means free.
    """

    renewed: frozenset[int]
    members: Mapping[str, timedelta]
    lease_ends_in: Mapping[int, timedelta]


class LeaseStore:
    """Leases and members of one replica."""

    def __init__(self, db: Database, *, replica: str, ttl: timedelta) -> None:
        self._db = db
        self._replica = replica
        self._ttl = ttl

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[Transaction]:
        """A transaction that Postgres ends when this process stands still in it: others wait for what it locks."""
        async with self._db.transaction() as tx:
            await tx.raw.execute(
                "SELECT set_config('idle_in_transaction_session_timeout', %s, true)",
                (f"{self._ttl // timedelta(milliseconds=1)}ms",),
            )
            yield tx

    async def ensure_shards(self, count: int) -> int:
        """Have `count` shard rows where there are none yet; returns how many there are now."""
        async with self._db.transaction() as tx:
            await tx.raw.execute(
                "INSERT INTO shard (shard) SELECT generate_series(0, %s - 1) WHERE NOT EXISTS (SELECT FROM shard)"
                " ON CONFLICT DO NOTHING",
                (count,),
            )
            row = await (await tx.raw.execute("SELECT count(*) FROM shard")).fetchone()
        assert row is not None
        return int(row[0])

    async def renew(self, held: Mapping[int, int]) -> Situation:
        """Say that we are alive, renew the shards we hold in these epochs, and look around."""
        async with self._transaction() as tx:
            await tx.raw.execute(
                "INSERT INTO member (replica, until) VALUES (%s, clock_timestamp() + %s)"
                " ON CONFLICT (replica) DO UPDATE SET until = EXCLUDED.until",
                (self._replica, self._ttl),
            )
            cursor = await tx.raw.execute(
                "UPDATE shard SET lease_until = clock_timestamp() + %s FROM (SELECT shard FROM shard"
                " JOIN unnest(%s::int[], %s::bigint[]) AS ours (shard, epoch) USING (shard, epoch)"
                " ORDER BY shard FOR NO KEY UPDATE OF shard) AS ours WHERE shard.shard = ours.shard"
                " RETURNING shard.shard",
                (self._ttl, list(held), list(held.values())),
            )
            renewed = frozenset(row[0] for row in await cursor.fetchall())
            cursor = await tx.raw.execute(
                "SELECT replica, until - clock_timestamp() FROM member WHERE until > clock_timestamp()"
            )
            members: dict[str, timedelta] = dict(await cursor.fetchall())
            cursor = await tx.raw.execute(
                "SELECT shard, coalesce(lease_until - clock_timestamp(), interval '0') FROM shard"
                " WHERE holder IS NULL OR holder <> %s OR lease_until < clock_timestamp()",
                (self._replica,),
            )
            lease_ends_in: dict[int, timedelta] = dict(await cursor.fetchall())
        return Situation(renewed=renewed, members=members, lease_ends_in=lease_ends_in)

    async def take(self, shards: Collection[int]) -> list[Grant]:
        """Take those of `shards` that nobody holds: raise the epoch, read the watermark, go on.

        One that a transaction has locked is left out: an owner's turn is committing, or stands still until Postgres
        ends it. Waiting for it here would keep our other leases from being renewed.
        """
        async with self._transaction() as tx:
            cursor = await tx.raw.execute(
                "UPDATE shard SET epoch = epoch + 1, holder = %s, lease_until = clock_timestamp() + %s"
                " WHERE shard IN (SELECT shard FROM shard WHERE shard = ANY(%s)"
                " AND (holder IS NULL OR holder = %s OR lease_until < clock_timestamp())"
                " ORDER BY shard FOR NO KEY UPDATE SKIP LOCKED)"
                " RETURNING shard, epoch, watermark_at, watermark_id",
                (self._replica, self._ttl, list(shards), self._replica),
            )
            taken = await cursor.fetchall()
            cursor = await tx.raw.execute(
                "SELECT shard, origin, max(sequence) FROM tombstone WHERE shard = ANY(%s) GROUP BY shard, origin",
                ([row[0] for row in taken],),
            )
            newest: dict[int, dict[str, int]] = {}
            for shard, origin, sequence in await cursor.fetchall():
                newest.setdefault(shard, {})[origin] = sequence
        return [
            Grant(shard=shard, epoch=epoch, watermark=Mark(at, timer_id), newest_tombstones=newest.get(shard, {}))
            for shard, epoch, at, timer_id in taken
        ]

    async def release(self, held: Mapping[int, int], *, is_leaving: bool) -> None:
        """Give shards back, so that others can take them at once; `is_leaving` also ends our membership."""
        async with self._transaction() as tx:
            await tx.raw.execute(
                "UPDATE shard SET holder = NULL, lease_until = NULL FROM (SELECT shard FROM shard"
                " JOIN unnest(%s::int[], %s::bigint[]) AS ours (shard, epoch) USING (shard, epoch)"
                " ORDER BY shard FOR NO KEY UPDATE OF shard) AS ours WHERE shard.shard = ours.shard",
                (list(held), list(held.values())),
            )
            if is_leaving:
                await tx.raw.execute("DELETE FROM member WHERE replica = %s", (self._replica,))

    async def forget(self, *, tombstones_after: timedelta, members_after: timedelta) -> None:
        """Delete tombstones that no frame can meet any more, and members long gone."""
        deleted = _FORGET_ROWS
        while deleted == _FORGET_ROWS:
            async with self._db.transaction() as tx:
                cursor = await tx.raw.execute(
                    "DELETE FROM tombstone WHERE ctid = ANY(ARRAY(SELECT ctid FROM tombstone"
                    " WHERE created_at < clock_timestamp() - %s LIMIT %s FOR UPDATE SKIP LOCKED))",
                    (tombstones_after, _FORGET_ROWS),
                )
                deleted = cursor.rowcount
        async with self._db.transaction() as tx:
            await tx.raw.execute("DELETE FROM member WHERE until < clock_timestamp() - %s", (members_after,))
