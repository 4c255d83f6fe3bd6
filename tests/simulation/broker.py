"""As much of NATS as the links rely on, which is little: it may lose, repeat, delay and forget.

Streams are work queues with durable pull consumers per subject: a message is handed out, comes again when it is not
acknowledged in time, and is deleted when it is. Beside them plain messages, which arrive or do not.

`noise` is the share of messages that something happens to; `wipe` is the loss of the disk.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from random import Random
from typing import Any

from libs.errors import Unavailable
from tests.simulation.loop import Process, VirtualLoop
from tests.simulation.network import Answer, Line


@dataclass(slots=True)
class _Stored:
    subject: str
    data: bytes
    headers: Mapping[str, str]
    deliveries: int = 0
    is_out: bool = False


@dataclass(eq=False, slots=True)
class _Stream:
    is_new_to: set[str] = field(default_factory=set)
    stored: dict[int, _Stored] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    waiting: dict[str, deque[tuple[int, timedelta, Answer]]] = field(default_factory=dict)
    last: int = 0


@dataclass(slots=True)
class Message:
    """A delivery; stands for libs.jetstream.Message."""

    data: bytes
    headers: Mapping[str, str]
    num_delivered: int
    _answer: Callable[[timedelta | None], None]

    async def ack(self) -> None:
        """It is done."""
        self._answer(None)

    async def nak(self, delay: timedelta = timedelta(0)) -> None:
        """Let it come again."""
        self._answer(delay)


class Broker:
    """The server."""

    def __init__(self, loop: VirtualLoop, rng: Random) -> None:
        self.noise = 0.0
        self._loop = loop
        self._rng = rng
        self._streams: dict[str, _Stream] = {}
        self._subscriptions: dict[str, list[tuple[Line, Callable[[bytes], Awaitable[None]]]]] = {}

    def wipe(self) -> None:
        """All streams are gone; who waited for messages hears that."""
        for stream in self._streams.values():
            for waiting in stream.waiting.values():
                for _, _, answer in waiting:
                    answer([])
        self._streams.clear()

    def happens(self) -> bool:
        """Whether something befalls this message."""
        return self._rng.random() < self.noise

    # Streams

    def ensure(self, name: str) -> _Stream:
        """Make a stream where there is none."""
        return self._streams.setdefault(name, _Stream())

    def publish(self, name: str, subject: str, data: bytes, headers: Mapping[str, str], msg_id: str) -> bool:
        """Store a message; False when there is no such stream. It may be stored twice, or not at all (R1)."""
        stream = self._streams.get(name)
        if stream is None:
            return False
        if msg_id in stream.ids:
            return True
        stream.ids.add(msg_id)
        copies = self._rng.choice((0, 2, 2)) if self.happens() else 1
        for _ in range(copies):
            stream.last += 1
            number = stream.last
            later_s = 3 * self._rng.random() if self.happens() else 0.0
            self._loop.outside(later_s, self._store, stream, number, _Stored(subject, data, headers))
        return True

    def _store(self, stream: _Stream, number: int, stored: _Stored) -> None:
        stream.stored[number] = stored
        self._hand_out(stream, stored.subject)

    def fetch(self, name: str, subject: str, batch: int, ack_wait: timedelta, answer: Answer) -> None:
        """Answer with messages once there are some; with none when there is no stream."""
        stream = self._streams.get(name)
        if stream is None:
            answer([])
            return
        stream.waiting.setdefault(subject, deque()).append((batch, ack_wait, answer))
        for stored in list(stream.stored.values()):
            self._hand_out(stream, stored.subject)

    def _hand_out(self, stream: _Stream, subject: str) -> None:
        for wanted, waiting in stream.waiting.items():
            if not waiting or not _matches(subject, wanted):
                continue
            ready = [n for n, s in stream.stored.items() if not s.is_out and _matches(s.subject, wanted)]
            if not ready:
                return
            if self.happens():
                self._rng.shuffle(ready)
            batch, ack_wait, answer = waiting.popleft()
            answer([self._deliver(stream, number, ack_wait) for number in ready[:batch]])

    def _deliver(self, stream: _Stream, number: int, ack_wait: timedelta) -> tuple[_Stream, int, _Stored, int]:
        stored = stream.stored[number]
        stored.is_out = True
        stored.deliveries += 1
        self._loop.outside(ack_wait.total_seconds(), self.redeliver, stream, number, stored.deliveries)
        return stream, number, stored, stored.deliveries

    def forget_request(self, name: str, subject: str, answer: Answer) -> None:
        """Who asked for messages has gone."""
        waiting = self._streams.get(name, _Stream()).waiting.get(subject, deque())
        for one in [one for one in waiting if one[2] is answer]:
            waiting.remove(one)

    def acknowledge(self, stream: _Stream, number: int) -> None:
        """It is done: forget it."""
        if not self.happens():
            stream.stored.pop(number, None)

    def redeliver(self, stream: _Stream, number: int, deliveries: int) -> None:
        """Let it come again, unless that has happened already."""
        stored = stream.stored.get(number)
        if stored is not None and stored.is_out and stored.deliveries == deliveries:
            stored.is_out = False
            self._hand_out(stream, stored.subject)

    # Plain messages

    def subscribe(self, subject: str, line: Line, callback: Callable[[bytes], Awaitable[None]]) -> None:
        """Hear what is sent from now on."""
        self._subscriptions.setdefault(subject, []).append((line, callback))

    def send(self, subject: str, payload: bytes) -> None:
        """To all who listen; it may get lost, and come twice."""
        for line, callback in self._subscriptions.get(subject, []):
            copies = self._rng.choice((0, 0, 2)) if self.happens() else 1
            for _ in range(copies):
                line.tell(partial(self._arrive, line, callback, payload))

    def _arrive(self, line: Line, callback: Callable[[bytes], Awaitable[None]], payload: bytes) -> None:
        if not line.process.is_dead:

            async def call() -> None:
                await callback(payload)

            self._loop.spawn(line.process, call())


def _matches(subject: str, wanted: str) -> bool:
    return subject == wanted or (wanted.endswith((".*", ".>")) and subject.startswith(wanted[:-1]))


class Bus:
    """One process's connection; stands for libs.jetstream.Bus."""

    def __init__(self, broker: Broker, line: Line, process: Process) -> None:
        self._broker = broker
        self._line = line
        self._process = process

    async def ensure_stream(self, name: str, subjects: Sequence[str], **_: object) -> bool:
        """Have a stream; whether it is another one than at the last call."""

        def request(answer: Answer) -> None:
            stream = self._broker.ensure(name)
            is_new = self._process.name not in stream.is_new_to
            stream.is_new_to.add(self._process.name)
            answer(is_new)

        return bool(await self._line.ask(request))

    async def publish(self, subject: str, payload: bytes, *, headers: Mapping[str, str], msg_id: str) -> None:
        """Publish; raises Unavailable when there is no stream."""
        _, kind, receiver, *_ = subject.split(".")
        name = "EVENTS" if kind == "events" else f"CARILLON_{receiver.upper()}"

        def request(answer: Answer) -> None:
            is_stored = self._broker.publish(name, subject, payload, headers, msg_id)
            answer(None if is_stored else Unavailable("No stream takes it.", reason="NO_STREAM"))

        await self._line.ask(request)

    async def send(self, subject: str, payload: bytes) -> None:
        """Send by plain NATS."""
        self._line.tell(lambda: self._broker.send(subject, payload))

    async def subscribe(self, subject: str, callback: Callable[[bytes], Awaitable[None]]) -> None:
        """Listen to plain NATS."""
        self._broker.subscribe(subject, self._line, callback)

    async def consume(
        self,
        stream: str,
        *,
        durable: str = "",
        filter_subject: str,
        batch: int,
        ack_wait: timedelta,
        max_ack_pending: int = 0,
    ) -> AsyncGenerator[list[Any], None]:
        """Messages as they come, until closed."""
        while True:
            fetched: list[Any] = []
            try:
                fetched = await self._fetch(stream, filter_subject, batch, ack_wait)
            except Unavailable:
                if self._process.is_buried:
                    return
            if fetched:
                yield [self._message(*one) for one in fetched]
            else:
                await asyncio.sleep(0.3)  # There is no stream; a sender makes it.

    async def _fetch(self, stream: str, subject: str, batch: int, ack_wait: timedelta) -> list[Any]:
        requests: list[Answer] = []

        def request(answer: Answer) -> None:
            requests.append(answer)
            self._broker.fetch(stream, subject, batch, ack_wait, answer)

        def abandon() -> None:
            for one in requests:
                self._broker.forget_request(stream, subject, one)

        found: list[Any] = await self._line.ask(request, abandon)
        return found

    def _message(self, stream: _Stream, number: int, stored: _Stored, deliveries: int) -> Message:
        broker, loop = self._broker, self._line.loop

        def answer(delay: timedelta | None) -> None:
            if delay is None:
                self._line.tell(lambda: broker.acknowledge(stream, number))
            else:
                later_s = delay.total_seconds()
                self._line.tell(lambda: loop.outside(later_s, broker.redeliver, stream, number, deliveries))

        return Message(stored.data, stored.headers, deliveries, answer)
