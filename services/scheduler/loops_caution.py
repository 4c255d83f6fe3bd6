"""How many timers a turn may fire: fewer where firing has failed, and where timers take long to decide.

Caution is for a shard whose firing has failed, until the timer that is to blame has been found. It fires half as many
timers each time; a timer that fails alone is recorded as failed the next time. With every success it fires twice as
many again.

Pace is for conditions over large facts and rules that are dear to count: milliseconds a timer, while Postgres ends a
transaction in which nothing has come for a lease.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from datetime import timedelta
from uuid import UUID

from services.scheduler.loops_turn import Turn
from services.scheduler.timer import Timer


class TurnTooSlow(Exception):
    """Deciding took so long that Postgres ended the transaction; the same turn would end like that again."""


class Caution:
    """The shards that go on with caution."""

    def __init__(self) -> None:
        self._most_timers: dict[int, int] = {}
        self._blamed: dict[int, tuple[UUID, str]] = {}

    @property
    def shards(self) -> Set[int]:
        """Which they are."""
        return self._most_timers.keys()

    @property
    def blamed(self) -> dict[UUID, str]:
        """Timers that failed alone, and why."""
        return dict(self._blamed.values())

    def most_timers(self, shard: int) -> int:
        """How many timers a cautious shard may fire in a turn."""
        return self._most_timers[shard]

    def blame(self, taken: Mapping[int, Sequence[Timer]], error: Exception, *, is_alone: bool) -> None:
        """A turn that took these timers failed; `is_alone`: they were all there was to it."""
        for shard, timers in taken.items():
            self._most_timers[shard] = max(1, len(timers) // 2)
            if is_alone and len(timers) == 1:
                self._blamed[shard] = (timers[0].id, f"{type(error).__name__}: {error}")

    def relax(self, shards: Iterable[int], enough: int) -> None:
        """These shards have fired; those that may fire `enough` again need no more caution."""
        for shard in self.shards & set(shards):
            self._blamed.pop(shard, None)
            self._most_timers[shard] *= 2
            if self._most_timers[shard] >= enough:
                del self._most_timers[shard]

    def forget(self, shard: int) -> None:
        """It has gone."""
        self._most_timers.pop(shard, None)
        self._blamed.pop(shard, None)


class Pace:
    """How long this process takes to decide a timer, of late."""

    def __init__(self, lease_ttl: timedelta) -> None:
        self._enough_s = lease_ttl.total_seconds() / 4
        self._timer_s = 0.0

    def most_timers(self, wanted: int) -> int:
        """Of `wanted` timers, those that are decided in a quarter of a lease; at least one."""
        return wanted if wanted * self._timer_s <= self._enough_s else max(1, int(self._enough_s / self._timer_s))

    def own_fault(self, turn: Turn, error: Exception) -> Exception:
        """What a turn failed of: its own slowness, where that explains that its transaction was lost."""
        is_slow = turn.decided_s > 2 * self._enough_s
        return TurnTooSlow(f"deciding took {turn.decided_s:.1f} s: {error}") if is_slow else error

    @contextmanager
    def deciding(self, turn: Turn, timers: int = 0) -> Iterator[None]:
        """Measure the processor time: a process that was stopped meanwhile was not slow.

        Slower counts at once, faster by half each time.
        """
        began_s = time.thread_time()
        try:
            yield
        finally:
            spent_s = time.thread_time() - began_s
            turn.decided_s += spent_s
            if timers:
                self._timer_s = max(spent_s / timers, (self._timer_s + spent_s / timers) / 2)
