"""A pull consumer: asks JetStream for messages, hands them out in lists, and notices when it is asking nobody.

One request is open at a time, for as many messages as a list may hold; JetStream answers it as messages come and sends
a heartbeat while there are none. So 64 idle consumers cost 6 messages a second, and silence means that the request is
lost: with the connection, with the consumer, or with the broker's disk. Then everything is set up again.

nats-py's own `fetch` cannot tell a quiet stream from a vanished one before its time is out.
"""

import asyncio
import json
import logging
import random
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Protocol

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.api import ConsumerConfig

from libs.errors import CarillonError

log = logging.getLogger(__name__)

_EXPIRES = timedelta(seconds=60)
_HEARTBEAT = timedelta(seconds=10)
_SILENCE_S = 25.0  # Two heartbeats and a bit.
_CLOSE_S = 1.0
_RETRY_MIN_S = 0.1
_RETRY_MAX_S = 2.0
_ERRORS = (nats.errors.Error, OSError, TimeoutError, CarillonError)


class Message:
    """A message from a stream. One of `ack`, `nak` and `term` ends it; unanswered, it comes again after `ack_wait`.

    Answers are sent without waiting and may be lost; they never raise for want of a connection.
    """

    __slots__ = ("_client", "data", "headers", "num_delivered", "reply", "subject")

    def __init__(self, client: Client, message: Msg) -> None:
        self._client = client
        self.subject = message.subject
        self.reply = message.reply
        self.data: bytes = message.data
        self.headers: Mapping[str, str] = message.headers or {}
        # $JS.ACK.<stream>.<consumer>.<delivered>… or, with a domain, $JS.ACK.<domain>.<account>.<stream>.<consumer>.…
        tokens = message.reply.split(".")
        self.num_delivered = int(tokens[4] if len(tokens) == 9 else tokens[6])

    async def ack(self) -> None:
        """It is done: the stream forgets it."""
        await self._answer(b"+ACK")

    async def nak(self, delay: timedelta = timedelta(0)) -> None:
        """It was not done: let it come again, after `delay`."""
        nanoseconds = delay // timedelta(microseconds=1) * 1000
        await self._answer(b"-NAK" + (b' {"delay": %d}' % nanoseconds if nanoseconds else b""))

    async def term(self) -> None:
        """It cannot be done: it never comes again."""
        await self._answer(b"+TERM")

    async def in_progress(self) -> None:
        """It is being worked on: `ack_wait` begins anew."""
        await self._answer(b"+WPI")

    async def _answer(self, verdict: bytes) -> None:
        with suppress(nats.errors.Error, OSError):
            await self._client.publish(self.reply, verdict)


class Opener(Protocol):
    """What a pull needs of the bus."""

    @property
    def epoch(self) -> int: ...
    async def open_pull(self, pull: "Pull") -> Client: ...


class Pull:
    """The client's half of one durable consumer."""

    def __init__(self, bus: Opener, stream: str, config: ConsumerConfig, batch: int) -> None:
        self.stream = stream
        self.config = config
        self._bus = bus
        self._batch = batch
        self._client: Client | None = None
        self._subscription: Subscription | None = None
        self._inbox = ""
        self._arrived: deque[Message] = deque()
        self._event = asyncio.Event()
        self._epoch: int | None = None
        self._request = 0
        self._outstanding = 0

    async def next(self) -> list[Message]:
        """The messages that are here, at most `batch`; waits for the first."""
        while True:
            if self._epoch != self._bus.epoch:
                await self._open()
            if not self._outstanding and len(self._arrived) <= self._batch:
                await self._ask()
            if self._arrived:
                return [self._arrived.popleft() for _ in range(min(self._batch, len(self._arrived)))]
            self._event.clear()
            try:
                async with asyncio.timeout(_SILENCE_S):
                    await self._event.wait()
            except TimeoutError:
                log.warning("A consumer heard nothing from JetStream; setting it up again.", extra=self._names())
                self._epoch = None

    def wake(self) -> None:
        """Look at the bus's epoch again."""
        self._event.set()

    async def close(self) -> None:
        """Stop, and hand back what arrived and was not handed out; most of what is on its way is waited for."""
        if self._subscription is not None and self._client is not None:
            with suppress(*_ERRORS):
                if self._client.is_connected:
                    async with asyncio.timeout(_CLOSE_S):
                        await self._subscription.drain()  # type: ignore[no-untyped-call]
                else:
                    await self._subscription.unsubscribe()
        for message in self._arrived:
            await message.nak()
        self._arrived.clear()

    async def _open(self) -> None:
        """Have stream, consumer and inbox, trying until it works."""
        delay = _RETRY_MIN_S
        while True:
            epoch = self._bus.epoch
            try:
                client = await self._bus.open_pull(self)
                if client is not self._client:
                    await self._listen(client)
            except _ERRORS as err:
                log.warning("A consumer cannot be set up; trying again.", extra={**self._names(), "error": str(err)})
                await asyncio.sleep(random.uniform(delay / 2, delay))
                delay = min(delay * 2, _RETRY_MAX_S)
                continue
            self._epoch, self._outstanding = epoch, 0
            return

    async def _listen(self, client: Client) -> None:
        self._inbox = client.new_inbox()
        self._subscription = await client.subscribe(f"{self._inbox}.*", cb=self._on_message)
        self._client = client

    async def _ask(self) -> None:
        """Ask for one list. Each request has its own reply subject, to tell whose end a status message announces."""
        assert self._client is not None
        self._request += 1
        self._outstanding = self._batch
        request = {"batch": self._batch, "expires": _nanoseconds(_EXPIRES), "idle_heartbeat": _nanoseconds(_HEARTBEAT)}
        with suppress(*_ERRORS):  # Silence, or the next epoch, makes up for it.
            await self._client.publish(
                f"$JS.API.CONSUMER.MSG.NEXT.{self.stream}.{self.config.durable_name}",
                json.dumps(request).encode(),
                reply=f"{self._inbox}.{self._request}",
            )

    async def _on_message(self, message: Msg) -> None:
        assert self._client is not None
        status = message.headers.get("Status") if message.headers else None
        if status is None or message.reply:
            self._arrived.append(Message(self._client, message))
            # One from an earlier request only brings the next request forward.
            self._outstanding = max(0, self._outstanding - 1)
        elif status != "100" and message.subject == f"{self._inbox}.{self._request}":
            await self._on_request_ended(status, message)
        self._event.set()

    async def _on_request_ended(self, status: str, message: Msg) -> None:
        self._outstanding = 0
        if status in {"404", "408"}:  # No messages in its time.
            return
        description = (message.headers or {}).get("Description", status)
        log.info("A consumer's request was ended by JetStream.", extra={**self._names(), "reason": description})
        await asyncio.sleep(random.uniform(0, _RETRY_MIN_S))  # Keeps a refusal from being asked for again at once.
        self._epoch = None

    def _names(self) -> dict[str, object]:
        return {"stream": self.stream, "consumer": self.config.durable_name}


def _nanoseconds(duration: timedelta) -> int:
    return duration // timedelta(microseconds=1) * 1000
