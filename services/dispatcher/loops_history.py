"""The loop that forgets deliveries that ended long ago (INV-9); any number of replicas may do so at once."""

import asyncio
import logging
from datetime import datetime, timedelta
from typing import Protocol

from libs.clock import Clock
from libs.postgres import Database, Transaction
from services.dispatcher import metrics

log = logging.getLogger(__name__)

_INTERVAL_S = 60.0
_AT_ONCE = 5_000
"""Deliveries deleted in one transaction: short enough not to be in anybody's way."""


class Deliveries(Protocol):
    """What is needed of the store of deliveries."""

    async def forget(self, tx: Transaction, *, before: datetime, limit: int) -> int: ...


class History:
    """What is kept of the past."""

    def __init__(self, *, db: Database, deliveries: Deliveries, clock: Clock, retention: timedelta) -> None:
        self._db = db
        self._deliveries = deliveries
        self._clock = clock
        self._retention = retention

    async def run(self) -> None:
        """Forget until cancelled."""
        while True:
            try:
                await self.forget_once()
            except Exception:  # Outermost frame of a loop that must go on.
                log.warning("Could not forget old deliveries; trying again.", exc_info=True)
            await asyncio.sleep(_INTERVAL_S)

    async def forget_once(self, *, at_once: int = _AT_ONCE) -> None:
        """Forget everything there is to forget, `at_once` deliveries in a transaction."""
        before, forgotten = self._clock.now() - self._retention, at_once
        while forgotten == at_once:
            async with self._db.transaction() as tx:
                forgotten = await self._deliveries.forget(tx, before=before, limit=at_once)
            metrics.FORGOTTEN.inc(forgotten)
