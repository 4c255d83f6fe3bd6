"""The replay: lets business time run from stop to stop, tells Carillon what happens, and waits until it is at rest.

Each shift goes like this; `|` is where the clock stands still, and the next step waits until the system is at rest:

    begin ──calls as the clock passes them──▶ | just before the end ──▶ | end: digests close ──▶ | trigger, facts ──▶ |

So every item is in its window before the window closes, every timer has fired before the clock goes on, and the outcome
is a function of the plan alone, however fast the clock runs and whoever is killed meanwhile.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Protocol

from local.demo.plan import Call, Plan, Shift

_JUST_BEFORE = timedelta(seconds=1)  # All of the data falls on whole minutes.


class Clock(Protocol):
    """Business time, on a leash. See local.demo.pace."""

    def now(self) -> datetime:
        """Business time."""
        ...

    async def let_run(self, until: datetime) -> None:
        """Let it go on; returns when every process has heard of it."""
        ...

    async def reach(self, at: datetime) -> None:
        """Wait until it has come there."""
        ...


class Rest(Protocol):
    """Knows when nothing more will happen by itself. See local.demo.rest."""

    async def wait(self, now: datetime) -> None:
        """Return when everything due at `now` has happened, in all services."""
        ...


class Caller(Protocol):
    """Tells Carillon. See local.demo.caller."""

    async def tell(self, calls: Sequence[Call]) -> None:
        """Make these calls."""
        ...

    async def put_facts(self, flown: Mapping[str, int]) -> None:
        """Tell how often each aircraft has flown."""
        ...

    async def trigger(self, end: datetime) -> None:
        """Close the batch's windows."""
        ...


class Replay:
    """Replays a plan. `on_shift` hears of each shift before it begins, with its number from 0."""

    def __init__(self, *, caller: Caller, pace: Clock, rest: Rest, on_shift: Callable[[int, Shift], None]) -> None:
        self._caller = caller
        self._pace = pace
        self._rest = rest
        self._on_shift = on_shift

    async def run(self, plan: Plan) -> None:
        """From the first shift's begin, where the clock must stand, to the last one's end."""
        for number, shift in enumerate(plan.shifts):
            self._on_shift(number, shift)
            await self._run(shift)

    async def _run(self, shift: Shift) -> None:
        waiting = deque(shift.calls)
        for stop in (*shift.stops, shift.end - _JUST_BEFORE):
            await self._pace.let_run(stop)
            await self._tell_until(stop, waiting)
            await self._rest.wait(stop)
            if of_this_moment := _take(waiting, stop):
                await self._caller.tell(of_this_moment)
                await self._rest.wait(stop)
        await self._pace.let_run(shift.end)
        await self._pace.reach(shift.end)
        await self._rest.wait(shift.end)
        await asyncio.gather(self._caller.trigger(shift.end), self._caller.put_facts(shift.facts))
        await self._rest.wait(shift.end)

    async def _tell_until(self, stop: datetime, waiting: deque[Call]) -> None:
        """Tell what comes before `stop`, when the clock has passed it; what piled up meanwhile goes together."""
        while waiting and waiting[0].at < stop:
            await self._pace.reach(waiting[0].at)
            await self._caller.tell(_take(waiting, min(self._pace.now(), stop - _JUST_BEFORE)))
        await self._pace.reach(stop)


def _take(waiting: deque[Call], until: datetime) -> list[Call]:
    taken = []
    while waiting and waiting[0].at <= until:
        taken.append(waiting.popleft())
    return taken
