"""libs.clock and libs.test_clock, as far as they need no Postgres."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import cast

import psycopg
import pytest

from libs.clock import DatabaseClock, wait_at_most
from libs.postgres import Database
from libs.test_clock import TestClock

ORIGIN = datetime(2013, 7, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


class Monotonic:
    """A monotonic clock that is moved by hand; begins anywhere, as the real one does."""

    def __init__(self) -> None:
        self.now_s = 12_345.0
        self.wall_s = ORIGIN.timestamp() - self.now_s
        """What this machine's clock adds to it."""

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def monotonic(monkeypatch: pytest.MonkeyPatch) -> Monotonic:
    """Stands in for time.monotonic, and time.time, within libs.clock."""
    clock = Monotonic()
    wall = staticmethod(lambda: clock.wall_s + clock.now_s)
    monkeypatch.setattr("libs.clock.time", type("Time", (), {"monotonic": staticmethod(clock), "time": wall}))
    return clock


class Row:
    """A cursor with one row."""

    def __init__(self, at: datetime) -> None:
        self._at = at

    async def fetchone(self) -> tuple[datetime]:
        """The row."""
        return (self._at,)


class FakeDatabase:
    """Answers `SELECT clock_timestamp()`; each round trip takes `round_trips_s` of its own, in turn."""

    def __init__(self, monotonic: Monotonic, *round_trips_s: float) -> None:
        self.offset = ORIGIN - SECOND * monotonic.now_s
        self.raw = self
        self._monotonic = monotonic
        self._round_trips_s = list(round_trips_s)

    def read(self) -> "FakeDatabase":
        """A transaction."""
        return self

    async def __aenter__(self) -> "FakeDatabase":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def execute(self, _: str) -> Row:
        """There and back; Postgres looks at its clock half way."""
        half_s = self._round_trips_s.pop(0) / 2
        self._monotonic.now_s += half_s
        at = self.offset + SECOND * self._monotonic.now_s
        self._monotonic.now_s += half_s
        return Row(at)


async def measured(monotonic: Monotonic, *round_trips_s: float) -> tuple[DatabaseClock, FakeDatabase]:
    """A clock that has asked once."""
    db = FakeDatabase(monotonic, *(round_trips_s or (0.0,) * 99))
    return await DatabaseClock.connect(cast(Database, db), resync=SECOND), db


def test_a_clock_that_was_not_set_says_so() -> None:
    """It does not make up a time."""
    with pytest.raises(RuntimeError):
        DatabaseClock(cast(Database, None), resync=SECOND).now()


async def test_time_passes_with_the_monotonic_clock(monotonic: Monotonic) -> None:
    """No question to Postgres in between."""
    clock, _ = await measured(monotonic)
    monotonic.now_s += 90
    assert clock.now() == ORIGIN + timedelta(seconds=90)


async def test_the_shortest_round_trip_decides(monotonic: Monotonic) -> None:
    """The time is taken to be that of the middle of it."""
    clock, db = await measured(monotonic, 4.0, 0.5, 2.0)
    assert clock.now() == db.offset + SECOND * monotonic.now_s


async def test_a_correction_forward_is_taken_at_once(monotonic: Monotonic) -> None:
    """And its size is told."""
    clock, db = await measured(monotonic)
    db.offset += 5 * SECOND
    assert await clock.measure_once() == 5 * SECOND
    assert clock.now() == ORIGIN + 5 * SECOND


async def test_time_stands_still_until_a_correction_backward_is_made_up(monotonic: Monotonic) -> None:
    """It never goes back."""
    clock, db = await measured(monotonic)
    monotonic.now_s += 10
    assert clock.now() == ORIGIN + 10 * SECOND
    db.offset -= 5 * SECOND
    assert await clock.measure_once() == -5 * SECOND
    assert clock.now() == ORIGIN + 10 * SECOND
    monotonic.now_s += 4
    assert clock.now() == ORIGIN + 10 * SECOND
    monotonic.now_s += 3
    assert clock.now() == ORIGIN + 12 * SECOND


