"""libs.jetstream against a real NATS: what comes back by itself, and what publishers and consumers see of it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from libs.errors import FailedPrecondition, Unavailable
from libs.jetstream import Bus, Message, PublishFailed
from local.servers import NatsServer
from tests.support.fixtures import OpenBus

SOON = 10.0


class Consumed:
    """Takes everything from a consumer, acknowledges it, and tells when something has come."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []
        self.list_sizes: list[int] = []
        self._came = asyncio.Condition()

    async def take(self, lists: AsyncIterator[list[Message]]) -> None:
        async for messages in lists:
            for message in messages:
                await message.ack()
            async with self._came:
                self.payloads += [message.data for message in messages]
                self.list_sizes.append(len(messages))
                self._came.notify_all()

    async def until(self, payload: bytes) -> None:
        async with asyncio.timeout(SOON), self._came:
            await self._came.wait_for(lambda: payload in self.payloads)

    async def until_count(self, count: int) -> None:
        async with asyncio.timeout(SOON), self._came:
            await self._came.wait_for(lambda: len(self.payloads) >= count)


def _lists(
    bus: Bus, *, durable: str = "bells", batch: int = 64, ack_wait_s: float = 30
) -> AsyncIterator[list[Message]]:
    return bus.consume(
        "BELLS",
        durable=durable,
        filter_subject="bells.>",
        batch=batch,
        ack_wait=timedelta(seconds=ack_wait_s),
        max_ack_pending=1000,
    )


@asynccontextmanager
async def consuming(bus: Bus, *, batch: int = 64, into: Consumed | None = None) -> AsyncIterator[Consumed]:
    """Consume in the background for the length of a block."""
    consumed = into or Consumed()
    task = asyncio.create_task(consumed.take(_lists(bus, batch=batch)))
    try:
        yield consumed
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def _publish_somehow(bus: Bus, subject: str, payload: bytes) -> None:
    """As the sweeper does: again and again until it is stored."""
    async with asyncio.timeout(SOON):
        while True:
            try:
                await bus.publish(subject, payload)
                return
            except PublishFailed:
                await asyncio.sleep(0.01)


async def test_a_published_message_arrives_with_its_headers(bus: Bus) -> None:
    """Payload, headers and the number of the delivery reach the consumer."""
    await bus.ensure_stream("BELLS", ["bells.>"])
    published = await bus.publish("bells.c", b"ding", headers={"traceparent": "00-1-2-01"}, msg_id="one")
    assert (published.stream, published.sequence, published.is_duplicate) == ("BELLS", 1, False)
    [message] = await anext(_lists(bus))
    assert (message.subject, message.data, message.num_delivered) == ("bells.c", b"ding", 1)
    assert message.headers["traceparent"] == "00-1-2-01"


async def test_a_message_id_is_stored_once(bus: Bus) -> None:
    """The second publication is acknowledged as a duplicate."""
    await bus.ensure_stream("BELLS", ["bells.>"])
    await bus.publish("bells.c", b"ding", msg_id="one")
    assert (await bus.publish("bells.c", b"ding", msg_id="one")).is_duplicate


async def test_a_stream_is_news_once(open_bus: OpenBus) -> None:
    """Who ensures a stream hears whether it is another one than before."""
    one, other = await open_bus("one"), await open_bus("other")
    assert await one.ensure_stream("BELLS", ["bells.>"])
    assert not await one.ensure_stream("BELLS", ["bells.>"])
    assert await other.ensure_stream("BELLS", ["bells.>"])
    assert not await other.ensure_stream("BELLS", ["bells.>"])


async def test_a_stream_takes_on_a_new_configuration(bus: Bus) -> None:
    """Subjects and limits change in place; what is stored stays, and it is not news."""
    await bus.ensure_stream("BELLS", ["bells.>"])
    await bus.publish("bells.c", b"ding")
    assert not await bus.ensure_stream("BELLS", ["bells.>", "gongs.>"], max_age=timedelta(minutes=1))
    assert (await bus.publish("gongs.c", b"dong")).sequence == 2


async def test_a_stream_that_cannot_be_changed_is_refused(bus: Bus) -> None:
    """A work queue does not become anything else."""
    await bus.ensure_stream("BELLS", ["bells.>"])
    with pytest.raises(FailedPrecondition, match="retention"):
        await bus.ensure_stream("BELLS", ["bells.>"], is_work_queue=False)


async def test_publishing_without_a_stream_fails_at_once(bus: Bus) -> None:
    """It does not wait for its timeout."""
    async with asyncio.timeout(1):
        with pytest.raises(PublishFailed) as caught:
            await bus.publish("bells.c", b"ding", timeout=timedelta(seconds=30))
    assert caught.value.reason == "NO_STREAM"


