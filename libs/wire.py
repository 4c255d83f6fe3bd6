"""Between protobuf and Python: instants, durations, ids, page tokens, and the checks every service makes on its fields.

A check takes the violations collected so far, the field's path and its value. It returns the value in Python's type, or
records what is wrong and returns a stand-in (an empty text, None); the handler calls `violations.raise_if_any()` after
the last check, so the caller hears everything at once, and never goes on with a stand-in.

Text must not hold NUL, which Postgres cannot store. Instants and durations are cut to microseconds.
"""

import base64
import binascii
import difflib
import json
import re
import unicodedata
import zoneinfo
from collections.abc import Mapping, Sequence, Sized
from datetime import UTC, datetime, timedelta
from functools import cache
from hashlib import blake2s
from typing import Any, Protocol
from uuid import UUID
from zoneinfo import ZoneInfo

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from libs.errors import FieldViolation, InvalidArgument, Violations

# The instants Carillon takes. Inside them no zone conversion or sum with a year's duration leaves Python's range.
EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
LATEST = datetime(2200, 1, 1, tzinfo=UTC)
LONGEST = timedelta(days=366 * 10)

DEFAULT_PAGE = 100
MAX_PAGE = 1000
_MAX_TOKEN = 2048
_BAD_TOKEN = "is not a token from an answer before"  # noqa: S105 - it is about tokens.

Cursor = Mapping[str, str | int | None]

After = tuple[datetime, UUID]
"""Where a page of a list in the order of an instant, then an id, goes on: after this entry."""


class ProtoEnum(Protocol):
    """A generated enum."""

    def items(self) -> Sequence[tuple[str, int]]:
        """Its names and numbers."""


# Conversions


