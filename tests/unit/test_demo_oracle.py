"""The demo's oracle: flights few enough to work out by hand, and the real ones by totals counted with other tools."""

import ast
import gzip
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from local.demo import oracle, story
from local.demo.flights import CSV, load
from local.demo.oracle import Expected, Message, expect
from local.demo.plan import Answer, Ask, Delay, Start, Stop, make_plan

_HEADER = "scheduled_departure_utc,carrier,flight,tailnum,origin,dest,dep_delay_min,arr_delay_min"


def _expect(tmp_path: Path, *rows: str, days: int = 10) -> Expected:
    path = tmp_path / "flights.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join([_HEADER, *rows]) + "\n")
    return expect(path, days)


def _messages(expected: Expected, subscriber: str) -> Sequence[tuple[str, tuple[str, ...]]]:
    return [(message.closes, message.items) for message in expected.messages if message.subscriber == subscriber]


def test_imports_nothing_of_carillon() -> None:
    """The oracle must not share a mistake with what it checks."""
    tree = ast.parse(Path(oracle.__file__).read_text())
    imported = {
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [f"{node.module}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert {name for name in imported if name.startswith(("libs", "services", "local", "carillon"))} == {
        "local.demo.story"
    }


def test_delay_goes_to_the_next_digest_in_local_time(tmp_path: Path) -> None:
    """11:50 UTC plus 15 minutes is 08:05 in New York: too late for today's daily digest, in time for the noon one."""
    expected = _expect(tmp_path, "2013-07-02T11:50:00Z,UA,1,N1,EWR,LAX,15,0")
    item = "flight.delayed UA1.EWR-LAX.20130702T1150Z"
    assert _messages(expected, "carrier-manager.UA") == [("2013-07-03 08:00", (item,))]
    assert _messages(expected, "airport-manager.EWR") == [("2013-07-02 12:00", (item,))]
    assert _messages(expected, "feed") == [("", (item,))]


@pytest.mark.parametrize(
    ("scheduled", "daily", "four_hourly"),
    [
        ("2013-07-02T11:44:00Z", "2013-07-02 08:00", "2013-07-02 08:00"),
        ("2013-07-02T11:45:00Z", "2013-07-03 08:00", "2013-07-02 12:00"),
        ("2013-07-02T03:44:00Z", "2013-07-02 08:00", "2013-07-02 00:00"),
        ("2013-07-02T03:45:00Z", "2013-07-02 08:00", "2013-07-02 04:00"),
    ],
)
def test_what_happens_when_a_window_closes_waits_for_the_next(
    tmp_path: Path, scheduled: str, daily: str, four_hourly: str
) -> None:
    """Windows take what happens before their end, not at it."""
    expected = _expect(tmp_path, f"{scheduled},UA,1,N1,EWR,LAX,15,0")
    assert _messages(expected, "carrier-manager.UA")[0][0] == daily
    assert _messages(expected, "airport-manager.EWR")[0][0] == four_hourly


def test_less_than_a_quarter_of_an_hour_is_not_late(tmp_path: Path) -> None:
    """14 minutes tell nobody anything."""
    assert _expect(tmp_path, "2013-07-02T11:50:00Z,UA,1,N1,EWR,LAX,14,0").counts["delays"] == 0


def test_delay_is_suppressed_for_the_deputy(tmp_path: Path) -> None:
    """Only delays from LaGuardia are counted as suppressed, and nothing is sent there."""
    expected = _expect(
        tmp_path, "2013-07-02T11:50:00Z,UA,1,N1,LGA,LAX,15,0", "2013-07-02T11:50:00Z,UA,2,N1,EWR,LAX,15,0"
    )
    assert expected.counts["suppressed"] == 1
    assert _messages(expected, "deputy.LGA") == []


def test_request_travels_to_every_other_carrier_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked with the next email, answered in the one after it, summed up three days after the first."""
    monkeypatch.setattr(story, "does_answer", lambda flight, carrier: carrier == "DL")
    expected = _expect(
        tmp_path,
        "2013-07-02T20:00:00Z,UA,1,N1,EWR,LAX,,",
        "2013-07-20T20:00:00Z,DL,2,N2,EWR,LAX,0,0",
        "2013-07-20T21:00:00Z,AA,3,N3,EWR,LAX,0,0",
        "2013-07-20T21:00:00Z,B6,4,N4,JFK,LAX,0,0",
    )
    flight = "UA1.EWR-LAX.20130702T2000Z"
    asked = [("2013-07-02 20:00", (f"rebooking/request {flight}",))]
    assert _messages(expected, "desk.DL") == asked
    assert _messages(expected, "desk.AA") == asked
    assert _messages(expected, "desk.UA") == _messages(expected, "desk.B6") == []
    assert _messages(expected, f"passenger.{flight}") == [
        ("2013-07-03 00:00", ("rebooking/response DL",)),
        ("2013-07-05 20:00", (f"rebooking/summary {flight} 1",)),
    ]


def test_request_nobody_can_take_is_refused(tmp_path: Path) -> None:
    """A carrier is not asked about its own cancelled flight."""
    expected = _expect(tmp_path, "2013-07-02T20:00:00Z,UA,1,N1,EWR,LAX,NA,NA")
    assert expected.counts == Counter(requests_refused=1, reports=10, remarks=1)


def _trial(*, flights: int, to_base_at: str | None = None) -> list[str]:
    first = [f"2013-07-0{1 + n}T16:00:00Z,UA,{n},N1,EWR,LAX,0,0" for n in range(flights)]
    return [*first, *([f"{to_base_at},UA,99,N1,EWR,DEN,0,0"] if to_base_at else [])]


def test_busy_aircraft_gets_all_three_steps(tmp_path: Path) -> None:
    """First flight on the 1st at noon: reminded on the 6th, checked on the 8th, looked at again on the 10th."""
    assert _messages(_expect(tmp_path, *_trial(flights=3)), "maintenance") == [
        ("2013-07-07 08:00", ("maintenance/reminder N1",)),
        ("2013-07-09 08:00", ("maintenance/check N1",)),
        ("2013-07-11 08:00", ("maintenance/follow-up N1",)),
    ]


def test_idle_aircraft_is_not_checked(tmp_path: Path) -> None:
    """With two flights the check is skipped, and its follow-up never begins."""
    expected = _expect(tmp_path, *_trial(flights=2))
    assert expected.counts["timers_fired"] == 1
    assert expected.counts["timers_skipped"] == 1
    assert len(_messages(expected, "maintenance")) == 1


@pytest.mark.parametrize(
    ("to_base_at", "fired", "cancelled", "items_cancelled"),
    [
        ("2013-07-04T12:00:00Z", 0, 2, 0),
        ("2013-07-06T15:59:00Z", 0, 2, 0),
        ("2013-07-06T16:00:00Z", 1, 1, 1),
        ("2013-07-07T11:59:00Z", 1, 1, 1),
        ("2013-07-07T12:00:00Z", 1, 1, 0),
        ("2013-07-09T16:00:00Z", 2, 1, 0),
        ("2013-07-10T17:00:00Z", 3, 0, 1),
    ],
)
def test_flight_to_a_base_cancels_what_is_upcoming(
    tmp_path: Path, to_base_at: str, fired: int, cancelled: int, items_cancelled: int
) -> None:
    """Timers not yet due, and items whose digest has not closed at 08:00; what has left stays."""
    expected = _expect(tmp_path, *_trial(flights=3, to_base_at=to_base_at))
    counts = expected.counts
    assert counts["timers_fired"] == fired
    assert counts["timers_cancelled"] == cancelled
    assert counts["items_cancelled"] == items_cancelled
    assert sum(len(items) for _, items in _messages(expected, "maintenance")) == fired - items_cancelled


def test_steps_beyond_the_horizon_are_still_scheduled(tmp_path: Path) -> None:
    """Two days of flights end on the 6th at 08:00: before the reminder of a trial that began on the 1st at noon."""
    expected = _expect(tmp_path, *_trial(flights=2), days=2)
    assert expected.counts["timers_scheduled"] == 2
    assert expected.counts["timers_fired"] == 0


def test_reports_come_on_weekdays(tmp_path: Path) -> None:
    """1 to 5, 8 to 12 July are weekdays; the one-off is on the 4th."""
    director = [message for message in _expect(tmp_path, days=7).messages if message.subscriber == "director"]
    assert Counter(item for message in director for item in message.items) == {"report/weekday": 8, "report/one-off": 1}


def test_real_flights_add_up() -> None:
    """Totals of the first ten days, counted with awk."""
    expected = expect(CSV, 10)
    assert expected.counts["delays"] == 3068
    assert expected.counts["requests"] + expected.counts["requests_refused"] == 372
    assert expected.counts["requests_refused"] == 107
    items = Counter(message.subscriber.partition(".")[0] for message in expected.messages for _ in message.items)
    assert items["carrier-manager"] == items["airport-manager"] == items["feed"] == 3068
    assert len(set(expected.messages)) == len(expected.messages) - expected.counts["reports"] + 1


def test_plan_and_oracle_agree_on_what_is_told() -> None:
    """They count the same calls, though they share no code."""
    plan, expected = make_plan(load(), 10), expect(CSV, 10)
    calls = Counter(type(call) for shift in plan.shifts for call in shift.calls)
    counts = expected.counts
    assert calls == {
        Delay: counts["delays"],
        Ask: counts["requests"] + counts["requests_refused"],
        Answer: counts["responses"],
        Start: counts["timelines"],
        Stop: counts["cancels"],
    }
    assert plan.shifts[-1].end == expected.end


def test_every_call_lies_within_its_shift() -> None:
    """So that a digest that closes at the shift's end has seen it."""
    for shift in make_plan(load(), 3).shifts:
        assert all(shift.begin <= call.at < shift.end for call in shift.calls)
        assert [call.at for call in shift.calls] == sorted(call.at for call in shift.calls)


def test_messages_sort_and_compare_as_a_whole() -> None:
    """The check compares them as a multiset."""
    one = Message(subscriber="a", cadence="daily", closes="2013-07-02 08:00", items=("x",))
    assert Counter([one, one]) != Counter([one])
