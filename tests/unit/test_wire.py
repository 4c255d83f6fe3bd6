"""Between protobuf and Python: conversions, field checks and page tokens."""

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import NullValue
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from libs import wire
from libs.errors import InvalidArgument, Violations

NOON = datetime(2013, 7, 1, 12, 0, 0, 123456, tzinfo=UTC)
AN_ID = UUID("018f4e0c-6b1e-7cc3-98c4-dc0c0c07398f")


def found(check: Callable[[Violations], object]) -> list[str]:
    """What a check finds wrong, as text."""
    violations = Violations()
    check(violations)
    return [f"{one.field} {one.description}" for one in violations]


FIRST, LAST = NOON.replace(1, 1, 1, tzinfo=None), NOON.replace(9999, 12, 31, tzinfo=None)


class TestConversions:
    """Exact to the microsecond, both ways."""

    @given(st.datetimes(min_value=FIRST, max_value=LAST, timezones=st.just(UTC)))
    def test_an_instant_survives_the_wire(self, instant: datetime) -> None:
        """Before 1970 too."""
        assert wire.from_timestamp(wire.to_timestamp(instant)) == instant

    @given(st.timedeltas(min_value=timedelta(days=-3000), max_value=timedelta(days=3000)))
    def test_a_duration_survives_the_wire(self, duration: timedelta) -> None:
        """Negative ones too."""
        assert wire.from_duration(wire.to_duration(duration)) == duration

    def test_an_instant_in_any_zone_is_the_same_instant(self) -> None:
        """The wire has no zones."""
        there = NOON.astimezone(timezone(timedelta(hours=-4)))
        assert wire.to_timestamp(there) == wire.to_timestamp(NOON)

    def test_a_naive_datetime_is_a_bug(self) -> None:
        """Nobody knows which instant it is."""
        with pytest.raises(ValueError, match="time zone"):
            wire.to_timestamp(NOON.replace(tzinfo=None))

    def test_nanoseconds_are_cut(self) -> None:
        """Never rounded into the future."""
        assert wire.from_timestamp(Timestamp(seconds=1, nanos=999_999_999)).microsecond == 999_999
        assert wire.from_duration(Duration(nanos=1999)) == timedelta(microseconds=1)


class TestText:
    """Bounded, and storable."""

    @pytest.mark.parametrize("value", ["x", "x" * 256, "Zürich 🔔", "two\nlines"])
    def test_ordinary_text_passes(self, value: str) -> None:
        """Characters are counted, not bytes."""
        violations = Violations()
        assert wire.check_text(violations, "entity", value, longest=256) == value
        assert not violations

    def test_length_is_told_with_its_bounds(self) -> None:
        """So that the caller can mend it."""
        assert found(lambda v: wire.check_text(v, "items[3].entity", "x" * 300, longest=256)) == [
            "items[3].entity must be 1-256 characters, got 300"
        ]
        assert found(lambda v: wire.check_text(v, "name", "", longest=1024)) == [
            "name must be 1-1,024 characters, got 0"
        ]

    @pytest.mark.parametrize("value", ["a\x00b", "a\x1bb", "a\x7fb"])
    def test_control_characters_are_refused(self, value: str) -> None:
        """Postgres cannot store NUL, and terminals obey the rest."""
        assert found(lambda v: wire.check_text(v, "name", value, longest=10)) == [
            "name must not hold control characters"
        ]

    def test_text_of_another_form_is_told_what_is_asked_for(self) -> None:
        """In words."""
        check = lambda v: wire.check_text(v, "id", "A B", longest=9, pattern="[a-z]+", described_as="lower case")  # noqa: E731
        assert found(check) == ["id must be lower case"]

    def test_optional_text_may_be_empty(self) -> None:
        """Also where it has a form."""
        assert found(lambda v: wire.check_text(v, "id", "", shortest=0, longest=9, pattern="[a-z]+")) == []


