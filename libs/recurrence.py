"""When a rule fires next: cron and RRULE in a time zone, with stated behaviour where local time jumps. Pure.

The rule is read on the local calendar, as people mean it; each local time then becomes an instant. A local time that
does not exist (clocks go forward) is shifted by the jump, or skipped. One that exists twice (clocks go back) fires at
the first, or at both. That is for rules that name hours. One that fires in every hour (`*/10 * * * *`) means "as time
goes by", so it fires whenever the wall clock shows one of its times: through any jump it loses and repeats nothing.

Cron is parsed by cronsim (its parser, on naive local times), RRULE by dateutil. A rule that does not fire within
`HORIZON` counts as one that never fires again.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import lru_cache
from heapq import heappop, heappush
from itertools import islice, takewhile
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from dateutil.rrule import rrule as DateutilRule  # noqa: N812 — a class, whatever its name.
from dateutil.rrule import rrulestr

MAX_RULE_CHARACTERS = 256
MAX_ZONE_CHARACTERS = 64
MAX_COUNT = 10_000
"""Occurrences of a rule that counts them, where it comes from outside; see libs.recurrence_cost."""
HORIZON = timedelta(days=50 * 366)
"""How far ahead occurrences are looked for; cronsim's own limit."""

_LAST = datetime(9900, 1, 1, tzinfo=UTC)  # Room for HORIZON before Python's calendar ends.
_LEAD = timedelta(days=1)
"""No jump is longer: Samoa's in 2011, over the date line."""
_GREGORIAN_CYCLE = timedelta(days=146_097)
"""400 years, after which the calendar repeats to the weekday."""
_STEPS = {
    "MINUTELY": timedelta(minutes=1),
    "HOURLY": timedelta(hours=1),
    "DAILY": timedelta(days=1),
    "WEEKLY": timedelta(weeks=1),
}
_FREQUENCIES = {*_STEPS, "MONTHLY", "YEARLY"}
_MAX_INTERVAL = 1_000_000
_SECOND = timedelta(seconds=1)
_MICROSECOND = timedelta(microseconds=1)
_UNTIL = re.compile(r"(\d{8})(T\d{6})?(Z)?")


class BadRule(Exception):
    """The rule cannot be read, or its zone does not exist; `field` says which part: cron, rrule or zone."""

    def __init__(self, field_name: str, message: str) -> None:
        super().__init__(message)
        self.field = field_name


class Gap(Enum):
    """What happens to local times that do not exist."""

    SHIFT = 1
    SKIP = 2


