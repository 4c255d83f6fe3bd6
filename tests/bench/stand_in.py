"""A receiver reduced to its link: takes the frames for a service, acknowledges and receipts them, and keeps nothing."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from typing import Self

from carillon.link.v1 import link_pb2

from libs.jetstream import Bus, Message
from libs.links.frames import REPLY_HEADER, all_subjects, decoded, stream_name
from libs.settings import NatsSettings

_FETCH_FRAMES = 64


class StandIn:
    """Takes the place of one service. `on_frame` is called with each new frame and its message."""

    def __init__(
        self,
        bus: Bus,
        service: str,
        on_frame: Callable[[link_pb2.Frame, Message], None] = lambda _frame, _message: None,
    ) -> None:
        self._bus = bus
        self._service = service
        self._on_frame = on_frame
        self._seen: set[bytes] = set()
        self.news = asyncio.Event()
        self.entries = 0
        self.last_at_ns = 0
        """When the newest frame was here, ns since 1970."""

    @classmethod
    @asynccontextmanager
    async def connect(cls, nats_url: str, service: str) -> AsyncIterator[Self]:
        """Taking frames until the block ends."""
        bus = await Bus.connect(NatsSettings(url=(nats_url,)), f"bench-{service}")
        try:
            stand_in = cls(bus, service)
            async with stand_in.running():
                yield stand_in
        finally:
            await bus.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Take frames until the block ends."""
        await self._bus.ensure_stream(stream_name(self._service), [all_subjects(self._service)])
        taking = asyncio.create_task(self._take())
        try:
            yield
        finally:
            taking.cancel()
            await asyncio.wait({taking}, timeout=5)

    async def _take(self) -> None:
        consumer = self._bus.consume(
            stream_name(self._service),
            durable=self._service,
            filter_subject=all_subjects(self._service),
            batch=_FETCH_FRAMES,
            ack_wait=timedelta(seconds=30),
            max_ack_pending=4_096,
        )
        async with aclosing(consumer) as lists:
            async for messages in lists:
                await self._land(messages)

    async def _land(self, messages: Sequence[Message]) -> None:
        receipts: dict[str, link_pb2.Receipts] = {}
        for message in messages:
            frame = decoded(message.data)
            await message.ack()
            receipts.setdefault(message.headers[REPLY_HEADER], link_pb2.Receipts()).receipts.add(
                frame_id=frame.id, verdict=link_pb2.FRAME_VERDICT_APPLIED
            )
            if frame.id in self._seen:  # Published again; a real receiver's inbox would know it.
                continue
            self._seen.add(frame.id)
            self.entries += len(frame.entries)
            self.last_at_ns = time.time_ns()
            self._on_frame(frame, message)
        for reply_to, told in receipts.items():
            await self._bus.send(reply_to, told.SerializeToString())
        self.news.set()
