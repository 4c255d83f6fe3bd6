"""The loop that checks the ledger of all tenants (INV-6), round after round, without anybody noticing.

A round goes through all notifications, then all digests, in the order of their keys. Each step looks at one range in
one short statement, and the rest after it is so long that checking takes at most `_SHARE` of one connection: with ten
million items a round takes about an hour, with none it takes no time. What is stored behind the place where a round is
waits for the next. Every replica makes its own rounds; what they have found so far goes with the process.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Final, Protocol
from uuid import UUID

from libs.postgres import Database, Transaction
from libs.telemetry.logs import get_logger
from services.digest import metrics
from services.digest.views import Gap, Kept

log = get_logger(__name__)

_ROWS: Final = 10_000
_SHARE: Final = 0.02
_SHORTEST_REST_S: Final = 0.05
_BETWEEN_ROUNDS_S: Final = 15.0

Place = tuple[str, UUID]


class LedgerStore(Protocol):
    """See store_ledger."""

    @property
    def BEGINNING(self) -> Place: ...  # noqa: N802 - a constant of the module.
    async def item_gaps(
        self, tx: Transaction, after: Place, *, rows: int
    ) -> tuple[Sequence[Gap], Kept, Place | None]: ...
    async def delivery_gaps(
        self, tx: Transaction, after: Place, *, rows: int
    ) -> tuple[Sequence[Gap], Kept, Place | None]: ...


class LedgerCheck:
    """One replica's rounds."""

    def __init__(self, *, db: Database, store: LedgerStore, rows: int = _ROWS) -> None:
        """`rows`: how many items, or digests, one step looks at."""
        self._db, self._rows, self._beginning = db, rows, store.BEGINNING
        self._stages = (store.item_gaps, store.delivery_gaps)
        self._stage, self._after = 0, self._beginning
        self._found = self._found_before = 0
        self._kept = Kept()
        self._began_at = self._whole_since = time.monotonic()
        metrics.UNACCOUNTED_AGE_SECONDS.set_function(lambda: time.monotonic() - self._whole_since)

    async def run(self) -> None:
        """Check until cancelled."""
        while True:
            started = time.monotonic()
            try:
                is_whole = await self.check_once()
            except Exception as err:  # noqa: BLE001 - outermost frame of a loop that must go on.
                log.warning("The ledger could not be checked; trying again.", error=repr(err))
                is_whole = True
            took_s = time.monotonic() - started
            rest_s = max(_SHORTEST_REST_S, took_s * (1 / _SHARE - 1))
            await asyncio.sleep(max(rest_s, _BETWEEN_ROUNDS_S) if is_whole else rest_s)

    async def check_round(self) -> None:
        """Check what is left of the round under way."""
        while not await self.check_once():
            pass

    async def check_once(self) -> bool:
        """Check one range; returns whether that was the last of its round."""
        async with self._db.read() as tx:
            gaps, kept, end = await self._stages[self._stage](tx, self._after, rows=self._rows)
        self._kept += kept
        for gap in gaps:
            self._found += gap.count
            log.error(
                "Something is unaccounted for.", kind=gap.kind, count=gap.count, examples=[str(one) for one in gap.ids]
            )
        metrics.UNACCOUNTED.set(max(self._found, self._found_before))
        if end is not None:
            self._after = end
            return False
        self._after = self._beginning
        self._stage = (self._stage + 1) % len(self._stages)
        if self._stage:
            return False
        self._found_before, self._found = self._found, 0
        metrics.UNACCOUNTED.set(self._found_before)
        metrics.show_kept(self._kept)
        self._kept = Kept()
        self._whole_since, self._began_at = self._began_at, time.monotonic()
        return True
