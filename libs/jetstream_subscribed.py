"""A plain NATS subscription that outlives the client it was made on."""

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

log = logging.getLogger(__name__)


class Subscribed:
    """A subscription that is made again on a new client."""

    def __init__(self, subject: str, queue: str, callback: Callable[[bytes], Awaitable[None]]) -> None:
        self._subject = subject
        self._queue = queue
        self._callback = callback
        self._current: Subscription | None = None

    async def start(self, client: Client) -> None:
        """Listen on a client that is new."""
        self._current = await client.subscribe(self._subject, self._queue, cb=self._on_message)

    async def end(self) -> None:
        """Listen no more."""
        if self._current is not None:
            with suppress(nats.errors.Error, OSError, TimeoutError):
                await self._current.unsubscribe()

    async def _on_message(self, message: Msg) -> None:
        try:
            await self._callback(message.data)
        except Exception:  # Outermost frame of a message nobody else waits for.
            log.exception("A message was not handled.", extra={"subject": message.subject})
