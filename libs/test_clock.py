"""The test clock: business time with an origin and a rate, the same in every process, on production code.

One row in Postgres (schema `test_clock`) says at which business time it began, when that was on the database's clock,
how many business seconds pass per second, and until when it may run:

    now = min(until, origin + rate × (database's clock − started))

`until` is a leash: whoever drives the clock lets it out step by step, so that a simulated month can pass in seconds and
still nothing overtakes what has to come before it. Processes hear of a change by NOTIFY, and read the row anew when
they connect, so a restarted process is on time at once. Each says what it has heard in the application_name of the
connection it listens on, which vanishes with it; so whoever lets the clock run can wait until all have.
"""

import asyncio
import contextlib
import logging
from datetime import UTC, datetime, timedelta
from typing import Self

import psycopg

from libs.clock import LONGEST_WAIT, DatabaseClock, wait_at_most
from libs.errors import FailedPrecondition, Unavailable

log = logging.getLogger(__name__)

CHANNEL = "carillon_test_clock"

_REREAD_S = 5.0
"""The row is read this often anyway, which shows whether the connection still lives."""

_PATIENCE_S = 5.0
"""How long a change waits for processes to hear of it; one that stands still must not stop the clock."""

_LISTENER = "test_clock "

_CREATE = """
    CREATE SCHEMA IF NOT EXISTS test_clock;
    CREATE TABLE IF NOT EXISTS test_clock.clock (
        only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
        origin_at timestamptz NOT NULL, started_at timestamptz NOT NULL,
        rate float8 NOT NULL CHECK (rate >= 0), until_at timestamptz NOT NULL)"""

# Each is one statement with its NOTIFY, so that no process is left with the old setting.
_SET = """
    INSERT INTO test_clock.clock (origin_at, started_at, rate, until_at)
    VALUES (%(origin)s, clock_timestamp(), %(rate)s, %(until)s)
    ON CONFLICT (only_row) DO UPDATE SET
        origin_at = EXCLUDED.origin_at, started_at = EXCLUDED.started_at,
        rate = EXCLUDED.rate, until_at = EXCLUDED.until_at
    RETURNING pg_notify(%(channel)s, '')"""

# The time is read once: at 30,000 × real time, a microsecond between two readings would lose 30 ms.
_ADVANCE = """
    WITH real AS MATERIALIZED (SELECT clock_timestamp() AS now)
    UPDATE test_clock.clock SET
        origin_at = least(until_at, origin_at + rate * greatest(real.now - started_at, interval '0')),
        started_at = greatest(real.now, started_at),
        rate = %(rate)s, until_at = greatest(until_at, %(until)s)
    FROM real
    RETURNING pg_notify(%(channel)s, ''), clock.started_at"""

_BEHIND = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND starts_with(application_name, %s) AND application_name <> %s"""

_READ = "SELECT origin_at, started_at, rate, until_at FROM test_clock.clock"


async def set_test_clock(url: str, *, origin: datetime, rate: float, until: datetime) -> None:
    """Set the clock to `origin`; it runs `rate` business seconds per second, to `until`. Creates its table if needed.

    For the start only: setting it back under running services would make them wait.
    """
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
        await conn.execute(_CREATE)
        await conn.execute(_SET, {"origin": origin, "rate": rate, "until": until, "channel": CHANNEL})


async def let_test_clock_run(
    conn: psycopg.AsyncConnection[tuple[object, ...]], *, until: datetime, rate: float
) -> None:
    """Let the clock go on from where it is, to `until` (never back). `conn` must be in autocommit mode.

    Returns when every process that follows the clock has heard of it, or after 5 s.
    """
    cursor = await conn.execute(_ADVANCE, {"until": until, "rate": rate, "channel": CHANNEL})
    row = await cursor.fetchone()
    if row is None:
        raise FailedPrecondition("no test clock has been set in this database")
    heard = _heard(row[1])
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_PATIENCE_S):
            while (await (await conn.execute(_BEHIND, (_LISTENER, heard))).fetchone()) != (0,):  # noqa: ASYNC110 - it is others who hear.
                await asyncio.sleep(0.002)


def _heard(started_at: object) -> str:
    """The application_name of a listener that knows the clock as it was started then."""
    assert isinstance(started_at, datetime)
    return f"{_LISTENER}{started_at.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"


class TestClock:
    """Follows the test clock's row. See libs.clock.Clock."""

    __test__ = False  # Not a test, whatever pytest thinks of the name.

    def __init__(self, database_clock: DatabaseClock, url: str) -> None:
        self._real = database_clock
        self._url = url
        self._setting: tuple[datetime, datetime, float, datetime] | None = None
        self._latest: datetime | None = None
        self._sleepers: set[asyncio.Event] = set()

    @classmethod
    async def connect(cls, database_clock: DatabaseClock, url: str) -> Self:
        """A clock that has read its row. Raises FailedPrecondition when no test clock has been set."""
        clock = cls(database_clock, url)
        try:
            async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
                await clock._read(conn)
        except psycopg.errors.UndefinedTable as err:
            raise FailedPrecondition(
                "CARILLON_TEST_CLOCK is on, but no test clock has been set in this database"
            ) from err
        except psycopg.OperationalError as err:
            raise Unavailable(f"cannot read the test clock: {err}") from err
        return clock

    def now(self) -> datetime:
        """See Clock."""
        assert self._setting is not None
        origin, started, rate, until = self._setting
        # Cut before it is added: years at a high rate leave Python's calendar.
        now = origin + min(max(self._real.now() - started, timedelta(0)) * rate, until - origin)
        if self._latest is not None and now < self._latest:
            return self._latest
        self._latest = now
        return now

    async def wait_until(self, at: datetime | None, wake: asyncio.Event) -> None:
        """See Clock; also returns when the clock is let run on."""
        assert self._setting is not None
        _, _, rate, until = self._setting
        wait = LONGEST_WAIT
        if at is not None and at <= until and rate > 0:
            wait = max(timedelta(0), at - self.now()) / rate
        self._sleepers.add(wake)
        try:
            await wait_at_most(wait, wake)
        finally:
            self._sleepers.discard(wake)

    async def run(self) -> None:
        """Follow the row until cancelled, through restarts of Postgres."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._real.run())
            tasks.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            with contextlib.suppress(psycopg.OperationalError, OSError):
                async with await psycopg.AsyncConnection.connect(self._url, autocommit=True) as conn:
                    await conn.execute(f"LISTEN {CHANNEL}")
                    while True:
                        await self._read(conn)
                        await conn.execute("SELECT set_config('application_name', %s, false)", (self._heard(),))
                        # To its end each time: an open `notifies` holds the connection, and no statement can run.
                        async for _ in conn.notifies(timeout=_REREAD_S, stop_after=1):
                            pass
            log.info("Lost the test clock's connection; connecting again.")
            await asyncio.sleep(0.2)

    def _heard(self) -> str:
        assert self._setting is not None
        return _heard(self._setting[1])

    async def _read(self, conn: psycopg.AsyncConnection[tuple[object, ...]]) -> None:
        async with conn.cursor() as cursor:
            row = await (await cursor.execute(_READ)).fetchone()
        if row is None:
            raise FailedPrecondition("CARILLON_TEST_CLOCK is on, but no test clock has been set in this database")
        setting = (row[0], row[1], float(row[2]), row[3])  # type: ignore[arg-type]
        if setting == self._setting:
            return
        self._setting = setting  # type: ignore[assignment]
        for sleeper in self._sleepers:
            sleeper.set()
