"""The way between a process and a server: it takes time, and it can be slow or cut.

A request and its answer are two messages. Whatever happens to the process in between, a request that has arrived takes
effect; whatever happens to the server, an answer that has not arrived tells nothing.
"""

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

from libs.errors import Unavailable
from tests.simulation.loop import Process, VirtualLoop

Answer = Callable[[Any], None]
"""Given a result or an exception."""


_LONGEST_S = 4.0  # Twice a lease.


class Line:
    """Between one process and one server. `slowness` multiplies what a message takes; a cut line loses everything."""

    def __init__(self, loop: VirtualLoop, process: Process, rng: Random) -> None:
        self.loop = loop
        self.process = process
        self.slowness = 1.0
        self.is_cut = False
        self._rng = rng
        self._traps: list[tuple[str, Callable[[], None]]] = []

    def trap(self, what: str, effect: Callable[[], None]) -> None:
        """Have something happen when the next request of this name has been sent and is on its way."""
        self._traps.append((what, effect))

    def _spring_traps(self, what: str) -> None:
        due = [effect for name, effect in self._traps if name == what]
        self._traps = [trap for trap in self._traps if trap[0] != what]
        for effect in due:
            effect()

    def delay_s(self) -> float:
        """What the next message takes: mostly about a millisecond, now and then a lot more."""
        draw = self._rng.random()
        usual = 0.0003 + 0.002 * self._rng.random()
        usual *= 1 if draw < 0.95 else 20 if draw < 0.995 else 200
        return min(self.slowness * usual, _LONGEST_S)

    async def ask(
        self, request: Callable[[Answer], None], on_abandoned: Callable[[], None] = lambda: None, *, what: str = ""
    ) -> Any:
        """Have `request` called at the server, and return or raise what it answers.

        `on_abandoned`: called at the server when the asker was cancelled. `what`: its name, for traps. Raises
        Unavailable over a cut line.
        """
        if self.process.is_buried:
            raise Unavailable("This history is over.")
        future = self.loop.create_future()

        def arrive() -> None:
            if self.is_cut:
                self.loop.outside(0.2 + self._rng.random(), settle, future, Unavailable("The line is cut."))
            else:
                request(answer)

        def answer(result: Any) -> None:
            self.loop.outside(self.delay_s(), come_back, result)

        def come_back(result: Any) -> None:
            lost = Unavailable("The line was cut before the answer came.")
            settle(future, lost if self.is_cut else result)

        self.loop.outside(self.delay_s(), arrive)
        if self._traps:
            self._spring_traps(what)
        try:
            return await future
        except asyncio.CancelledError:
            self.loop.outside(self.delay_s(), on_abandoned)
            raise

    def tell(self, effect: Callable[[], None]) -> None:
        """Send without an answer; lost when the line is cut by the time it arrives."""
        if not self.process.is_buried:
            self.loop.outside(self.delay_s(), lambda: None if self.is_cut else effect())


def settle(future: "asyncio.Future[Any]", result: Any) -> None:
    """Give a future its result or exception, unless nobody waits any more."""
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)
