"""The loop that forgets requests that were over long ago (INV-9); any number of replicas may do so at once."""

import asyncio
from datetime import datetime, timedelta
from typing import Protocol

from libs.clock import Clock
from libs.postgres import Database, Transaction
from libs.telemetry.logs import get_logger
from services.intake import metrics

log = get_logger(__name__)

_INTERVAL_S = 60.0
_AT_ONCE = 100
"""Requests deleted in one transaction: each may have a thousand responses of 64 KiB."""


class Store(Protocol):
    """See services.intake.store_requests."""

    async def forget(self, tx: Transaction, *, before: datetime, limit: int) -> int: ...


class History:
    """What is kept of the past: requests that are over, for `retention` from their answer-by dates."""

    def __init__(self, *, db: Database, store: Store, clock: Clock, retention: timedelta) -> None:
        self._db, self._store, self._clock, self._retention = db, store, clock, retention

    async def run(self) -> None:
        """Forget until cancelled."""
        while True:
            try:
                await self.forget_once()
            except Exception as err:  # noqa: BLE001 - outermost frame of a loop that must go on.
                log.warning("Could not forget old requests; trying again.", error=repr(err))
            await asyncio.sleep(_INTERVAL_S)

    async def forget_once(self, *, at_once: int = _AT_ONCE) -> int:
        """Forget all that are old enough, `at_once` in a transaction; returns how many."""
        before = self._clock.now() - self._retention
        forgotten, deleted = 0, at_once
        while deleted == at_once:
            async with self._db.transaction() as tx:
                deleted = await self._store.forget(tx, before=before, limit=at_once)
            metrics.FORGOTTEN_REQUESTS.inc(deleted)
            forgotten += deleted
        return forgotten
