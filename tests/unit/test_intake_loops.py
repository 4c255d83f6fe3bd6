"""Intake's housekeeping goes on, whatever Postgres says."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, cast

import psycopg
import pytest

from libs.postgres import Database
from services.intake.loops import Measuring, Pruning


class RefusingOnce:
    """Database, store and backlogs in one: the first statement takes too long, the second one is answered."""

    def __init__(self) -> None:
        self.statements = 0
        self.answered = asyncio.Event()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """Or a read."""
        yield

    read = transaction

    def _answer(self) -> None:
        self.statements += 1
        if self.statements == 1:
            raise psycopg.errors.QueryCanceled
        self.answered.set()

    async def prune(self, _tx: object, _retention: timedelta, *, limit: int) -> int:
        """Nothing is old."""
        self._answer()
        return 0

    async def frames_by_tenant(self, _tx: object, _header: str) -> dict[str, int]:
        """Nothing is under way."""
        self._answer()
        return {}

    def learn(self, frames: Mapping[str, int]) -> None:
        """Nothing."""


@pytest.mark.parametrize("loop", ["pruning", "measuring"])
async def test_a_statement_that_takes_too_long_does_not_end_a_loop(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the process with it: the next round may be faster."""
    monkeypatch.setattr("services.intake.loops.MEASURE_INTERVAL_S", 0.0)
    refusing = RefusingOnce()
    db, both = cast(Database, refusing), cast(Any, refusing)
    loops: dict[str, Pruning | Measuring] = {
        "pruning": Pruning(db=db, store=both, retention=timedelta(days=7), interval=timedelta(0)),
        "measuring": Measuring(db=db, store=both, backlogs=both, header="Tenant"),
    }
    running = asyncio.create_task(loops[loop].run())
    async with asyncio.timeout(5):
        await asyncio.wait(
            [running, answered := asyncio.create_task(refusing.answered.wait())], return_when=asyncio.FIRST_COMPLETED
        )
    assert answered.done()
    assert not running.done()
    running.cancel()
