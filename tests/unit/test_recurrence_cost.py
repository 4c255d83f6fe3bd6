"""Rules that would take too long to read are refused."""

from datetime import UTC, datetime
from typing import Any

import pytest

from libs.recurrence import BadRule, Rule, next_after
from libs.recurrence_cost import check_cost

NOW = datetime(2013, 7, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    "rrule",
    [
        "FREQ=MINUTELY;INTERVAL=7;BYDAY=MO;BYHOUR=3;BYMINUTE=7",
        "FREQ=HOURLY;BYMONTH=2;BYMONTHDAY=30",
        "rrule:freq=minutely;byyearday=1",
        "FREQ=HOURLY;INTERVAL=23;BYDAY=MO",
        "FREQ=MINUTELY;INTERVAL=0;BYDAY=MO",
    ],
)
def test_a_rule_that_drifts_or_filters_minutes_by_date_is_refused(rrule: str) -> None:
    """The message says what to write instead."""
    with pytest.raises(BadRule) as caught:
        check_cost(Rule(rrule=rrule, start=NOW))
    assert caught.value.field == "rrule"


@pytest.mark.parametrize(
    "rrule",
    ["FREQ=MINUTELY;INTERVAL=7", "FREQ=MINUTELY;INTERVAL=15;BYDAY=MO;BYHOUR=9", "FREQ=DAILY;BYMONTH=2;BYMONTHDAY=29"],
)
def test_a_rule_that_people_write_is_not(rrule: str) -> None:
    """And is read at once."""
    rule = Rule(rrule=rrule, start=NOW)
    check_cost(rule)
    assert next_after(rule, NOW) is not None


@pytest.mark.parametrize(
    ("counting", "field"),
    [({"cron": "* * * * *", "count": 10_001}, "count"), ({"rrule": "FREQ=DAILY;COUNT=10001"}, "rrule")],
)
def test_a_count_is_bounded(counting: dict[str, Any], field: str) -> None:
    """To find its end takes time for each occurrence; from when it is counted does not matter."""
    check_cost(Rule(start=NOW, cron="* * * * *", count=10_000))
    check_cost(Rule(start=datetime(1970, 1, 1, tzinfo=UTC), rrule="FREQ=DAILY;COUNT=10000"))
    with pytest.raises(BadRule, match="at most 10,000") as caught:
        check_cost(Rule(start=NOW, **counting))
    assert caught.value.field == field
