"""libs.recurrence against a naive minute-by-minute model."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice

from hypothesis import given, settings
from hypothesis import strategies as st

from libs.recurrence import Fold, Gap, Rule, next_after, occurrences, zone_of

NEW_YORK = "America/New_York"
LORD_HOWE = "Australia/Lord_Howe"
APIA = "Pacific/Apia"


def at(text: str) -> datetime:
    """An instant in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


_DAYS = {  # Around jumps, and one without.
    NEW_YORK: ["2013-03-10", "2013-11-03", "2013-07-01"],
    LORD_HOWE: ["2013-10-05", "2013-04-06"],
    "Europe/Berlin": ["2013-03-31", "2013-10-27"],
    "Asia/Kathmandu": ["2013-07-01"],
    APIA: ["2011-12-30"],
}
MINUTE = timedelta(minutes=1)


def numbers(text: str, low: int, high: int) -> set[int]:
    """What a field of the small cron language below stands for."""
    if text.startswith("*"):
        return set(range(low, high + 1, int(text[2:] or "1")))
    return {int(part) for part in text.split(",")}


def model(minutes: str, hours: str, zone_name: str, gap: Gap, fold: Fold, first: datetime) -> Iterator[datetime]:
    """All instants in two days from `first`, found by walking through them."""
    zone = zone_of(zone_name)
    wanted = {(hour, minute) for hour in numbers(hours, 0, 23) for minute in numbers(minutes, 0, 59)}
    goes_by_elapsed_time = hours == "*"
    found: set[datetime] = set()
    for n in range(-1440 * 2, 1440 * 2):
        instant = first + n * MINUTE
        local = instant.astimezone(zone)
        if (local.hour, local.minute) in wanted and (not local.fold or fold is Fold.BOTH or goes_by_elapsed_time):
            found.add(instant)
        previous = (instant - MINUTE).astimezone(zone)
        missing = previous.replace(tzinfo=None) + MINUTE
        moved = instant
        while missing < local.replace(tzinfo=None) and not goes_by_elapsed_time and gap is Gap.SHIFT:
            if (missing.hour, missing.minute) in wanted:
                found.add(moved)
            missing, moved = missing + MINUTE, moved + MINUTE
    yield from sorted(one for one in found if first < one)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    zone_name=st.sampled_from(sorted(_DAYS)),
    minutes=st.one_of(
        st.sampled_from(["*", "*/7", "*/10", "*/30"]),
        st.lists(st.integers(0, 59), min_size=1, max_size=3).map(lambda found: ",".join(map(str, found))),
    ),
    hours=st.one_of(
        st.sampled_from(["*", "*/2", "*/3"]),
        st.lists(st.integers(0, 4), min_size=1, max_size=3).map(lambda found: ",".join(map(str, found))),
    ),
    gap=st.sampled_from(Gap),
    fold=st.sampled_from(Fold),
    offset=st.integers(-720, 1440),
)
def test_occurrences_are_what_the_naive_model_finds(
    data: st.DataObject, zone_name: str, minutes: str, hours: str, gap: Gap, fold: Fold, offset: int
) -> None:
    """Every instant the model finds, no other, in order, wherever one starts to look."""
    first = at(data.draw(st.sampled_from(_DAYS[zone_name]))) + offset * MINUTE
    rule = Rule(cron=f"{minutes} {hours} * * *", zone=zone_name, start=at("2011-01-01"), gap=gap, fold=fold)
    expected = [one for one in model(minutes, hours, zone_name, gap, fold, first) if one < first + 1440 * MINUTE]
    assert list(islice(occurrences(rule, first), len(expected))) == expected
    after_them = next_after(rule, first + 1440 * MINUTE - timedelta(microseconds=1))
    assert after_them is not None
    assert after_them >= first + 1440 * MINUTE
