"""Many histories of the scheduler, none of which may break an invariant.

`make chaos` runs these and many more, so a few of them are enough here.
"""

import os
import subprocess
import sys
from random import Random

import pytest

from tests.simulation.checker import violations_of
from tests.simulation.plan import draw_plan
from tests.simulation.shrink import explained
from tests.simulation.world import simulate

CHUNK = 10


@pytest.mark.parametrize("first", range(0, 50, CHUNK))
def test_inv1_to_inv5_hold_in_every_history(first: int) -> None:
    """Crashes, pauses, lost and doubled frames, a wiped broker, Postgres away: see plan.py.

    Of those that break one, the first is shown as the shortest history that still does.
    """
    for seed in range(first, first + CHUNK):
        if violations := violations_of(simulate(seed)):
            pytest.fail(explained(seed, violations), pytrace=False)


def test_one_seed_is_one_history_whatever_the_hashes() -> None:
    """Byte for byte, also in another process with another order of hashing."""
    code = "from tests.simulation.world import simulate; print(simulate(4).fingerprint())"
    told = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    ]
    assert told == [simulate(4).fingerprint()] * 2


def test_the_plans_hold_everything_that_can_be_planned() -> None:
    """Each kind of action comes up in the seeds that every run of the tests takes."""
    kinds = {type(action).__name__ for seed in range(200) for action in draw_plan(Random(f"{seed} plan"))}
    assert kinds == {
        *("Schedule", "Recur", "Start", "Facts", "Cancel", "Pause", "Resume", "Move", "Trigger", "Backfill"),
        *("Crash", "Leave", "Stop", "Slow", "Cut", "PostgresAway", "Wipe", "Noise", "StepClock"),
    }
