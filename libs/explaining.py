"""What Explain of any service answers: a story, or of one that is too long the part that is nearest to now."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Protocol, TypeVar

from carillon.explain.v1 import explain_pb2

MOST_ENTRIES = 1_000
MOST_BYTES = 7 << 19
"""Of 4 MiB, which clients take by default, a little is left for what is around it."""


class Happening(Protocol):
    """What happened, or will, as a service has it."""

    @property
    def at(self) -> datetime: ...


Happened = TypeVar("Happened", bound=Happening)
Row = TypeVar("Row")


class Bounds:
    """Remembers whether there may be more of something than was read."""

    def __init__(self) -> None:
        self.are_met = False

    def noted(self, rows: list[Row], most: int) -> list[Row]:
        """The same rows, of which at most so many were read."""
        self.are_met |= len(rows) >= most
        return rows


def nearest(
    told: Sequence[Happened], now: datetime, message: Callable[[Happened], explain_pb2.Entry]
) -> tuple[list[explain_pb2.Entry], bool]:
    """Ascending by time, at most MOST_ENTRIES and MOST_BYTES; and whether some were left out."""
    kept: list[tuple[datetime, int, explain_pb2.Entry]] = []
    room = MOST_BYTES
    by_distance = sorted(range(len(told)), key=lambda number: abs(told[number].at - now))
    for number in by_distance[:MOST_ENTRIES]:
        entry = message(told[number])
        room -= entry.ByteSize() + 8
        if room < 0:
            break
        kept.append((told[number].at, number, entry))
    kept.sort(key=lambda one: one[:2])  # What happened at the same time stays in the order in which it was told.
    return [entry for _, _, entry in kept], len(kept) < len(told)
