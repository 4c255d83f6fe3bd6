"""Housekeeping: idempotency keys are forgotten when they are old enough."""

import asyncio
from datetime import timedelta
from typing import Protocol

from libs.errors import Unavailable
from libs.postgres import Database, Transaction
from libs.telemetry.logs import get_logger
from services.intake import metrics

log = get_logger(__name__)

PRUNED_AT_ONCE = 5_000


class Store(Protocol):
    """See services.intake.store."""

    async def prune(self, tx: Transaction, retention: timedelta, *, limit: int) -> int: ...


class Pruning:
    """Forgets idempotency keys after `retention`, on the database's clock; any number of replicas may do so at once."""

    def __init__(self, *, db: Database, store: Store, retention: timedelta, interval: timedelta) -> None:
        self._db = db
        self._store = store
        self._retention = retention
        self._interval = interval

    async def run_once(self) -> int:
        """Forget at most 5,000 keys; returns how many."""
        async with self._db.transaction() as tx:
            pruned = await self._store.prune(tx, self._retention, limit=PRUNED_AT_ONCE)
        metrics.PRUNED_KEYS.inc(pruned)
        return pruned

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                while await self.run_once() == PRUNED_AT_ONCE:
                    pass
            except Unavailable as error:
                log.warning("Could not forget old idempotency keys; trying again.", error=str(error))
            await asyncio.sleep(self._interval.total_seconds())
