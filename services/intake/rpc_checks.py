"""Checks of what one item holds. Each adds what is wrong to `found`, with the field's path within the item.

These run for every item of every batch, tens of thousands a second: so a field that is right costs one compiled pattern
or one comparison, instants are compared as microseconds since 1970, and paths are put together only where something is
wrong.
"""

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Protocol
from uuid import UUID

from carillon.scheduler.v1 import timer_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from libs.errors import FieldViolation
from libs.wire import EARLIEST, LATEST, from_duration, to_timestamp
from services.intake.payloads import MAX_PAYLOAD_BYTES, object_problem

Found = list[FieldViolation]


class Enum(Protocol):
    """A generated enum."""

    def keys(self) -> Sequence[str]: ...
    def values(self) -> Sequence[int]: ...


_SECOND_US = 1_000_000
_MAX_SECONDS = int(LATEST.timestamp())
YEAR = timedelta(days=365)
LONGEST_AFTER = 10 * YEAR + timedelta(days=3)

# Tab and line ends are the control characters that Postgres, JSON and mail headers' encoders all take.
_TEXT = r"[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"
is_name = re.compile(_TEXT + r"{1,256}").fullmatch
is_text = re.compile(_TEXT + r"{0,2048}").fullmatch
is_key = re.compile(_TEXT + r"{0,128}").fullmatch
# There are few types, and many of each.
is_notification_type = lru_cache(1_024)(re.compile(r"[a-z0-9._/-]{1,128}").fullmatch)
is_timer_type = lru_cache(1_024)(re.compile(r"[a-zA-Z0-9._/-]{0,128}").fullmatch)
is_short_name = re.compile(r"[a-z0-9._-]{1,64}").fullmatch

RESERVED = "carillon:"

_PRIORITIES = frozenset(timer_pb2.Priority.values())

MAX_CONTENT_BYTES = 384 * 1024
"""A notification's content in all. An entry must fit into a frame of 512 KiB, with room for what goes around it."""


def microseconds(timestamp: Timestamp) -> int:
    """Since 1970; -1 for a Timestamp that is not valid, or outside of the years 1970 to 2199."""
    if 0 <= timestamp.seconds < _MAX_SECONDS and 0 <= timestamp.nanos < 1_000_000_000:
        return timestamp.seconds * _SECOND_US + timestamp.nanos // 1_000
    return -1


def microseconds_of(instant: datetime) -> int:
    """The same of an aware datetime."""
    return (instant - EARLIEST) // timedelta(microseconds=1)


def check_entity(found: Found, field: str, entity: str) -> None:
    """1-256 characters, not one of our own."""
    if not is_name(entity):
        found.append(FieldViolation(field, _text_problem(entity, 1, 256)))
    elif entity.startswith(RESERVED):
        found.append(FieldViolation(field, f'must not start with "{RESERVED}"'))


def check_name(found: Found, field: str, name: str) -> None:
    """1-256 characters: a subscriber, topic, item or timeline's entity."""
    if not is_name(name):
        found.append(FieldViolation(field, _text_problem(name, 1, 256)))


def check_optional_text(found: Found, field: str, text: str, longest: int) -> None:
    """0 to `longest` (at most 2,048) characters."""
    if text and (len(text) > longest or not is_text(text)):
        found.append(FieldViolation(field, _text_problem(text, 0, longest)))


def check_timer_type(found: Found, field: str, text: str) -> None:
    """A caller's kind of timer."""
    if not is_timer_type(text):
        found.append(FieldViolation(field, "must be 0-128 characters of [a-zA-Z0-9._/-]"))


def check_timeline_name(found: Found, field: str, text: str) -> None:
    """A timeline's name."""
    if not is_notification_type(text):
        found.append(FieldViolation(field, "must be 1-128 characters of [a-z0-9._/-]"))


def check_batch_name(found: Found, field: str, text: str) -> None:
    """A batch's name."""
    if not is_short_name(text):
        found.append(FieldViolation(field, "must be 1-64 characters of [a-z0-9._-]"))


def check_object(found: Found, field: str, text: str, most_bytes: int = MAX_PAYLOAD_BYTES) -> None:
    """A JSON object."""
    if problem := object_problem(text, most_bytes):
        found.append(FieldViolation(field, problem))


