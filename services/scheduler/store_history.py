"""Forgetting timers that ended long ago, in SQL."""

from datetime import datetime

from libs.postgres import Database
from services.scheduler.timer import UNDER_WAY, State

_MAY_STILL_ACT = ", ".join(str(int(state)) for state in sorted({State.PAUSED, *UNDER_WAY}))

_FORGET = f"""
    WITH old AS (
        SELECT timer.ctid FROM timer JOIN shard USING (shard)
        WHERE timer.shard = %(shard)s AND timer.fire_at < %(before)s AND timer.state NOT IN ({_MAY_STILL_ACT})
          AND (timer.state <> {int(State.SCHEDULED)}
               OR (timer.fire_at, timer.id) <= (shard.watermark_at, shard.watermark_id))
        ORDER BY timer.fire_at, timer.id LIMIT %(limit)s FOR UPDATE OF timer SKIP LOCKED),
    gone AS (DELETE FROM timer WHERE ctid = ANY(ARRAY(SELECT ctid FROM old)) RETURNING id),
    attempts AS (DELETE FROM attempt USING gone WHERE attempt.timer_id = gone.id)
    SELECT count(*) FROM gone"""  # noqa: S608 - constants of this package.


class HistoryStore:
    """Timers that are over. Deleting them decides nothing, so no epoch is asked (INV-3)."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def forget(self, shard: int, *, before: datetime, limit: int) -> int:
        """Delete at most `limit` timers that ended and whose time lies before `before`; returns how many."""
        async with self._db.transaction() as tx:
            # What is lost with a crash is deleted again.
            await tx.raw.execute("SET LOCAL synchronous_commit = off")
            cursor = await tx.raw.execute(_FORGET, {"shard": shard, "before": before, "limit": limit})
            row = await cursor.fetchone()
        assert row is not None
        return int(row[0])
