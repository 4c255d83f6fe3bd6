"""A clock that jumps, for tests: business time moves only when told."""

import asyncio
from datetime import datetime, timedelta


class ManualClock:
    """See libs.clock.Clock. `set` wakes whoever waits."""

    def __init__(self, now: datetime) -> None:
        self._now = now
        self._sleepers: set[asyncio.Event] = set()

    def now(self) -> datetime:
        """The instant last set."""
        return self._now

    def set(self, now: datetime) -> None:
        """Jump to `now`."""
        self._now = now
        for sleeper in self._sleepers:
            sleeper.set()

    def advance(self, by: timedelta) -> None:
        """Jump forward."""
        self.set(self._now + by)

    async def wait_until(self, at: datetime | None, wake: asyncio.Event) -> None:
        """Return when `at` has been reached, or `wake` is set."""
        self._sleepers.add(wake)
        try:
            if at is None or at > self._now:
                await wake.wait()
            wake.clear()
        finally:
            self._sleepers.discard(wake)
