"""The boundaries of aligned windows: when the window that an instant falls into ends. Pure.

A window is [start, end): it belongs to the first boundary strictly after its items. Computing one costs about 30 µs,
and items come by the thousand for the same few rules and zones; so what was computed is kept as intervals with one
answer. Nothing here depends on when it is asked, so replicas agree without talking.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from libs.recurrence import next_after
from services.digest.catalog import rule_of

_RULES_KEPT = 10_000
_INTERVALS_KEPT = 10_000
LONGEST_CHAIN = 5_000
"""Windows between two instants that are told apart; what is older counts as late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRule:
    """A cadence's rule in one zone."""

    cron: str
    rrule: str
    zone: str


@dataclass(frozen=True, slots=True)
class Interval:
    """Every instant in [start, end) belongs to the window that ends at `end`."""

    start: datetime
    end: datetime


@dataclass(slots=True)
class _Known:
    starts: list[datetime] = field(default_factory=list)
    ends: list[datetime] = field(default_factory=list)


class Boundaries:
    """Remembers boundaries; safe to lose."""

    def __init__(self) -> None:
        self._known: dict[LocalRule, _Known] = {}

    def after(self, rule: LocalRule, instant: datetime) -> datetime | None:
        """The first boundary strictly after `instant` (UTC), or None when the rule has ended. Raises BadRule."""
        known = self._known.get(rule)
        if known is None:
            if len(self._known) >= _RULES_KEPT:
                self._known.clear()
            known = self._known[rule] = _Known()
        place = bisect_right(known.ends, instant)
        if place < len(known.ends) and known.starts[place] <= instant:
            return known.ends[place]
        end = next_after(rule_of(rule.cron, rule.rrule, rule.zone), instant)
        if end is None:
            return None
        if place < len(known.ends) and known.ends[place] == end:
            known.starts[place] = instant
        else:
            if len(known.ends) >= _INTERVALS_KEPT:
                known.starts.clear()
                known.ends.clear()
                place = 0
            known.starts.insert(place, instant)
            known.ends.insert(place, end)
        return end

    def between(self, rule: LocalRule, first: datetime, last: datetime) -> Iterator[Interval]:
        """Intervals that cover [first, last] without gaps, ascending, at most LONGEST_CHAIN of them."""
        start = first
        for _ in range(LONGEST_CHAIN):
            end = self.after(rule, start)
            if end is None:
                return
            yield Interval(start, end)
            if end > last:
                return
            start = end

    def covering(self, rule: LocalRule, first: datetime, last: datetime, now: datetime) -> list[Interval]:
        """What items that happened in [first, last] need: their own windows, and the one that is current at `now`."""
        past = self.between(rule, first, min(last, now)) if first <= now else iter(())
        return list(dict.fromkeys([*past, *self.between(rule, now, max(last, now))]))
