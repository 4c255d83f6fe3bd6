"""Quiet hours between the contract's messages and the catalog's values."""

import re
from collections.abc import Callable, Sequence
from datetime import time

from carillon.digest.v1 import digest_pb2 as pb

from libs.errors import Violations
from libs.wire import check_count
from services.digest.catalog import Channel, QuietRange
from services.digest.quiet import leaves_no_time

ReadChannel = Callable[[Violations, str, int], Channel | None]


def quiet_hours(
    v: Violations, field: str, given: Sequence[pb.QuietHours], *, channel: ReadChannel
) -> tuple[QuietRange, ...]:
    """Checked ranges, which leave some time on every channel."""
    check_count(v, field, given, least=0, most=8)
    ranges = [_range(v, f"{field}[{number}]", one, channel) for number, one in enumerate(given[:8])]
    found = tuple(one for one in ranges if one is not None)
    if leaves_no_time(found):
        v.add(field, "must leave some time of the day on every channel")
    return found


def from_quiet_hours(one: QuietRange) -> pb.QuietHours:
    """As the contract has it."""
    return pb.QuietHours(
        channel=pb.Channel.Value(f"CHANNEL_{one.channel.name}") if one.channel else pb.CHANNEL_UNSPECIFIED,
        from_time_of_day=f"{one.start:%H:%M}",
        until_time_of_day=f"{one.until:%H:%M}",
    )


def _range(v: Violations, field: str, one: pb.QuietHours, channel: ReadChannel) -> QuietRange | None:
    found = channel(v, f"{field}.channel", one.channel)
    start = _time_of_day(v, f"{field}.from_time_of_day", one.from_time_of_day)
    until = _time_of_day(v, f"{field}.until_time_of_day", one.until_time_of_day)
    if start is None or until is None:
        return None
    if start == until:
        v.add(f"{field}.until_time_of_day", "must differ from from_time_of_day")
        return None
    return QuietRange(channel=found, start=start, until=until)


def _time_of_day(v: Violations, field: str, value: str) -> time | None:
    if re.fullmatch(r"([01][0-9]|2[0-3]):[0-5][0-9]", value, re.ASCII) is None:
        v.add(field, "must be a time of day as HH:MM, from 00:00 to 23:59")
        return None
    return time.fromisoformat(value)
