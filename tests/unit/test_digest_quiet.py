"""When quiet hours hold, and when they end."""

from datetime import UTC, datetime, time
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.digest.catalog import Channel, QuietRange
from services.digest.quiet import leaves_no_time, quiet_until

NEW_YORK = ZoneInfo("America/New_York")


def hours(text: str, channel: Channel | None = None) -> QuietRange:
    """A range written as 22:00-07:00."""
    start, until = text.split("-")
    return QuietRange(start=time.fromisoformat(start), until=time.fromisoformat(until), channel=channel)


def ends(now: str, *ranges: str) -> str | None:
    """Local New York time at which the quiet at local time `now` ends, with its offset; None when there is none."""
    at = datetime.fromisoformat(now)
    at = at if at.tzinfo else at.replace(tzinfo=NEW_YORK)
    until = quiet_until([hours(one) for one in ranges], NEW_YORK, Channel.EMAIL, at.astimezone(UTC))
    return None if until is None else until.astimezone(NEW_YORK).strftime("%d %H:%M %z")


@pytest.mark.parametrize(
    ("now", "ranges", "end"),
    [
        ("2026-03-02T21:59:59", ["22:00-07:00"], None),
        ("2026-03-02T22:00", ["22:00-07:00"], "03 07:00 -0500"),
        ("2026-03-03T06:59:59.999999", ["22:00-07:00"], "03 07:00 -0500"),
        ("2026-03-03T07:00", ["22:00-07:00"], None),
        ("2026-03-02T12:30", ["12:00-13:00"], "02 13:00 -0500"),
        ("2026-03-02T12:30", ["12:00-13:00", "13:00-14:00", "13:30-15:00"], "02 15:00 -0500"),
        ("2026-03-02T23:00", ["00:00-07:00", "22:00-00:00"], "03 07:00 -0500"),
        ("2026-03-02T12:30", ["22:00-07:00"], None),
        ("2026-03-02T12:30", [], None),
    ],
)
def test_ranges_hold_from_their_start_to_just_before_their_end(now: str, ranges: list[str], end: str | None) -> None:
    """Over midnight too; those that meet or overlap are one."""
    assert ends(now, *ranges) == end


@pytest.mark.parametrize(
    ("now", "ranges", "end"),
    [
        ("2026-03-07T23:00", ["22:00-07:00"], "08 07:00 -0400"),  # The clock jumps within.
        ("2026-03-08T01:30", ["22:00-02:30"], "08 03:30 -0400"),  # The end is skipped.
        ("2026-03-08T03:15-04:00", ["02:30-05:00"], None),  # The start is skipped: half an hour after the jump.
        ("2026-03-08T03:30-04:00", ["02:30-05:00"], "08 05:00 -0400"),
        ("2026-11-01T01:15-04:00", ["22:00-01:30"], "01 01:30 -0500"),  # The end comes twice: the second.
        ("2026-11-01T01:45-04:00", ["22:00-01:30"], "01 01:30 -0500"),
        ("2026-11-01T01:45-04:00", ["01:30-05:00"], "01 05:00 -0500"),  # The start comes twice: the first.
    ],
)
def test_days_of_clock_changes_err_on_the_quiet_side(now: str, ranges: list[str], end: str | None) -> None:
    """8 March and 1 November 2026 in New York."""
    assert ends(now, *ranges) == end


def test_a_range_for_one_channel_leaves_the_others_alone() -> None:
    """Email waits, a webhook does not."""
    ranges = [hours("22:00-07:00", Channel.EMAIL)]
    night = datetime(2026, 3, 2, 23, tzinfo=UTC)
    assert quiet_until(ranges, ZoneInfo("UTC"), Channel.EMAIL, night) == datetime(2026, 3, 3, 7, tzinfo=UTC)
    assert quiet_until(ranges, ZoneInfo("UTC"), Channel.WEBHOOK, night) is None


def test_ranges_that_leave_no_minute_of_the_day_are_found() -> None:
    """One channel is enough; a single minute is, too."""
    day = hours("08:00-20:00")
    assert leaves_no_time([day, hours("20:00-08:00", Channel.LOG)])
    assert not leaves_no_time([day, hours("20:00-07:59")])
    assert not leaves_no_time([])


hours_of_day = st.integers(0, 23).map(time)
several = st.lists(
    st.builds(QuietRange, start=hours_of_day, until=hours_of_day, channel=st.sampled_from([None, Channel.EMAIL])),
    max_size=4,
).map(lambda ranges: [one for one in ranges if one.start != one.until])


@given(several)
def test_no_time_is_left_when_every_hour_of_some_channel_is_quiet(ranges: list[QuietRange]) -> None:
    """As found by looking at each hour."""

    def is_quiet(one: QuietRange, hour: int) -> bool:
        return (hour - one.start.hour) % 24 < (one.until.hour - one.start.hour) % 24

    email = all(any(is_quiet(one, hour) for one in ranges) for hour in range(24))
    others = all(any(is_quiet(one, hour) for one in ranges if one.channel is None) for hour in range(24))
    assert leaves_no_time(ranges) == (email or others)
