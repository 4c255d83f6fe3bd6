"""Recurrences: a rule with its policies, and which occurrence follows which. Pure.

The next occurrence is strictly after both the last one and now (DESIGN §5): what was missed while nothing could fire is
made up by the one firing that comes late, never by a second firing of the same occurrence.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from libs.ids import derived_id
from libs.recurrence import Fold, Gap, Rule, next_after


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrence:
    """A rule that makes timers. See libs.recurrence.Rule for what its parts mean."""

    rule: Rule

    def first(self, accepted_at: datetime) -> datetime | None:
        """The first occurrence strictly after acceptance, and not before the rule's start."""
        return next_after(self.rule, accepted_at)

    def following(self, last: datetime, now: datetime) -> datetime | None:
        """The occurrence after `last`, strictly in the future."""
        return next_after(self.rule, max(last, now))

    def to_json(self) -> dict[str, Any]:
        """For storage."""
        rule = self.rule
        return {
            "cron": rule.cron,
            "rrule": rule.rrule,
            "zone": rule.zone,
            "start": rule.start.isoformat(),
            "end": rule.end.isoformat() if rule.end else None,
            "count": rule.count,
            "exclusions": sorted(one.isoformat() for one in rule.exclusions),
            "gap": rule.gap.name,
            "fold": rule.fold.name,
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Recurrence":
        """From storage."""
        return cls(
            rule=Rule(
                cron=stored["cron"],
                rrule=stored["rrule"],
                zone=stored["zone"],
                start=datetime.fromisoformat(stored["start"]),
                end=datetime.fromisoformat(stored["end"]) if stored["end"] else None,
                count=stored["count"],
                exclusions=frozenset(map(datetime.fromisoformat, stored["exclusions"])),
                gap=Gap[stored["gap"]],
                fold=Fold[stored["fold"]],
            )
        )


def occurrence_id(schedule_id: UUID, due_at: datetime) -> UUID:
    """The timer id of one occurrence: whoever makes it again makes the same."""
    return derived_id("occurrence", schedule_id, due_at.isoformat())
