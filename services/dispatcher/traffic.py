"""Which destinations may be sent to now: rates, and circuit breakers that open after failures in a row.

    closed ──failures in a row──▶ open ──its time is over──▶ half open ──one attempt, a success──▶ closed
                                    ▲                             │
                                    └────── a failure, for twice as long ──────┘

Both hold deliveries back *before* they are claimed, so that waiting costs no attempt: behind a breaker, and above a
destination's rate, they are parked in the queue until the hold is over; above a rate each for a time of its own (Line).
Every process keeps its own books and nobody else's: N replicas send N times a rate, find an outage out N times, and
probe N times. That is stated in the settings, and cheaper than a round trip per delivery. But where a channel has one
destination (the SMTP server), a replica that alone cannot reach it would park everything under the others' hands: it
parks what nobody has sent for `PATIENCE`.

Time here is monotonic and real: how long a receiver is down has nothing to do with business time. Only destinations
that failed lately, or that a rate is kept for, are remembered; at `destinations` the least recent is forgotten, which
lets at most a few attempts too many through (INV-9).

The states are purgatory's, whose own clock is the wall's, so what ends an opening is decided here. Rates are
throttled's GCRA.
"""

from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime, timedelta
from time import monotonic

from purgatory.domain.model import CLOSED, HALF_OPENED, OPENED, Context, HalfOpenedState
from throttled import RateLimiterType, Throttled
from throttled.store import MemoryStore

from services.dispatcher import metrics
from services.dispatcher.delivery import Hold, Priority, Reason
from services.dispatcher.settings import TrafficSettings

PATIENCE = timedelta(seconds=30)
"""Far longer than a delivery waits where some replica sends, far shorter than the service level's five minutes."""

Place = tuple[str, str]
"""A lane and a destination in it; an empty one is the lane as a whole."""


_MAIL_SERVER: Place = ("email", "")


class Outage(Exception):
    """An attempt that failed for a reason that speaks of the whole destination."""


class Breaker:
    """One destination's; `end` says whether it has just closed."""

    def __init__(self, settings: TrafficSettings) -> None:
        self._first_s = settings.breaker_open.total_seconds()
        self._longest_s = settings.breaker_open_longest.total_seconds()
        self._context = Context("", settings.breaker_failures, self._first_s)
        self._openings = 0
        self._until_s = 0.0
        self.is_probing = False

    @property
    def is_blank(self) -> bool:
        """Whether it knows nothing that would be missed."""
        return self._context.state == CLOSED and not self._context.failure_count

    @property
    def is_open(self) -> bool:
        """Open or half open."""
        return self._context.state != CLOSED

    def wait_s(self, now_s: float) -> float | None:
        """How long to hold back; None: send. 0 while the one attempt that is let through is under way."""
        if self._context.state == OPENED:
            if now_s < self._until_s:
                return self._until_s - now_s
            self._context.set_state(HalfOpenedState())
        return 0.0 if self.is_probing else None

    def begin(self) -> None:
        """An attempt is about to be made."""
        self.is_probing = self._context.state == HALF_OPENED

    def end(self, now_s: float, *, is_outage: bool, retry_after_s: float) -> bool:
        """An attempt has ended; what is still under way from before it opened counts as little as it should."""
        before = self._context.state
        if is_outage:
            self._context.handle_exception(Outage())
        else:
            self._context.handle_end_request()
        self._context.messages.clear()  # Purgatory keeps its events until somebody publishes them.
        if before != OPENED:
            self.is_probing = False
        if before != OPENED and self._context.state == OPENED:
            open_s = min(self._first_s * 2.0 ** min(self._openings, 30), self._longest_s)
            self._until_s = now_s + max(open_s, retry_after_s)
            self._openings += 1
        if self._context.state == CLOSED:
            self._openings = 0
        return before == HALF_OPENED and self._context.state == CLOSED


