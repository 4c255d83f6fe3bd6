"""Exponential backoff with full jitter."""

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from libs.backoff import Backoff

SECOND = timedelta(seconds=1)
BACKOFF = Backoff(first=10 * SECOND, longest=60 * SECOND)


def test_the_bound_doubles_up_to_the_longest() -> None:
    """After 1, 2, 3… failures."""
    assert [BACKOFF.bound(n) // SECOND for n in (1, 2, 3, 4, 5, 1_000_000)] == [10, 20, 40, 60, 60, 60]


def test_the_wait_is_drawn_below_the_bound() -> None:
    """Full jitter: anything from nothing to the bound."""
    assert BACKOFF.delay(2, draw=0.0) == timedelta(0)
    assert BACKOFF.delay(2, draw=0.25) == 5 * SECOND


def test_what_the_other_side_asks_for_is_the_least() -> None:
    """The jitter comes on top, so that not everybody comes back in the same second."""
    assert BACKOFF.delay(1, draw=0.5, retry_after=90 * SECOND) == 95 * SECOND
    assert BACKOFF.delay(1, draw=0.5, retry_after=-90 * SECOND) == 5 * SECOND


@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_the_wait_stays_within_its_bounds(failures: int, draw: float) -> None:
    """Never negative, never longer than the longest."""
    assert timedelta(0) <= BACKOFF.delay(failures, draw=draw) <= 60 * SECOND
