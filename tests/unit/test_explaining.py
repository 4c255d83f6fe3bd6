"""Stories that are too long: what is kept of them, and that it is said."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from carillon.explain.v1 import explain_pb2

from libs.explaining import MOST_BYTES, MOST_ENTRIES, Bounds, nearest

NOON = datetime(2013, 7, 4, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


@dataclass(frozen=True)
class Thing:
    """What happened so many seconds after noon."""

    second: int
    sentence: str = ""

    @property
    def at(self) -> datetime:
        return NOON + self.second * SECOND


def message(thing: Thing) -> explain_pb2.Entry:
    """As callers see it."""
    return explain_pb2.Entry(kind=str(thing.second), sentence=thing.sentence)


def test_a_short_story_is_told_whole_and_in_order() -> None:
    """What happened at once stays in the order in which it was told."""
    told = [Thing(2), Thing(-1, "first"), Thing(-1, "second")]
    entries, is_cut = nearest(told, NOON, message)
    assert [(one.kind, one.sentence) for one in entries] == [("-1", "first"), ("-1", "second"), ("2", "")]
    assert not is_cut


def test_of_a_long_story_what_is_nearest_to_now_is_told() -> None:
    """The past is long, and what will come is not lost for it."""
    told = [Thing(second) for second in range(-3 * MOST_ENTRIES, 10)]
    entries, is_cut = nearest(told, NOON, message)
    assert [int(one.kind) for one in entries] == [*range(10 - MOST_ENTRIES, 10)]
    assert is_cut


def test_an_answer_fits_into_a_message() -> None:
    """Whatever its sentences say."""
    told = [Thing(second, "x" * 10_000) for second in range(900)]
    entries, is_cut = nearest(told, NOON, message)
    assert 0.98 * MOST_BYTES < sum(one.ByteSize() for one in entries) <= MOST_BYTES
    assert [int(one.kind) for one in entries] == [*range(len(entries))]
    assert is_cut


def test_bounds_remember_that_there_may_be_more() -> None:
    """As soon as one list was as long as it could be."""
    bounds = Bounds()
    assert bounds.noted([1, 2], 3) == [1, 2]
    assert not bounds.are_met
    bounds.noted([1, 2, 3], 3)
    bounds.noted([], 3)
    assert bounds.are_met
