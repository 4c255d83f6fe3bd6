"""Who holds which shard, in SQL, on the database's clock: no other clock has a say (INV-3).

Every statement that locks several shards does so in order of their numbers, as `TurnStore.fence` does: no deadlocks.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta

from libs.postgres import Database
from services.scheduler.timer import Mark

_FORGET_ROWS = 10_000

_TAKE = """
    UPDATE shard SET epoch = epoch + 1, holder = %(replica)s, lease_until = clock_timestamp() + %(ttl)s
    FROM (SELECT shard, lease_until, set_config('idle_in_transaction_session_timeout', %(patience)s, true)
        FROM shard WHERE shard = ANY(%(shards)s)
        AND (holder IS NULL OR holder = %(replica)s OR lease_until < clock_timestamp())
        ORDER BY shard FOR NO KEY UPDATE SKIP LOCKED) AS free
    WHERE shard.shard = free.shard
    RETURNING shard.shard, epoch, watermark_at, watermark_id,
        greatest(clock_timestamp() - free.lease_until, interval '0')"""

# A statement of its own, so that it sees what an owner whose lease had ended committed until its shard was locked.
# From one origin of a shard's tombstones to the next through their index, each read from its end: there may be a
# million, timers stand still meanwhile, and Postgres skips like that only where it is told how.
_NEWEST_TOMBSTONES = """
    WITH RECURSIVE newest AS (
        SELECT taken.shard, last.origin, last.sequence FROM unnest(%s::int[]) AS taken (shard),
        LATERAL (SELECT origin, sequence FROM tombstone WHERE shard = taken.shard
            ORDER BY origin DESC, sequence DESC LIMIT 1) AS last
        UNION ALL
        SELECT newest.shard, last.origin, last.sequence FROM newest,
        LATERAL (SELECT origin, sequence FROM tombstone WHERE shard = newest.shard AND origin < newest.origin
            ORDER BY origin DESC, sequence DESC LIMIT 1) AS last
    )
    SELECT shard, json_object_agg(origin, sequence) FROM newest GROUP BY shard"""

_RELEASE = """
    UPDATE shard SET holder = NULL, lease_until = clock_timestamp()
    FROM (SELECT shard, set_config('idle_in_transaction_session_timeout', %s, true)
        FROM shard WHERE shard = ANY(%s) AND holder = %s ORDER BY shard FOR NO KEY UPDATE) AS ours
    WHERE shard.shard = ours.shard"""

_LOOK = """
    SELECT replica, NULL, until - clock_timestamp() FROM member WHERE until > clock_timestamp()
    UNION ALL
    SELECT NULL, shard, coalesce(lease_until - clock_timestamp(), interval '0') FROM shard
    WHERE holder IS NULL OR holder <> %s OR lease_until < clock_timestamp()"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """A shard that has just become ours, where its former owner had got to, and how long it has had none."""

    shard: int
    epoch: int
    watermark: Mark
    newest_tombstones: Mapping[str, int]
    unheld: timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What there is to see.

    `members`: live replicas and how long they count as such; `lease_ends_in`: of shards that are not ours, not positive
    means free.
    """

    members: Mapping[str, timedelta]
    lease_ends_in: Mapping[int, timedelta]


class LeaseStore:
    """Leases and members of one replica, whose name no other process ever has.

    A shard is ours in an epoch *and* by name: a failover that lost a takeover gives the epoch to another.
    """

    def __init__(self, db: Database, *, replica: str, ttl: timedelta) -> None:
        self._db = db
        self._replica = replica
        self._ttl = ttl
        # Postgres ends a transaction in which this process stands still: others wait for what it locks.
        self._patience = f"{ttl // timedelta(milliseconds=1)}ms"

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

    async def look(self) -> Situation:
        """Who there is, and which shards are free. Waits for nobody."""
        async with self._db.transaction() as tx:
            rows = await (await tx.raw.execute(_LOOK, (self._replica,))).fetchall()
        members = {replica: left for replica, shard, left in rows if shard is None}
        return Situation(members=members, lease_ends_in={shard: left for _, shard, left in rows if shard is not None})

    async def renew(self, held: Mapping[int, int]) -> frozenset[int]:
        """Say that we are alive, and renew the shards we hold in these epochs; returns those, after their turns."""
        async with self._db.transaction() as tx:
            await tx.raw.execute(
                "SELECT set_config('idle_in_transaction_session_timeout', %s, true)",
                (self._patience,),
            )
            await tx.raw.execute(
                "INSERT INTO member (replica, until) VALUES (%s, clock_timestamp() + %s)"
                " ON CONFLICT (replica) DO UPDATE SET until = EXCLUDED.until",
                (self._replica, self._ttl),
            )
            cursor = await tx.raw.execute(
                "UPDATE shard SET lease_until = clock_timestamp() + %s FROM (SELECT shard FROM shard"
                " JOIN unnest(%s::int[], %s::bigint[]) AS ours (shard, epoch) USING (shard, epoch) WHERE holder = %s"
                " ORDER BY shard FOR NO KEY UPDATE OF shard) AS ours WHERE shard.shard = ours.shard"
                " RETURNING shard.shard",
                (self._ttl, list(held), list(held.values()), self._replica),
            )
            return frozenset(row[0] for row in await cursor.fetchall())

    async def take(self, shards: Collection[int]) -> list[Grant]:
        """Take those of `shards` that nobody holds: raise the epoch, read the watermark, go on.

        One that a transaction has locked is left out: an owner's turn is committing, or stands still until Postgres
        ends it. Waiting for it here would keep our other leases from being renewed.
        """
        named = {"replica": self._replica, "ttl": self._ttl, "patience": self._patience, "shards": list(shards)}
        async with self._db.transaction() as tx:
            rows = await (await tx.raw.execute(_TAKE, named)).fetchall()
            cursor = await tx.raw.execute(_NEWEST_TOMBSTONES, ([row[0] for row in rows],))
            newest: dict[int, dict[str, int]] = dict(await cursor.fetchall())
        return [
            Grant(
                shard=shard,
                epoch=epoch,
                watermark=Mark(at, timer_id),
                newest_tombstones=newest.get(shard, {}),
                unheld=unheld or timedelta(0),  # Nobody has held it ever.
            )
            for shard, epoch, at, timer_id, unheld in rows
        ]

    async def release(self, shards: Collection[int]) -> None:
        """Give back those of `shards` that are ours, so that others can take them at once."""
        async with self._db.transaction() as tx:
            await tx.raw.execute(_RELEASE, (self._patience, list(shards), self._replica))

    async def resign(self) -> None:
        """End our membership: what we hold falls to others, once it is released."""
        async with self._db.transaction() as tx:
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
