"""NATS with JetStream: a connection that never gives up, streams that come back, publishing, pull consumers.

The broker remembers nothing that counts (rule R1), and this module behaves accordingly. A `Bus` connects for ever, also
when NATS is away at start; what was declared on it (streams, subscriptions, consumers) is declared again after every
connect, so that a broker which lost its disk is as good as before within a second. `ensure_stream` says when a stream
had vanished; its owner then publishes again what it holds.

Publishing fails fast while there is no connection: a frame that waits in a buffer here is worth less than the one that
waits in the outbox.
"""

import asyncio
import json
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Self

import nats.errors
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js import errors as js_errors
from nats.js.api import ConsumerConfig, Header, StreamConfig

from libs.errors import FailedPrecondition, Unavailable
from libs.jetstream_creds import Credentials
from libs.jetstream_metrics import CONNECTED, RECONNECTS
from libs.jetstream_options import RECONNECT_MAX_S, connection_options
from libs.jetstream_pull import Message, Pull
from libs.jetstream_streams import create_or_update, stream_config
from libs.jetstream_subscribed import Subscribed
from libs.lifecycle import heed_cancellation
from libs.settings import NatsSettings

__all__ = ["Bus", "Message", "PublishFailed", "Published"]

log = logging.getLogger(__name__)

_API_TIMEOUT_S = 2.0  # What a cluster is asked while it elects a leader is never answered; asking again is.
_CANNOT_UPDATE = 10052  # "stream configuration update can not change …", with code 500
_ERRORS = (nats.errors.Error, OSError, TimeoutError)


class PublishFailed(Unavailable):
    """JetStream did not acknowledge the message; it may or may not have it."""

    default_reason = "PUBLISH_FAILED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """JetStream's acknowledgement. `is_duplicate`: it had a message with this id, within the duplicate window."""

    stream: str
    sequence: int
    is_duplicate: bool


@dataclass(slots=True)
class _Stream:
    config: StreamConfig
    created_at: datetime | None = None
    is_news: bool = False


