"""Whether a recurrence may be accepted: readable, not over before it begins, and cheap to compute. Pure.

Reading rules is libs.recurrence's business. Added here is what a rule from outside may cost: dateutil steps through an
RRULE's periods one by one, so a rule that never matches (`FREQ=MINUTELY;BYMONTH=2;BYMONTHDAY=30`) would hold the process
for hours. Two measures:

- Only the parts listed per frequency are taken; every useful rule can be said with them.
- Whether a rule ever fires is asked 7,600 years later: the calendar repeats every 400 years, dateutil ends at the year
  9999, so it looks at 373 years at most instead of 7,973: 0.3 s in the worst case, and that is remembered.
"""

import re
from datetime import datetime, timedelta
from functools import lru_cache

from dateutil.rrule import rrulestr

from libs.recurrence import BadRule, Rule, check_rule, next_after

_MANY_YEARS = 7_600
_LONGEST_PAST = timedelta(days=7)
_COMMON = {"FREQ", "INTERVAL", "COUNT", "UNTIL", "WKST", "BYHOUR", "BYMINUTE", "BYDAY"}
_DATES = {"BYMONTH", "BYMONTHDAY", "BYSETPOS"}
_PARTS = {
    "YEARLY": _COMMON | _DATES | {"BYYEARDAY", "BYWEEKNO", "BYEASTER"},
    "MONTHLY": _COMMON | _DATES,
    "WEEKLY": _COMMON | {"BYMONTH", "BYSETPOS"},
    "DAILY": _COMMON | {"BYMONTH", "BYMONTHDAY"},
    "HOURLY": _COMMON,
    "MINUTELY": _COMMON,
}
_RRULE = re.compile(r"(?:RRULE:)?([A-Z]+=[A-Z0-9,+-]+(?:;[A-Z]+=[A-Z0-9,+-]+)*)")


def check_recurrence(rule: Rule, now: datetime) -> datetime:
    """The rule's first occurrence after `now`; raises BadRule, naming the field, for a rule that is not to be accepted."""
    if rule.rrule:
        _check_cost(rule, now)
    check_rule(rule)
    first = next_after(rule, now)
    if first is None:
        raise BadRule("cron" if rule.cron else "rrule", "has no occurrence from now on")
    return first


def _check_cost(rule: Rule, now: datetime) -> None:
    written = _RRULE.fullmatch(rule.rrule.upper())
    if written is None:
        raise BadRule("rrule", "must be one RRULE such as FREQ=WEEKLY;BYDAY=FR, without DTSTART")
    parts = dict(part.split("=", 1) for part in written[1].split(";"))
    frequency = parts.get("FREQ", "")
    if frequency not in _PARTS:
        raise BadRule("rrule", f"must have a FREQ of {', '.join(_PARTS)}")
    if unknown := parts.keys() - _PARTS[frequency]:
        raise BadRule("rrule", f"must not have {min(unknown)} with FREQ={frequency}")
    if frequency in ("HOURLY", "MINUTELY") and now - rule.start > _LONGEST_PAST:
        raise BadRule("start_time", f"must not be more than 7 days back with FREQ={frequency}")
    # Both bound a rule that fires; neither matters to whether it would.
    kept = ";".join(f"{name}={value}" for name, value in parts.items() if name not in ("COUNT", "UNTIL"))
    if "BYEASTER" not in parts and not _ever_fires(kept, rule.start.replace(tzinfo=None)):
        raise BadRule("rrule", "never fires")


@lru_cache(maxsize=1_024)
def _ever_fires(text: str, start: datetime) -> bool:
    try:
        later = start.replace(year=start.year % 400 + _MANY_YEARS + 2_000)
        return next(iter(rrulestr(text, dtstart=later)), None) is not None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadRule("rrule", f"{text!r} is not an RRULE: {error}") from error
