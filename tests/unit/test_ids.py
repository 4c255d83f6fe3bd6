"""libs.ids and libs.sharding."""

import pickle
from collections import Counter
from datetime import UTC, datetime, timedelta
from uuid import RFC_4122, UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from libs.errors import InvalidArgument
from libs.ids import derived_id, id_beside, id_floor, id_of, id_time, new_id, parse_id
from libs.sharding import shard_of

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
instants = st.timedeltas(timedelta(days=1), timedelta(days=2_900_000)).map(lambda age: EPOCH + age)


def test_new_ids_ascend() -> None:
    """So that inserts stay on the right-hand edge of the index."""
    made = [new_id() for _ in range(10_000)]
    assert made == sorted(made)
    assert len(set(made)) == 10_000
    assert {one.version for one in made} == {7}


def test_an_id_tells_when_it_was_made() -> None:
    """RFC 9562, appendix A.6."""
    assert id_time(UUID("017F22E2-79B0-7CC3-98C4-DC0C0C07398F")) == datetime(2022, 2, 22, 19, 22, 22, tzinfo=UTC)


def test_another_id_of_the_same_time_is_a_new_one() -> None:
    """As old as the first, however many are made."""
    first = UUID("017F22E2-79B0-7CC3-98C4-DC0C0C07398F")
    made = [id_beside(first) for _ in range(1_000)]
    assert len({first, *made}) == 1_001
    assert {(one.version, one.variant, id_time(one)) for one in made} == {(7, RFC_4122, id_time(first))}


def test_other_ids_tell_no_time() -> None:
    """A derived id must not be mistaken for a young or old one."""
    with pytest.raises(ValueError, match="not a UUIDv7"):
        id_time(derived_id("window", 1))


@given(instants)
def test_the_floor_of_an_instant_is_below_its_ids_and_above_those_before(at: datetime) -> None:
    """Ranges over ids are ranges over time, to the millisecond."""
    floor = id_floor(at)
    assert timedelta(0) <= at - id_time(floor) < timedelta(milliseconds=1)
    assert id_floor(at - timedelta(milliseconds=1)) < floor < id_floor(at + timedelta(milliseconds=1))
    assert UUID(int=floor.int | (1 << 62) - 1) >= floor


def test_derived_ids_are_the_same_for_ever() -> None:
    """They are stored, and found again by deriving them."""
    window = UUID("0190b6f2-0000-7000-8000-000000000001")
    assert derived_id("window-timer", window) == UUID("9cdf0012-ba31-5619-82a3-74d88a1ba6d2")


@given(st.binary(min_size=16, max_size=16))
def test_an_id_of_bytes_is_like_any_other(id_bytes: bytes) -> None:
    """Made by a short cut: equal, of the same hash, printed, sorted and sent alike."""
    made, other = id_of(id_bytes), UUID(bytes=id_bytes)
    assert made == other
    assert (hash(made), str(made), repr(made), made.bytes, made.is_safe) == (
        *(hash(other), str(other), repr(other)),
        *(other.bytes, other.is_safe),
    )
    assert pickle.loads(pickle.dumps(made)) == other


@pytest.mark.parametrize("length", [0, 15, 17])
def test_an_id_has_sixteen_bytes(length: int) -> None:
    """Less or more is no id."""
    with pytest.raises(ValueError, match="16 bytes"):
        id_of(bytes(length))


parts_of_ids = st.lists(st.text("ab\x1e\x1f01", max_size=4), min_size=1, max_size=3)


@given(parts_of_ids, parts_of_ids)
@example(["a", "b"], ["a\x1fb"])
@example(["a\x1f", "b"], ["a", "\x1fb"])
@example(["\x1e1"], ["\x1f"])
def test_derived_ids_tell_their_parts_apart(parts: list[str], other: list[str]) -> None:
    """("ab", "c") is not ("a", "bc"), whatever callers put into them."""
    assert (derived_id(*parts) == derived_id(*other)) == (parts == other)


def test_an_id_is_read_from_text() -> None:
    """Upper case or lower."""
    assert parse_id("017F22E2-79B0-7CC3-98C4-DC0C0C07398F", "id") == UUID("017f22e279b07cc398c4dc0c0c07398f")


@pytest.mark.parametrize("text", ["", "nonsense", "017f22e2", "017F22E2-79B0-7CC3-98C4-DC0C0C07398G", "x" * 100_000])
def test_what_is_no_id_is_refused_naming_the_field(text: str) -> None:
    """And the answer does not repeat a megabyte of it."""
    with pytest.raises(InvalidArgument) as caught:
        parse_id(text, "timers[3].id")
    (violation,) = caught.value.violations
    assert violation.field == "timers[3].id"
    assert len(violation.description) < 120


def test_a_shard_is_the_same_for_ever() -> None:
    """Changing these would scatter what is stored."""
    assert [shard_of("acme", f"account:{n}", 64) for n in range(8)] == [59, 39, 9, 56, 33, 7, 59, 7]
    assert shard_of("ac", "me", 1 << 30) != shard_of("acm", "e", 1 << 30)


def test_entities_are_spread_over_all_shards() -> None:
    """Evenly: none of 64 has twice its part of 64,000."""
    counts = Counter(shard_of("acme", f"account:{n}", 64) for n in range(64_000))
    assert set(counts) == set(range(64))
    assert max(counts.values()) < 1_200
