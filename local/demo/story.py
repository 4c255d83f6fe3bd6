"""The fixed points of the story that the demo tells: names, times and shares. No computation; that is in two places.

`plan` derives from them what is told to Carillon, `oracle` what must come of it. They share these constants, and
nothing else.
"""

from datetime import datetime, timedelta
from hashlib import sha256
from zoneinfo import ZoneInfo

NEW_YORK = ZoneInfo("America/New_York")
START = datetime(2013, 7, 1, tzinfo=NEW_YORK)
LAST_DAY = 31
DRAIN = timedelta(days=3, hours=8)
"""The replay goes on so long after the last day's midnight: to 08:00 on the fourth day, when every summary is out."""

AIRPORTS = ("EWR", "JFK", "LGA")
SHIFT = timedelta(hours=4)
"""Every digest, batch and report of facts falls on the end of a shift: 00, 04, 08, 12, 16, 20 o'clock local time."""

# Digest: delayed departures.
DELAYED = "flight.delayed"
LATE = timedelta(minutes=15)
DAILY, FOUR_HOURLY, IMMEDIATE, OFF = "daily-at-8", "every-4-hours", "immediate", "off"
FEED = "feed"
"""Gets every delay at once, by webhook."""
DEPUTY, DEPUTY_AIRPORT = "deputy.LGA", "LGA"
"""Has turned delays off: what would have gone there is suppressed."""

# Batch: cancelled flights.
BATCH = "rebooking"
ASKED, ANSWERED, SUMMARY = f"{BATCH}/request", f"{BATCH}/response", f"{BATCH}/summary"
ANSWER_WITHIN = timedelta(days=3)
ANSWER_AFTER = timedelta(minutes=90)
"""A carrier answers so long after its email, or never."""
ANSWERING_PERCENT = 60

# Timeline: a trial that begins with an aircraft's first flight.
TRIAL = "maintenance-trial"
REMINDER, CHECK, FOLLOW_UP = "maintenance/reminder", "maintenance/check", "maintenance/follow-up"
REMIND_AFTER, CHECK_AFTER, FOLLOW_UP_AFTER = timedelta(days=5), timedelta(days=7), timedelta(days=2)
BUSY_FLIGHTS = 3
"""The check is only for aircraft that have flown so often."""
BASES = ("DEN", "IAH", "MSP", "PHX", "SLC")
"""An aircraft that later flies to one of these is looked after there; everything upcoming is cancelled."""
MAINTENANCE = "maintenance"

# Schedule: a report, and something once.
REPORT, REMARK = "report/weekday", "report/one-off"
REPORT_CRON, REPORT_HOUR = "0 9 * * 1-5", 9
REMARK_AT = datetime(2013, 7, 4, 21, 20, tzinfo=NEW_YORK)
DIRECTOR = "director"


def carrier_manager(carrier: str) -> str:
    """The subscriber who runs a carrier's operations."""
    return f"carrier-manager.{carrier}"


def airport_manager(airport: str) -> str:
    """The subscriber who runs an airport's operations."""
    return f"airport-manager.{airport}"


def desk(carrier: str) -> str:
    """The subscriber who rebooks for a carrier."""
    return f"desk.{carrier}"


def passenger(flight: str) -> str:
    """The subscriber who was booked on a cancelled flight."""
    return f"passenger.{flight}"


def address(subscriber: str) -> str:
    """A subscriber's email address."""
    return f"{subscriber}@demo.example"


def aircraft(tail: str) -> str:
    """The entity that an aircraft is."""
    return f"aircraft.{tail}"


def does_answer(flight: str, carrier: str) -> bool:
    """Whether a carrier answers the request for a cancelled flight: the same in every run and on every machine."""
    return int.from_bytes(sha256(f"{flight} {carrier}".encode()).digest()[:4]) % 100 < ANSWERING_PERCENT
