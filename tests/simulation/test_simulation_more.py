"""The other half of the histories of test_simulation, in a file of its own so that two workers share them."""

import pytest

from tests.simulation.test_simulation import CHUNK, expect_no_violation


@pytest.mark.parametrize("first", range(100, 200, CHUNK))
def test_inv1_to_inv5_hold_in_more_histories(first: int) -> None:
    """As in test_simulation."""
    expect_no_violation(first)
