"""How much the engine reads ahead at once: nothing fires meanwhile."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, cast

from msgspec.structs import replace

from libs.ids import new_id
from services.scheduler.loops_engine import Engine
from services.scheduler.settings import SchedulerSettings
from services.scheduler.timer import BEGINNING, Mark, Timer
from tests.support.scheduler_table import MINUTE, NOW, Table

SHARDS = 4


class _Endless:
    """A database with as many timers as anybody asks for, a millisecond from each to the next."""

    def __init__(self) -> None:
        table = Table()
        table.turn(table.schedule(NOW + MINUTE))
        [self._timer] = table.rows.values()
        self.limits: list[int] = []

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        yield

    async def pages(self, _tx: None, after: Mapping[int, Mark], limit: int) -> dict[int, list[Timer]]:
        self.limits.append(limit)
        first = max(NOW + MINUTE, *(mark.at for mark in after.values()))
        return {
            number: [
                replace(self._timer, id=new_id(), shard=number, fire_at=first + n * timedelta(milliseconds=1))
                for n in range(1, limit + 1)
            ]
            for number in after
        }


def _engine(database: _Endless, **settings: int) -> Engine:
    engine = Engine(
        **cast(Any, dict.fromkeys(("codec", "settlement", "sender", "events", "asker"), None)),
        db=cast(Any, database),
        store=cast(Any, database),
        clock=cast(Any, type("Still", (), {"now": lambda _: NOW})()),
        settings=SchedulerSettings(**cast(Any, settings)),
        shard_count=SHARDS,
        receivers=["digest"],
    )
    for number in range(SHARDS):
        engine.add(number=number, epoch=1, watermark=BEGINNING, newest_tombstones={})
    return engine


async def _limits(**settings: int) -> list[int]:
    database = _Endless()
    engine = _engine(database, **settings)
    while any(shard.wants_page() is not None for shard in engine._shards.values()):
        await engine._read_pages(engine._shards)
    return database.limits


async def test_the_first_page_of_a_shard_is_short_and_the_next_ones_grow() -> None:
    """What became due while it changed hands waits for the first one only."""
    assert await _limits(wheel_timers=SHARDS * 4_096, turn_timers=100_000) == [64, 512, 4_096]


async def test_no_more_is_read_at_once_than_a_turn_may_fire() -> None:
    """Divided among the shards that want something; a page may be as short as a timer."""
    assert await _limits(wheel_timers=SHARDS * 4_096, turn_timers=2_000) == [64, 500, 500]
    assert set(await _limits(wheel_timers=SHARDS * 64, turn_timers=1)) == {1}