async def test_a_full_stream_refuses(bus: Bus) -> None:
    """INV-9: it never drops what it has for what is new."""
    await bus.ensure_stream("BELLS", ["bells.>"], max_bytes=10_000)
    for _ in range(9):
        await bus.publish("bells.c", bytes(1000))
    with pytest.raises(PublishFailed, match="maximum bytes"):
        await bus.publish("bells.c", bytes(1000))


async def test_too_large_a_message_is_refused(bus: Bus) -> None:
    """One above the server's limit fails here, and the connection stays."""
    await bus.ensure_stream("BELLS", ["bells.>"])
    with pytest.raises(PublishFailed):
        await bus.publish("bells.c", bytes(2 << 20))
    await bus.publish("bells.c", b"ding")


async def test_lists_hold_what_has_come_up_to_the_batch(bus: Bus) -> None:
    """Everything arrives once, in order, in lists no longer than asked for."""
    await bus.ensure_stream("BELLS", ["bells.>"])
    payloads = [b"%d" % n for n in range(500)]
    for payload in payloads:
        await bus.publish("bells.c", payload)
    async with consuming(bus, batch=50) as consumed:
        await consumed.until_count(500)
    assert consumed.payloads == payloads
    assert max(consumed.list_sizes) == 50
    assert len(consumed.list_sizes) < 50


async def test_consumers_of_one_name_share(open_bus: OpenBus) -> None:
    """Two processes get each message once between them."""
    buses = [await open_bus("one"), await open_bus("other")]
    await buses[0].ensure_stream("BELLS", ["bells.>"])
    async with consuming(buses[0], batch=5) as consumed, consuming(buses[1], batch=5, into=consumed):
        for n in range(200):
            await buses[0].publish("bells.c", b"%d" % n)
        await consumed.until_count(200)
    assert sorted(consumed.payloads) == sorted(b"%d" % n for n in range(200))


async def test_a_nak_brings_it_again_after_the_delay(bus: Bus) -> None:
    """The second delivery says that it is the second."""
    await bus.ensure_stream("BELLS", ["bells.>"])
    await bus.publish("bells.c", b"ding")
    lists = _lists(bus)
    [message] = await anext(lists)
    before = asyncio.get_running_loop().time()
    await message.nak(timedelta(milliseconds=200))
    [again] = await anext(lists)
    assert asyncio.get_running_loop().time() - before > 0.15
    assert again.num_delivered == 2


async def test_a_term_ends_a_message(bus: Bus) -> None:
    """It does not come again, and the next one does."""
    await bus.ensure_stream("BELLS", ["bells.>"])
    lists = _lists(bus, ack_wait_s=0.2)
    await bus.publish("bells.c", b"bad")
    [bad] = await anext(lists)
    await bad.term()
    await asyncio.sleep(0.4)
    await bus.publish("bells.c", b"good")
    [good] = await anext(lists)
    assert good.data == b"good"


async def test_progress_postpones_redelivery(bus: Bus) -> None:
    """A message said to be in progress does not come again when its ack_wait is over."""
    await bus.ensure_stream("BELLS", ["bells.>"])
    lists = _lists(bus, ack_wait_s=0.3)
    await bus.publish("bells.c", b"slow")
    [slow] = await anext(lists)
    for _ in range(4):
        await asyncio.sleep(0.15)
        await slow.in_progress()
    await slow.ack()
    await bus.publish("bells.c", b"next")
    [following] = await anext(lists)
    assert following.data == b"next"


async def test_a_closed_consumer_hands_back_what_it_held(open_bus: OpenBus) -> None:
    """What was fetched and not yet handed out goes to others at once, not after ack_wait."""
    bus, other = await open_bus("one"), await open_bus("other")
    await bus.ensure_stream("BELLS", ["bells.>"])
    for n in range(3):
        await bus.publish("bells.c", b"%d" % n)
    lists = _lists(bus, batch=1)
    [first] = await anext(lists)
    assert first.data == b"0"
    await first.ack()
    await lists.aclose()  # type: ignore[attr-defined]
    async with consuming(other) as consumed:
        await consumed.until(b"1")
        await consumed.until(b"2")


async def test_plain_messages_reach_subscribers_and_groups(bus: Bus) -> None:
    """Each subscriber gets a message, of a group only one; a callback that raises does not end its subscription."""
    got: list[str] = []
    came = asyncio.Event()

    async def one(payload: bytes) -> None:
        got.append("one")
        came.set()
        raise ValueError(payload)

    async def member(payload: bytes) -> None:
        got.append("member")

    await bus.subscribe("bells.plain", one)
    await bus.subscribe("bells.plain", member, queue="group")
    end = await bus.subscribe("bells.plain", member, queue="group")
    for _ in range(2):
        came.clear()
        await bus.send("bells.plain", b"ding")
        async with asyncio.timeout(SOON):
            await came.wait()
    await end()
    assert got.count("one") == 2
    assert got.count("member") == 2


