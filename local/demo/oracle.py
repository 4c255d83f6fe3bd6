"""What must come of the replay, computed straight from the CSV by plain arithmetic on local time.

Independent on purpose: nothing of Carillon, not even its calendar, and nothing of the plan is used here, only the
story's constants. Where the two disagree, one of them is wrong.
"""

import csv
import gzip
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from local.demo import story

Row = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Message:
    """One mail or webhook. `closes` is local, "2013-07-02 08:00"; empty for what is sent at once.

    `items` are "<notification type> <what about>", sorted.
    """

    subscriber: str
    cadence: str
    closes: str
    items: tuple[str, ...]


@dataclass(kw_only=True)
class Expected:
    """What must have happened when the clock stands at the end of the replay."""

    end: datetime
    messages: list[Message] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """By name: notifications, suppressed, requests, timers_fired, …"""
    windows: defaultdict[tuple[str, str, datetime], list[str]] = field(default_factory=lambda: defaultdict(list))
    """Items by (subscriber, cadence, close)."""

    def add(self, subscriber: str, cadence: str, closes: datetime, item: str) -> None:
        """An item lands in the window of its subscriber that closes then."""
        self.windows[subscriber, cadence, closes].append(item)

    def add_alone(self, subscriber: str, item: str) -> None:
        """An item is sent at once."""
        self.messages.append(Message(subscriber=subscriber, cadence=story.IMMEDIATE, closes="", items=(item,)))


def expect(path: Path, days: int) -> Expected:
    """What must come of replaying the first `days` days of July."""
    with gzip.open(path, "rt", newline="") as file:
        everything = list(csv.DictReader(file))
    rows = [row for row in everything if _scheduled(row).day <= days]
    expected = Expected(end=_local_midnight(days) + story.DRAIN)
    _expect_digests(rows, expected)
    _expect_batches(rows, everything, expected)
    _expect_timelines(rows, expected)
    _expect_schedules(expected)
    for (subscriber, cadence, closes), items in expected.windows.items():
        if closes > expected.end:
            expected.counts["items_waiting"] += len(items)
            continue
        local, sorted_items = f"{closes:%Y-%m-%d %H:%M}", tuple(sorted(items))
        expected.messages.append(Message(subscriber=subscriber, cadence=cadence, closes=local, items=sorted_items))
    expected.messages.sort()
    return expected


def _expect_digests(rows: Sequence[Row], expected: Expected) -> None:
    for row in rows:
        if _is_cancelled(row) or int(row["dep_delay_min"]) < story.LATE.total_seconds() / 60:
            continue
        at = _departed(row)
        item = f"{story.DELAYED} {_key(row)}"
        expected.counts["delays"] += 1
        expected.add(story.carrier_manager(row["carrier"]), story.DAILY, _next_eight(at), item)
        expected.add(story.airport_manager(row["origin"]), story.FOUR_HOURLY, _next_shift(at), item)
        expected.add_alone(story.FEED, item)
        if row["origin"] == story.DEPUTY_AIRPORT:
            expected.counts["suppressed"] += 1


def _expect_batches(rows: Sequence[Row], everything: Sequence[Row], expected: Expected) -> None:
    flying = defaultdict(set)
    for row in everything:
        flying[row["origin"], row["dest"]].add(row["carrier"])
    for row in rows:
        if not _is_cancelled(row):
            continue
        others = flying[row["origin"], row["dest"]] - {row["carrier"]}
        if not others:
            expected.counts["requests_refused"] += 1
            continue
        expected.counts["requests"] += 1
        passenger, asked_at = story.passenger(_key(row)), _next_shift(_scheduled(row))
        for carrier in others:
            expected.add(story.desk(carrier), story.BATCH, asked_at, f"{story.ASKED} {_key(row)}")
        answering = [carrier for carrier in others if story.does_answer(_key(row), carrier)]
        expected.counts["responses"] += len(answering)
        for carrier in answering:
            heard_at = _next_shift(asked_at + story.ANSWER_AFTER)
            expected.add(passenger, story.BATCH, heard_at, f"{story.ANSWERED} {carrier}")
        summary = f"{story.SUMMARY} {_key(row)} {len(answering)}"
        expected.add(passenger, story.BATCH, asked_at + story.ANSWER_WITHIN, summary)


