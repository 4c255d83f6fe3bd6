"""Frames in memory that wait for their shards' turns; bounded per shard, so that none starves the others (INV-9).

Mail for a shard that was lost waits here until this replica has taken it again. When another replica has it, the leases
loop removes the mail, and the broker brings it there.
"""

import asyncio
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import UUID

from libs.links.receiver import IncomingFrame
from services.scheduler.commands import Command


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A frame for a shard, decoded. `is_suspect`: a turn it was part of failed, so it is to be tried alone."""

    shard: int
    incoming: IncomingFrame
    commands: list[Command]
    is_suspect: bool = False


@dataclass(slots=True)
class _Box:
    arrivals: deque[Arrival] = field(default_factory=deque)
    has_room: asyncio.Event = field(default_factory=asyncio.Event)


class Mailbox:
    """One queue per shard, each of at most `limit` frames; frames that are put back may exceed it by one turn's."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._boxes: dict[int, _Box] = {}

    def __len__(self) -> int:
        """Frames in it."""
        return sum(len(box.arrivals) for box in self._boxes.values())

    async def put(self, arrival: Arrival) -> None:
        """Add a frame; waits while its shard's queue is full."""
        box = self._boxes.setdefault(arrival.shard, _Box())
        while len(box.arrivals) >= self._limit:
            box.has_room.clear()
            await box.has_room.wait()
        box.arrivals.append(arrival)

    def put_back(self, arrivals: Iterable[Arrival]) -> None:
        """Return frames to the heads of their queues, in the order in which they were taken."""
        for arrival in reversed([*arrivals]):
            self._boxes.setdefault(arrival.shard, _Box()).arrivals.appendleft(arrival)

    def take_suspect(self, shards: Collection[int]) -> Arrival | None:
        """The next frame of these shards that is to be tried alone."""
        for shard, box in self._boxes.items():
            if shard in shards and box.arrivals and box.arrivals[0].is_suspect:
                return self._pop(box)
        return None

    def take(self, shards: Collection[int], most_entries: int) -> list[Arrival]:
        """Frames of these shards with at most `most_entries` entries together, at least one; each shard in its turn.

        Each id once: a copy of a frame waits for the next turn, where the inbox knows it.
        """
        taken: list[Arrival] = []
        seen: set[UUID] = set()
        entries = 0
        open_boxes = deque(box for shard, box in self._boxes.items() if shard in shards and box.arrivals)
        while open_boxes:
            box = open_boxes.popleft()
            first = box.arrivals[0]
            if first.is_suspect or first.incoming.id in seen:
                continue
            entries += len(first.commands)
            if taken and entries > most_entries:
                break
            seen.add(first.incoming.id)
            taken.append(self._pop(box))
            if box.arrivals:
                open_boxes.append(box)
        self._rotate()
        return taken

    def remove(self, shards: Iterable[int]) -> list[Arrival]:
        """Take out everything for these shards."""
        return [arrival for shard in shards if (box := self._boxes.pop(shard, None)) for arrival in box.arrivals]

    def _rotate(self) -> None:
        """Let another shard be first next time."""
        if self._boxes:
            shard = next(iter(self._boxes))
            self._boxes[shard] = self._boxes.pop(shard)

    @staticmethod
    def _pop(box: _Box) -> Arrival:
        box.has_room.set()
        return box.arrivals.popleft()


async def hand_back(frames: Iterable[IncomingFrame]) -> None:
    """Have the broker give them to somebody else, at once."""
    for one in frames:
        await one.message.nak(timedelta(0))
