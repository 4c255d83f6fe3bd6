"""A process's life: start things in order, run until a signal or a crash, close them in reverse order, in bounded time.

    async with Lifecycle(drain_timeout) as life:
        db = await life.enter(Database.connect(...))
        life.spawn("sweeper", sweeper.run())
        await life.run_until_signalled()

Tasks and context managers close in the reverse of the order they came in, so a task never outlives what it uses; each
task is cancelled when its turn comes. A task that crashes ends the process: half a service that looks alive is worse
than a restart. A signal that comes while things start is remembered, and they are closed once they have started: for a
container's first process, which has no handler yet, the kernel would drop it. A second signal ends the process at once,
as if there were no handler.

Cancelling is safe at any point because every state change is a transaction: what was not committed did not happen.
"""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from datetime import timedelta
from typing import Any, NoReturn, Self, TypeVar

from libs.errors import CarillonError, SettingsError
from libs.telemetry.logs import get_logger

_log = get_logger(__name__)

T = TypeVar("T")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_MIN_CLOSE_S = 1.0


class TaskCrashed(Exception):
    """A task of the service ended with an error, and so does the process."""


class Lifecycle:
    """Owns what a process runs; use as `async with`."""

    def __init__(self, drain_timeout: timedelta = timedelta(seconds=20)) -> None:
        """`drain_timeout` bounds closing as a whole; whatever comes after it still gets a second."""
        self.stopping = asyncio.Event()
        self._drain_s = drain_timeout.total_seconds()
        self._closers: list[tuple[str, Callable[[float], Awaitable[None]]]] = []
        self._crash: asyncio.Future[tuple[str, BaseException]] | None = None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._crash = loop.create_future()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._signalled, number)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stopping.set()
        _remove_handlers()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._drain_s
        failures: list[Exception] = []
        for name, close in reversed(self._closers):
            try:
                await close(max(deadline - loop.time(), _MIN_CLOSE_S))
            except TimeoutError:
                _log.warning("Gave up waiting for something to close.", name=name)
            except Exception as error:  # noqa: BLE001 - whatever fails, the rest must be closed too.
                _log.exception("Something failed while closing.", name=name)
                failures.append(error)
        self._closers.clear()
        if failures:
            raise ExceptionGroup("Closing failed.", failures)

    async def enter(self, resource: AbstractAsyncContextManager[T]) -> T:
        """Enter an async context manager now, and leave it when this lifecycle ends."""
        entered = await resource.__aenter__()

        async def close(seconds: float) -> None:
            async with asyncio.timeout(seconds):
                await resource.__aexit__(None, None, None)

        self._closers.append((type(resource).__name__, close))
        return entered

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine until this lifecycle ends, which cancels it; when it raises, the process ends."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        task.add_done_callback(self._note_end)

        async def close(seconds: float) -> None:
            task.cancel()
            _, pending = await asyncio.wait([task], timeout=seconds)
            if pending:
                raise TimeoutError

        self._closers.append((name, close))
        return task

    def stop(self) -> None:
        """End the life as a signal would."""
        self.stopping.set()

    async def run_until_signalled(self) -> None:
        """Wait for SIGTERM, SIGINT (or one since this lifecycle began) or `stop`.

        Raises TaskCrashed as soon as a task fails.
        """
        if self._crash is None:
            raise RuntimeError("A Lifecycle is used as `async with`.")
        stopping = asyncio.create_task(self.stopping.wait())
        waited: list[asyncio.Future[Any]] = [stopping, self._crash]
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
        if self._crash.done():
            name, error = self._crash.result()
            raise TaskCrashed(f"The task {name} crashed: {error!r}") from error

    def _signalled(self, number: signal.Signals) -> None:
        _log.info("Stopping, because of a signal.", signal=number.name)
        self.stopping.set()
        _remove_handlers()

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        _log.error("A task crashed.", task=task.get_name(), exc_info=error)
        if self._crash is not None and not self._crash.done():
            self._crash.set_result((task.get_name(), error))


def heed_cancellation() -> None:
    """End the current task if it was cancelled; for after what waits for Postgres or NATS.

    Before Python 3.12 `asyncio.wait_for`, which psycopg and nats-py use, loses a cancellation that meets the answer,
    and a loop would go on until the time to drain is over.
    """
    if (task := asyncio.current_task()) is not None and task.cancelling():
        raise asyncio.CancelledError


def _remove_handlers() -> None:
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.remove_signal_handler(number)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> NoReturn:
    """Run a process's main coroutine on uvloop and exit: 0 when it returned, 2 for wrong settings, else 1."""
    import uvloop

    with exiting_on_errors():
        uvloop.run(main())
    raise SystemExit(0)


@contextmanager
def exiting_on_errors() -> Iterator[None]:
    """Say in a line what went wrong, and exit with its status; what nobody has foreseen passes through."""
    try:
        yield
    except SettingsError as error:
        sys.stderr.write(f"{error.message}\n")
        raise SystemExit(2) from None
    except TaskCrashed:
        raise SystemExit(1) from None  # It is in the log already, with its traceback.
    except CarillonError as error:
        _log.error("Could not run.", reason=error.reason, error=error.message)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
