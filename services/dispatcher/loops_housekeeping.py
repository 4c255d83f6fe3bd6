"""What keeps the tables short and the gauges true, in any replica, a few times a minute."""

import asyncio
import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

from libs.errors import Unavailable
from libs.postgres import Database, Transaction
from services.dispatcher import metrics

log = logging.getLogger(__name__)

_HOUSEKEEPING_S = 5.0
_COUNT_DEAD_LETTERS = 12  # Rounds.
_KEY_RETENTION = timedelta(days=7)
_FORGET_KEYS = 10_000
_BOUNCE_RETENTION = timedelta(days=30)
_FORGET_BOUNCES = 10_000


class Queue(Protocol):
    """What housekeeping needs of the store."""

    async def backlog(self, tx: Transaction) -> dict[str, tuple[int, float]]: ...


class DeadLetters(Protocol):
    """What housekeeping needs of the store of dead letters."""

    async def total(self, tx: Transaction) -> int: ...


class Keys(Protocol):
    """What housekeeping needs of the store of idempotency keys."""

    async def forget(self, tx: Transaction, *, older_than: timedelta, limit: int) -> int: ...


class Bounces(Protocol):
    """What housekeeping needs of the store of bounces."""

    async def forget(self, tx: Transaction, *, older_than: timedelta, limit: int) -> int: ...


class Housekeeping:
    """Measures the queue and forgets old idempotency keys and bounces, in any replica."""

    def __init__(
        self,
        *,
        db: Database,
        queue: Queue,
        dead_letters: DeadLetters,
        keys: Keys,
        bounces: Bounces,
        lanes: Sequence[str],
    ) -> None:
        self._db = db
        self._queue = queue
        self._dead_letters = dead_letters
        self._rounds = 0
        self._keys = keys
        self._bounces = bounces
        self._lanes = lanes

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.run_once()
            except Unavailable as error:
                log.warning("Could not keep house; trying again.", extra={"error": str(error)})
            await asyncio.sleep(_HOUSEKEEPING_S)

    async def run_once(self) -> None:
        """Measure, then forget."""
        async with self._db.read() as tx:
            backlog = await self._queue.backlog(tx)
            if self._rounds % _COUNT_DEAD_LETTERS == 0:  # There may be many, and they change slowly.
                metrics.DEAD_LETTERS.set(await self._dead_letters.total(tx))
        self._rounds += 1
        for lane in self._lanes:
            queued, oldest_s = backlog.get(lane, (0, 0.0))
            metrics.QUEUED.labels(lane).set(queued)
            metrics.OLDEST_QUEUED_SECONDS.labels(lane).set(oldest_s)
        async with self._db.transaction() as tx:
            await self._keys.forget(tx, older_than=_KEY_RETENTION, limit=_FORGET_KEYS)
            await self._bounces.forget(tx, older_than=_BOUNCE_RETENTION, limit=_FORGET_BOUNCES)