@pytest.mark.parametrize("accident", ["restart", "wipe"])
async def test_everything_goes_on_after_the_broker(open_bus: OpenBus, private_nats: NatsServer, accident: str) -> None:
    """A broker that restarts, or comes back without its disk, has streams, consumers and subscriptions again."""
    bus, publisher = await open_bus("bus", private_nats.url), await open_bus("publisher", private_nats.url)
    receipts: asyncio.Queue[bytes] = asyncio.Queue()
    hooked: asyncio.Queue[str] = asyncio.Queue()
    await bus.subscribe("receipts", receipts.put)
    await publisher.ensure_stream("BELLS", ["bells.>"])
    publisher.on_stream_created(hooked.put)
    await bus.ensure_stream("BELLS", ["bells.>"])
    async with consuming(bus) as consumed:
        for n in range(3):
            await _publish_somehow(publisher, "bells.c", b"before %d" % n)
            await consumed.until(b"before %d" % n)
            await asyncio.to_thread(getattr(private_nats, accident))
            await _publish_somehow(publisher, "bells.c", b"after %d" % n)
            await consumed.until(b"after %d" % n)
            async with asyncio.timeout(SOON):
                await publisher.wait_connected()
                await publisher.send("receipts", b"receipt")
                assert await receipts.get() == b"receipt"
                if accident == "wipe":
                    assert await hooked.get() == "BELLS"
            assert await publisher.ensure_stream("BELLS", ["bells.>"]) is (accident == "wipe")


async def test_a_consumer_survives_the_deletion_of_stream_and_consumer(open_bus: OpenBus) -> None:
    """Somebody deletes them while the broker runs on: both are made again."""
    bus, other = await open_bus("bus"), await open_bus("other")
    await bus.ensure_stream("BELLS", ["bells.>"])
    async with consuming(bus) as consumed:
        for n, delete in enumerate(("consumer", "stream")):
            await _publish_somehow(bus, "bells.c", b"before %d" % n)
            await consumed.until(b"before %d" % n)
            jetstream = other._jetstream()
            deleting = (
                jetstream.delete_stream("BELLS") if delete == "stream" else jetstream.delete_consumer("BELLS", "bells")
            )
            await deleting
            await _publish_somehow(bus, "bells.c", b"after %d" % n)
            await consumed.until(b"after %d" % n)


async def test_publishing_fails_fast_without_a_broker(open_bus: OpenBus, private_nats: NatsServer) -> None:
    """Neither what is under way when the broker dies nor what comes after waits for its timeout."""
    bus = await open_bus("bus", private_nats.url)
    await bus.ensure_stream("BELLS", ["bells.>"])
    async with asyncio.timeout(5):
        private_nats.kill()
        for _ in range(2):
            with pytest.raises(PublishFailed):
                await bus.publish("bells.c", b"ding", timeout=timedelta(seconds=60))
        assert not bus.is_connected
        await bus.send("receipts", b"dropped")
        with pytest.raises(Unavailable):
            await bus.ensure_stream("BELLS", ["bells.>"])


async def test_a_bus_starts_before_its_broker(open_bus: OpenBus, private_nats: NatsServer) -> None:
    """What is declared while NATS is away is there when it comes."""
    private_nats.stop()
    bus = await open_bus("bus", private_nats.url, connect_timeout=timedelta(seconds=0.1))
    assert not bus.is_connected
    got: asyncio.Queue[bytes] = asyncio.Queue()
    await bus.subscribe("receipts", got.put)
    with pytest.raises(Unavailable):
        await bus.ensure_stream("BELLS", ["bells.>"])
    async with consuming(bus) as consumed:
        await asyncio.to_thread(private_nats.start)
        await bus.wait_connected(timedelta(seconds=SOON))
        await _publish_somehow(bus, "bells.c", b"ding")
        await consumed.until(b"ding")
        await bus.send("receipts", b"receipt")
        async with asyncio.timeout(SOON):
            assert await got.get() == b"receipt"


async def test_idle_consumers_are_cheap(open_bus: OpenBus) -> None:
    """A process may have a consumer per shard: 64 of them do nothing while nothing comes."""

    bus = await open_bus("bus")
    await bus.ensure_stream("BELLS", ["bells.>"])

    async def idle(shard: int) -> None:
        async for _ in bus.consume(
            "BELLS",
            durable=f"shard-{shard}",
            filter_subject=f"bells.{shard}",
            batch=64,
            ack_wait=timedelta(seconds=30),
            max_ack_pending=1000,
        ):
            raise AssertionError("Nothing was sent.")

    tasks = [asyncio.create_task(idle(shard)) for shard in range(64)]
    await asyncio.sleep(1)
    before = time.process_time()
    await asyncio.sleep(1)
    assert time.process_time() - before < 0.05
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
