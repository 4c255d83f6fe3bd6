"""A process's life: started in order, closed in reverse, ended by a signal, `stop` or a crash, in bounded time."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

from libs.errors import FailedPrecondition, SettingsError
from libs.lifecycle import Lifecycle, TaskCrashed, run


@asynccontextmanager
async def resource(name: str, said: list[str]) -> AsyncIterator[str]:
    """Says when it opens and closes."""
    said.append(f"open {name}")
    yield name
    said.append(f"close {name}")


async def forever(name: str, said: list[str]) -> None:
    """Says when it is cancelled."""
    try:
        await asyncio.Event().wait()
    finally:
        said.append(f"end {name}")


async def test_things_close_in_the_reverse_of_the_order_they_came_in() -> None:
    """A task never outlives what it uses."""
    said: list[str] = []
    async with Lifecycle() as life:
        assert await life.enter(resource("database", said)) == "database"
        life.spawn("sweeper", forever("sweeper", said))
        await life.enter(resource("server", said))
        await asyncio.sleep(0)
        life.stop()
        await life.run_until_signalled()
    assert said == ["open database", "open server", "close server", "end sweeper", "close database"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_life(number: signal.Signals) -> None:
    """Kubernetes sends the one, a terminal the other."""
    async with asyncio.timeout(5), Lifecycle() as life:
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), number)
        await life.run_until_signalled()
        assert life.stopping.is_set()


async def test_a_signal_while_things_start_ends_the_life_once_they_have() -> None:
    """The kernel drops it for a container's first process that has no handler yet."""
    said: list[str] = []
    async with asyncio.timeout(5), Lifecycle() as life:
        os.kill(os.getpid(), signal.SIGTERM)
        await life.enter(resource("database", said))
        await life.run_until_signalled()
    assert said == ["open database", "close database"]


async def test_a_second_signal_meets_no_handler() -> None:
    """So it ends the process at once, and so does one while things close."""
    before = signal.getsignal(signal.SIGTERM)
    async with asyncio.timeout(5), Lifecycle() as life:
        os.kill(os.getpid(), signal.SIGTERM)
        await life.run_until_signalled()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL == before
    async with Lifecycle():
        pass
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


async def test_a_crashed_task_ends_the_life() -> None:
    """Half a service that looks alive is worse than a restart; what was open is still closed."""
    said: list[str] = []

    async def crash() -> None:
        raise ValueError("broken")

    async def live() -> None:
        async with Lifecycle() as life:
            await life.enter(resource("database", said))
            life.spawn("sweeper", crash())
            await life.run_until_signalled()

    with pytest.raises(TaskCrashed, match="sweeper") as caught:
        await live()
    assert isinstance(caught.value.__cause__, ValueError)
    assert said == ["open database", "close database"]


async def test_a_task_that_returns_is_no_crash() -> None:
    """Some work is done once."""

    async def once() -> None:
        pass

    async with Lifecycle() as life:
        await life.spawn("once", once())
        life.stop()
        await life.run_until_signalled()


async def test_closing_ends_although_something_hangs() -> None:
    """The drain timeout bounds it; what comes after is closed all the same."""
    said: list[str] = []

    @asynccontextmanager
    async def hanging() -> AsyncIterator[None]:
        yield
        await asyncio.Event().wait()

    async with asyncio.timeout(10):
        async with Lifecycle(drain_timeout=timedelta(0)) as life:
            await life.enter(resource("database", said))
            await life.enter(hanging())
    assert said == ["open database", "close database"]


async def test_a_failure_while_closing_does_not_keep_the_rest_open() -> None:
    """It is raised when everything is closed."""
    said: list[str] = []

    @asynccontextmanager
    async def failing() -> AsyncIterator[None]:
        yield
        raise ValueError("cannot close")

    async def live() -> None:
        async with Lifecycle() as life:
            await life.enter(resource("database", said))
            await life.enter(failing())

    with pytest.raises(ExceptionGroup):
        await live()
    assert said == ["open database", "close database"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, 0),
        (SettingsError("CARILLON_X: wrong"), 2),
        (TaskCrashed("sweeper"), 1),
        (FailedPrecondition("The schema is not migrated."), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_the_exit_status_says_how_it_ended(error: BaseException | None, status: int) -> None:
    """Non-zero for anything but a normal end."""

    def main() -> Coroutine[Any, Any, None]:
        async def live() -> None:
            if error is not None:
                raise error

        return live()

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == status
