"""A hashed timing wheel: near timers, found again in firing order. Pure data, no clock, no I/O.

Varghese & Lauck, "Hashed and Hierarchical Timing Wheels" (SOSP 1987), scheme 6: time is cut into ticks, tick t lives in
slot t mod N, and a slot holds timers of several rounds unsorted. Adding and removing cost O(1); what has come due is
sorted once, when it is taken out. A bitmap of occupied slots lets the wheel jump over empty time, so that a clock that
leaps (a test clock, a process that was paused) costs no more than the timers it leaps over.

Invariant: everything at or before the cursor's tick is in `_ready`, sorted; everything after it is in a slot.
"""

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from uuid import UUID

from services.scheduler.timer import Mark, Timer

TICK = timedelta(milliseconds=50)
SLOTS = 1024

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_by_mark = attrgetter("fire_at", "id.int")  # As `mark`; comparing UUIDs themselves is slow.
_by_fire_at = attrgetter("fire_at")


class Wheel:
    """Timers of one shard, by id."""

    def __init__(self, now: datetime) -> None:
        self._slots: list[dict[UUID, Timer]] = [{} for _ in range(SLOTS)]
        self._occupied = 0  # Bit s is set while slot s has timers.
        self._cursor = _tick(now)
        self._ready: list[Timer] = []
        self._ids: dict[UUID, int | None] = {}  # None: in _ready.
        self._next_at: datetime | None = None
        self._is_next_known = True

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, timer_id: UUID) -> bool:
        return timer_id in self._ids

    def add(self, timer: Timer) -> None:
        """Add a timer; one that is in already is not added twice."""
        if timer.id in self._ids:
            return
        tick = _tick(timer.fire_at)
        if tick <= self._cursor:
            if self._ready and _by_mark(timer) < _by_mark(self._ready[-1]):
                insort(self._ready, timer, key=_by_mark)
            else:  # Pages come in order.
                self._ready.append(timer)
            self._ids[timer.id] = None
        else:
            self._put(timer, tick % SLOTS)
        if self._next_at is None or timer.fire_at < self._next_at:
            self._next_at = timer.fire_at

    def remove(self, timer_ids: Iterable[UUID]) -> None:
        """Take timers out; one that is not in is no error."""
        ready: set[UUID] = set()
        for timer_id in timer_ids:
            slot = self._ids.pop(timer_id, -1)
            if slot is None:
                ready.add(timer_id)
            elif slot >= 0:
                self._drop(slot, timer_id)
        if ready:
            self._ready = [timer for timer in self._ready if timer.id not in ready]
        self._is_next_known = False

    def take_due(self, now: datetime, limit: int) -> list[Timer]:
        """Take out timers with `fire_at <= now` in firing order, at most `limit`; the others stay first in line."""
        self._advance(_tick(now))
        count = min(limit, bisect_right(self._ready, now, key=_by_fire_at))
        taken, self._ready = self._ready[:count], self._ready[count:]
        for timer in taken:
            del self._ids[timer.id]
        self._is_next_known = False
        return taken

    def next_at(self) -> datetime | None:
        """When the first timer comes due; None when the wheel is empty."""
        if not self._is_next_known:
            self._next_at, self._is_next_known = self._find_next(), True
        return self._next_at

    def _find_next(self) -> datetime | None:
        if self._ready:
            return self._ready[0].fire_at
        for slot in self._occupied_slots():
            this_round = [t.fire_at for t in self._slots[slot].values() if _tick(t.fire_at) - self._cursor <= SLOTS]
            if this_round:
                return min(this_round)
        later = (timer.fire_at for slot in self._occupied_slots() for timer in self._slots[slot].values())
        return min(later, default=None)

    def cut(self, keep: int) -> Mark | None:
        """Drop all but the first `keep` timers; returns the last kept one's mark, None when nothing was dropped."""
        if len(self._ids) <= keep:
            return None
        everything = sorted([*self._ready, *(timer for slot in self._slots for timer in slot.values())], key=_by_mark)
        for timer in everything[keep:]:
            slot = self._ids.pop(timer.id)
            if slot is not None:
                self._drop(slot, timer.id)
        # Whatever is ready comes before whatever is in a slot.
        self._ready = self._ready[:keep]
        self._is_next_known = False
        return everything[keep - 1].mark

    def _advance(self, tick: int) -> None:
        """Move the cursor, and what it passes into `_ready`."""
        if tick <= self._cursor:
            return
        passed: list[Timer] = []
        for slot in self._occupied_slots():
            if (slot - self._cursor - 1) % SLOTS >= tick - self._cursor:
                break  # Further along the wheel than the cursor goes.
            for timer in [t for t in self._slots[slot].values() if _tick(t.fire_at) <= tick]:
                self._drop(slot, timer.id)
                self._ids[timer.id] = None
                passed.append(timer)
        self._cursor = tick
        if passed:
            self._ready = sorted([*self._ready, *passed], key=_by_mark)

    def _occupied_slots(self) -> Iterator[int]:
        """Occupied slots in the order in which the cursor will reach them."""
        first = (self._cursor + 1) % SLOTS
        rotated = (self._occupied >> first) | ((self._occupied & ((1 << first) - 1)) << (SLOTS - first))
        while rotated:
            lowest = rotated & -rotated
            yield (lowest.bit_length() - 1 + first) % SLOTS
            rotated ^= lowest

    def _put(self, timer: Timer, slot: int) -> None:
        self._slots[slot][timer.id] = timer
        self._occupied |= 1 << slot
        self._ids[timer.id] = slot

    def _drop(self, slot: int, timer_id: UUID) -> None:
        del self._slots[slot][timer_id]
        if not self._slots[slot]:
            self._occupied &= ~(1 << slot)


def _tick(at: datetime) -> int:
    return (at - _EPOCH) // TICK
