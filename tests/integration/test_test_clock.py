"""libs.clock and libs.test_clock against a real Postgres."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from libs.clock import DatabaseClock
from libs.errors import FailedPrecondition
from libs.test_clock import TestClock, let_test_clock_run, set_test_clock
from local.servers import PostgresServer
from tests.support.fixtures import OpenDatabase

ORIGIN = datetime(2013, 7, 1, tzinfo=UTC)
DAY = timedelta(days=1)
RESYNC = timedelta(seconds=10)


@asynccontextmanager
async def following(clock: TestClock) -> AsyncIterator[None]:
    """The clock hears of changes in here."""
    task = asyncio.create_task(clock.run())
    try:
        yield
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def reaches(clock: TestClock, at: datetime, timeout_s: float = 15) -> None:
    """Wait for business time, the way services do."""
    async with asyncio.timeout(timeout_s):
        while clock.now() < at:
            await clock.wait_until(at, asyncio.Event())


@pytest.fixture
async def real(open_database: OpenDatabase) -> DatabaseClock:
    """The clock of this test's database."""
    return await DatabaseClock.connect(await open_database("intake"), resync=RESYNC)


async def test_the_database_clock_is_that_of_postgres(real: DatabaseClock, postgres_url: str) -> None:
    """Without asking it: between what Postgres says before and after, give or take a round trip."""
    async with await psycopg.AsyncConnection.connect(postgres_url) as conn:
        before = await (await conn.execute("SELECT clock_timestamp()")).fetchone()
        now = real.now()
        after = await (await conn.execute("SELECT clock_timestamp()")).fetchone()
    assert before is not None
    assert after is not None
    assert before[0] - timedelta(milliseconds=50) < now < after[0] + timedelta(milliseconds=50)
    assert now.utcoffset() == timedelta(0)


async def test_measuring_again_finds_little_to_correct(real: DatabaseClock) -> None:
    """Both clocks run at the same rate."""
    assert abs(await real.measure_once()) < timedelta(milliseconds=50)


async def test_without_a_test_clock_set_there_is_none(real: DatabaseClock, postgres_url: str) -> None:
    """A service that is told to use one refuses to start."""
    with pytest.raises(FailedPrecondition):
        await TestClock.connect(real, postgres_url)


async def test_business_time_runs_from_its_origin_at_its_rate(real: DatabaseClock, postgres_url: str) -> None:
    """A day passes in well under a second at 864,000 × real time, and halts at its leash."""
    await set_test_clock(postgres_url, origin=ORIGIN, rate=864_000, until=ORIGIN + DAY)
    clock = await TestClock.connect(real, postgres_url)
    assert ORIGIN <= clock.now() <= ORIGIN + DAY
    await reaches(clock, ORIGIN + DAY)
    assert clock.now() == ORIGIN + DAY


async def test_all_processes_read_the_same_time(
    real: DatabaseClock, postgres_url: str, open_database: OpenDatabase
) -> None:
    """Two clocks, each with its own measurement of the database's clock, agree to a few milliseconds × the rate."""
    await set_test_clock(postgres_url, origin=ORIGIN, rate=1000, until=ORIGIN + 365 * DAY)
    one = await TestClock.connect(real, postgres_url)
    other = await TestClock.connect(
        await DatabaseClock.connect(await open_database("digest"), resync=RESYNC), postgres_url
    )
    assert abs(one.now() - other.now()) < timedelta(milliseconds=50) * 1000


async def test_letting_the_clock_run_wakes_those_who_wait(real: DatabaseClock, postgres_url: str) -> None:
    """Again and again: each step is heard of, from a halt."""
    await set_test_clock(postgres_url, origin=ORIGIN, rate=0, until=ORIGIN)
    clock = await TestClock.connect(real, postgres_url)
    async with following(clock), await psycopg.AsyncConnection.connect(postgres_url, autocommit=True) as driver:
        for day in range(1, 6):
            waiting = asyncio.create_task(reaches(clock, ORIGIN + day * DAY))
            await let_test_clock_run(driver, until=ORIGIN + day * DAY, rate=1e7)
            await waiting
            assert clock.now() == ORIGIN + day * DAY


async def test_a_change_of_rate_moves_no_time(real: DatabaseClock, postgres_url: str) -> None:
    """The clock goes on from where it is, and never to before what it has shown."""
    await set_test_clock(postgres_url, origin=ORIGIN, rate=86_400, until=ORIGIN + 365 * DAY)
    clock = await TestClock.connect(real, postgres_url)
    async with following(clock), await psycopg.AsyncConnection.connect(postgres_url, autocommit=True) as driver:
        shown = clock.now()
        for rate in (0, 3600, 0, 86_400, 0):
            await let_test_clock_run(driver, until=ORIGIN, rate=rate)
            assert clock.now() >= shown
            shown = clock.now()
        late_comer = await TestClock.connect(real, postgres_url)
        assert timedelta(0) <= late_comer.now() - ORIGIN < timedelta(days=30)


async def test_the_leash_is_never_shortened(real: DatabaseClock, postgres_url: str) -> None:
    """An `until` before the one that holds changes nothing."""
    await set_test_clock(postgres_url, origin=ORIGIN, rate=1e7, until=ORIGIN + DAY)
    async with await psycopg.AsyncConnection.connect(postgres_url, autocommit=True) as driver:
        await let_test_clock_run(driver, until=ORIGIN - DAY, rate=1e7)
    clock = await TestClock.connect(real, postgres_url)
    await reaches(clock, ORIGIN + DAY)


async def test_a_restart_of_postgres_is_survived(private_postgres: PostgresServer, open_database: OpenDatabase) -> None:
    """The clock connects again and hears what was changed meanwhile and later."""
    url = private_postgres.url
    await set_test_clock(url, origin=ORIGIN, rate=0, until=ORIGIN)
    real = await DatabaseClock.connect(await open_database("intake", url), resync=RESYNC)
    clock = await TestClock.connect(real, url)
    async with following(clock):
        waiting = asyncio.create_task(reaches(clock, ORIGIN + DAY, timeout_s=30))
        await asyncio.to_thread(private_postgres.restart)
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as driver:
            await let_test_clock_run(driver, until=ORIGIN + DAY, rate=1e7)
        await waiting


async def test_whoever_lets_the_clock_run_hears_when_all_have_heard(
    postgres_url: str, open_database: OpenDatabase
) -> None:
    """Three followers: right after the call each reads the new stop, although none was given time to."""
    await set_test_clock(postgres_url, origin=ORIGIN, rate=0, until=ORIGIN)
    real = await DatabaseClock.connect(await open_database("intake"), resync=timedelta(seconds=10))
    clocks = [await TestClock.connect(real, postgres_url) for _ in range(3)]
    following = [asyncio.create_task(clock.run()) for clock in clocks]
    async with await psycopg.AsyncConnection.connect(postgres_url, autocommit=True) as driver:
        while await _listeners(driver) < len(clocks):  # noqa: ASYNC110 - only Postgres knows.
            await asyncio.sleep(0.01)
        for day in range(1, 30):
            await let_test_clock_run(driver, until=ORIGIN + day * DAY, rate=1e12)
            assert [clock.now() for clock in clocks] == [ORIGIN + day * DAY] * 3
    for task in following:
        task.cancel()
    await asyncio.gather(*following, return_exceptions=True)


async def _listeners(conn: psycopg.AsyncConnection[tuple[object, ...]]) -> int:
    cursor = await conn.execute(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND starts_with(application_name, 'test_clock ')"
    )
    row = await cursor.fetchone()
    assert row is not None
    return int(str(row[0]))
