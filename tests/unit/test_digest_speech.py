"""Dates, times and numbers as a subscriber reads them."""

from datetime import UTC, date, datetime
from typing import Any

import pytest
from babel.localedata import locale_identifiers

from services.digest.speech import LENGTHS, Speech

NOON = datetime(2026, 7, 9, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("locale", "amount", "money"),
    [
        ("en", "1,234,567.5", "€1,234.50"),
        ("de", "1.234.567,5", "1.234,50\u00a0€"),
        ("fr-FR", "1\u00a0234\u00a0567,5", "1\u00a0234,50\u00a0€"),
        ("hi", "12,34,567.5", "€1,234.50"),
    ],
)
def test_numbers_are_grouped_as_the_locale_has_it(locale: str, amount: str, money: str) -> None:
    """Thousands, lakhs, points and commas."""
    speech = Speech(locale, "UTC")
    assert speech.number(1234567.5) == amount
    assert speech.currency("1234.5", "EUR") == money


@pytest.mark.parametrize(
    "text",
    [
        "2026-07-09T12:15:59.999999+00:00",
        "2026-07-09T12:15:59+02:00",
        "1960-05-05T00:44:45+00:00",  # Monrovia's clocks went 44 minutes and 30 seconds after Greenwich.
        "1900-01-01T00:00:20+00:00",
    ],
)
@pytest.mark.parametrize("zone", ["Asia/Kathmandu", "Africa/Monrovia", "UTC"])
def test_an_instant_reads_as_its_moment_does(text: str, zone: str) -> None:
    """Remembered by the minute, which must not show."""
    speech = Speech("en", zone)
    assert speech.instant(text) == speech.moment(datetime.fromisoformat(text))


@pytest.mark.parametrize("value", ["1e999999999", "soon", "", "NaN", "9" * 50, None, True, [1]])
def test_what_is_no_number_anybody_reads_is_shown_as_it_is(value: Any) -> None:
    """Exponents that would fill the memory included."""
    speech = Speech("en", "UTC")
    assert speech.number(value) == speech.percent(value) == ("" if value is None else str(value))


@pytest.mark.parametrize(
    "value", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00", "2026-02-30", "2026-07-09T12"]
)
def test_what_is_no_date_in_the_zone_is_shown_as_it_is(value: str) -> None:
    """Days that do not exist, instants off the calendar's ends."""
    assert Speech("en", "UTC").moment(value) == value


def test_a_day_stays_a_day_and_an_instant_moves_with_the_zone() -> None:
    """A date without a time belongs to no zone."""
    speech = Speech("en-GB", "Asia/Tokyo")
    assert speech.moment("2026-07-09T20:00:00Z") == "Fri, 10 Jul 2026, 05:00"
    assert speech.moment(date(2026, 7, 9)) == speech.field("2026-07-09") == "Thu, 9 Jul 2026"
    assert speech.relative("2026-07-09T09:00:00Z", NOON) == "3 hours ago"


def test_every_locale_there_is_can_be_spoken() -> None:
    """All of CLDR, all lengths: something is written, and without the space that mail programs have no glyph for."""
    for tag in locale_identifiers():
        speech = Speech(tag.replace("_", "-"), "UTC")
        written = [speech.moment(NOON, length) for length in ("", *LENGTHS)] + [speech.number(1.5), speech.clock(NOON)]
        assert all(written), tag
        assert "\u202f" not in "".join(written), tag


def test_another_length_is_refused() -> None:
    """A template's mistake, which its preview shows."""
    with pytest.raises(ValueError, match="short, medium, long or full"):
        Speech("en", "UTC").day(NOON, "EEEE")
