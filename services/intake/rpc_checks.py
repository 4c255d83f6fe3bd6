"""Checks of what one item holds. Each adds what is wrong to `found`, with the field's path within the item.

These run for every item of every batch, tens of thousands a second: so a field that is right costs one compiled pattern or
one comparison, instants are compared as microseconds since 1970, and paths are put together only where something is wrong.
"""

import re
from datetime import datetime, timedelta
from uuid import UUID

from carillon.scheduler.v1 import timer_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from libs.conditions import BadCondition, compile_condition
from libs.errors import FieldViolation
from libs.recurrence import BadRule, Fold, Gap, Rule, next_after
from libs.wire import EARLIEST, from_duration, from_timestamp
from services.intake.payloads import MAX_PAYLOAD_BYTES, object_problem

Found = list[FieldViolation]

_SECOND_US = 1_000_000
_MAX_SECONDS = 32_503_680_000  # The year 3000.
_LONGEST_COUNTED_US = 31 * 86_400 * _SECOND_US
YEAR = timedelta(days=365)
LONGEST_AFTER = 10 * YEAR + timedelta(days=3)
MAX_EXCLUSIONS = 366

# Tab and line ends are the control characters that Postgres, JSON and mail headers' encoders all take.
_TEXT = r"[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"
is_name = re.compile(_TEXT + r"{1,256}").fullmatch
is_short_text = re.compile(_TEXT + r"{0,512}").fullmatch
is_key = re.compile(_TEXT + r"{0,128}").fullmatch
is_notification_type = re.compile(r"[a-z0-9._/-]{1,128}").fullmatch
is_timer_type = re.compile(r"[a-zA-Z0-9._/-]{0,128}").fullmatch
is_batch = re.compile(r"[a-z0-9._-]{1,64}").fullmatch

RESERVED = "carillon:"


def microseconds(timestamp: Timestamp) -> int:
    """Since 1970; -1 for a Timestamp that is not valid, or outside of the years 1970 to 2999."""
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
    """0 to `longest` (at most 512) characters."""
    if text and (len(text) > longest or not is_short_text(text)):
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
    if not is_batch(text):
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
        found.append(FieldViolation(field, "must be a valid time, year 1970 to 2999"))
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
    found.append(FieldViolation(field, f"must be {least.total_seconds():g}s to {most.total_seconds():g}s"))
    return None


def check_content(found: Found, field: str, content: timer_pb2.NotificationContent) -> None:
    """A notification's content. An empty payload becomes an empty object, so that nobody after us meets a text that is no JSON."""
    if not is_notification_type(content.type):
        found.append(FieldViolation(f"{field}.type", "must be 1-128 characters of [a-z0-9._/-]"))
    subscribers, topics = content.subscribers, content.topics
    if len(subscribers) > 1_000:
        found.append(FieldViolation(f"{field}.subscribers", f"must have 0-1,000 entries, got {len(subscribers):,}"))
    elif not subscribers and not topics:
        found.append(FieldViolation(f"{field}.subscribers", "must have at least one entry, or topics must"))
    if len(topics) > 16:
        found.append(FieldViolation(f"{field}.topics", f"must have 0-16 entries, got {len(topics):,}"))
    for name in subscribers:
        if not is_name(name):
            found.append(FieldViolation(f"{field}.subscribers", f"each {_text_problem(name, 1, 256)}"))
            break
    for name in topics:
        if not is_name(name):
            found.append(FieldViolation(f"{field}.topics", f"each {_text_problem(name, 1, 256)}"))
            break
    if payload := content.payload:
        check_object(found, f"{field}.payload", payload)
    else:
        content.payload = "{}"
    if content.group_key:
        check_optional_text(found, f"{field}.group_key", content.group_key, 256)


def check_event(found: Found, field: str, event: timer_pb2.EventContent) -> None:
    """An event's content."""
    if not is_notification_type(event.type):
        found.append(FieldViolation(f"{field}.type", "must be 1-128 characters of [a-z0-9._/-]"))
    if event.payload:
        check_object(found, f"{field}.payload", event.payload)
    else:
        event.payload = "{}"
    if event.HasField("report_within"):
        most = timedelta(days=7)
        check_duration(found, f"{field}.report_within", event.report_within, least=timedelta(0), most=most)


def check_id(found: Found, field: str, text: str) -> UUID | None:
    """A UUID in its usual form of 36 characters."""
    try:
        if len(text) == 36:
            return UUID(text)
    except ValueError:
        pass
    found.append(FieldViolation(field, "must be a UUID such as 018f4e0c-6b1e-7cc3-98c4-dc0c0c07398f"))
    return None


def check_condition(found: Found, field: str, condition: timer_pb2.Condition) -> None:
    """A condition that is set."""
    try:
        compile_condition(condition.cel)
    except BadCondition as error:
        found.append(FieldViolation(f"{field}.cel", str(error)))