class TestBounds:
    """Counts, numbers, sizes."""

    def test_one_item_too_many_is_refused(self) -> None:
        """1,001 items."""
        assert found(lambda v: wire.check_count(v, "items", range(1001), most=1000)) == [
            "items must have 1-1,000 entries, got 1001"
        ]
        assert found(lambda v: wire.check_count(v, "items", range(1000), most=1000)) == []

    def test_an_empty_list_is_refused_where_one_is_needed(self) -> None:
        """A call about nothing is a mistake."""
        assert found(lambda v: wire.check_count(v, "items", [], most=1000)) == [
            "items must have 1-1,000 entries, got 0"
        ]

    def test_a_number_is_told_its_bounds(self) -> None:
        """Both ends belong to the range."""
        assert found(lambda v: wire.check_number(v, "n", 0, least=1, most=5)) == ["n must be 1-5, got 0"]
        assert found(lambda v: wire.check_number(v, "n", 5, least=1, most=5)) == []

    def test_a_size_is_told_its_limit(self) -> None:
        """Of bytes, and of messages as they are on the wire."""
        assert found(lambda v: wire.check_size(v, "body", b"xxx", most_bytes=2)) == [
            "body must be at most 2 bytes, got 3"
        ]
        assert found(lambda v: wire.check_size(v, "at", Timestamp(seconds=1), most_bytes=1)) == [
            "at must be at most 1 bytes, got 2"
        ]

    def test_an_enum_value_must_be_a_known_one(self) -> None:
        """Unspecified is a default where there is one."""
        assert found(lambda v: wire.check_enum(v, "kind", 7, NullValue)) == ["kind must be one of "]
        violations = Violations()
        assert wire.check_enum(violations, "kind", 0, NullValue, default=3) == 3
        assert not violations


class TestZones:
    """IANA names only."""

    def test_a_zone_is_found(self) -> None:
        """With its rules."""
        assert wire.check_zone(Violations(), "zone", "Europe/Berlin") == ZoneInfo("Europe/Berlin")

    @pytest.mark.parametrize(
        "name", ["", "America", "../etc/passwd", "/etc/localtime", "x" * 5000, "Mars/Olympus", "a\x00b"]
    )
    def test_what_is_no_zone_is_a_violation(self, name: str) -> None:
        """Also what ZoneInfo itself fails on in other ways: directories, paths, NUL, names too long for a file."""
        violations = Violations()
        assert wire.check_zone(violations, "zone", name) is None
        assert [one.field for one in violations] == ["zone"]

    def test_a_near_miss_is_pointed_at(self) -> None:
        """Most wrong zones are misspelt."""
        assert found(lambda v: wire.check_zone(v, "zone", "Europe/Berln")) == [
            "zone must be an IANA time zone such as Europe/Berlin; did you mean Europe/Berlin?"
        ]


class TestInstants:
    """Valid, and within their bounds."""

    def test_a_good_instant_is_read(self) -> None:
        """As an aware UTC datetime."""
        assert wire.check_instant(Violations(), "at", wire.to_timestamp(NOON)) == NOON

    @pytest.mark.parametrize(
        "timestamp",
        [
            Timestamp(seconds=-1),
            Timestamp(seconds=2**62),
            Timestamp(seconds=-(2**62)),
            Timestamp(seconds=1, nanos=-1),
            Timestamp(seconds=1, nanos=1_000_000_000),
        ],
    )
    def test_an_impossible_instant_is_a_violation(self, timestamp: Timestamp) -> None:
        """Never an OverflowError."""
        assert found(lambda v: wire.check_instant(v, "at", timestamp)) == [
            "at must be a valid time between 1970-01-01 and 2200-01-01"
        ]

    def test_an_instant_past_a_bound_is_told_the_bound(self) -> None:
        """A past expiry, for example."""
        timestamp = wire.to_timestamp(NOON)
        assert found(
            lambda v: wire.check_instant(v, "expire_time", timestamp, not_before=NOON + timedelta(days=1))
        ) == ["expire_time must not be before 2013-07-02T12:00:00.123456+00:00, got 2013-07-01T12:00:00.123456+00:00"]
        assert found(lambda v: wire.check_instant(v, "at", timestamp, not_after=NOON - timedelta(days=1)))

    @pytest.mark.parametrize(
        "duration",
        [
            Duration(seconds=-1),
            Duration(seconds=2**62),
            Duration(seconds=1, nanos=-1),
            Duration(nanos=2_000_000_000),
            Duration(seconds=61),
        ],
    )
    def test_a_duration_out_of_bounds_is_a_violation(self, duration: Duration) -> None:
        """Or one that is not valid at all."""
        violations = Violations()
        assert wire.check_duration(violations, "after", duration, most=timedelta(minutes=1)) is None
        assert len(violations) == 1

    def test_a_good_duration_is_read(self) -> None:
        """Both ends belong to the range."""
        assert wire.check_duration(Violations(), "after", Duration(seconds=60), most=timedelta(minutes=1)) == timedelta(
            minutes=1
        )


