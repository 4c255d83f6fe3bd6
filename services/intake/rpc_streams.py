"""Bulk calls: batches in, answers out, in order, a bounded number of batches under way.

At the bound reading stops, so gRPC's flow control holds the caller back. The first batch that fails as a whole ends the
stream with its error; what was answered before is accepted, and what was under way may be: callers repeat it with the
same idempotency keys.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from services.intake import metrics

MAX_UNDER_WAY = 16

RequestT = TypeVar("RequestT")
AnswerT = TypeVar("AnswerT")


async def answer_in_order(
    requests: AsyncIterator[RequestT],
    answer: Callable[[RequestT], Awaitable[AnswerT]],
    *,
    most: int = MAX_UNDER_WAY,
) -> AsyncIterator[AnswerT]:
    """Yield `answer(request)` for each request, in order; at most `most` are begun and not yet yielded."""
    slots = asyncio.Semaphore(most)
    begun: asyncio.Queue[asyncio.Task[AnswerT] | None] = asyncio.Queue()
    tasks: set[asyncio.Task[AnswerT]] = set()

    async def work(request: RequestT) -> AnswerT:
        with metrics.STREAM_BATCHES.track_inprogress():
            return await answer(request)

    async def read() -> None:
        try:
            async for request in requests:
                await slots.acquire()
                task = asyncio.create_task(work(request))
                tasks.add(task)
                begun.put_nowait(task)
        finally:
            begun.put_nowait(None)

    reader = asyncio.create_task(read())
    try:
        while (task := await begun.get()) is not None:
            yield await task
            tasks.discard(task)
            slots.release()
        await reader
    finally:
        for one in (reader, *tasks):
            one.cancel()
        # Collected, so that no error of a task nobody waits for any more is logged as lost.
        await asyncio.gather(reader, *tasks, return_exceptions=True)
