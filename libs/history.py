"""The loop that forgets what ended long ago (INV-9); any number of replicas of a service may do so at once."""

import asyncio
import logging
from datetime import datetime, timedelta
from typing import Protocol

from prometheus_client import Counter

from libs.clock import Clock
from libs.lifecycle import heed_cancellation
from libs.postgres import Database, Transaction

log = logging.getLogger(__name__)

_INTERVAL_S = 60.0


class Forget(Protocol):
    """Deletes at most `limit` of what had ended before `before`, in business time; returns how many."""

    async def __call__(self, tx: Transaction, *, before: datetime, limit: int) -> int: ...


class History:
    """What a service keeps of the past: `retention` of it."""

    def __init__(
        self, *, db: Database, forget: Forget, at_once: int, clock: Clock, retention: timedelta, forgotten: Counter
    ) -> None:
        """`at_once` are deleted in one transaction: so few that it is in nobody's way."""
        self._db, self._forget, self._at_once = db, forget, at_once
        self._clock, self._retention, self._forgotten = clock, retention, forgotten

    async def run(self) -> None:
        """Forget until cancelled."""
        while True:
            try:
                await self.forget_once()
            except Exception:  # Outermost frame of a loop that must go on.
                log.warning("Could not forget what is old; trying again.", exc_info=True)
            heed_cancellation()
            await asyncio.sleep(_INTERVAL_S)

    async def forget_once(self) -> int:
        """Forget all there is to forget; returns how many."""
        before = self._clock.now() - self._retention
        forgotten, deleted = 0, self._at_once
        while deleted == self._at_once:
            async with self._db.transaction() as tx:
                deleted = await self._forget(tx, before=before, limit=self._at_once)
            self._forgotten.inc(deleted)
            forgotten += deleted
        return forgotten