class Fold(Enum):
    """What happens to local times that exist twice."""

    FIRST = 1
    BOTH = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A recurrence rule. Exactly one of `cron` (5 fields) and `rrule` (RFC 5545, without DTSTART) is set.

    `start`: no occurrence before it; for an RRULE also its DTSTART, so INTERVAL counts from it. `end`: none at or after
    it. `count`: at most so many in all, counted from start, excluded ones too; 0: no limit.
    """

    cron: str = ""
    rrule: str = ""
    zone: str = "UTC"
    start: datetime
    end: datetime | None = None
    count: int = 0
    exclusions: frozenset[datetime] = field(default_factory=frozenset)
    gap: Gap = Gap.SHIFT
    fold: Fold = Fold.FIRST


def check_rule(rule: Rule) -> None:
    """Raise BadRule unless the rule can be read. Whether it ever fires is another question: ask `next_after`."""
    if bool(rule.cron) == bool(rule.rrule):
        raise BadRule("cron", "exactly one of cron and rrule must be given")
    next(occurrences(rule, rule.start), None)


def next_after(rule: Rule, after: datetime) -> datetime | None:
    """The first occurrence strictly after `after` (aware, UTC), or None when there is none."""
    return next(occurrences(rule, after), None)


def whole_second(start: datetime) -> datetime:
    """A start that somebody gave, rounded up: occurrences fall on whole seconds, and the first must not lie before."""
    return start if start.microsecond == 0 else start.replace(microsecond=0) + _SECOND


def uncounted(rule: Rule) -> Rule:
    """The rule with the same occurrences and without counts: they become the end, and COUNT the UNTIL, they come to.

    It counts once, about 10 µs per occurrence; who reads the rule as it was counts each time. Counts above MAX_COUNT
    would take too long at once, and stay.
    """
    parts = _rrule_parts(rule.rrule) if rule.rrule else {}
    if 0 < _whole_number(parts.get("COUNT"), "COUNT") <= MAX_COUNT:
        for local in deque(_local_times(rule, rule.start), maxlen=1):
            parts |= {"UNTIL": local.strftime("%Y%m%dT%H%M%S")}
            del parts["COUNT"]
            rule = replace(rule, rrule=";".join(f"{name}={value}" for name, value in parts.items()))
    if 0 < rule.count <= MAX_COUNT:
        for at in deque(islice(_instants(rule, rule.start - _MICROSECOND), rule.count), maxlen=1):
            last = at + _MICROSECOND
            rule = replace(rule, count=0, end=last if rule.end is None else min(last, rule.end))
    return rule


def occurrences(rule: Rule, after: datetime) -> Iterator[datetime]:
    """Occurrences strictly after `after`, ascending, each instant once, in UTC.

    With a count, everything from the start has to be counted: see `uncounted`.
    """
    before_start = rule.start - _MICROSECOND
    instants = _instants(rule, before_start if rule.count else max(after, before_start))
    for at in islice(instants, rule.count) if rule.count else instants:
        if rule.end is not None and at >= rule.end:
            return
        if at > after and at not in rule.exclusions:
            yield at


def _instants(rule: Rule, after: datetime) -> Iterator[datetime]:
    zone = zone_of(rule.zone)
    # A local time before `after` can stand for an instant after it only where the clocks jump.
    near = {at.astimezone(zone).utcoffset() for at in (after - _LEAD, after, after + _LEAD)}
    begin = after - _LEAD if len(near) > 1 else after
    if _is_for_every_hour(rule):
        ordered = _in_order(_local_times(rule, begin), zone, gap=Gap.SKIP, fold=Fold.BOTH)
    else:
        ordered = _in_order(_local_times(rule, begin), zone, gap=rule.gap, fold=rule.fold)
    latest = after
    for at in ordered:
        if at > latest:
            latest = at
            yield at


def _in_order(local_times: Iterable[datetime], zone: ZoneInfo, *, gap: Gap, fold: Fold) -> Iterator[datetime]:
    """The instants of ascending local times, ascending; where two local times fall together, twice.

    Local times and instants are in the same order except in a gap or fold, so what is made there waits for the next
    local time that is in neither.
    """
    waiting: list[datetime] = []
    for local in local_times:
        if _offsets_differ(local, zone):
            for at in instants_of(local, zone, gap=gap, fold=fold):
                heappush(waiting, at)
            continue
        ordinary = local.replace(tzinfo=zone).astimezone(UTC)
        while waiting and waiting[0] <= ordinary:
            yield heappop(waiting)
        yield ordinary
    while waiting:
        yield heappop(waiting)


def instants_of(local: datetime, zone: ZoneInfo, *, gap: Gap, fold: Fold) -> tuple[datetime, ...]:
    """The instants (UTC, ascending) a naive local time stands for: none, one or two."""
    first = local.replace(tzinfo=zone, fold=0)
    second = local.replace(tzinfo=zone, fold=1)
    if not _offsets_differ(local, zone):
        return (first.astimezone(UTC),)
    # PEP 495: in a gap fold=0 has the offset before the jump, the smaller one.
    if (first.utcoffset() or timedelta(0)) < (second.utcoffset() or timedelta(0)):
        # That lands as long after the jump as the rule says after its beginning.
        return (first.astimezone(UTC),) if gap is Gap.SHIFT else ()
    return (first.astimezone(UTC), second.astimezone(UTC)) if fold is Fold.BOTH else (first.astimezone(UTC),)


def _offsets_differ(local: datetime, zone: ZoneInfo) -> bool:
    return local.replace(tzinfo=zone, fold=0).utcoffset() != local.replace(tzinfo=zone, fold=1).utcoffset()


def _local_times(rule: Rule, after: datetime) -> Iterator[datetime]:
    """Ascending naive local times from just before `after` to HORIZON after it."""
    zone = zone_of(rule.zone)
    after_local = after.astimezone(zone).replace(tzinfo=None)
    last = (min(max(after, rule.start), _LAST) + HORIZON).replace(tzinfo=None)
    if rule.cron:
        times = _cron_times(rule.cron, after_local - timedelta(minutes=1))
    else:
        times = _rrule_times(rule.rrule, zone, rule.start.astimezone(zone).replace(tzinfo=None), after_local)
    return takewhile(lambda local: local <= last, times)


def _cron_times(expression: str, after: datetime) -> Iterator[datetime]:
    if len(expression.split()) != 5:
        raise BadRule("cron", f"must have five fields (minute hour day month weekday), got {expression!r}")
    try:
        return CronSim(expression, after)
    except (CronSimError, ValueError) as err:  # ValueError: a number of thousands of digits.
        raise BadRule("cron", f"{expression!r} is not a cron expression: {err}") from err


def _rrule_times(text: str, zone: ZoneInfo, start: datetime, after: datetime) -> Iterator[datetime]:
    """Local times at or after `after`; INTERVAL and COUNT count from `start`."""
    parts = _rrule_parts(text)
    count = _whole_number(parts.pop("COUNT", None), "COUNT") or None
    interval = _whole_number(parts.get("INTERVAL"), "INTERVAL") or 1
    until = _until(parts.pop("UNTIL", None), zone)
    step = _STEPS.get(parts["FREQ"])
    if step is not None and count is None and after > start:
        # dateutil would walk there from the start.
        start += (after - start) // (step * interval) * step * interval
    # dateutil looks on to the year 9999 for a rule that never fires, which takes it seconds. So it gets a year not long
    # before that, with the same calendar.
    shift = (9_850 - start.year) // 400 * _GREGORIAN_CYCLE
    try:
        rule = rrulestr(";".join(f"{name}={value}" for name, value in parts.items()), dtstart=start + shift)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as err:
        raise BadRule("rrule", f"{text!r} is not an RRULE: {err}") from err
    if not isinstance(rule, DateutilRule):
        raise BadRule("rrule", f"{text!r} is not an RRULE")
    times = (local - shift for local in islice(_raising_bad_rule(rule, text), count))
    return (local for local in takewhile(lambda local: until is None or local <= until, times) if local >= after)


def _raising_bad_rule(rule: DateutilRule, text: str) -> Iterator[datetime]:
    try:
        yield from rule
    except (ValueError, OverflowError) as err:  # Some rules turn out to be impossible on the way.
        raise BadRule("rrule", f"{text!r} is not an RRULE: {err}") from err


def _rrule_parts(text: str) -> dict[str, str]:
    named = [part.partition("=") for part in text.strip().upper().removeprefix("RRULE:").split(";")]
    parts = {name: value for name, _, value in named}
    if len(parts) != len(named) or "\n" in text or "DTSTART" in text.upper():
        raise BadRule("rrule", "must be one RRULE, each part once, without DTSTART; use start_time")
    if parts.get("FREQ") not in _FREQUENCIES:
        raise BadRule("rrule", f"must have a FREQ from YEARLY to MINUTELY, got {text!r}")
    if "BYEASTER" in parts:
        raise BadRule("rrule", "BYEASTER is not part of RFC 5545")
    return parts


def _whole_number(text: str | None, name: str) -> int:
    """0 when absent."""
    if text is None:
        return 0
    if not re.fullmatch("[0-9]{1,7}", text) or not 1 <= int(text) <= _MAX_INTERVAL:
        raise BadRule("rrule", f"{name} must be 1 to {_MAX_INTERVAL}, got {text!r}")
    return int(text)


def _until(text: str | None, zone: ZoneInfo) -> datetime | None:
    """The last local time. RFC 5545 has it in UTC (…Z) where DTSTART has a zone; without Z it is taken as local."""
    if text is None:
        return None
    found = _UNTIL.fullmatch(text)
    try:
        if found is None:
            raise ValueError("it looks like 20131231T235959Z")
        local = datetime.strptime(found[1] + (found[2] or "T000000"), "%Y%m%dT%H%M%S")  # noqa: DTZ007 — local time.
        return local.replace(tzinfo=UTC).astimezone(zone).replace(tzinfo=None) if found[3] else local
    except (ValueError, OverflowError) as err:
        raise BadRule("rrule", f"UNTIL={text} is not a date and time: {err}") from err


def _is_for_every_hour(rule: Rule) -> bool:
    """Whether the rule fires in each hour of its days, so that its hours are no choice of somebody's."""
    if rule.cron:
        hour = rule.cron.split()[1] if len(rule.cron.split()) == 5 else ""
        return hour in {"*", "*/1", "0-23"}
    parts = _rrule_parts(rule.rrule)
    interval = _whole_number(parts.get("INTERVAL"), "INTERVAL") or 1
    return "BYHOUR" not in parts and interval <= {"MINUTELY": 60, "HOURLY": 1}.get(parts["FREQ"], 0)


@lru_cache(maxsize=1024)
def zone_of(name: str) -> ZoneInfo:
    """The IANA zone; raises BadRule when there is none of that name."""
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError) as err:
        raise BadRule("zone", f"{name!r} is not an IANA time zone") from err
