"""When a rule fires next: cron and RRULE in a time zone, with stated behaviour where local time jumps. Pure.

The rule is read on the local calendar, as people mean it; each local time then becomes an instant. A local time that does
not exist (clocks go forward) is shifted by the jump, or skipped. One that exists twice (clocks go back) fires at the
first, or at both. Rules that repeat within the hour of the jump (`*/10 * * * *`) lose nothing and repeat nothing under
the defaults, because shifted duplicates fall together.

Cron is parsed by cronsim (its parser, on naive local times), RRULE by dateutil.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import lru_cache
from itertools import islice
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from dateutil.rrule import rrulestr

MAX_RULE_CHARACTERS = 256
MAX_ZONE_CHARACTERS = 64
_SEARCHED = 100_000
"""Candidates looked at before a rule counts as one that never fires again."""


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

    `start`: no occurrence before it; for an RRULE also its DTSTART, so INTERVAL counts from it. `end`: none at or after.
    `count`: at most so many in all, counted from start; 0: no limit.
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
    zone_of(rule.zone)
    next(_local_times(rule, rule.start), None)


def next_after(rule: Rule, after: datetime) -> datetime | None:
    """The first occurrence strictly after `after` (aware, UTC), or None when there is none."""
    return next(occurrences(rule, after), None)


def occurrences(rule: Rule, after: datetime) -> Iterator[datetime]:
    """Occurrences strictly after `after`, ascending, each instant once, in UTC."""
    # A count is counted from the start, so everything from there has to be seen.
    seen_from = (
        rule.start - timedelta(microseconds=1) if rule.count else max(after, rule.start - timedelta(microseconds=1))
    )
    numbered = islice(_instants(rule, seen_from), rule.count) if rule.count else _instants(rule, seen_from)
    for at in numbered:
        if rule.end is not None and at >= rule.end:
            return
        if at > after and at not in rule.exclusions:
            yield at


def _instants(rule: Rule, after: datetime) -> Iterator[datetime]:
    zone = zone_of(rule.zone)
    latest = after
    # Begin a day early: a shifted or repeated local time may belong to a wall-clock time before `after`.
    for searched, local in enumerate(_local_times(rule, after - timedelta(days=1))):
        if searched > _SEARCHED:
            return
        for at in instants_of(local, zone, gap=rule.gap, fold=rule.fold):
            if at > latest:
                latest = at
                yield at


def instants_of(local: datetime, zone: ZoneInfo, *, gap: Gap, fold: Fold) -> tuple[datetime, ...]:
    """The instants (UTC, ascending) a naive local time stands for: none, one or two."""
    first = local.replace(tzinfo=zone, fold=0)
    second = local.replace(tzinfo=zone, fold=1)
    if first.utcoffset() == second.utcoffset():
        return (first.astimezone(UTC),)
    if (first.utcoffset() or timedelta(0)) < (second.utcoffset() or timedelta(0)):  # PEP 495: a gap, it does not exist.
        # fold=0 uses the offset before the jump, which lands as long after it as the rule says after its beginning.
        return (first.astimezone(UTC),) if gap is Gap.SHIFT else ()
    return (first.astimezone(UTC), second.astimezone(UTC)) if fold is Fold.BOTH else (first.astimezone(UTC),)


def _local_times(rule: Rule, after: datetime) -> Iterator[datetime]:
    zone = zone_of(rule.zone)
    start = rule.start.astimezone(zone).replace(tzinfo=None)
    after_local = after.astimezone(zone).replace(tzinfo=None)
    if rule.cron:
        return _cron_times(rule.cron, max(after_local, start - timedelta(minutes=1)))
    return _rrule_times(rule.rrule, start, after_local)


def _cron_times(expression: str, after: datetime) -> Iterator[datetime]:
    if len(expression.split()) != 5:
        raise BadRule("cron", f"must have five fields (minute hour day month weekday), got {expression!r}")
    try:
        return CronSim(expression, after)
    except CronSimError as err:
        raise BadRule("cron", f"{expression!r} is not a cron expression: {err}") from err


def _rrule_times(text: str, start: datetime, after: datetime) -> Iterator[datetime]:
    if "DTSTART" in text.upper() or "\n" in text:
        raise BadRule("rrule", "must be one RRULE without DTSTART; use start_time")
    try:
        return rrulestr(text, dtstart=start).xafter(after, inc=True)
    except (ValueError, TypeError, KeyError, AttributeError) as err:
        raise BadRule("rrule", f"{text!r} is not an RRULE: {err}") from err


@lru_cache(maxsize=1024)
def zone_of(name: str) -> ZoneInfo:
    """The IANA zone; raises BadRule when there is none of that name."""
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError) as err:
        raise BadRule("zone", f"{name!r} is not an IANA time zone") from err