def check_retry_policy(found: Found, field: str, policy: timer_pb2.RetryPolicy) -> None:
    """A retry policy that is set; the delays' defaults are 30 s and 1 hour."""
    second, day = timedelta(seconds=1), timedelta(days=1)
    initial: timedelta | None = 30 * second
    longest: timedelta | None = timedelta(hours=1)
    if policy.HasField("initial_delay"):
        initial = check_duration(found, f"{field}.initial_delay", policy.initial_delay, least=second, most=day)
    if policy.HasField("maximum_delay"):
        longest = check_duration(found, f"{field}.maximum_delay", policy.maximum_delay, least=second, most=7 * day)
    if initial is not None and longest is not None and longest < initial:
        found.append(FieldViolation(f"{field}.maximum_delay", "must not be shorter than initial_delay"))
    if policy.multiplier and not 1.0 <= policy.multiplier <= 10.0:
        found.append(FieldViolation(f"{field}.multiplier", f"must be 1.0 to 10.0, got {policy.multiplier:g}"))
    if policy.maximum_attempts > 100:
        found.append(FieldViolation(f"{field}.maximum_attempts", f"must be 1-100, got {policy.maximum_attempts}"))
    if policy.HasField("maximum_age"):
        check_duration(found, f"{field}.maximum_age", policy.maximum_age, least=second, most=30 * day)


def check_rule(found: Found, field: str, recurrence: timer_pb2.Recurrence, now: datetime) -> None:
    """A recurrence that is set: every bound, and that it has an occurrence after `now`."""
    before = len(found)
    if not recurrence.WhichOneof("rule"):
        found.append(FieldViolation(f"{field}.cron", "one of cron and rrule must be given"))
    for name, text in (("cron", recurrence.cron), ("rrule", recurrence.rrule)):
        if len(text) > 256:
            found.append(FieldViolation(f"{field}.{name}", f"must be at most 256 characters, got {len(text):,}"))
    if len(recurrence.zone) > 64:
        found.append(FieldViolation(f"{field}.zone", f"must be at most 64 characters, got {len(recurrence.zone):,}"))
    start_us = microseconds_of(now)
    if recurrence.HasField("start_time"):
        # A count is counted from the start, occurrence by occurrence, each time.
        least_us = start_us - _LONGEST_COUNTED_US if recurrence.count else 0
        start_us = check_instant(found, f"{field}.start_time", recurrence.start_time, least_us=least_us)
    if recurrence.HasField("end_time"):
        after_us = max(start_us, microseconds_of(now))
        check_instant(found, f"{field}.end_time", recurrence.end_time, after_us=after_us)
    if len(recurrence.exclusions) > MAX_EXCLUSIONS:
        count = len(recurrence.exclusions)
        found.append(FieldViolation(f"{field}.exclusions", f"must have 0-{MAX_EXCLUSIONS} entries, got {count:,}"))
    elif any(microseconds(one) < 0 for one in recurrence.exclusions):
        found.append(FieldViolation(f"{field}.exclusions", "each must be a valid time, year 1970 to 2999"))
    _check_policies(found, field, recurrence)
    if len(found) == before:
        try:
            if next_after(_rule_of(recurrence, now), now) is None:
                found.append(
                    FieldViolation(f"{field}.{recurrence.WhichOneof('rule')}", "has no occurrence from now on")
                )
        except BadRule as error:
            found.append(FieldViolation(f"{field}.{error.field}", str(error)))


def _check_policies(found: Found, field: str, recurrence: timer_pb2.Recurrence) -> None:
    hour, day = timedelta(hours=1), timedelta(days=1)
    if recurrence.HasField("jitter"):
        check_duration(found, f"{field}.jitter", recurrence.jitter, least=timedelta(0), most=hour)
    if recurrence.HasField("catch_up_window"):
        check_duration(found, f"{field}.catch_up_window", recurrence.catch_up_window, least=timedelta(0), most=30 * day)
    for name, value, enum in (
        ("gap_policy", recurrence.gap_policy, timer_pb2.GapPolicy),
        ("fold_policy", recurrence.fold_policy, timer_pb2.FoldPolicy),
        ("misfire_policy", recurrence.misfire_policy, timer_pb2.MisfirePolicy),
        ("overlap_policy", recurrence.overlap_policy, timer_pb2.OverlapPolicy),
    ):
        if value not in enum.values():
            found.append(FieldViolation(f"{field}.{name}", f"must be one of {', '.join(enum.keys()[1:])}"))


def _rule_of(recurrence: timer_pb2.Recurrence, now: datetime) -> Rule:
    return Rule(
        cron=recurrence.cron,
        rrule=recurrence.rrule,
        zone=recurrence.zone or "UTC",
        start=from_timestamp(recurrence.start_time) if recurrence.HasField("start_time") else now,
        end=from_timestamp(recurrence.end_time) if recurrence.HasField("end_time") else None,
        count=recurrence.count,
        exclusions=frozenset(map(from_timestamp, recurrence.exclusions)),
        gap=Gap.SKIP if recurrence.gap_policy == timer_pb2.GAP_POLICY_SKIP else Gap.SHIFT,
        fold=Fold.BOTH if recurrence.fold_policy == timer_pb2.FOLD_POLICY_BOTH else Fold.FIRST,
    )


def _text_problem(text: str, shortest: int, longest: int) -> str:
    if shortest <= len(text) <= longest:
        return "must not hold control characters"
    return f"must be {shortest}-{longest} characters, got {len(text):,}"


def _shown(at_us: int) -> str:
    return (EARLIEST + timedelta(microseconds=at_us)).isoformat()
