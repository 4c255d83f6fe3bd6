"""What a turn reads of an entity: its timers that wait, and not the history behind them."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from msgspec.structs import replace

from libs.ids import new_id
from libs.postgres import Database
from services.scheduler.commands import Changes
from services.scheduler.needs import Known, Needs
from services.scheduler.store import _WAITING, TurnStore
from services.scheduler.timer import Mark, State, Timer
from tests.support import scheduler_table
from tests.support.fixtures import OpenDatabase
from tests.support.schemas import create_tables

NOON = datetime(2013, 7, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def timer(fire_at: datetime, state: State = State.SCHEDULED, **more: Any) -> Timer:
    """A timer of e in shard 3, whose watermark is at noon."""
    return replace(scheduler_table.timer(fire_at), shard=3, state=state, **more)


@pytest.fixture
async def db(postgres_url: str, open_database: OpenDatabase) -> Database:
    """The scheduler's tables, with two shards."""
    create_tables(postgres_url, "scheduler")
    db = await open_database("scheduler", postgres_url)
    async with db.transaction() as tx:
        await tx.raw.execute("INSERT INTO shard (shard, watermark_at) VALUES (3, %s), (4, now())", (NOON,))
    return db


async def store(db: Database, inserts: Sequence[Timer] = (), updates: Sequence[Timer] = ()) -> None:
    """What a turn decided."""
    changes = Changes(shard=3, inserts={one.id: one for one in inserts}, updates={one.id: one for one in updates})
    async with db.transaction() as tx:
        await TurnStore(replica="a").write(tx, [changes], NOON)


async def load(db: Database, needs: Needs) -> Known:
    """What a turn reads."""
    async with db.transaction() as tx:
        return await TurnStore(replica="a").load(tx, needs)


async def waiting(db: Database) -> list[UUID]:
    """What waits of e, in firing order."""
    known = await load(db, Needs(waiting={("acme", "e"), ("acme", "unheard of")}))
    return [one.id for one in known.waiting.get(("acme", "e"), ())]


async def test_what_waits_is_found_wherever_the_watermark_is(db: Database) -> None:
    """Also what was paused or buffered before its time came, and is long behind; nothing that has fired or ended."""
    at_noon = Mark(NOON, UUID(int=2**128 - 1))
    async with db.transaction() as tx:
        await tx.raw.execute("UPDATE shard SET watermark_id = %s WHERE shard = 3", (at_noon.id,))
    past, future = NOON - MINUTE, NOON + MINUTE
    expected = [timer(past - MINUTE, State.PAUSED), timer(past, State.BUFFERED)]
    states = (State.SCHEDULED, State.AWAITING, State.ASKING, State.RETRYING, State.PAUSED)
    expected += [timer(future + n * MINUTE, state) for n, state in enumerate(states)]
    over = [timer(past), timer(NOON), timer(past, State.DONE), timer(past, State.FAILED)]
    over += [timer(future, State.CANCELLED)]
    await store(db, [*over, *expected, timer(future, entity="f"), timer(future, tenant="other")])
    assert await waiting(db) == [one.id for one in expected]


async def test_a_pause_is_found_and_its_end_too_whoever_wrote_it(db: Database) -> None:
    """An older version says the state and nothing else."""
    one = timer(NOON - MINUTE)
    await store(db, [one])
    assert await waiting(db) == []
    await store(db, updates=[replace(one, state=State.PAUSED)])
    assert await waiting(db) == [one.id]
    await store(db, updates=[replace(one, state=State.CANCELLED)])
    assert await waiting(db) == []
    async with db.transaction() as tx:
        cursor = await tx.raw.execute("SELECT count(*) FROM timer WHERE is_on_hold")
        assert await cursor.fetchone() == (0,)


async def test_what_waits_is_found_without_the_history_being_read(db: Database) -> None:
    """Twenty thousand lie behind its two timers, and ten thousand of others wait: by any plan a few pages are read."""
    schedule_id, recurrence = new_id(), scheduler_table.hourly()
    history = [
        timer(NOON - n * MINUTE, schedule_id=schedule_id, nominal_at=NOON - n * MINUTE, recurrence=recurrence)
        for n in range(1, 20_001)
    ]
    others = [timer(NOON + n * MINUTE, entity=f"e{n}") for n in range(1, 10_001)]
    await store(db, [*history, *others, timer(NOON + MINUTE), timer(NOON - MINUTE, State.PAUSED)])
    query = _WAITING.replace("%s::text[], %s::text[]", "$1, $2")
    async with db.transaction() as tx:
        await tx.raw.execute("ANALYZE timer")
        await tx.raw.execute(f"PREPARE waiting (text[], text[]) AS {query}".encode())
        for mode in ("force_custom_plan", "force_generic_plan"):
            await tx.raw.execute(f"SET LOCAL plan_cache_mode = {mode}".encode())
            explain = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE waiting (ARRAY['acme'], ARRAY['e'])"
            row = await (await tx.raw.execute(explain)).fetchone()
            assert row is not None
            told = row[0] if isinstance(row[0], list) else json.loads(row[0])
            assert told[0]["Plan"]["Actual Rows"] == 2
            assert told[0]["Plan"]["Shared Hit Blocks"] + told[0]["Plan"]["Shared Read Blocks"] < 50


async def test_the_newest_occurrence_is_found_among_extras(db: Database) -> None:
    """What was triggered has no nominal time."""
    schedule_id, recurrence = new_id(), scheduler_table.hourly()
    times = [NOON - MINUTE, NOON + MINUTE]
    made = [timer(at, schedule_id=schedule_id, nominal_at=at, recurrence=recurrence) for at in times]
    extras = [timer(NOON, schedule_id=schedule_id), timer(NOON, schedule_id=schedule_id, recurrence=recurrence)]
    await store(db, [*made, *extras])
    known = await load(db, Needs(schedules={schedule_id}))
    assert known.schedules[schedule_id].id == made[1].id