def to_timestamp(instant: datetime) -> Timestamp:
    """An aware datetime as a Timestamp; ValueError for a naive one."""
    if instant.tzinfo is None:
        raise ValueError("An instant has a time zone.")
    since = instant - EARLIEST
    return Timestamp(seconds=since // timedelta(seconds=1), nanos=since.microseconds * 1000)


def set_timestamp(timestamp: Timestamp, instant: datetime) -> None:
    """Write an aware datetime into a Timestamp that is there: half the cost of `to_timestamp` and a copy."""
    since = instant - EARLIEST
    timestamp.seconds = since.days * 86_400 + since.seconds
    timestamp.nanos = since.microseconds * 1000


def from_timestamp(timestamp: Timestamp) -> datetime:
    """A valid Timestamp as an aware UTC datetime; OverflowError outside the years 1 to 9999."""
    return EARLIEST + timedelta(seconds=timestamp.seconds, microseconds=timestamp.nanos // 1000)


def to_duration(duration: timedelta) -> Duration:
    """A timedelta as a Duration, negative ones too."""
    message = Duration()
    message.FromTimedelta(duration)
    return message


def from_duration(duration: Duration) -> timedelta:
    """A valid Duration as a timedelta."""
    return timedelta(seconds=duration.seconds, microseconds=int(duration.nanos / 1000))


# Field checks


def check_text(
    violations: Violations,
    field: str,
    value: str,
    *,
    longest: int,
    shortest: int = 1,
    pattern: str | None = None,
    described_as: str = "",
) -> str:
    """Text of `shortest` to `longest` characters without control characters other than tab and line ends.

    `pattern` must match all of it; `described_as` then says in words what it asks for.
    """
    if not shortest <= len(value) <= longest:
        violations.add(field, f"must be {_range(shortest, longest)} characters, got {len(value)}")
    elif any(unicodedata.category(char) == "Cc" and char not in "\t\n\r" for char in value):
        violations.add(field, "must not hold control characters")
    elif value and pattern is not None and not re.fullmatch(pattern, value):
        violations.add(field, f"must be {described_as or f'text like {pattern}'}")
    else:
        return value
    return ""


def check_count(violations: Violations, field: str, items: Sized, *, most: int, least: int = 1) -> None:
    """A repeated field with `least` to `most` entries."""
    if not least <= len(items) <= most:
        violations.add(field, f"must have {_range(least, most)} entries, got {len(items)}")


def check_number(violations: Violations, field: str, value: int, *, least: int, most: int) -> int:
    """A number from `least` to `most`; `least` stands in for a wrong one."""
    if least <= value <= most:
        return value
    violations.add(field, f"must be {_range(least, most)}, got {value}")
    return least


def check_size(violations: Violations, field: str, value: bytes | Message, *, most_bytes: int) -> None:
    """Bytes, or a message as it is on the wire, of at most `most_bytes`."""
    size = value.ByteSize() if isinstance(value, Message) else len(value)
    if size > most_bytes:
        violations.add(field, f"must be at most {most_bytes} bytes, got {size}")


def check_enum(violations: Violations, field: str, value: int, enum: ProtoEnum, *, default: int = 0) -> int:
    """One of the enum's values. 0 (unspecified) means `default`; without a default it is refused."""
    if value == 0 and default:
        return default
    names = [name for name, number in enum.items() if number]
    if value == 0 or value not in (number for _, number in enum.items()):
        violations.add(field, f"must be one of {', '.join(names)}")
        return default
    return value


def check_zone(violations: Violations, field: str, value: str) -> ZoneInfo | None:
    """An IANA time zone such as Europe/Berlin; None for an unknown one."""
    if value in _zones():
        return ZoneInfo(value)
    near = difflib.get_close_matches(value[:64], _zones(), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    violations.add(field, f"must be an IANA time zone such as Europe/Berlin{hint}")
    return None


def check_instant(
    violations: Violations,
    field: str,
    value: Timestamp,
    *,
    not_before: datetime = EARLIEST,
    not_after: datetime = LATEST,
) -> datetime | None:
    """A valid Timestamp from `not_before` to `not_after`. Check HasField first where it may be absent."""
    in_range = EARLIEST.timestamp() <= value.seconds <= LATEST.timestamp() and 0 <= value.nanos < 1_000_000_000
    if not in_range:
        violations.add(field, f"must be a valid time between {_day(EARLIEST)} and {_day(LATEST)}")
        return None
    instant = from_timestamp(value)
    if instant < not_before:
        violations.add(field, f"must not be before {not_before.isoformat()}, got {instant.isoformat()}")
    elif instant > not_after:
        violations.add(field, f"must not be after {not_after.isoformat()}, got {instant.isoformat()}")
    else:
        return instant
    return None


def check_duration(
    violations: Violations,
    field: str,
    value: Duration,
    *,
    least: timedelta = timedelta(0),
    most: timedelta = LONGEST,
) -> timedelta | None:
    """A valid Duration from `least` to `most`. Check HasField first where it may be absent."""
    is_valid = abs(value.nanos) < 1_000_000_000 and value.seconds * value.nanos >= 0
    bounds = f"{least.total_seconds():g}s to {most.total_seconds():g}s"
    if is_valid and abs(value.seconds) <= LONGEST.total_seconds():
        duration = from_duration(value)
        if least <= duration <= most:
            return duration
        violations.add(field, f"must be {bounds}, got {duration.total_seconds():g}s")
    else:
        violations.add(field, f"must be a valid duration of {bounds}")
    return None


def check_id(violations: Violations, field: str, value: str) -> UUID | None:
    """A UUID in its usual form of 36 characters."""
    try:
        if len(value) == 36:
            return UUID(value)
    except ValueError:
        pass
    violations.add(field, "must be a UUID such as 018f4e0c-6b1e-7cc3-98c4-dc0c0c07398f")
    return None


# Pages


def check_page_size(violations: Violations, value: int, *, field: str = "page_size") -> int:
    """How many entries a list shows: 0 means 100, at most 1,000."""
    return check_number(violations, field, value or DEFAULT_PAGE, least=1, most=MAX_PAGE)


def page_token(cursor: Cursor, *, query: str = "") -> str:
    """An opaque token for the page after `cursor`; `query` stands for the filters, with which alone it is valid.

    It is not signed: it only says where to go on, and every query filters by tenant anyway (INV-8).
    """
    body = json.dumps({**cursor, "": _fingerprint(query)}, separators=(",", ":"))
    return base64.urlsafe_b64encode(body.encode()).decode().rstrip("=")


def read_page_token(
    token: str, expected: Mapping[str, type | tuple[type, ...]], *, query: str = "", field: str = "page_token"
) -> dict[str, Any] | None:
    """The cursor in a token, with exactly the names and types of `expected`; None for the first page.

    Raises InvalidArgument for a token that is not ours, or was made for other filters.
    """
    if not token:
        return None
    cursor = _unpacked(token)
    if cursor is None or cursor.keys() - {""} != expected.keys():
        raise InvalidArgument([FieldViolation(field, _BAD_TOKEN)])
    if cursor.pop("", None) != _fingerprint(query):
        raise InvalidArgument([FieldViolation(field, "was made for other filters; start again without it")])
    # bool is an int to Python, and 2**70 is none to Postgres.
    for name, kind in expected.items():
        value = cursor[name]
        is_wrong = isinstance(value, bool) or (isinstance(value, int) and abs(value) >= 1 << 63)
        if is_wrong or not isinstance(value, kind):
            raise InvalidArgument([FieldViolation(field, _BAD_TOKEN)])
    return cursor


def instant_token(at: datetime, id_: UUID, *, query: str = "") -> str:
    """A page token for lists in the order of an instant, then an id: the last entry's."""
    return page_token({"at": at.isoformat(), "id": str(id_)}, query=query)


def read_instant_token(token: str, *, query: str = "", field: str = "page_token") -> After | None:
    """What `instant_token` was made of; None for the first page. Raises InvalidArgument as `read_page_token` does."""
    cursor = read_page_token(token, {"at": str, "id": str}, query=query, field=field)
    if cursor is None:
        return None
    try:
        at, id_ = datetime.fromisoformat(cursor["at"]), UUID(cursor["id"])
    except ValueError as err:
        raise InvalidArgument([FieldViolation(field, _BAD_TOKEN)]) from err
    if at.tzinfo is None:
        raise InvalidArgument([FieldViolation(field, _BAD_TOKEN)])
    return at, id_


def _unpacked(token: str) -> dict[str, Any] | None:
    try:
        padded = token[:_MAX_TOKEN].encode("ascii") + b"=" * (-len(token[:_MAX_TOKEN]) % 4)
        cursor = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (ValueError, binascii.Error, RecursionError):
        return None
    if not isinstance(cursor, dict) or not all(map(_is_storable, cursor.values())):
        return None
    return cursor


def _is_storable(value: object) -> bool:
    """Whether Postgres takes it: JSON may escape NUL, and halves of surrogate pairs, which UTF-8 cannot hold."""
    return not isinstance(value, str) or not any(char == "\x00" or "\ud800" <= char <= "\udfff" for char in value)


def _fingerprint(query: str) -> str:
    return blake2s(query.encode(), digest_size=6).hexdigest()


# Pieces


def _range(least: int, most: int) -> str:
    return f"{least:,}-{most:,}" if least != most else f"exactly {most:,}"


def _day(instant: datetime) -> str:
    return instant.date().isoformat()


@cache
def _zones() -> frozenset[str]:
    """Read once. ZoneInfo itself would take directories for zones, and raises half a dozen classes of error."""
    return frozenset(zoneinfo.available_timezones() - {"localtime", "posixrules", "Factory"})
