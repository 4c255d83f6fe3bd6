"""What is seen while the replay runs: flights, business time, mails and webhooks as they arrive."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from local.demo import story
from local.demo.plan import Plan, Shift

_LOOK_S = 0.3


class Bars:
    """Three bars; `shift` moves the first two, the mailbox's counts the third."""

    def __init__(self, console: Console, plan: Plan, *, messages: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._flights = self._progress.add_task("Flights replayed", total=plan.flights)
        self._time = self._progress.add_task("Business time", total=len(plan.shifts))
        self._expected = messages
        self._messages = self._progress.add_task("Mails and webhooks received", total=messages)

    def shift(self, number: int, shift: Shift) -> None:
        """A shift begins."""
        local = shift.begin.astimezone(story.NEW_YORK)
        self._progress.update(self._time, completed=number, description=f"New York: {local:%a %d %B, %H:%M}")
        self._progress.advance(self._flights, shift.flights)

    @asynccontextmanager
    async def shown(self, mailbox_url: str) -> AsyncIterator[None]:
        """Show them until the block ends."""
        with self._progress:
            watching = asyncio.create_task(self._watch(mailbox_url))
            try:
                yield
            finally:
                watching.cancel()
            self._finish(self._time)
            async with aiohttp.ClientSession() as session:
                await self._look(session, mailbox_url)

    async def _watch(self, mailbox_url: str) -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                await self._look(session, mailbox_url)
                await asyncio.sleep(_LOOK_S)

    async def _look(self, session: aiohttp.ClientSession, mailbox_url: str) -> None:
        async with session.get(f"{mailbox_url}/api/counts") as response:
            counts = await response.json()
        received = counts["mails"] + sum(counts["hooks"].values())
        # A large digest travels in several mails, so there may be more than messages.
        self._progress.update(self._messages, completed=received, total=max(received, self._expected))

    def _finish(self, task: TaskID) -> None:
        [total] = [one.total for one in self._progress.tasks if one.id == task]
        self._progress.update(task, completed=total or 0)
