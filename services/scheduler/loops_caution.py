"""Caution: how a shard whose firing has failed goes on, until the timer that is to blame has been found.

It fires half as many timers each time; a timer that fails alone is recorded as failed the next time. With every success
it fires twice as many again.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from uuid import UUID

from services.scheduler.timer import Timer


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
