"""libs.recurrence: what a count comes to, and starts that are no whole second."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from libs import recurrence
from libs.recurrence import Fold, Rule, next_after, occurrences, uncounted, whole_second
from tests.unit.test_recurrence import LORD_HOWE, NEW_YORK, at

_COUNTED = [
    {"cron": "*/20 1-3 * * *", "count": 7},
    {"cron": "30 2 * * *", "count": 3, "fold": Fold.BOTH},
    {"rrule": "FREQ=DAILY;COUNT=5"},
    {"rrule": "rrule:freq=daily;byhour=1,2,3;byminute=0,15,30;count=11"},
    {"rrule": "FREQ=HOURLY;COUNT=30", "count": 9},
    {"rrule": "FREQ=DAILY;COUNT=9;UNTIL=20131106T000000Z"},
]


@given(
    counted=st.sampled_from(_COUNTED),
    zone=st.sampled_from(["UTC", NEW_YORK, LORD_HOWE]),
    begin=st.timedeltas(timedelta(0), timedelta(days=242)).map(at("2013-03-07").__add__),
    fold=st.sampled_from(Fold),
    has_end=st.booleans(),
)
@settings(max_examples=200)
@example(counted=_COUNTED[3], zone=NEW_YORK, begin=at("2013-11-02T14:00"), fold=Fold.BOTH, has_end=False)
@example(counted=_COUNTED[0], zone=NEW_YORK, begin=at("2013-03-09T14:00"), fold=Fold.FIRST, has_end=False)
def test_a_rule_without_its_count_has_the_same_occurrences(
    counted: dict[str, Any], zone: str, begin: datetime, fold: Fold, has_end: bool
) -> None:
    """Wherever the clocks jump, whatever else ends it, and however late one asks."""
    end = begin + timedelta(days=3) if has_end else None
    rule = replace(Rule(start=begin, zone=zone, end=end, fold=fold), **counted)
    plain = uncounted(rule)
    assert plain.count == 0
    assert "COUNT" not in plain.rrule
    for after in (begin - timedelta(days=1), begin + timedelta(days=2)):
        assert list(occurrences(plain, after)) == list(occurrences(rule, after))


def test_a_rule_without_its_count_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for the last of ten thousand, it looks at no other."""
    looked_at = []
    instants = recurrence._instants

    def noted(rule: Rule, after: datetime) -> Iterator[datetime]:
        for one in instants(rule, after):
            looked_at.append(one)
            yield one

    monkeypatch.setattr(recurrence, "_instants", noted)
    rule = Rule(cron="* * * * *", start=at("2013-07-01"), count=10_000)
    before_last = at("2013-07-01") + timedelta(minutes=9_998)
    last = before_last + timedelta(minutes=1)
    assert next_after(rule, before_last) == last
    assert len(looked_at) == 10_000
    plain = uncounted(rule)
    looked_at.clear()
    assert next_after(plain, before_last) == last
    assert looked_at == [last]


def test_what_would_take_too_long_to_count_at_once_stays() -> None:
    """It was accepted before there was a bound."""
    for rule in (
        Rule(cron="* * * * *", start=at("2013-07-01"), count=1_000_000),
        Rule(rrule="FREQ=MINUTELY;COUNT=1000000", start=at("2013-07-01")),
    ):
        assert uncounted(rule) == rule


@given(
    frequency=st.sampled_from(["MINUTELY", "HOURLY", "DAILY", "WEEKLY", "MONTHLY", "YEARLY"]),
    begin=st.timedeltas(timedelta(0), timedelta(days=360)).map(at("2013-01-01").__add__),
    count=st.integers(1, 4),
)
@example(frequency="DAILY", begin=at("2013-07-01T08:00:00.500"), count=3)
def test_a_start_between_two_seconds_loses_no_occurrence(frequency: str, begin: datetime, count: int) -> None:
    """The first is at the next whole second, and COUNT counts as many as it says."""
    rule = Rule(rrule=f"FREQ={frequency};COUNT={count}", start=whole_second(begin))
    found = list(occurrences(rule, begin - timedelta(microseconds=1)))
    assert len(found) == count
    assert begin <= found[0] < begin + timedelta(seconds=1)
