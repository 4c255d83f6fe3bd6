"""Business time, let out step by step: the driver's end of the test clock's leash."""

import asyncio
import time
from datetime import datetime, timedelta
from typing import Any

import psycopg

from libs.test_clock import let_test_clock_run

_SECOND = timedelta(seconds=1)
_NOTHING = timedelta(0)
_HEARSAY_S = 0.02
"""How far the processes' readings may lie apart once all have heard that the clock runs on; usually under 1 ms."""


class Pace:
    """Lets the test clock run from one stop to the next, at `rate` business seconds per second.

    Every process follows the same clock within milliseconds; what must not depend on those is waited for at a stop,
    where the clock stands still for all.
    """

    def __init__(self, conn: psycopg.AsyncConnection[Any], *, at: datetime, rate: float) -> None:
        self._conn = conn
        self._rate = rate
        self._from = self._until = at
        self._began_s = time.monotonic()

    @property
    def until(self) -> datetime:
        """The stop that the clock runs to, or stands at."""
        return self._until

    def now(self) -> datetime:
        """Business time, a little behind what the services see, so that nothing is told before it happened for them."""
        run_s = max(0.0, time.monotonic() - self._began_s - _HEARSAY_S)
        return min(self._until, self._from + run_s * self._rate * _SECOND)

    async def let_run(self, until: datetime) -> None:
        """Let the clock go on to `until`; returns when every process has heard of it."""
        self._from = self.now()
        await let_test_clock_run(self._conn, until=until, rate=self._rate)
        self._until, self._began_s = until, time.monotonic()

    async def reach(self, at: datetime) -> None:
        """Wait until the clock has come to `at`, which must not lie beyond the stop."""
        if (left := at - self.now()) > _NOTHING:
            begun_s = time.monotonic() - self._began_s
            await asyncio.sleep(left / _SECOND / self._rate + max(0.0, _HEARSAY_S - begun_s))
