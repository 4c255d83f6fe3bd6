"""Rates and circuit breakers of destinations, on a clock that the test moves."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import throttled.utils
from pydantic import ValidationError

from services.dispatcher import metrics
from services.dispatcher.delivery import Hold, Priority, Reason
from services.dispatcher.settings import TrafficSettings
from services.dispatcher.traffic import PATIENCE, Traffic

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
NOON = datetime(2013, 7, 4, 12, tzinfo=UTC)
HOOK = ("webhook", "example.com:443")
RELAY = ("email", "")


class Street:
    """Traffic whose time stands still."""

    def __init__(self, **settings: Any) -> None:
        self.at_s = 1_000.0
        given: dict[str, Any] = {
            "breaker_failures": 3,
            "breaker_open": 10 * SECOND,
            "breaker_open_longest": 35 * SECOND,
        } | settings
        self.traffic = Traffic(TrafficSettings(**given), now_s=lambda: self.at_s)
        self.traffic.released(*RELAY)

    def fail(self, place: tuple[str, str] = HOOK, times: int = 1, **fields: Any) -> None:
        for _ in range(times):
            self.traffic.end(*place, is_outage=True, **fields)

    def take(self, lane: str, destination: str, priority: Priority = Priority.NORMAL, minute: int = 0) -> Hold | None:
        """Of a delivery that came in that minute."""
        return self.traffic.take(lane, destination, priority, NOON + minute * MINUTE)

    def work(self, place: tuple[str, str] = HOOK) -> None:
        self.traffic.end(*place, is_outage=False)


def held(seconds: float) -> Hold:
    """Held by a breaker."""
    return Hold(Reason.BREAKER_OPEN, timedelta(seconds=seconds))


def test_a_breaker_opens_after_failures_in_a_row_only() -> None:
    """A success in between starts the count anew, and other destinations are not touched."""
    street = Street()
    street.fail(times=2)
    street.work()
    street.fail(times=2)
    assert street.take(*HOOK) is None
    street.fail()
    assert street.take(*HOOK) == held(10)
    assert street.take("webhook", "example.org:443") is None


def test_an_open_breaker_lets_one_attempt_through_when_its_time_is_over() -> None:
    """Whatever else there is waits for what comes of that one."""
    street = Street()
    street.fail(times=3)
    street.at_s += 9.5
    assert street.take(*HOOK) == held(0.5)
    street.at_s += 0.5
    assert street.take(*HOOK) is None
    assert street.take(*HOOK) == held(0)
    assert street.traffic.probed() == ["example.com:443"]


def test_the_attempt_that_works_closes_the_breaker_and_says_so() -> None:
    """What is parked for the destination can then be let go, until nothing is or it fails again."""
    street = Street()
    street.fail(times=3)
    street.at_s += 10
    assert street.take(*HOOK) is None
    street.work()
    assert street.take(*HOOK) is None
    assert street.traffic.probed() == []
    assert street.traffic.closed() == [HOOK]
    street.fail(times=3)
    assert street.traffic.closed() == []
    street.at_s += 10
    street.take(*HOOK)
    street.work()
    street.traffic.released(*HOOK)
    assert street.traffic.closed() == []


def test_each_failure_of_that_attempt_doubles_the_time_up_to_the_longest() -> None:
    """Ten seconds, twenty, then the longest; and ten again after it has worked."""
    street, waits = Street(), []
    street.fail(times=3)
    for _ in range(4):
        hold = street.take(*HOOK)
        assert hold is not None
        waits.append(hold.wait.total_seconds())
        street.at_s += waits[-1]
        assert street.take(*HOOK) is None
        street.fail()
    assert waits == [10, 20, 35, 35]
    street.at_s += 35
    street.take(*HOOK)
    street.work()
    street.fail(times=3)
    assert street.take(*HOOK) == held(10)


def test_a_destination_that_names_a_time_is_left_alone_for_it() -> None:
    """Retry-After, up to the longest."""
    street = Street()
    street.fail(times=2)
    street.fail(retry_after=25 * SECOND)
    assert street.take(*HOOK) == held(25)
    other = Street()
    other.fail(times=3, retry_after=timedelta(hours=9))
    assert other.take(*HOOK) == held(35)


def test_what_ends_while_the_breaker_is_open_changes_nothing() -> None:
    """Attempts from before it opened come in late; neither their failures nor their successes move it."""
    street = Street()
    street.fail(times=3)
    street.work()
    street.fail(times=5)
    assert street.take(*HOOK) == held(10)


def test_an_attempt_that_is_not_made_after_all_leaves_the_place_free() -> None:
    """The claim may be rolled back; the next one tries instead."""
    street = Street()
    street.fail(times=3)
    street.at_s += 10
    assert street.take(*HOOK) is None
    street.traffic.leave(*HOOK)
    assert street.take(*HOOK) is None


def test_a_channel_with_one_destination_that_fails_claims_only_what_nobody_else_sends() -> None:
    """That is parked; then there is one place, for whatever is first; then all."""
    street = Street(email_rate="8/s")
    street.fail(RELAY, times=3)
    assert (street.traffic.places("email", 32), street.traffic.patience("email")) == (32, PATIENCE)
    assert street.take(*RELAY) == held(10)
    assert (street.traffic.places("webhook", 32), street.traffic.patience("webhook")) == (32, 0 * SECOND)
    street.at_s += 10
    assert (street.traffic.places("email", 32), street.traffic.patience("email")) == (1, 0 * SECOND)
    assert street.take(*RELAY) is None
    assert street.traffic.places("email", 32) == 0
    street.work(RELAY)
    assert (street.traffic.places("email", 32), street.traffic.patience("email")) == (7, 0 * SECOND)
    assert street.traffic.closed() == [RELAY]


def test_a_new_process_lets_go_of_what_others_have_parked_for_the_mail_server() -> None:
    """It knows of no outage, so to restart all of them is a way out of one that is over."""
    assert Traffic(TrafficSettings()).closed() == [RELAY]


def test_breakers_can_be_switched_off() -> None:
    """With 0 failures nothing is ever left alone."""
    street = Street(breaker_failures=0)
    street.fail(times=100)
    assert street.take(*HOOK) is None


def test_memory_of_destinations_is_bounded() -> None:
    """The one that failed longest ago is forgotten, and the gauge of open ones follows (INV-9)."""
    street = Street(destinations=3)
    gauge = metrics.OPEN_BREAKERS.labels("webhook")
    before = gauge._value.get()
    for n in range(4):
        street.fail(("webhook", f"host{n}:443"), times=3)
    assert gauge._value.get() == before + 3
    assert street.take("webhook", "host0:443") is None
    assert street.take("webhook", "host1:443") is not None
    assert len(street.traffic._breakers) == 3


def test_a_destination_that_works_costs_no_memory() -> None:
    """Books are kept of failures only."""
    street = Street()
    street.fail()
    street.work()
    assert len(street.traffic._breakers) == 0


@pytest.fixture
def time_stands(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The rate library's clock; its only item is the time in seconds."""
    now = [1_000.0]
    monkeypatch.setattr(throttled.utils, "now_mono_f", lambda: now[0])
    return now


