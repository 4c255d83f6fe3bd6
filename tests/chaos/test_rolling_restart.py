"""A rolling restart of everything under load, two replicas of each service behind one name."""

from pathlib import Path

import pytest

from local.stack import SERVICES
from tests.support.rolling_load import RollingLoad, restart_all

RATE = 50
"""Timers a second."""
LASTS_S = 60
HANDOVER_S = 2.5
"""Far below the lease of 5 s: shards were handed over, and nobody waited for a lease to end. `make bench-rolling`
measures how long it takes; here the machine may be busy with anything."""


@pytest.mark.timeout(600)
async def test_a_rolling_restart_fails_no_call_and_loses_no_timer(tmp_path: Path) -> None:
    """Each replica is asked to end, started again, and has its share again before the next one goes."""
    async with RollingLoad.running(tmp_path / "stack", rate=RATE, seconds=LASTS_S) as load:
        await restart_all(load)
        await load.finish()
    seen = load.seen
    assert seen.failed == []
    assert set(seen.calls) == set(SERVICES)
    assert seen.repeated == 0
    assert len(seen.late_s) == RATE * LASTS_S
    assert max(seen.late_s.values()) < HANDOVER_S
    assert len(seen.taken_s) == 2 * len(SERVICES)
