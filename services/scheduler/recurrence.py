"""Recurrences: a rule with its policies, and which occurrence follows which. Pure.

An occurrence has a *nominal* time, by the rule, and is due at that time plus its jitter. Its id derives from the
nominal time, so that whoever makes it again makes the same. Only an occurrence whose time has come makes the next one.

What was missed while nothing could fire is made up for as the misfire policy says:

    FIRE_ONCE   the first missed occurrence within the window fires; the next is not missed
    FIRE_ALL    every missed occurrence within the window fires, one after the other
    SKIP        as FIRE_ALL, with a window of a minute: later than that is not worth firing
"""

from datetime import datetime, timedelta
from enum import IntEnum
from itertools import islice, takewhile
from uuid import UUID

from msgspec import Struct
from msgspec.structs import replace

from libs.ids import derived_id
from libs.recurrence import Rule, next_after, occurrences, uncounted
from services.scheduler.attempts import fraction_of

CATCH_UP = timedelta(days=30)
"""How far back missed occurrences count where nothing is said: no outage should lose a monthly report."""

_GRACE = timedelta(minutes=1)
_MICROSECOND = timedelta(microseconds=1)


class Misfire(IntEnum):
    """What happens to missed occurrences; numbers as in scheduler.v1.MisfirePolicy."""

    FIRE_ONCE = 1
    FIRE_ALL = 2
    SKIP = 3


class Overlap(IntEnum):
    """What happens when one before has no outcome yet; numbers as in scheduler.v1.OverlapPolicy."""

    ALLOW = 1
    SKIP = 2
    BUFFER_ONE = 3


class Recurrence(Struct, frozen=True, kw_only=True):
    """A rule that makes timers. See libs.recurrence.Rule for what its parts mean."""

    rule: Rule
    jitter: timedelta = timedelta(0)
    misfire: Misfire = Misfire.FIRE_ONCE
    catch_up: timedelta = CATCH_UP
    overlap: Overlap = Overlap.ALLOW

    @property
    def _window(self) -> timedelta:
        return _GRACE if self.misfire is Misfire.SKIP else self.catch_up

    def uncounted(self) -> "Recurrence":
        """As it is kept: counted once, and not at every firing."""
        return replace(self, rule=uncounted(self.rule))

    def first(self, accepted_at: datetime) -> datetime | None:
        """The first nominal time strictly after acceptance, and not before the rule's start."""
        return next_after(self.rule, accepted_at)

    def due_at(self, schedule_id: UUID, nominal_at: datetime) -> datetime:
        """When the occurrence is due: its nominal time and its share of the jitter.

        Never after the nominal time of the next one: only an occurrence whose time has come makes the next, which would
        be late for no fault of its own.
        """
        if not self.jitter:
            return nominal_at
        next_at = next_after(self.rule, nominal_at)
        most = self.jitter if next_at is None else min(self.jitter, next_at - nominal_at)
        return nominal_at + most * fraction_of(occurrence_id(schedule_id, nominal_at), 0)

    def is_missed(self, due_at: datetime, nominal_at: datetime, now: datetime) -> bool:
        """Whether it comes too late to be fired. One rescheduled to an earlier time is not late before its own."""
        return now - max(due_at, nominal_at) > self._window

    def following(self, schedule_id: UUID, nominal_at: datetime, now: datetime, *, is_missed: bool) -> datetime | None:
        """The nominal time after `nominal_at`; `is_missed`: that one came too late."""
        if self.misfire is Misfire.FIRE_ONCE and not is_missed:  # It fires for all that have come due meanwhile.
            near = occurrences(self.rule, max(nominal_at, now - self.jitter))
            return next((at for at in near if self.due_at(schedule_id, at) > now), None)
        earliest = now - self._window - self.jitter
        return next_after(self.rule, max(nominal_at, earliest - _MICROSECOND))

    def between(self, start: datetime, end: datetime, *, most: int) -> list[datetime]:
        """Nominal times in (start, end], at most `most + 1`: one more says that there are too many."""
        return list(islice(takewhile(lambda at: at <= end, occurrences(self.rule, start)), most + 1))


def occurrence_id(schedule_id: UUID, nominal_at: datetime) -> UUID:
    """The timer id of one occurrence: whoever makes it again makes the same."""
    return derived_id("occurrence", schedule_id, nominal_at.isoformat())


def backfill_id(schedule_id: UUID, nominal_at: datetime) -> UUID:
    """The timer id of an occurrence that is made up for: once, however often it is asked for."""
    return derived_id("backfill", schedule_id, nominal_at.isoformat())
