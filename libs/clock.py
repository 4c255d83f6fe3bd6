"""Rule R3: one clock. Business time is the database's clock, or the test clock where one is set.

`now()` is read once per decision and passed in; core code never reads a clock. Leases and the waiting times of links
use the database's clock within SQL and do not come here.

Node clocks are never read as wall clocks: `DatabaseClock` asks Postgres for the time, remembers the offset to this
process's monotonic clock, and asks again every `resync`. The answer is off by at most half a round trip. It never goes
back: after a correction backwards it stands still until real time has caught up.
"""

import asyncio
import time
from datetime import datetime, timedelta
from typing import Protocol, Self

from libs import clock_metrics
from libs.lifecycle import heed_cancellation
from libs.postgres import Database
from libs.telemetry.logs import get_logger

log = get_logger(__name__)

LONGEST_WAIT = timedelta(hours=1)
"""Waits are cut to this, so that a corrected clock is noticed."""


class Clock(Protocol):
    """Business time."""

    def now(self) -> datetime:
        """The current instant, aware, UTC, never earlier than the one before."""
        ...

    async def wait_until(self, at: datetime | None, wake: asyncio.Event) -> None:
        """Return at `at` (None: never), or once `wake` is set, which this clears; may return early, so look again."""
        ...


class DatabaseClock:
    """Postgres's clock, read without asking each time."""

    def __init__(self, db: Database, *, resync: timedelta) -> None:
        self._db = db
        self._resync = resync
        self._origin: datetime | None = None
        self._origin_monotonic_s = 0.0
        self._latest: datetime | None = None

    @classmethod
    async def connect(cls, db: Database, *, resync: timedelta) -> Self:
        """A clock that has asked once. Raises Unavailable when Postgres does not answer."""
        clock = cls(db, resync=resync)
        await clock.measure_once()
        clock_metrics.AGE_SECONDS.set_function(lambda: time.monotonic() - clock._origin_monotonic_s)
        return clock

    def now(self) -> datetime:
        """See Clock."""
        if self._origin is None:
            raise RuntimeError("this clock has not been set: await measure_once() first")
        now = self._origin + timedelta(seconds=time.monotonic() - self._origin_monotonic_s)
        if self._latest is not None and now < self._latest:
            return self._latest
        self._latest = now
        return now

    async def wait_until(self, at: datetime | None, wake: asyncio.Event) -> None:
        """See Clock."""
        await wait_at_most(LONGEST_WAIT if at is None else at - self.now(), wake)

    async def measure_once(self) -> timedelta:
        """Ask Postgres for the time; returns how far off this clock had been (0 the first time)."""
        best: tuple[float, datetime, float] | None = None
        for _ in range(3):  # The shortest of three round trips says most.
            async with self._db.read() as tx:
                sent_s = time.monotonic()
                row = await (await tx.raw.execute("SELECT clock_timestamp()")).fetchone()
                received_s = time.monotonic()
            assert row is not None
            if best is None or received_s - sent_s < best[0]:
                best = (received_s - sent_s, row[0], (sent_s + received_s) / 2)
        assert best is not None
        round_trip_s, origin, origin_monotonic_s = best
        drift = timedelta(0)
        if self._origin is not None:
            expected = self._origin + timedelta(seconds=origin_monotonic_s - self._origin_monotonic_s)
            drift = origin - expected
        self._origin, self._origin_monotonic_s = origin, origin_monotonic_s
        # The one place that reads the machine's clock, which decides nothing: but ids, certificates and logs are on it.
        now = origin + timedelta(seconds=time.monotonic() - origin_monotonic_s)
        clock_metrics.DRIFT_SECONDS.set(time.time() - now.timestamp())  # noqa: TID251 - it is what is measured.
        clock_metrics.CORRECTION_SECONDS.set(drift.total_seconds())
        clock_metrics.UNCERTAINTY_SECONDS.set(round_trip_s / 2)
        return drift

    async def run(self) -> None:
        """Measure again every `resync` until cancelled; keeps the old offset while Postgres does not answer."""
        while True:
            await asyncio.sleep(self._resync.total_seconds())
            try:
                await self.measure_once()
            except Exception as error:  # noqa: BLE001 - outermost frame of a loop that must go on.
                log.warning("Could not ask Postgres for the time; trying again.", error=repr(error))
            heed_cancellation()


async def wait_at_most(duration: timedelta, wake: asyncio.Event) -> None:
    """Wait for `duration` of real time, at most LONGEST_WAIT, or until `wake` is set, which this clears."""
    if not wake.is_set() and duration > timedelta(0):
        try:
            async with asyncio.timeout(min(duration, LONGEST_WAIT).total_seconds()):
                await wake.wait()
        except TimeoutError:
            return
    wake.clear()