def _expect_timelines(rows: Sequence[Row], expected: Expected) -> None:
    flown = defaultdict(list)
    for row in rows:
        if not _is_cancelled(row) and row["tailnum"] not in ("", "NA"):
            flown[row["tailnum"]].append((_departed(row), _scheduled(row), _key(row), row["dest"]))
    for tail, flights in flown.items():
        flights.sort()
        expected.counts["timelines"] += 1
        landed = [departed for departed, _, _, destination in flights[1:] if destination in story.BASES]
        if landed:
            expected.counts["cancels"] += 1
        cancelled_at = landed[0] if landed else None
        _expect_trial(tail, [departed for departed, *_ in flights], cancelled_at, expected)


def _expect_trial(tail: str, departures: Sequence[datetime], cancelled_at: datetime | None, expected: Expected) -> None:
    start = departures[0]
    counts = expected.counts
    upcoming = [(start + story.REMIND_AFTER, story.REMINDER), (start + story.CHECK_AFTER, story.CHECK)]
    while upcoming:
        due, step = upcoming.pop(0)
        if cancelled_at is not None and cancelled_at < due:
            counts["timers_cancelled"] += 1
        elif due > expected.end:
            counts["timers_scheduled"] += 1
        elif step == story.CHECK and sum(at < _shift_start(due) for at in departures) < story.BUSY_FLIGHTS:
            counts["timers_skipped"] += 1
        else:
            counts["timers_fired"] += 1
            counts[f"{step} fired"] += 1
            closes = _next_eight(due)
            if cancelled_at is not None and due <= cancelled_at < closes:
                counts["items_cancelled"] += 1
            else:
                expected.add(story.MAINTENANCE, story.DAILY, closes, f"{step} {tail}")
            if step == story.CHECK:
                upcoming.append((due + story.FOLLOW_UP_AFTER, story.FOLLOW_UP))


def _expect_schedules(expected: Expected) -> None:
    for day in _days(story.START, expected.end):
        at = day.replace(hour=story.REPORT_HOUR)
        if day.weekday() < 5 and at <= expected.end:
            expected.counts["reports"] += 1
            expected.add_alone(story.DIRECTOR, story.REPORT)
    if expected.end >= story.REMARK_AT:
        expected.counts["remarks"] += 1
        expected.add_alone(story.DIRECTOR, story.REMARK)


# Local time. `aware + timedelta` is wall-clock arithmetic in Python; July has no change of clocks.


def _next_eight(at: datetime) -> datetime:
    """The first 08:00 after `at`."""
    today = at.replace(hour=8, minute=0)
    return today if at < today else today + timedelta(days=1)


def _shift_start(at: datetime) -> datetime:
    """The end of a shift before which facts were last told: strictly before `at`."""
    start = at.replace(hour=at.hour // 4 * 4, minute=0)
    return start if start < at else start - timedelta(hours=4)


def _next_shift(at: datetime) -> datetime:
    """The first of 00, 04, 08, 12, 16, 20 o'clock after `at`."""
    return at.replace(hour=at.hour // 4 * 4, minute=0) + timedelta(hours=4)


def _local_midnight(days: int) -> datetime:
    return story.START + timedelta(days=days)


def _days(first: datetime, last: datetime) -> Iterator[datetime]:
    day = first
    while day <= last:
        yield day
        day += timedelta(days=1)


# Rows.


def _is_cancelled(row: Row) -> bool:
    return row["dep_delay_min"] in ("", "NA")


def _scheduled(row: Row) -> datetime:
    return datetime.fromisoformat(row["scheduled_departure_utc"]).astimezone(story.NEW_YORK)


def _departed(row: Row) -> datetime:
    return _scheduled(row) + timedelta(minutes=int(row["dep_delay_min"]))


def _key(row: Row) -> str:
    stamp = row["scheduled_departure_utc"].replace("-", "").replace(":", "")  # 2013-07-01T09:00:00Z
    return f"{row['carrier']}{row['flight']}.{row['origin']}-{row['dest']}.{stamp[:13]}Z"