class TestIds:
    """UUIDs in their usual form."""

    def test_a_uuid_is_read(self) -> None:
        """In either case."""
        assert wire.check_id(Violations(), "id", str(AN_ID).upper()) == AN_ID

    @pytest.mark.parametrize("value", ["", "7", "{018f4e0c-6b1e-7cc3-98c4-dc0c0c07398f}", AN_ID.hex, "z" * 36])
    def test_anything_else_is_a_violation(self, value: str) -> None:
        """Also forms that Python would take."""
        assert found(lambda v: wire.check_id(v, "id", value)) != []


class TestPages:
    """Opaque tokens, bounded sizes."""

    def test_a_token_gives_its_cursor_back(self) -> None:
        """With the types expected of it."""
        token = wire.page_token({"at": "2013-07-01", "id": 7}, query="state=waiting")
        assert wire.read_page_token(token, {"at": str, "id": int}, query="state=waiting") == {
            "at": "2013-07-01",
            "id": 7,
        }

    def test_no_token_is_the_first_page(self) -> None:
        """As an empty field."""
        assert wire.read_page_token("", {"id": int}) is None

    def test_a_token_made_for_other_filters_is_refused(self) -> None:
        """It would silently skip entries."""
        token = wire.page_token({"id": 7}, query="state=waiting")
        with pytest.raises(InvalidArgument, match="other filters"):
            wire.read_page_token(token, {"id": int}, query="state=fired")

    @pytest.mark.parametrize(
        "body",
        [[], 7, {"id": "7"}, {"id": True}, {"id": 2**63}, {"id": None}, {}, {"id": 1, "more": 1}],
        ids=repr,
    )
    def test_a_forged_token_is_refused(self, body: Any) -> None:
        """Whatever it decodes to; nothing of it reaches SQL."""
        if isinstance(body, dict):
            body = {**body, "": json.loads(decoded(wire.page_token({})))[""]}
        token = base64.urlsafe_b64encode(json.dumps(body).encode()).decode().rstrip("=")
        with pytest.raises(InvalidArgument) as caught:
            wire.read_page_token(token, {"id": int})
        assert caught.value.violations[0].field == "page_token"

    @pytest.mark.parametrize("text", ["\x00", "a\ud800", "\udfff"], ids=ascii)
    def test_a_token_with_text_that_cannot_be_stored_is_refused(self, text: str) -> None:
        """JSON can escape NUL, and halves of surrogate pairs; Postgres takes neither."""
        with pytest.raises(InvalidArgument):
            wire.read_page_token(wire.page_token({"id": text}), {"id": str})

    @given(st.text(min_size=1, max_size=200) | st.just("[" * 2000) | st.just("W1tb" * 600))
    def test_any_other_text_is_refused_as_a_token(self, token: str) -> None:
        """Never an exception of another kind."""
        with pytest.raises(InvalidArgument):
            wire.read_page_token(token, {"id": int})

    def test_a_token_of_an_instant_gives_both_back(self) -> None:
        """The microsecond and the id of the last entry; None is the first page."""
        token = wire.instant_token(NOON, AN_ID, query="dead")
        assert wire.read_instant_token(token, query="dead") == (NOON, AN_ID)
        assert wire.read_instant_token("", query="dead") is None
        with pytest.raises(InvalidArgument, match="other filters"):
            wire.read_instant_token(token, query="delivered")

    @pytest.mark.parametrize("at", ["2013-07-01T12:00:00", "noon", ""])
    def test_a_forged_instant_is_refused(self, at: str) -> None:
        """Also one without a zone, which Postgres would take for its own."""
        with pytest.raises(InvalidArgument, match="not a token"):
            wire.read_instant_token(wire.page_token({"at": at, "id": str(AN_ID)}))
        with pytest.raises(InvalidArgument, match="not a token"):
            wire.read_instant_token(wire.page_token({"at": NOON.isoformat(), "id": at}))

    @pytest.mark.parametrize(("asked", "given_"), [(0, 100), (1, 1), (1000, 1000)])
    def test_a_page_has_a_default_size(self, asked: int, given_: int) -> None:
        """0 means 100."""
        assert wire.check_page_size(Violations(), asked) == given_

    @pytest.mark.parametrize("asked", [-1, 1001])
    def test_a_page_has_a_maximal_size(self, asked: int) -> None:
        """INV-9."""
        assert found(lambda v: wire.check_page_size(v, asked)) == [f"page_size must be 1-1,000, got {asked}"]


def decoded(token: str) -> bytes:
    """The content of a token."""
    return base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
