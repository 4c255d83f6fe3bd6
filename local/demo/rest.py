"""Knows when nothing more will happen by itself: one statement over all four schemas says that all is done.

Why one statement is enough. Every piece of work is, at every moment, written down in at least one of these places:

- in the outbox of the service that hands it on: inserted in the transaction of the state change that caused it, and
  deleted only after the receiver has committed its effects;
- as a timer that is due and that its shard's watermark has not passed;
- as a window that is closing, that is, not rendered and handed on yet (what is sent alone has a window of its own);
- in the dispatcher's queue, from its arrival until its outcome is in the outbox.

A hand-over writes the new place before (or in the same transaction as) it deletes the old one. So in a single snapshot,
which is what one READ COMMITTED statement sees, no work can be between two places, and all of them empty means that
there is none. Several statements would not do: work could move behind their backs. The caller must have no call under
way, and the clock must stand still, or new timers come due meanwhile.

A delivery that waits for a retry is at rest: it is a timer that is not due yet.
"""

import asyncio
import time
from datetime import datetime
from typing import Any

import psycopg
from psycopg.rows import dict_row

_POLL_S, _LONGEST_POLL_S = 0.002, 0.015  # Often enough to lose no time, seldom enough to take none from the services.
_PATIENCE_S = 120.0

# Frames that could not be applied wait for a person. In the demo there must be none.
_DEAD = """
    SELECT sender, reason FROM intake.dead_frame UNION ALL SELECT sender, reason FROM scheduler.dead_frame
    UNION ALL SELECT sender, reason FROM digest.dead_frame UNION ALL SELECT sender, reason FROM dispatcher.dead_frame"""

_UNDONE = f"""
    SELECT (SELECT count(*) FROM intake.outbox) AS intake_outbox,
           (SELECT count(*) FROM scheduler.outbox) AS scheduler_outbox,
           (SELECT count(*) FROM scheduler.event_outbox) AS events_unpublished,
           (SELECT count(*) FROM digest.outbox) AS digest_outbox,
           (SELECT count(*) FROM dispatcher.outbox) AS dispatcher_outbox,
           (SELECT count(*) FROM scheduler.shard CROSS JOIN LATERAL (
             SELECT FROM scheduler.timer
             WHERE timer.shard = shard.shard AND timer.state = 1 AND timer.fire_at <= %(now)s
               AND (timer.fire_at, timer.id) > (shard.watermark_at, shard.watermark_id) LIMIT 1) AS due)
             AS shards_behind,
           (SELECT count(*) FROM digest.digest_window WHERE state = 2) AS windows_closing,
           (SELECT count(*) FROM dispatcher.queue) AS deliveries_queued,
           (SELECT count(*) FROM ({_DEAD}) AS dead) AS frames_put_aside"""  # noqa: S608 — a literal.


class NoRest(Exception):
    """The system did not come to rest in time, or put something aside; says where the work is."""


class Rest:
    """See the module."""

    def __init__(self, conn: psycopg.AsyncConnection[Any]) -> None:
        self._conn = conn
        self.waited_s = 0.0

    async def wait(self, now: datetime) -> None:
        """Return when everything due at `now` has happened, in all services. Raises NoRest."""
        began_s, poll_s = time.monotonic(), _POLL_S
        while undone := await self._undone(now):
            if "frames_put_aside" in undone:
                raise NoRest(await self._why_put_aside())
            if time.monotonic() - began_s > _PATIENCE_S:
                raise NoRest(f"Not at rest at {now:%Y-%m-%d %H:%M:%S} after {_PATIENCE_S:.0f} s: {undone}")
            await asyncio.sleep(poll_s)
            poll_s = min(poll_s * 1.5, _LONGEST_POLL_S)
        self.waited_s += time.monotonic() - began_s

    async def _why_put_aside(self) -> str:
        rows = await (await self._conn.execute(_DEAD)).fetchall()
        return "Frames were put aside: " + "; ".join(sorted({f"from {sender}: {reason}" for sender, reason in rows}))

    async def _undone(self, now: datetime) -> dict[str, int]:
        async with self._conn.cursor(row_factory=dict_row) as cursor:
            row = await (await cursor.execute(_UNDONE, {"now": now})).fetchone()
        assert row is not None
        return {place: count for place, count in row.items() if count}