async def test_a_clock_that_was_refused_asks_again(monotonic: Monotonic) -> None:
    """Whatever Postgres said, a statement timeout say: it keeps what it knows, and the process goes on."""
    answered = asyncio.Event()

    class Refusing(FakeDatabase):
        is_refusing = False

        async def execute(self, statement: str) -> Row:
            if self.is_refusing:
                self.is_refusing = False
                raise psycopg.errors.QueryCanceled
            answered.set()
            return await super().execute(statement)

    db = Refusing(monotonic, *(0.0,) * 99)
    clock = await DatabaseClock.connect(cast(Database, db), resync=timedelta(0))
    answered.clear()
    db.is_refusing = True
    running = asyncio.create_task(clock.run())
    async with asyncio.timeout(5):
        await answered.wait()
    assert not running.done()
    running.cancel()


async def test_a_wait_ends_when_its_time_has_come() -> None:
    """Real time."""
    before_s = time.monotonic()
    await wait_at_most(timedelta(milliseconds=30), asyncio.Event())
    assert 0.02 < time.monotonic() - before_s < 5


async def test_a_wait_ends_when_it_is_woken_and_takes_the_wake() -> None:
    """The event is clear afterwards, ready for the next."""
    wake = asyncio.Event()
    waiting = asyncio.create_task(wait_at_most(timedelta(hours=1), wake))
    wake.set()
    async with asyncio.timeout(5):
        await waiting
    assert not wake.is_set()


async def test_a_wake_before_the_wait_is_not_lost() -> None:
    """The wait returns at once, although its time has not come."""
    wake = asyncio.Event()
    wake.set()
    async with asyncio.timeout(5):
        await wait_at_most(timedelta(hours=1), wake)
    assert not wake.is_set()


@pytest.mark.parametrize("duration", [timedelta(0), timedelta(seconds=-5)])
async def test_what_is_past_is_not_waited_for(duration: timedelta) -> None:
    """An overdue timer does not wait for a wake."""
    async with asyncio.timeout(5):
        await wait_at_most(duration, asyncio.Event())


async def a_test_clock(monotonic: Monotonic, *, rate: float, until: datetime) -> tuple[TestClock, DatabaseClock]:
    """A test clock that starts at ORIGIN with the real clock where it is."""
    real, _ = await measured(monotonic)
    clock = TestClock(real, "")
    clock._setting = (ORIGIN, real.now(), rate, until)
    return clock, real


async def test_business_seconds_pass_at_the_rate(monotonic: Monotonic) -> None:
    """Ten seconds at 360 × are an hour."""
    clock, _ = await a_test_clock(monotonic, rate=360, until=ORIGIN + timedelta(days=9))
    monotonic.now_s += 10
    assert clock.now() == ORIGIN + timedelta(hours=1)


async def test_the_leash_holds(monotonic: Monotonic) -> None:
    """Also after years at a high rate, which leave Python's calendar."""
    clock, _ = await a_test_clock(monotonic, rate=30_000, until=ORIGIN + timedelta(hours=1))
    monotonic.now_s += 400 * 86_400
    assert clock.now() == ORIGIN + timedelta(hours=1)


async def test_a_real_clock_behind_the_start_does_not_show(monotonic: Monotonic) -> None:
    """Business time begins at its origin, however little the processes' clocks differ."""
    clock, _ = await a_test_clock(monotonic, rate=30_000, until=ORIGIN + timedelta(hours=1))
    monotonic.now_s -= 0.01
    assert clock.now() == ORIGIN


async def test_a_halted_clock_is_waited_for_until_it_is_let_run() -> None:
    """Whoever waits for what lies beyond the leash is not woken by time."""
    real = DatabaseClock(cast(Database, None), resync=SECOND)
    clock = TestClock(real, "")
    clock._setting = (ORIGIN, ORIGIN, 30_000.0, ORIGIN)
    wake = asyncio.Event()
    waiting = asyncio.create_task(clock.wait_until(ORIGIN + SECOND, wake))
    await asyncio.sleep(0)
    assert clock._sleepers == {wake}
    assert not waiting.done()
    wake.set()
    async with asyncio.timeout(5):
        await waiting
    assert not clock._sleepers
