"""Where aligned windows end."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.recurrence import next_after
from services.digest.boundaries import Boundaries, Interval, LocalRule
from services.digest.catalog import rule_of

DAILY = LocalRule(cron="0 8 * * *", rrule="", zone="America/New_York")
NOON = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
DAY = timedelta(days=1)


def test_the_boundary_is_strictly_after_the_instant() -> None:
    """08:00 sharp belongs to the window that ends tomorrow."""
    at_eight = datetime(2026, 3, 2, 13, 0, tzinfo=UTC)
    boundaries = Boundaries()
    assert boundaries.after(DAILY, at_eight - timedelta(microseconds=1)) == at_eight
    assert boundaries.after(DAILY, at_eight) == at_eight + DAY


@given(st.lists(st.integers(min_value=0, max_value=400 * 24 * 60), min_size=1, max_size=40))
def test_what_is_remembered_is_what_would_be_computed(minutes: list[int]) -> None:
    """In whatever order instants come, over two clock changes, the answer is that of the rule."""
    boundaries = Boundaries()
    rule = rule_of("0 8 * * *", "", "America/New_York")
    for minute in minutes:
        instant = NOON + timedelta(minutes=minute)
        assert boundaries.after(DAILY, instant) == next_after(rule, instant)


def test_intervals_cover_without_gaps_and_include_the_current_one() -> None:
    """Items of two days and now: three windows, each with its end."""
    eight = datetime(2026, 3, 2, 13, 0, tzinfo=UTC)
    found = Boundaries().covering(DAILY, NOON - DAY, NOON, NOON)
    assert found == [
        Interval(NOON - DAY, eight - DAY),
        Interval(eight - DAY, eight),
        Interval(NOON, eight),
    ]


def test_items_of_the_future_get_windows_of_their_own() -> None:
    """occur_time may lie some minutes ahead, over a boundary."""
    found = Boundaries().covering(DAILY, NOON + DAY, NOON + DAY, NOON)
    assert [interval.end.day for interval in found] == [2, 3]


def test_a_rule_that_has_ended_has_no_boundary() -> None:
    """None instead of an error; the item is then suppressed with that reason."""
    over = LocalRule(cron="", rrule="FREQ=DAILY;UNTIL=20250101T000000", zone="UTC")
    assert Boundaries().after(over, NOON) is None
    assert Boundaries().covering(over, NOON, NOON, NOON) == []


def test_every_second_week_counts_from_a_fixed_monday() -> None:
    """INTERVAL does not depend on when anybody first asks."""
    rule = LocalRule(cron="", rrule="FREQ=WEEKLY;INTERVAL=2;BYDAY=FR;BYHOUR=10;BYMINUTE=0", zone="UTC")
    first = Boundaries().after(rule, NOON)
    assert first == datetime(2026, 3, 13, 10, 0, tzinfo=UTC)
    assert Boundaries().after(rule, first) == datetime(2026, 3, 27, 10, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("rrule", "local"),
    [
        ("FREQ=DAILY;BYHOUR=8", "2026-07-15 08:00"),
        ("FREQ=DAILY;INTERVAL=2", "2026-07-15 00:00"),
        ("FREQ=WEEKLY", "2026-07-20 00:00"),
        ("FREQ=WEEKLY;BYDAY=FR", "2026-07-17 00:00"),
        ("FREQ=WEEKLY;INTERVAL=2;BYDAY=FR;BYHOUR=10;BYMINUTE=0", "2026-07-17 10:00"),
        ("FREQ=MONTHLY", "2026-08-03 00:00"),
        ("FREQ=YEARLY", "2027-01-03 00:00"),
    ],
)
@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Pacific/Kiritimati"])
def test_what_a_rule_leaves_open_is_a_monday_at_midnight_in_its_zone(zone: str, rrule: str, local: str) -> None:
    """Everywhere the same day and time on the wall, east and west of UTC and where zones have half hours."""
    before = datetime(2026, 7, 14, 23, 59, tzinfo=ZoneInfo(zone)).astimezone(UTC)
    found = Boundaries().after(LocalRule(cron="", rrule=rrule, zone=zone), before)
    assert found is not None
    assert f"{found.astimezone(ZoneInfo(zone)):%Y-%m-%d %H:%M}" == local


def test_a_rule_keeps_its_time_of_day_when_the_clocks_change() -> None:
    """New York, the night to 8 March 2026: the second one comes after 23 hours, and both are at eight."""
    rule = LocalRule(cron="", rrule="FREQ=DAILY;BYHOUR=8", zone="America/New_York")
    first = Boundaries().after(rule, datetime(2026, 3, 6, 23, 0, tzinfo=UTC))
    assert first == datetime(2026, 3, 7, 13, 0, tzinfo=UTC)
    assert Boundaries().after(rule, first) == datetime(2026, 3, 8, 12, 0, tzinfo=UTC)