class Bus:
    """One connection to NATS for a process; `connect` makes it, `close` ends it."""

    def __init__(self, settings: NatsSettings, name: str) -> None:
        self._settings = settings
        self._name = name
        self._client: Client | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._connected = asyncio.Event()
        self._epoch = 0
        self._streams: dict[str, _Stream] = {}
        self._stream_lock = asyncio.Lock()
        self._subscriptions: dict[int, Subscribed] = {}
        self._pulls: set[Pull] = set()
        self._hooks: list[Callable[[str], Awaitable[None]]] = []
        self._restoring: asyncio.Task[None] | None = None
        self._waits: set[asyncio.Timeout] = set()

    @classmethod
    async def connect(cls, settings: NatsSettings, name: str) -> Self:
        """Connect, and keep connected until `close`. `name` shows in NATS's monitoring.

        Returns after `connect_timeout` also without a connection, which is then made as soon as NATS is there. Raises
        SettingsError when creds_file cannot be used.
        """
        if settings.creds_file is not None:
            Credentials(settings.creds_file).check()
        bus = cls(settings, name)
        CONNECTED.set_function(lambda: bus.is_connected)
        bus._keeper = asyncio.create_task(bus._keep_connected(), name="nats connection")
        try:
            await bus.wait_connected(settings.connect_timeout)
        except TimeoutError:
            log.warning("NATS cannot be reached; going on without it for now.", extra={"servers": list(settings.url)})
        return bus

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now."""
        return self._connected.is_set()

    @property
    def epoch(self) -> int:
        """Goes up with every connect and reconnect; what was asked of the server before is void."""
        return self._epoch

    async def wait_connected(self, timeout: timedelta | None = None) -> None:
        """Wait for a connection; raises TimeoutError."""
        async with asyncio.timeout(None if timeout is None else timeout.total_seconds()):
            await self._connected.wait()

    async def close(self) -> None:
        """End all consumers and the connection; what is not acknowledged yet is lost, or comes again elsewhere."""
        for task in (self._keeper, self._restoring):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        if self._client is None:
            return
        with suppress(*_ERRORS):
            if self.is_connected:
                await self._client.flush(1)  # Acknowledgements are still on their way.
        self._connected.clear()
        with suppress(Exception):  # As above.
            await self._client.close()

    # Streams

    async def ensure_stream(
        self,
        name: str,
        subjects: Sequence[str],
        *,
        is_work_queue: bool = True,
        max_age: timedelta | None = None,
        max_bytes: int | None = None,
        replicas: int | None = None,
    ) -> bool:
        """Have the stream exist with this configuration, from now on; whether it is new since the last call.

        Stored in files; refuses messages when full; knows message ids for two minutes. A work
        queue deletes what is acknowledged. None: from the settings. The stream is also made again by itself after a
        reconnect; the answer True is then kept for the next call. Raises Unavailable when NATS is away (the stream is
        made when it is back) or refuses, FailedPrecondition when the stream exists and cannot be changed into this.
        """
        config = stream_config(
            name,
            subjects,
            is_work_queue=is_work_queue,
            max_age=max_age or self._settings.stream_max_age,
            max_bytes=max_bytes or self._settings.stream_max_bytes,
            replicas=replicas or self._settings.stream_replicas,
        )
        known = self._streams.setdefault(name, _Stream(config))
        known.config = config
        await self.restore_stream(name)
        is_news, known.is_news = known.is_news, False
        return is_news

    def on_stream_created(self, hook: Callable[[str], Awaitable[None]]) -> None:
        """Call `hook(name)` whenever a declared stream turns out to be a new one, within a second of a reconnect."""
        self._hooks.append(hook)

    async def restore_stream(self, name: str) -> None:
        """Make a declared stream exist again; does nothing for one nobody declared. Errors: as `ensure_stream`."""
        stream = self._streams.get(name)
        if stream is None:
            return
        async with self._stream_lock:
            try:
                async with self._while_connected():
                    created_at = await create_or_update(self._jetstream, stream.config)
            except _ERRORS as err:
                if isinstance(err, js_errors.APIError) and (err.code == 400 or err.err_code == _CANNOT_UPDATE):
                    raise FailedPrecondition(f"The stream {name} cannot be changed: {err.description}") from err
                raise Unavailable(f"The stream {name} cannot be ensured now: {err}", reason="NATS_UNAVAILABLE") from err
        if created_at == stream.created_at:
            return
        stream.created_at, stream.is_news = created_at, True
        log.info("A stream is new.", extra={"stream": name})
        for hook in self._hooks:
            await hook(name)

    # Messages

    async def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        headers: Mapping[str, str] | None = None,
        msg_id: str | None = None,
        timeout: timedelta | None = None,
    ) -> Published:
        """Publish to the stream that has `subject` and wait until it is stored.

        A message with the `msg_id` of one published in the last two minutes is not stored again. Raises PublishFailed:
        no connection, no such stream, stream full, or no answer within `timeout` (None: `publish_timeout`).
        """
        seconds = (timeout or self._settings.publish_timeout).total_seconds()
        all_headers = {**(headers or {}), **({Header.MSG_ID.value: msg_id} if msg_id else {})}
        try:
            client = self._connection()
            async with self._while_connected():
                answer = await client.request(subject, payload, timeout=seconds, headers=all_headers or None)
            ack: dict[str, Any] = json.loads(answer.data)
        except nats.errors.NoRespondersError as err:
            self._restore_soon()
            raise PublishFailed(f"No stream takes {subject}.", reason="NO_STREAM") from err
        except (*_ERRORS, Unavailable) as err:
            raise PublishFailed(f"{subject} was not acknowledged: {str(err) or type(err).__name__}") from err
        if error := ack.get("error"):
            raise PublishFailed(f"{subject} was refused: {error.get('description', error)}")
        return Published(stream=ack["stream"], sequence=ack["seq"], is_duplicate=ack.get("duplicate", False))

    async def send(self, subject: str, payload: bytes, *, headers: Mapping[str, str] | None = None) -> None:
        """Send by plain NATS, which may lose it; never fails for want of a connection."""
        with suppress(*_ERRORS, Unavailable):
            await self._connection().publish(subject, payload, headers=dict(headers) if headers else None)

    async def subscribe(
        self, subject: str, callback: Callable[[bytes], Awaitable[None]], *, queue: str | None = None
    ) -> Callable[[], Awaitable[None]]:
        """Call `callback(payload)` for each plain NATS message, one at a time, from now on and after reconnects.

        With `queue`, one of its members gets each message. What the callback raises is logged. Returns a function that
        ends the subscription.
        """
        subscribed = Subscribed(subject, queue or "", callback)
        self._subscriptions[id(subscribed)] = subscribed
        if self._client is not None and self.is_connected:
            await subscribed.start(self._client)

        async def end() -> None:
            self._subscriptions.pop(id(subscribed), None)
            await subscribed.end()

        return end

    async def consume(
        self,
        stream: str,
        *,
        durable: str,
        filter_subject: str,
        batch: int,
        ack_wait: timedelta,
        max_ack_pending: int,
    ) -> AsyncGenerator[list[Message], None]:
        """Messages of a durable consumer as they come, in lists of 1 to `batch`, until cancelled or closed.

        Several processes with the same `durable` share the messages. While a list is worked on, the next ones are
        fetched: at most 3 × `batch` messages are here at once. Each must be acknowledged within `ack_wait` or it comes
        again; `max_ack_pending` bounds what all processes together hold. Never raises for NATS's sake: it waits for
        the connection, makes the stream (if declared here) and consumer again where they vanished, and goes on.
        """
        config = ConsumerConfig(
            name=durable,
            durable_name=durable,
            filter_subject=filter_subject,
            ack_wait=ack_wait.total_seconds(),
            max_ack_pending=max_ack_pending,
        )
        pull = Pull(self, stream, config, batch)
        self._pulls.add(pull)
        try:
            while True:
                yield await pull.next()
        finally:
            self._pulls.discard(pull)
            await pull.close()

    async def open_pull(self, pull: Pull) -> Client:
        """For `Pull`: a connection on which its stream and consumer exist. Raises Unavailable and NATS's errors."""
        await self._connected.wait()
        await self.restore_stream(pull.stream)
        async with self._while_connected():
            await self._jetstream().add_consumer(pull.stream, pull.config)
        return self._connection()

    # The connection

    def _connection(self) -> Client:
        if self._client is None or not self.is_connected:
            raise Unavailable("There is no connection to NATS.", reason="NATS_UNAVAILABLE")
        return self._client

    def _jetstream(self) -> JetStreamContext:
        return self._connection().jetstream(timeout=_API_TIMEOUT_S)

    async def _keep_connected(self) -> None:
        """Make a client and a new one whenever it gave up, which it does on some errors from the server."""
        while True:
            self._client = client = Client()
            has_given_up = asyncio.Event()
            try:
                await client.connect(
                    name=self._name, **connection_options(self._settings), **self._callbacks(client, has_given_up)
                )
                await self._on_connected(client, is_new=True)
                await has_given_up.wait()
            except Exception as err:  # noqa: BLE001 - outermost frame of a task that must go on.
                log.warning("Connecting to NATS failed; trying again.", extra={"error": repr(err)})
                with suppress(Exception):  # It fails for a client that did not come to connect.
                    await client.close()
            self._on_disconnected()
            await asyncio.sleep(random.uniform(0, RECONNECT_MAX_S))

    def _callbacks(self, client: Client, has_given_up: asyncio.Event) -> dict[str, Any]:
        async def on_disconnected() -> None:
            self._on_disconnected()

        async def on_reconnected() -> None:
            await self._on_connected(client, is_new=False)

        async def on_closed() -> None:
            has_given_up.set()

        async def on_error(error: Exception) -> None:
            log.debug("NATS client.", extra={"error": repr(error)})

        return {
            "disconnected_cb": on_disconnected,
            "reconnected_cb": on_reconnected,
            "closed_cb": on_closed,
            "error_cb": on_error,
        }

    async def _on_connected(self, client: Client, *, is_new: bool) -> None:
        self._epoch += 1
        self._connected.set()
        RECONNECTS.inc(self._epoch > 1)
        log.info("Connected to NATS.", extra={"server": client.connected_url.netloc if client.connected_url else ""})
        if is_new:  # A reconnected client has its subscriptions still.
            for subscribed in list(self._subscriptions.values()):
                await subscribed.start(client)
        for pull in self._pulls:
            pull.wake()
        self._restore_soon()

    def _on_disconnected(self) -> None:
        if not self.is_connected:
            return
        log.warning("The connection to NATS is lost; reconnecting.")
        self._connected.clear()
        for wait in self._waits:
            wait.reschedule(0)

    @asynccontextmanager
    async def _while_connected(self) -> AsyncIterator[None]:
        """Raise TimeoutError at once when the connection is lost: what was asked will not be answered.

        nats-py would wait its full time, and publishers with it.
        """
        async with asyncio.timeout(None) as wait:
            self._waits.add(wait)
            try:
                yield
            finally:
                self._waits.discard(wait)
        heed_cancellation()

    def _restore_soon(self) -> None:
        if self._streams and (self._restoring is None or self._restoring.done()):
            self._restoring = asyncio.create_task(self._restore_streams(), name="restore streams")

    async def _restore_streams(self) -> None:
        for name in list(self._streams):
            try:
                await self.restore_stream(name)
            except (Unavailable, FailedPrecondition) as err:
                log.warning("A stream could not be restored.", extra={"stream": name, "error": str(err)})
