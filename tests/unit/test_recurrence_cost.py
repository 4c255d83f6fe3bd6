"""Rules that would take too long to read are refused."""

from datetime import UTC, datetime, timedelta

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
        check_cost(Rule(rrule=rrule, start=NOW), NOW)
    assert caught.value.field == "rrule"


@pytest.mark.parametrize(
    "rrule",
    ["FREQ=MINUTELY;INTERVAL=7", "FREQ=MINUTELY;INTERVAL=15;BYDAY=MO;BYHOUR=9", "FREQ=DAILY;BYMONTH=2;BYMONTHDAY=29"],
)
def test_a_rule_that_people_write_is_not(rrule: str) -> None:
    """And is read at once."""
    rule = Rule(rrule=rrule, start=NOW)
    check_cost(rule, NOW)
    assert next_after(rule, NOW) is not None


@pytest.mark.parametrize("counting", [{"cron": "* * * * *", "count": 9}, {"rrule": "FREQ=DAILY;COUNT=9"}])
def test_a_count_is_not_counted_from_years_ago(counting: dict[str, object]) -> None:
    """A month is."""
    check_cost(Rule(start=NOW - timedelta(days=31), **counting), NOW)  # type: ignore[arg-type]
    with pytest.raises(BadRule) as caught:
        check_cost(Rule(start=NOW - timedelta(days=32), **counting), NOW)  # type: ignore[arg-type]
    assert caught.value.field == "start_time"
