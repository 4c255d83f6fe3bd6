"""Quiet hours: until when a subscriber is to be left in peace. Pure.

A range holds for a channel, or for all; `until` not later than `start` means over midnight. Ranges that meet or overlap
are one. Days on which the clocks change err on the quiet side: a start that comes twice is the first, an end that
comes twice the second; a time that is skipped counts from the offset before (RFC 5545), so it is that much later.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

from libs.recurrence import Fold, Gap, instants_of
from services.digest.catalog import Channel, QuietRange


def quiet_until(ranges: Sequence[QuietRange], zone: ZoneInfo, channel: Channel, now: datetime) -> datetime | None:
    """When the quiet that holds at `now` ends (UTC); None when nothing holds. Ranges are [start, until)."""
    days = [now.astimezone(zone).date() + timedelta(days=offset) for offset in (-1, 0, 1, 2)]
    spans = sorted(
        (
            instants_of(datetime.combine(day, one.start), zone, gap=Gap.SHIFT, fold=Fold.BOTH)[0],
            instants_of(_end(one, datetime.combine(day, one.until)), zone, gap=Gap.SHIFT, fold=Fold.BOTH)[-1],
        )
        for one in ranges
        for day in days
        if one.channel in (None, channel)
    )
    until = now
    for start, end in spans:
        if start <= until < end:
            until = end
    return until.astimezone(UTC) if until > now else None


def leaves_no_time(ranges: Sequence[QuietRange]) -> bool:
    """Whether some channel would be quiet all day long, so that nothing could ever be sent by it.

    What is not quiet begins where some range ends, so no other times need a look.
    """
    theirs = ([one for one in ranges if one.channel in (None, channel)] for channel in Channel)
    return any(held and all(_is_quiet(held, one.until) for one in held) for held in theirs)


def _is_quiet(ranges: Sequence[QuietRange], at: time) -> bool:
    return any(
        (one.start <= at < one.until) if one.start < one.until else (at >= one.start or at < one.until)
        for one in ranges
    )


def _end(one: QuietRange, same_day: datetime) -> datetime:
    return same_day + timedelta(days=one.until <= one.start)
