"""What is told to Carillon and when: the flights, cut into four-hour shifts of calls.

A shift begins and ends where digests close, so that the clock can stop there and everything that belongs into a
digest is in it before it closes. Within a shift the order of calls does not matter, with one exception: a cancel and a
timeline step of the same aircraft that is due in the same shift. There the clock stops at the moment of the cancel.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from local.demo import story
from local.demo.flights import Flight, carriers_by_route, within


@dataclass(frozen=True, kw_only=True, slots=True)
class Delay:
    """A flight left late: Notify."""

    at: datetime
    flight: Flight


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A flight was cancelled: SubmitRequest to `carriers`, the others on its route. Without any it will be refused."""

    at: datetime
    flight: Flight
    carriers: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A carrier answers the request for a cancelled flight: RecordResponse."""

    at: datetime
    flight: Flight
    carrier: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """An aircraft's first flight: StartTimeline."""

    at: datetime
    tail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """An aircraft flies to a base: Cancel."""

    at: datetime
    tail: str


Call = Delay | Ask | Answer | Start | Stop


@dataclass(kw_only=True, slots=True)
class Shift:
    """Four hours: from `begin` up to, not including, `end`."""

    begin: datetime
    end: datetime
    calls: list[Call] = field(default_factory=list)
    """In order of time."""
    stops: list[datetime] = field(default_factory=list)
    """Where the clock must stop, ascending: what is due by then has happened; the cancels of that moment come next."""
    facts: dict[str, int] = field(default_factory=dict)
    """What is told when the shift is over: how often each aircraft that flew has flown by then."""
    flights: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The whole replay."""

    shifts: Sequence[Shift]
    carriers: Sequence[str]
    passengers: Sequence[str]
    """Keys of the cancelled flights."""
    flights: int

    @property
    def calls(self) -> int:
        """How many calls there are in all, were each made alone."""
        return sum(len(shift.calls) for shift in self.shifts)


def make_plan(everything: Sequence[Flight], days: int) -> Plan:
    """The plan for the first `days` days of July."""
    flights = within(everything, days)
    end = story.START + timedelta(days=days) + story.DRAIN
    shifts = [
        Shift(begin=story.START + n * story.SHIFT, end=story.START + (n + 1) * story.SHIFT)
        for n in range((end - story.START) // story.SHIFT)
    ]
    for flight in flights:
        _shift_of(shifts, flight.scheduled_at).flights += 1
    calls = [*_delays(flights), *_rebookings(flights, carriers_by_route(everything), shifts), *_trials(flights, shifts)]
    for call in sorted(calls, key=lambda call: call.at):
        _shift_of(shifts, call.at).calls.append(call)
    _add_facts(flights, shifts)
    return Plan(
        shifts=shifts,
        carriers=sorted({flight.carrier for flight in everything}),
        passengers=[flight.key for flight in flights if flight.delay is None],
        flights=len(flights),
    )


def _delays(flights: Sequence[Flight]) -> list[Call]:
    return [
        Delay(at=flight.scheduled_at + flight.delay, flight=flight)
        for flight in flights
        if flight.delay is not None and flight.delay >= story.LATE
    ]


def _rebookings(
    flights: Sequence[Flight], carriers: Mapping[tuple[str, str], Sequence[str]], shifts: Sequence[Shift]
) -> list[Call]:
    calls: list[Call] = []
    for flight in flights:
        if flight.delay is not None:
            continue
        shift = _shift_of(shifts, flight.scheduled_at)
        others = [carrier for carrier in carriers[flight.route] if carrier != flight.carrier]
        # The answer-by date counts from when intake takes the request. An hour into the shift no process's clock still
        # stands before its begin, so the date falls into the same shift three days on, whatever was slow.
        asked_at = max(flight.scheduled_at, shift.begin + timedelta(hours=1))
        calls.append(Ask(at=asked_at, flight=flight, carriers=others))
        calls += [
            Answer(at=shift.end + story.ANSWER_AFTER, flight=flight, carrier=carrier)
            for carrier in others
            if story.does_answer(flight.key, carrier)
        ]
    return calls


def _trials(flights: Sequence[Flight], shifts: Sequence[Shift]) -> list[Call]:
    calls: list[Call] = []
    for tail, flown in _by_tail(flights).items():
        (started_at, _), *later = flown
        calls.append(Start(at=started_at, tail=tail))
        stopped_at = next((at for at, flight in later if flight.destination in story.BASES), None)
        if stopped_at is None:
            continue
        calls.append(Stop(at=stopped_at, tail=tail))
        shift = _shift_of(shifts, stopped_at)
        check_at = started_at + story.CHECK_AFTER
        steps = (started_at + story.REMIND_AFTER, check_at, check_at + story.FOLLOW_UP_AFTER)
        if any(shift.begin <= at < shift.end for at in steps) and stopped_at not in shift.stops:
            shift.stops.append(stopped_at)
    for shift in shifts:
        shift.stops.sort()
    return calls


def _add_facts(flights: Sequence[Flight], shifts: Sequence[Shift]) -> None:
    departures = sorted((at, tail) for tail, flown in _by_tail(flights).items() for at, _ in flown)
    flown: Counter[str] = Counter()
    for at, tail in departures:
        flown[tail] += 1
        _shift_of(shifts, at).facts[tail] = flown[tail]


def _by_tail(flights: Sequence[Flight]) -> Mapping[str, Sequence[tuple[datetime, Flight]]]:
    """Each aircraft's departures, in order; cancelled flights left out."""
    found = defaultdict(list)
    for flight in flights:
        if flight.tail is not None and flight.departed_at is not None:
            found[flight.tail].append((flight.departed_at, flight))
    return {tail: sorted(flown, key=lambda one: (one[0], one[1].scheduled_at)) for tail, flown in found.items()}


def _shift_of(shifts: Sequence[Shift], at: datetime) -> Shift:
    return shifts[(at - story.START) // story.SHIFT]
