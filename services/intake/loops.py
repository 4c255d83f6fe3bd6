"""Housekeeping: idempotency keys are forgotten when they are old enough, and tenants' backlogs are looked at."""

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from typing import Protocol

from libs.postgres import Database, Transaction
from libs.telemetry.logs import get_logger
from services.intake import metrics

log = get_logger(__name__)

PRUNED_AT_ONCE = 5_000
MEASURE_INTERVAL_S = 1.0


class Store(Protocol):
    """See services.intake.store."""

    async def prune(self, tx: Transaction, retention: timedelta, *, limit: int) -> int: ...
    async def frames_by_tenant(self, tx: Transaction, header: str) -> dict[str, int]: ...


class Backlogs(Protocol):
    """See services.intake.stream_backlog."""

    def learn(self, frames: Mapping[str, int]) -> None: ...


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
            except Exception as error:  # noqa: BLE001 - outermost frame of a loop that must go on.
                log.warning("Could not forget old idempotency keys; trying again.", error=repr(error))
            await asyncio.sleep(self._interval.total_seconds())


class Measuring:
    """Tells `backlogs` how many frames each tenant has under way, as `header` in them says; every replica does so."""

    def __init__(self, *, db: Database, store: Store, backlogs: Backlogs, header: str) -> None:
        self._db = db
        self._store = store
        self._backlogs = backlogs
        self._header = header

    async def run_once(self) -> None:
        """Count them now."""
        async with self._db.read() as tx:
            frames = await self._store.frames_by_tenant(tx, self._header)
        self._backlogs.learn(frames)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.run_once()
            except Exception as error:  # noqa: BLE001 - outermost frame of a loop that must go on.
                log.warning("Could not count the tenants' frames; trying again.", error=repr(error))
            await asyncio.sleep(MEASURE_INTERVAL_S)