class Line:
    """Those above one destination's rate: each gets a time of its own, one interval after whoever is before it.

    Three queues share the rate: urgent ones, who must not wait for thousands; those that found their time taken, by an
    urgent one or after a pause; and new ones, behind all that have come before. Who is older than the last new one has
    been in line. So at most three come at once, however many wait, and nearly in their order.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._ends_s = {"urgent": 0.0, "again": 0.0, "new": 0.0}
        self._newest: datetime | None = None

    def wait_s(self, now_s: float, first_s: float, priority: Priority, since: datetime) -> float:
        """How long to hold one back; `first_s` is when the rate has a place for one."""
        if self._ends_s["new"] <= now_s:
            self._newest = None
        queue = "new"
        if priority is Priority.HIGH:
            queue = "urgent"
        elif self._newest is not None and since < self._newest:
            queue = "again"
        else:
            self._newest = since
        at_s = max(now_s + first_s, self._ends_s[queue])
        self._ends_s[queue] = at_s + self._interval_s
        return at_s - now_s


class Traffic:
    """All destinations of one process."""

    def __init__(self, settings: TrafficSettings, *, now_s: Callable[[], float] = monotonic) -> None:
        """`now_s` is a monotonic clock, in seconds; rates are on their library's own, which is monotonic too."""
        self._settings = settings
        self._now_s = now_s
        lane_rates = {"email": settings.email_rate, "webhook": settings.webhook_rate, "apprise": settings.apprise_rate}
        self._lane_rates = {lane: _rate(quota, 1) for lane, quota in lane_rates.items() if quota}
        quota = settings.destination_rate
        self._destination_rate = _rate(quota, settings.destinations) if quota else None
        self._lines: OrderedDict[Place, Line] = OrderedDict()
        self._breakers: OrderedDict[Place, Breaker] = OrderedDict()
        self._open: set[Place] = set()
        self._probed: set[Place] = set()
        self._closed: set[Place] = {_MAIL_SERVER}  # Processes that have ended may have left something parked.

    def places(self, lane: str, free: int) -> int:
        """How many deliveries of a lane may be claimed, of `free`."""
        breaker = self._breakers.get((lane, ""))
        if breaker is not None and breaker.is_open:
            wait_s = breaker.wait_s(self._now_s())
            if wait_s is not None:
                return free if wait_s else 0
            free = min(free, 1)
        rate = self._lane_rates.get(lane)
        return free if rate is None else min(free, rate.peek(lane).remaining)

    def patience(self, lane: str) -> timedelta:
        """How long deliveries of a lane must have waited to be claimed: no time, unless they will be parked."""
        breaker = self._breakers.get((lane, ""))
        return PATIENCE if breaker is not None and breaker.wait_s(self._now_s()) else timedelta(0)

    def probed(self) -> list[str]:
        """Destinations whose one attempt is under way; whatever else they have must wait for it."""
        return [destination for _, destination in self._probed if destination]

    def take(self, lane: str, destination: str, priority: Priority, since: datetime) -> Hold | None:
        """Count an attempt that is about to be made; or why it must wait, where it must.

        `since`: when the delivery came, which tells those that have been in line from new ones.
        """
        place = (lane, destination)
        breaker = self._breakers.get(place)
        if breaker is not None and (wait_s := breaker.wait_s(self._now_s())) is not None:
            return Hold(Reason.BREAKER_OPEN, timedelta(seconds=wait_s))
        if self._destination_rate is not None and destination:
            state = self._destination_rate.limit(f"{lane} {destination}")
            if state.limited:
                line = self._line(place)
                wait_s = line.wait_s(self._now_s(), state.state.retry_after, priority, since)
                return Hold(Reason.RATE, timedelta(seconds=wait_s))
        if (rate := self._lane_rates.get(lane)) is not None:
            rate.limit(lane)
        if breaker is not None:
            breaker.begin()
            self._note(place, breaker)
        return None

    def leave(self, lane: str, destination: str) -> None:
        """An attempt that was counted is not made after all."""
        if (breaker := self._breakers.get((lane, destination))) is not None:
            breaker.is_probing = False
            self._note((lane, destination), breaker)

    def end(self, lane: str, destination: str, *, is_outage: bool, retry_after: timedelta | None = None) -> None:
        """An attempt has ended; one without an outage says that the destination works, whatever it said."""
        place = (lane, destination)
        breaker = self._breakers.get(place)
        if breaker is None:
            if not is_outage or not self._settings.breaker_failures:
                return
            breaker = self._remember(place)
        was_open = breaker.is_open
        retry_after_s = min(retry_after or timedelta(0), self._settings.breaker_open_longest).total_seconds()
        if breaker.end(self._now_s(), is_outage=is_outage, retry_after_s=retry_after_s):
            self._closed.add(place)
        if breaker.is_open and not was_open:
            metrics.BREAKER_OPENINGS.labels(lane).inc()
            self._closed.discard(place)
        self._note(place, breaker)
        if breaker.is_blank:
            del self._breakers[place]
        else:
            self._breakers.move_to_end(place)

    def closed(self) -> list[Place]:
        """Destinations whose breakers have closed: what is parked for them may go, until it is `released`."""
        return list(self._closed)

    def released(self, lane: str, destination: str) -> None:
        """Nothing is parked any more for a destination whose breaker has closed."""
        self._closed.discard((lane, destination))

    def _line(self, place: Place) -> Line:
        assert self._destination_rate is not None
        if place not in self._lines:
            if len(self._lines) >= self._settings.destinations:
                self._lines.popitem(last=False)
            self._lines[place] = Line(self._destination_rate.limiter.quota.emission_interval)
        self._lines.move_to_end(place)
        return self._lines[place]

    def _remember(self, place: Place) -> Breaker:
        while len(self._breakers) >= self._settings.destinations:
            forgotten, _ = self._breakers.popitem(last=False)
            self._note(forgotten, None)
        self._breakers[place] = Breaker(self._settings)
        return self._breakers[place]

    def _note(self, place: Place, breaker: Breaker | None) -> None:
        """Keep track of which are open and which are probed, so that nobody has to look through all of them."""
        was_open = place in self._open
        for kept, is_so in (
            (self._open, breaker is not None and breaker.is_open),
            (self._probed, breaker is not None and breaker.is_probing),
        ):
            (kept.add if is_so else kept.discard)(place)
        metrics.OPEN_BREAKERS.labels(place[0]).inc((place in self._open) - was_open)


def _rate(quota: str, keys: int) -> Throttled:
    return Throttled(using=RateLimiterType.GCRA.value, quota=quota, store=MemoryStore(options={"MAX_SIZE": keys}))