def test_a_channel_gets_as_many_places_as_its_rate_has_left(time_stands: list[float]) -> None:
    """Eight a second: eight now, and one for each eighth of a second after that."""
    street = Street(email_rate="8/s")
    assert street.traffic.places("email", 32) == 8
    assert [street.take(*RELAY) for _ in range(8)] == [None] * 8
    assert street.traffic.places("email", 32) == 0
    time_stands[0] += 0.4
    assert street.traffic.places("email", 32) == 3
    assert street.traffic.places("webhook", 32) == 32


def waits(*holds: Hold | None) -> list[float | None]:
    """In seconds; None for what may go. All are held by a rate."""
    assert all(hold is None or hold.reason is Reason.RATE for hold in holds)
    return [None if hold is None else round(hold.wait.total_seconds(), 3) for hold in holds]


def test_what_is_above_the_rate_of_a_destination_is_put_off_one_after_the_other(time_stands: list[float]) -> None:
    """Each has a time of its own, in whatever round it is claimed, so that they do not come back together."""
    street = Street(destination_rate="2/s")
    street.traffic.places("webhook", 3)
    assert waits(*(street.take(*HOOK) for _ in range(3))) == [None, None, 0.5]
    street.traffic.places("webhook", 3)
    assert waits(*(street.take(*HOOK) for _ in range(3))) == [1.0, 1.5, 2.0]
    assert street.take("webhook", "example.org:443") is None
    time_stands[0] += 0.5
    street.at_s += 0.5
    assert waits(street.take(*HOOK), street.take(*HOOK)) == [None, 2.0]


def test_an_urgent_delivery_passes_those_in_line_for_a_rate(time_stands: list[float]) -> None:
    """It takes the next second, and whoever finds that taken keeps to the front instead of going to the end."""
    street = Street(destination_rate="1/s")
    assert waits(*(street.take(*HOOK, minute=minute) for minute in range(100))) == [None, *range(1, 100)]
    assert waits(street.take(*HOOK, Priority.HIGH, minute=100), street.take(*HOOK, Priority.HIGH, minute=100)) == [1, 2]
    time_stands[0] += 1
    street.at_s += 1
    assert waits(street.take(*HOOK, Priority.HIGH, minute=100)) == [None]
    assert waits(street.take(*HOOK, minute=1)) == [1]
    assert waits(street.take(*HOOK, minute=101)) == [99]


def test_memory_of_lines_is_bounded(time_stands: list[float]) -> None:
    """As that of failures is; whoever has waited for a line that is forgotten stands in a new one (INV-9)."""
    street = Street(destination_rate="1/s", destinations=3)
    for n in range(10):
        for _ in range(2):
            street.take("webhook", f"host{n}:443")
    assert len(street.traffic._lines) == 3


@pytest.mark.parametrize("rate", ["fast", "10", "0/s", "10/s, 5/s"])
def test_a_rate_that_is_none_is_refused_at_the_start(rate: str) -> None:
    """With words that say what one looks like."""
    with pytest.raises(ValidationError, match="14/s"):
        TrafficSettings(email_rate=rate)
