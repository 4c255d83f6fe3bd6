"""The sending half of a link without a database: publishes frames to a service as another would, and takes receipts."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from uuid import UUID

from carillon.link.v1 import link_pb2

from libs.jetstream import Bus
from libs.links.frames import REPLY_HEADER, OutgoingFrame, receipt_subject, subject_of

_PUBLISHERS = 32  # As libs.links.sender.


class NotInTime(Exception):
    """Something did not happen within the time a benchmark allows for it."""


class LinkSender:
    """Stands in for the sender `service`. `news` is set whenever a receipt has come; one that says dead is an error."""

    def __init__(self, bus: Bus, service: str, news: asyncio.Event) -> None:
        self._bus = bus
        self._news = news
        self._reply_to = receipt_subject(service, "bench")
        self._unconfirmed: dict[UUID, None] = {}
        self._refused = ""

    async def listen(self) -> None:
        """Begin to take receipts; before anything is sent."""
        await self._bus.subscribe(self._reply_to, self._on_receipts)

    def publish(self, frames: Sequence[OutgoingFrame]) -> "asyncio.Future[list[None]]":
        """Start publishing; what is not confirmed yet counts as `unconfirmed`."""
        self._unconfirmed.update(dict.fromkeys(frame.id for frame in frames))
        waiting = iter(frames)
        return asyncio.gather(*(self._publish_each(waiting) for _ in range(_PUBLISHERS)))

    async def send(self, frames: Sequence[OutgoingFrame], *, timeout: timedelta) -> None:
        """Publish, and return when the receiver has receipted all: they are committed. Raises NotInTime."""
        await self.publish(frames)
        await self.until_confirmed(timeout=timeout)

    async def until_confirmed(self, *, timeout: timedelta) -> None:
        """Wait until everything that was sent is receipted. Raises NotInTime, or RuntimeError for a dead frame."""
        told = lambda: f"{len(self._unconfirmed)} frames unconfirmed"  # noqa: E731
        await until(lambda: not self._unconfirmed or bool(self._refused), self._news, timeout, told)
        if self._refused:
            raise RuntimeError(f"a frame was put aside: {self._refused}")

    async def _publish_each(self, frames: Iterator[OutgoingFrame]) -> None:
        for frame in frames:
            await self._bus.publish(
                subject_of(frame.receiver, frame.partition),
                frame.payload,
                headers={REPLY_HEADER: self._reply_to},
                msg_id=str(frame.id),
                timeout=timedelta(seconds=30),
            )

    async def _on_receipts(self, payload: bytes) -> None:
        for receipt in link_pb2.Receipts.FromString(payload).receipts:
            if receipt.verdict != link_pb2.FRAME_VERDICT_APPLIED:
                self._refused = receipt.reason
            self._unconfirmed.pop(UUID(bytes=receipt.frame_id), None)
        self._news.set()


async def until(is_so: Callable[[], bool], news: asyncio.Event, timeout: timedelta, told: Callable[[], str]) -> None:
    """Wait until `is_so`, looking whenever there is news; `told` says how far it came. Raises NotInTime."""
    try:
        async with asyncio.timeout(timeout.total_seconds()):
            while not is_so():
                news.clear()
                await news.wait()
    except TimeoutError:
        raise NotInTime(f"after {timeout.total_seconds():.0f} s: {told()}") from None
