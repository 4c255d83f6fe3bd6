"""The flights of July 2013, read from the CSV, for the plan. (The oracle reads the CSV for itself.)"""

import csv
import gzip
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from local.demo.story import NEW_YORK

DATA = Path(__file__).with_name("data")
CSV = DATA / "nyc-flights-2013-07.csv.gz"
_UNKNOWN = ("", "NA")


@dataclass(frozen=True, kw_only=True, slots=True)
class Flight:
    """One scheduled departure. `delay` None: cancelled. `tail` None: unknown."""

    carrier: str
    number: str
    tail: str | None
    origin: str
    destination: str
    scheduled_at: datetime
    delay: timedelta | None

    @property
    def key(self) -> str:
        """Unique in the data: carrier and number, route, scheduled departure."""
        at = self.scheduled_at.astimezone(UTC)
        return f"{self.carrier}{self.number}.{self.origin}-{self.destination}.{at:%Y%m%dT%H%MZ}"

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.carrier} {self.number} from {self.origin} to {self.destination}"

    @property
    def departed_at(self) -> datetime | None:
        """When it really left; None when it was cancelled."""
        return None if self.delay is None else self.scheduled_at + self.delay

    @property
    def route(self) -> tuple[str, str]:
        """Origin and destination."""
        return self.origin, self.destination


def load(path: Path = CSV) -> list[Flight]:
    """All flights in order of scheduled departure."""
    with gzip.open(path, "rt", newline="") as file:
        flights = [_flight(row) for row in csv.DictReader(file)]
    return sorted(flights, key=lambda flight: (flight.scheduled_at, flight.key))


def within(flights: Sequence[Flight], days: int) -> list[Flight]:
    """The flights scheduled on the first `days` days of July, New York time."""
    return [flight for flight in flights if flight.scheduled_at.astimezone(NEW_YORK).day <= days]


def carriers_by_route(flights: Sequence[Flight]) -> Mapping[tuple[str, str], Sequence[str]]:
    """Who flies each route, in order of the carriers' codes."""
    found = defaultdict(set)
    for flight in flights:
        found[flight.route].add(flight.carrier)
    return {route: sorted(carriers) for route, carriers in found.items()}


def airlines(path: Path = DATA / "airlines.csv") -> Mapping[str, str]:
    """The carriers' names by code."""
    with path.open(newline="") as file:
        return {row["carrier"]: row["name"] for row in csv.DictReader(file)}


def _flight(row: Mapping[str, str]) -> Flight:
    delay = row["dep_delay_min"]
    return Flight(
        carrier=row["carrier"],
        number=row["flight"],
        tail=None if row["tailnum"] in _UNKNOWN else row["tailnum"],
        origin=row["origin"],
        destination=row["dest"],
        scheduled_at=datetime.fromisoformat(row["scheduled_departure_utc"]),
        delay=None if delay in _UNKNOWN else timedelta(minutes=int(delay)),
    )
