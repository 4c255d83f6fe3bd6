"""How a subscriber reads dates, times and numbers: in its locale and its zone, by CLDR (Babel). Pure.

A locale nobody knows loses its last part until one is known, and is English in the end: de-CH-x-ours, de-CH, de, en.
What is no date or number is shown as it is: payloads vary, and a message with an odd field beats none.

Babel needs some 20 µs for a date, and digests hold tens of thousands. So dates and times of day are written
separately and kept: there are few of each.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any, Final
from zoneinfo import ZoneInfo

from babel import Locale, UnknownLocaleError
from babel.dates import format_date, format_skeleton, format_time, format_timedelta
from babel.numbers import format_currency, format_decimal, format_percent, parse_pattern

LENGTHS: Final = ("short", "medium", "long", "full")
_DAY: Final = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_INSTANT: Final = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d:?\d\d)", re.ASCII)
_MOST_DIGITS: Final = 40  # A payload may say 1e999999999, which nobody reads and no memory holds.


@dataclass(frozen=True, slots=True)
class Speech:
    """One subscriber's way; `locale` is any BCP 47 text, `zone` an IANA zone that exists."""

    locale: str
    zone: str

    def day(self, value: Any, length: str = "") -> str:
        """`Thu, Jul 9, 2026`; with a length of LENGTHS as CLDR has it. Raises ValueError for another length."""
        found = self._read(value)
        return _day(found.year, found.month, found.day, _length(length), self.locale) if found else _as_is(value)

    def clock(self, value: Any, length: str = "short") -> str:
        """`8:15 AM`; with seconds if not short."""
        found = self._read(value)
        if not isinstance(found, datetime):
            return _as_is(value)
        return _clock(found.hour, found.minute, 0 if length == "short" else found.second, _length(length), self.locale)

    def moment(self, value: Any, length: str = "") -> str:
        """`Thu, Jul 9, 2026, 8:15 AM`; of a day without a time just the day."""
        found = self._read(value)
        if not isinstance(found, datetime):
            return self.day(value, length)
        glue = _glue(length or "medium", self.locale)
        return glue.replace("{1}", self.day(found, length)).replace("{0}", self.clock(found))

    def instant(self, text: str) -> str:
        """The `moment` of an instant in ISO 8601."""
        # Since 1973 all zones are whole minutes from UTC, so that what is read is the same for a whole minute.
        is_plain = text.endswith("+00:00") and text >= "1973"
        return _minute(f"{text[:16]}+00:00", self) if is_plain else self.moment(datetime.fromisoformat(text))

    def relative(self, value: Any, now: datetime) -> str:
        """`3 hours ago`, seen from `now`."""
        found = self._read(value)
        if not isinstance(found, datetime):
            return self.day(value)
        return _plain(format_timedelta(found - now, add_direction=True, locale=known(self.locale)))

    def number(self, value: Any, digits: int | None = None) -> str:
        """`50,000`; with `digits` after the decimal point (0 to 10), by default as many as it has, at most 3."""
        found = _number(value)
        if found is None:
            return _as_is(value)
        if digits is None:
            return _decimal(str(found), self.locale)
        locale = known(self.locale)
        pattern = parse_pattern(locale.decimal_formats[None].pattern)
        places = min(max(digits, 0), 10)
        pattern.frac_prec = (places, places)
        return _plain(pattern.apply(found, locale))

    def currency(self, value: Any, code: str) -> str:
        """`€1,234.50`; `code` is ISO 4217."""
        found = _number(value)
        return _as_is(value) if found is None else _plain(format_currency(found, code[:8], locale=known(self.locale)))

    def percent(self, value: Any) -> str:
        """`12%` of 0.12."""
        found = _number(value)
        return _as_is(value) if found is None else _plain(format_percent(found, locale=known(self.locale)))

    def field(self, value: str) -> str:
        """A payload's text: ISO 8601 dates and instants as people read them, everything else as it is."""
        return self.moment(value) if value[4:5] == "-" and len(value) < 36 else value

    def _read(self, value: Any) -> date | datetime | None:
        """A datetime in the subscriber's zone, or a date, or None for what is neither."""
        if isinstance(value, str):
            value = _from_iso(value)
        if not isinstance(value, datetime):
            return value if isinstance(value, date) else None
        if value.tzinfo is None:
            return None
        try:
            return value.astimezone(ZoneInfo(self.zone))
        except OverflowError:  # The first or last day that Python knows.
            return None


@lru_cache(maxsize=1024)
def known(tag: str) -> Locale:
    """The locale, or the nearest that is known."""
    for one in _chain(tag):
        try:
            return Locale.parse(one, sep="-")
        except (ValueError, UnknownLocaleError):
            continue
    return Locale("en")


def _chain(tag: str) -> Iterator[str]:
    while tag:
        yield tag
        tag = tag.rpartition("-")[0]


@lru_cache(maxsize=4096)
def _day(year: int, month: int, day: int, length: str, tag: str) -> str:
    value, locale = date(year, month, day), known(tag)
    return _plain(
        format_date(value, length, locale=locale) if length else format_skeleton("yMMMEd", value, locale=locale)
    )


@lru_cache(maxsize=4096)
def _clock(hour: int, minute: int, second: int, length: str, tag: str) -> str:
    # Long and full ones would name the zone.
    length = "short" if length == "short" else "medium"
    return _plain(format_time(time(hour, minute, second), length, locale=known(tag)))


@lru_cache(maxsize=16_384)
def _minute(text: str, speech: Speech) -> str:
    return speech.moment(datetime.fromisoformat(text))


@lru_cache(maxsize=4096)
def _decimal(text: str, tag: str) -> str:
    return _plain(format_decimal(Decimal(text), locale=known(tag)))


@lru_cache(maxsize=1024)
def _glue(length: str, tag: str) -> str:
    return str(known(tag).datetime_formats[length]).replace("'", "")


def _plain(text: str) -> str:
    """Without the narrow no-break space, for which many mail programs have no glyph."""
    return text.replace("\u202f", "\u00a0")


def _length(length: str) -> str:
    if length and length not in LENGTHS:
        raise ValueError(f"length must be short, medium, long or full, got {length!r}")
    return length


def _from_iso(text: str) -> date | datetime | None:
    try:
        if _DAY.fullmatch(text):
            return date.fromisoformat(text)
        return datetime.fromisoformat(text) if _INSTANT.fullmatch(text) else None
    except ValueError:
        return None


def _number(value: Any) -> Decimal | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str, Decimal)):
        return None
    if isinstance(value, str) and len(value) > _MOST_DIGITS:
        return None
    try:
        number = Decimal(str(value))
    except (InvalidOperation, ValueError):
        return None
    return number if number.is_finite() and abs(number.adjusted()) < _MOST_DIGITS else None


def _as_is(value: Any) -> str:
    return "" if value is None else str(value)
