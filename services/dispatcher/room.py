"""How much may be under way at once: a bound per lane and one per destination within it. Pure.

What is claimed is started at once, so nothing waits for a place while its claim runs out; what finds no place stays in
the queue for the next round, or for another replica.
"""

from collections import Counter
from collections.abc import Mapping


class Room:
    """Counts what is under way. Without an entry in `limits` a lane has none."""

    def __init__(self, *, limits: Mapping[str, int], per_destination: int) -> None:
        self._limits = dict(limits)
        self._per_destination = per_destination
        self._lanes: Counter[str] = Counter()
        self._destinations: Counter[str] = Counter()

    def free(self) -> dict[str, int]:
        """The lanes that have places, and how many."""
        places = {lane: limit - self._lanes[lane] for lane, limit in self._limits.items()}
        return {lane: count for lane, count in places.items() if count > 0}

    def full_destinations(self) -> list[str]:
        """Destinations that must wait, in any order."""
        return [destination for destination, count in self._destinations.items() if count >= self._per_destination]

    def take(self, lane: str, destination: str) -> bool:
        """Take a place; False when there is none."""
        has_none = self._lanes[lane] >= self._limits.get(lane, 0)
        if has_none or (destination and self._destinations[destination] >= self._per_destination):
            return False
        self._lanes[lane] += 1
        if destination:
            self._destinations[destination] += 1
        return True

    def leave(self, lane: str, destination: str) -> None:
        """Give a place back."""
        self._lanes[lane] -= 1
        if destination:
            self._destinations[destination] -= 1
            if not self._destinations[destination]:
                del self._destinations[destination]