def check_instant(
    found: Found,
    field: str,
    timestamp: Timestamp,
    *,
    after_us: int | None = None,
    least_us: int = 0,
    most_us: int | None = None,
) -> int:
    """A Timestamp that is set; its microseconds, -1 when it is wrong. Bounds are inclusive, `after_us` is not."""
    at_us = microseconds(timestamp)
    if at_us < 0:
        found.append(FieldViolation(field, "must be a valid time, year 1970 to 2199"))
    elif after_us is not None and at_us <= after_us:
        found.append(FieldViolation(field, f"must be after {_shown(after_us)}, got {_shown(at_us)}"))
    elif at_us < least_us:
        found.append(FieldViolation(field, f"must not be before {_shown(least_us)}, got {_shown(at_us)}"))
    elif most_us is not None and at_us > most_us:
        found.append(FieldViolation(field, f"must not be after {_shown(most_us)}, got {_shown(at_us)}"))
    else:
        return at_us
    return -1


def check_duration(
    found: Found, field: str, duration: Duration, *, least: timedelta, most: timedelta
) -> timedelta | None:
    """A Duration that is set."""
    seconds, nanos = duration.seconds, duration.nanos
    is_valid = abs(seconds) <= 1e9 and abs(nanos) < 1_000_000_000 and seconds * nanos >= 0
    if is_valid and least <= (value := from_duration(duration)) <= most:
        return value
    found.append(FieldViolation(field, f"must be {_length(least)} to {_length(most)}"))
    return None


def check_after(found: Found, field: str, after: Duration, now: datetime) -> Timestamp | None:
    """A Duration from `now`, 0 to 10 years: when that is, None when it is wrong."""
    value = check_duration(found, field, after, least=timedelta(0), most=LONGEST_AFTER)
    return None if value is None else to_timestamp(now + value)


def check_enum(found: Found, field: str, value: int, enum: Enum) -> None:
    """One of the enum's values, or 0 for its default."""
    if value not in enum.values():
        found.append(FieldViolation(field, f"must be one of {', '.join(enum.keys()[1:])}, got {value}"))


def check_content(found: Found, field: str, content: timer_pb2.NotificationContent) -> bytes:
    """A notification's content, which is returned serialised.

    No payload becomes `{}`: nobody after us meets a text that is no JSON.
    """
    if not is_notification_type(content.type):
        found.append(FieldViolation(f"{field}.type", "must be 1-128 characters of [a-z0-9._/-]"))
    subscribers, topics = content.subscribers, content.topics
    if subscribers:
        _check_names(found, f"{field}.subscribers", subscribers, most=1_000)
    elif not topics:
        found.append(FieldViolation(f"{field}.subscribers", "must have at least one entry, or topics must"))
    if topics:
        _check_names(found, f"{field}.topics", topics, most=16)
    if payload := content.payload:
        check_object(found, f"{field}.payload", payload)
    else:
        content.payload = "{}"
    if content.group_key:
        check_optional_text(found, f"{field}.group_key", content.group_key, 256)
    if content.priority not in _PRIORITIES:
        check_enum(found, f"{field}.priority", content.priority, timer_pb2.Priority)
    serialised = content.SerializeToString()
    if len(serialised) > MAX_CONTENT_BYTES:
        size = f"{len(serialised):,} bytes"
        found.append(FieldViolation(field, f"must be at most {MAX_CONTENT_BYTES // 1024} KiB in all, got {size}"))
    return serialised


def _check_names(found: Found, field: str, names: Sequence[str], *, most: int) -> None:
    if len(names) > most:
        found.append(FieldViolation(field, f"must have 0-{most:,} entries, got {len(names):,}"))
        return
    for name in names:
        if not is_name(name):
            found.append(FieldViolation(f"{field}[{list(names).index(name)}]", _text_problem(name, 1, 256)))
            return


def check_id(found: Found, field: str, text: str) -> UUID | None:
    """A UUID in its usual form of 36 characters."""
    try:
        if len(text) == 36:
            return UUID(text)
    except ValueError:
        pass
    found.append(FieldViolation(field, "must be a UUID such as 018f4e0c-6b1e-7cc3-98c4-dc0c0c07398f"))
    return None


def _text_problem(text: str, shortest: int, longest: int) -> str:
    if shortest <= len(text) <= longest:
        return "must not hold control characters"
    return f"must be {shortest}-{longest:,} characters, got {len(text):,}"


def _length(duration: timedelta) -> str:
    days = duration.days
    return f"{days:,} days" if days > 1 else f"{duration.total_seconds():g}s"


def _shown(at_us: int) -> str:
    return (EARLIEST + timedelta(microseconds=at_us)).isoformat()
