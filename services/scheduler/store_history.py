"""Forgetting timers that ended long ago, and facts that are none any more, in SQL."""

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

# One that a turn changes at this moment is looked at again after that, and stays.
_FORGET_FACTS = """
    WITH part AS (SELECT tenant, entity FROM facts WHERE (tenant, entity) > (%(tenant)s, %(entity)s)
        ORDER BY tenant, entity LIMIT %(limit)s),
    gone AS (DELETE FROM facts USING part WHERE facts.tenant = part.tenant AND facts.entity = part.entity
        AND facts.changed_at < %(before)s AND facts.facts = '{}')
    SELECT tenant, entity FROM part ORDER BY tenant, entity OFFSET %(limit)s - 1"""

Place = tuple[str, str]
"""(tenant, entity)"""


class HistoryStore:
    """What is over. Deleting it decides nothing, so no epoch is asked (INV-3)."""

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

    async def forget_facts(self, after: Place, *, before: datetime, limit: int) -> Place | None:
        """Look at the facts of the next `limit` entities, and delete what is empty and has been since `before`.

        There is no index of what is empty: it would cost every patch. Returns the place to go on from; None at the end.
        """
        async with self._db.transaction() as tx:
            await tx.raw.execute("SET LOCAL synchronous_commit = off")
            tenant, entity = after
            named = {"tenant": tenant, "entity": entity, "before": before, "limit": limit}
            return await (await tx.raw.execute(_FORGET_FACTS, named)).fetchone()
