"""Which recurrence rules take too long to read: for rules that come from outside. Pure.

dateutil walks an RRULE step by step. One that counts minutes or hours and then filters by date, or whose steps drift
against the day, may walk for seconds before its next occurrence or the end of the calendar: measured 5 s for
`FREQ=MINUTELY;INTERVAL=7;BYDAY=MO;BYHOUR=3;BYMINUTE=7`. Everything it could say is said by FREQ=DAILY or above, which
takes at most 0.4 s. What a count comes to is found by counting: a tenth of a second for MAX_COUNT occurrences.
"""

from libs.recurrence import MAX_COUNT, BadRule, Rule

_PER_DAY = {"MINUTELY": 1_440, "HOURLY": 24}
_DATES = {"BYMONTH", "BYMONTHDAY", "BYYEARDAY", "BYWEEKNO", "BYSETPOS"}
_TIMES = {"BYDAY", "BYHOUR", "BYMINUTE"}


def check_cost(rule: Rule) -> None:
    """Raise BadRule for a rule that could take seconds; `field` may also be count. Bounds on text come before."""
    named = [part.partition("=") for part in rule.rrule.strip().upper().removeprefix("RRULE:").split(";")]
    parts = {name.strip(): value.strip() for name, _, value in named}
    if rule.count > MAX_COUNT:
        raise BadRule("count", f"must be at most {MAX_COUNT:,}, got {rule.count:,}; give an end_time instead")
    count = parts.get("COUNT", "")
    if count.isdecimal() and (len(count) > 9 or int(count) > MAX_COUNT):
        raise BadRule("rrule", f"COUNT must be at most {MAX_COUNT:,}, got {count[:10]}; give an UNTIL instead")
    per_day = _PER_DAY.get(parts.get("FREQ", ""))
    if per_day is None:
        return
    if used := sorted(_DATES & parts.keys()):
        raise BadRule("rrule", f"must not have {used[0]} with FREQ={parts['FREQ']}; use FREQ=DAILY or above")
    interval = parts.get("INTERVAL", "1")
    if _TIMES & parts.keys() and (not interval.isdecimal() or int(interval[:9]) == 0 or per_day % int(interval[:9])):
        raise BadRule("rrule", f"must have an INTERVAL that divides {per_day} where BYDAY, BYHOUR or BYMINUTE is given")
