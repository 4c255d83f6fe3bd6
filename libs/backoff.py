"""How long to wait before trying again: exponential, with full jitter. Pure.

Full jitter draws the whole wait at random between nothing and the exponential bound. Of the usual variants it spreads
callers that failed together best, at the least work for the other side (M. Brooker, "Exponential Backoff And Jitter",
AWS Architecture Blog, 2015).
"""

from dataclasses import dataclass
from datetime import timedelta

_MOST_STEPS = 62  # Beyond any useful bound, and within a float.


@dataclass(frozen=True, kw_only=True, slots=True)
class Backoff:
    """The bound starts at `first` and is multiplied with every failure, up to `longest`."""

    first: timedelta
    longest: timedelta
    multiplier: float = 2.0

    def bound(self, failures: int) -> timedelta:
        """The longest possible wait after that many failures, counted from 1."""
        steps = min(max(failures, 1) - 1, _MOST_STEPS)
        seconds = min(self.first.total_seconds() * self.multiplier**steps, self.longest.total_seconds())
        return timedelta(seconds=seconds)

    def delay(self, failures: int, *, draw: float, retry_after: timedelta | None = None) -> timedelta:
        """The wait after that many failures; `draw` is random in [0, 1).

        Never less than `retry_after`, which is what the other side asked for: the jitter comes on top of it, because
        everybody it told so would otherwise come back in the same second.
        """
        asked_for = max(retry_after or timedelta(0), timedelta(0))
        return asked_for + self.bound(failures) * draw
