"""The simulation finds bugs: planted one at a time, each comes to light within 200 seeds."""

import pytest

from tests.simulation.checker import violations_of
from tests.simulation.defects import DEFECTS
from tests.simulation.shrink import shrunk
from tests.simulation.world import draw, simulate

QUICK = (3, 9, 31, 53, 32, 43)
"""These showed all of them once, so they are tried first; nothing depends on it but the time it takes."""
SEEDS = (*QUICK, *(seed for seed in range(200) if seed not in QUICK))


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found(name: str) -> None:
    """The first seed that shows it is enough."""
    with DEFECTS[name]():
        assert any(violations_of(simulate(seed)) for seed in SEEDS), f"nobody noticed: {name}"


def test_a_failing_history_is_made_short() -> None:
    """Of thirty actions those few are left that show what is wrong."""
    with DEFECTS["tombstones ignored"]():
        seed, violation = next((n, found[0]) for n in SEEDS if (found := violations_of(simulate(n))))
        actions, _ = shrunk(seed, violation)
    assert len(actions) <= 4 < len(draw(seed))
