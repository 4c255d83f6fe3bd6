"""The loop that forgets what went out or ended long ago (INV-9); any number of replicas may do so at once."""

import asyncio
from datetime import datetime
from typing import Final, Protocol

from libs.clock import Clock
from libs.postgres import Database, Transaction
from libs.telemetry.logs import get_logger
from services.digest import metrics
from services.digest.catalog import DEFAULT_RETENTION

log = get_logger(__name__)

_INTERVAL_S: Final = 60.0
_AT_ONCE: Final = 5_000
"""Items deleted in one transaction: short enough not to be in anybody's way."""


class Forgotten(Protocol):
    """See store_history."""

    @property
    def items(self) -> int: ...
    @property
    def notifications(self) -> int: ...
    @property
    def windows(self) -> int: ...
    @property
    def digests(self) -> int: ...
    @property
    def is_all(self) -> bool: ...


class HistoryStore(Protocol):
    """See store_history."""

    async def forget(self, tx: Transaction, *, now: datetime, limit: int) -> Forgotten: ...
    async def forget_batch_runs(self, tx: Transaction, *, before: datetime, limit: int) -> int: ...


class History:
    """What is kept of the past."""

    def __init__(self, *, db: Database, store: HistoryStore, clock: Clock) -> None:
        self._db, self._store, self._clock = db, store, clock

    async def run(self) -> None:
        """Forget until cancelled."""
        while True:
            try:
                await self.forget_once()
            except Exception as err:  # noqa: BLE001 - outermost frame of a loop that must go on.
                log.warning("Could not forget what is over; trying again.", error=repr(err))
            await asyncio.sleep(_INTERVAL_S)

    async def forget_once(self, *, at_once: int = _AT_ONCE) -> None:
        """Forget everything that is over, `at_once` items in a transaction."""
        now, is_all = self._clock.now(), False
        while not is_all:
            async with self._db.transaction() as tx:
                done = await self._store.forget(tx, now=now, limit=at_once)
            _count(done)
            is_all = done.is_all
        runs = at_once
        while runs == at_once:
            async with self._db.transaction() as tx:
                runs = await self._store.forget_batch_runs(tx, before=now - DEFAULT_RETENTION, limit=at_once)
            metrics.FORGOTTEN.labels("batch_run").inc(runs)


def _count(done: Forgotten) -> None:
    metrics.FORGOTTEN.labels("item").inc(done.items)
    metrics.FORGOTTEN.labels("notification").inc(done.notifications)
    metrics.FORGOTTEN.labels("window").inc(done.windows)
    metrics.FORGOTTEN.labels("digest").inc(done.digests)
