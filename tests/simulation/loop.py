"""An event loop whose time is a number, and processes that can die or stand still at any await point.

Nothing waits: when no callback is ready, time jumps to the next timer. Callbacks run in the order in which they were
made, so a run is a function of its input; tasks hash by their number, because asyncio keeps them in sets.

Every callback belongs to a process, found in its context (tasks hand their context on to what they start; servers have
none). The loop runs no callback of a dead process and puts those of a stopped one aside. So code under test needs no
hooks: `kill -9` is `is_dead = True`, between two steps of any task, and no `finally` gets a word in.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar, cast

Result = TypeVar("Result")

_MOST_STEPS = 2_000_000


class Process:
    """A machine's worth of tasks."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_dead = False
        self.is_stopped = False
        self.is_buried = False
        self.held: list[_Call] = []

    def __repr__(self) -> str:
        return self.name


_PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


class Stuck(Exception):
    """A history that does not end: nothing is left to happen, or it happens for ever."""


class _Call:
    """What asyncio calls a handle."""

    __slots__ = ("args", "callback", "context", "is_cancelled", "process", "when_s")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: Context, when_s: float) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.process: Process | None = context.get(_PROCESS)
        self.when_s = when_s
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def cancelled(self) -> bool:
        return self.is_cancelled

    def when(self) -> float:
        return self.when_s


class _Task(asyncio.Task[Any]):
    number: int

    def __new__(cls, _coro: object, *, number: int, **_: Any) -> "_Task":
        self = super().__new__(cls)
        self.number = number
        return self

    def __init__(self, coro: Coroutine[Any, Any, Any], *, number: int, **more: Any) -> None:
        super().__init__(coro, **more)

    def __hash__(self) -> int:
        return self.number


class VirtualLoop(asyncio.AbstractEventLoop):
    """As much of an event loop as code without sockets and threads needs."""

    def __init__(self) -> None:
        self.steps = 0
        self.unhandled: list[tuple[Process | None, BaseException]] = []
        self._now_s = 0.0
        self._ready: deque[_Call] = deque()
        self._timers: list[tuple[float, int, _Call]] = []
        self._numbers = 0
        self._outside = copy_context()

    # What asyncio asks for

    def time(self) -> float:
        """Seconds since the beginning of the history."""
        return self._now_s

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(  # type: ignore[override] # Here and below: the stubs' generics say no more than this.
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        call = _Call(callback, args, context or copy_context(), self._now_s)
        self._ready.append(call)
        return cast(asyncio.Handle, call)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        call = _Call(callback, args, context or copy_context(), when)
        self._numbers += 1
        heapq.heappush(self._timers, (when, self._numbers, call))
        return cast(asyncio.TimerHandle, call)

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, Result], *, name: object = None, context: Context | None = None, **_: Any
    ) -> asyncio.Task[Result]:
        self._numbers += 1
        named = None if name is None else str(name)
        return _Task(coro, number=self._numbers, loop=self, name=named or "task", context=context)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Errors that nobody awaited are part of the history; tasks that a crash left behind are not."""
        if (error := context.get("exception")) is not None:
            self.unhandled.append((_PROCESS.get(), error))

    # What the simulation asks for

    def outside(self, delay_s: float, callback: Callable[..., object], *args: Any) -> None:
        """Call something later that belongs to no process: a server, the network, fate."""
        self.call_at(self._now_s + delay_s, callback, *args, context=self._outside)

    def spawn(self, process: Process, coro: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """Start a task of a process."""
        context = self._outside.copy()
        context.run(_PROCESS.set, process)
        return self.create_task(coro, context=context)

    def stop_process(self, process: Process) -> None:
        """SIGSTOP."""
        process.is_stopped = True

    def continue_process(self, process: Process) -> None:
        """SIGCONT: everything that came up meanwhile happens now."""
        process.is_stopped = False
        self._ready.extend(process.held)
        process.held = []

    def run(self, main: Coroutine[Any, Any, Result]) -> Result:
        """Run until `main` is done. Raises Stuck."""
        asyncio._set_running_loop(self)
        try:
            task = self.create_task(main)
            while not task.done():
                self._step()
            return task.result()
        finally:
            asyncio._set_running_loop(None)

    def bury(self, processes: list[Process]) -> None:
        """After the history: let the tasks of all processes end, so that nothing of them is left; not part of it."""
        for process in processes:
            process.is_buried, process.is_dead = True, False
            self.continue_process(process)
        asyncio._set_running_loop(self)
        try:
            for _ in range(20):
                if not (left := [task for task in asyncio.all_tasks(self) if not task.done()]):
                    return
                for task in left:
                    task.cancel()
                until_s = self._now_s + 1
                with suppress(Stuck):
                    while self._ready or (self._timers and self._timers[0][0] <= until_s):
                        self._step()
        finally:
            asyncio._set_running_loop(None)

    def _step(self) -> None:
        if not self._ready:
            if not self._timers:
                raise Stuck("nothing is left to happen, and the history has not ended")
            self._now_s = max(self._now_s, self._timers[0][0])
            while self._timers and self._timers[0][0] <= self._now_s:
                self._ready.append(heapq.heappop(self._timers)[2])
        call = self._ready.popleft()
        if call.is_cancelled:
            return
        process = call.process
        if process is not None and (process.is_dead or process.is_stopped):
            process.held.append(call)
            return
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise Stuck(f"{_MOST_STEPS:,} steps, and the history has not ended")
        call.context.run(call.callback, *call.args)
