"""What is told of clocks: how far they are apart, how far off one was, and how sure that is."""

import pytest

from tests.support.metrics import sample
from tests.unit.test_clock import SECOND, Monotonic, measured, monotonic

__all__ = ["monotonic"]


@pytest.mark.parametrize("ahead_s", [0.0, 2.5, -40.0])
async def test_the_machines_clock_is_compared_with_the_databases(monotonic: Monotonic, ahead_s: float) -> None:
    """Above 0 it is ahead; half of the round trip is taken into account."""
    monotonic.wall_s += ahead_s
    await measured(monotonic, 3.0, 1.0, 3.0)
    assert sample("carillon_clock_drift_seconds") == pytest.approx(ahead_s, abs=1e-6)
    assert sample("carillon_clock_uncertainty_seconds") == 0.5


async def test_a_correction_is_told_until_the_next_measurement(monotonic: Monotonic) -> None:
    """Signed: the database's clock was set forward, then stayed."""
    clock, db = await measured(monotonic)
    assert sample("carillon_clock_correction_seconds") == 0
    db.offset += 5 * SECOND
    await clock.measure_once()
    assert sample("carillon_clock_correction_seconds") == 5
    await clock.measure_once()
    assert sample("carillon_clock_correction_seconds") == 0


async def test_the_age_of_the_measurement_grows_until_the_next(monotonic: Monotonic) -> None:
    """While Postgres is away, nobody corrects anything."""
    clock, _ = await measured(monotonic)
    monotonic.now_s += 90
    assert sample("carillon_clock_age_seconds") == 90
    await clock.measure_once()
    assert sample("carillon_clock_age_seconds") == 0
