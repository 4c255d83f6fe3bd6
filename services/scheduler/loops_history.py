"""The loop that forgets timers that ended long ago (INV-9), each replica for the shards it holds.

Facts are kept as long as there are any, since nobody knows when they are asked for next: an entity may start a timeline
years after its last fact. What its caller has emptied is forgotten, after the same time.
"""

import asyncio
import logging
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Protocol

from libs.clock import Clock
from libs.lifecycle import heed_cancellation
from services.scheduler import metrics

log = logging.getLogger(__name__)

_INTERVAL_S = 60.0
_AT_ONCE = 5_000
"""Timers deleted in one transaction: short enough not to be in anybody's way."""


class Store(Protocol):
    """services.scheduler.store_history.HistoryStore."""

    async def forget(self, shard: int, *, before: datetime, limit: int) -> int: ...

    async def forget_facts(self, after: tuple[str, str], *, before: datetime, limit: int) -> tuple[str, str] | None: ...


class Holder(Protocol):
    """Who knows which shards are here; services.scheduler.loops_engine.Engine."""

    @property
    def epochs(self) -> dict[int, int]: ...


class History:
    """What one replica keeps of the past."""

    def __init__(self, *, store: Store, holder: Holder, clock: Clock, retention: timedelta) -> None:
        self._store = store
        self._holder = holder
        self._clock = clock
        self._retention = retention
        self._place: tuple[str, str] | None = None  # How far facts have been looked through.

    async def run(self) -> None:
        """Forget until cancelled."""
        while True:
            try:
                await self.forget_once(self._holder.epochs)
                await self.forget_facts_once()
            except Exception:  # Outermost frame of a loop that must go on.
                log.warning("Could not forget what is old; trying again.", exc_info=True)
            heed_cancellation()
            await asyncio.sleep(_INTERVAL_S)

    async def forget_once(self, shards: Iterable[int]) -> int:
        """Forget everything there is to forget in these shards; returns how many timers."""
        before = self._clock.now() - self._retention
        forgotten = 0
        for shard in shards:
            deleted = _AT_ONCE
            while deleted == _AT_ONCE:
                deleted = await self._store.forget(shard, before=before, limit=_AT_ONCE)
                forgotten += deleted
                metrics.FORGOTTEN.inc(deleted)
        return forgotten

    async def forget_facts_once(self) -> None:
        """Look through a part of the facts; after the last part it begins again."""
        before = self._clock.now() - self._retention
        self._place = await self._store.forget_facts(self._place or ("", ""), before=before, limit=_AT_ONCE)
