"""What links, Postgres and NATS tell of themselves: each metric moves when the thing happens."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic

import pytest
from carillon.link.v1 import link_pb2
from prometheus_client import REGISTRY

from libs.errors import FailedPrecondition, Unavailable
from libs.jetstream import Bus
from libs.links import metrics
from libs.links.frames import OutgoingFrame
from libs.postgres import Database
from libs.telemetry import measured
from local.servers import NatsServer
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.link_process import RECEIVER, SENDER, commit_numbers
from tests.support.link_world import LinkWorld, make_world, until
from tests.support.metrics import Since, sample

SECOND = timedelta(seconds=1)
DELAY = "carillon_link_delay_seconds"


@pytest.fixture
async def world(open_database: OpenDatabase, postgres_url: str, nats_url: str, tmp_path: Path) -> LinkWorld:
    """Both ends, not running."""
    return await make_world(open_database, postgres_url, nats_url, tmp_path)


class InHand:
    """A message as a receiver gets it, without a stream."""

    num_delivered = 1

    def __init__(self, frame: OutgoingFrame, *, sender: str = SENDER, made_at: datetime | None = None) -> None:
        content = link_pb2.Frame.FromString(frame.payload)
        content.sender = sender
        if made_at is not None:
            milliseconds = int(made_at.timestamp() * 1000)
            content.id = milliseconds.to_bytes(6) + content.id[6:]
        self.data = content.SerializeToString()
        self.headers: dict[str, str] = {}

    async def ack(self) -> None: ...
    async def nak(self, delay: timedelta) -> None: ...


# Links


async def test_what_comes_is_counted_by_who_sent_it(world: LinkWorld, bus: Bus) -> None:
    """Frames and entries; and the same once more, which has no effects."""
    metrics.know(receivers=(), senders=[SENDER])
    since = Since()
    (frame,) = await commit_numbers(world.sender_db, world.sender(bus), [1, 2, 3])
    receiver = world.receiver(bus)
    await receiver.handle([InHand(frame)])
    await receiver.handle([InHand(frame)])
    assert since("carillon_link_applied_frames_total", sender=SENDER) == 1
    assert since("carillon_link_applied_entries_total", sender=SENDER) == 3
    assert since("carillon_link_duplicate_frames_total", sender=SENDER) == 1


async def test_a_senders_name_is_no_label_unless_it_is_known(world: LinkWorld, bus: Bus) -> None:
    """It comes with the frame, so it may be anything."""
    since = Since()
    (frame,) = await commit_numbers(world.sender_db, world.sender(bus), [1])
    await world.receiver(bus).handle([InHand(frame, sender="whoever this may be")])
    assert since("carillon_link_applied_frames_total", sender="other") == 1
    assert 'sender="whoever' not in str(list(metrics.APPLIED_FRAMES.collect()))


async def test_a_frame_tells_how_long_it_was_on_its_way(world: LinkWorld, bus: Bus) -> None:
    """From its id to the database's clock; what comes again is not counted again."""
    metrics.know(receivers=(), senders=[SENDER])
    since = Since()
    (frame,) = await commit_numbers(world.sender_db, world.sender(bus), [1])
    late = InHand(frame, made_at=datetime.now(UTC) - 40 * SECOND)
    receiver = world.receiver(bus)
    await receiver.handle([late])
    await receiver.handle([late])
    assert since(f"{DELAY}_count", sender=SENDER) == 1
    assert 39 < since(f"{DELAY}_sum", sender=SENDER) < 60


async def test_a_clock_that_is_ahead_makes_no_negative_delay(world: LinkWorld, bus: Bus) -> None:
    """A histogram that goes down would be taken for a restart."""
    metrics.know(receivers=(), senders=[SENDER])
    since = Since()
    (frame,) = await commit_numbers(world.sender_db, world.sender(bus), [1])
    early = InHand(frame, made_at=datetime.now(UTC) + 40 * SECOND)
    await world.receiver(bus).handle([early])
    assert since(f"{DELAY}_count", sender=SENDER) == 1
    assert since(f"{DELAY}_sum", sender=SENDER) == 0


async def test_the_backlog_of_a_link_is_told_until_there_is_none(world: LinkWorld, bus: Bus) -> None:
    """Also of the one to ourselves, which is there only when something is redriven."""
    sender = world.sender(bus)
    await commit_numbers(world.sender_db, sender, [1])
    async with world.sender_db.transaction() as tx:
        await tx.raw.execute(
            "INSERT INTO outbox SELECT (jsonb_populate_record(outbox, jsonb_build_object('receiver', %s::text,"
            " 'frame_id', uuidv7()))).* FROM outbox",
            (SENDER,),
        )
    await sender.measure_once()
    for receiver in (RECEIVER, SENDER):
        assert sample("carillon_link_unconfirmed_frames", receiver=receiver) == 1
        assert sample("carillon_link_oldest_unconfirmed_seconds", receiver=receiver) > 0
    async with world.sender_db.transaction() as tx:
        await tx.raw.execute("DELETE FROM outbox")
    await sender.measure_once()
    for receiver in (RECEIVER, SENDER):
        assert sample("carillon_link_unconfirmed_frames", receiver=receiver) == 0
        assert sample("carillon_link_oldest_unconfirmed_seconds", receiver=receiver) == 0


async def test_a_backlog_that_cannot_be_read_is_missing(
    world: LinkWorld, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would say that all is well while Postgres is away; once it is back, so is the gauge."""
    gauge, sender = "carillon_link_oldest_unconfirmed_seconds", world.sender(bus)
    await sender.measure_once()
    assert REGISTRY.get_sample_value(gauge, {"receiver": RECEIVER}) == 0
    monkeypatch.setattr(measured, "monotonic", lambda: monotonic() + measured.FRESH_S + 1)
    assert REGISTRY.get_sample_value(gauge, {"receiver": RECEIVER}) is None
    await sender.measure_once()
    assert REGISTRY.get_sample_value(gauge, {"receiver": RECEIVER}) == 0
    assert REGISTRY.get_sample_value("carillon_link_unconfirmed_frames", {"receiver": RECEIVER}) == 0


# Postgres


def connections(state: str) -> float:
    """Of the pool that was opened last."""
    return sample("carillon_postgres_pool_connections", state=state)


async def test_the_pool_tells_who_uses_it_and_who_waits(open_database: OpenDatabase) -> None:
    """Two connections, both in use, and a third transaction that waits, then gives up."""
    since = Since()
    db = await open_database("intake", pool_size=2, pool_timeout=SECOND)
    assert sample("carillon_postgres_pool_size") == 2
    assert (connections("in_use"), connections("idle")) == (0, 1)
    async with db.read(), db.read():
        assert (connections("in_use"), connections("idle")) == (2, 0)
        third = asyncio.create_task(_look(db))
        await until(_is_waited_for)
        with pytest.raises(Unavailable):
            await third
        assert sample("carillon_postgres_pool_waiting") == 0
    assert since("carillon_postgres_pool_timeouts_total") == 1
    assert since("carillon_postgres_transient_errors_total") == 1
    assert since("carillon_postgres_connections_opened_total") == 2
    assert (connections("in_use"), connections("idle")) == (0, 2)


async def test_who_is_cancelled_waits_no_more(open_database: OpenDatabase) -> None:
    """A gauge that only went up would be no use."""
    db = await open_database("intake", pool_size=1)
    async with db.read():
        second = asyncio.create_task(_look(db))
        await until(_is_waited_for)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert sample("carillon_postgres_pool_waiting") == 0


async def test_errors_of_the_statement_itself_are_not_transient(open_database: OpenDatabase) -> None:
    """Only what may be repeated counts."""
    since = Since()
    db = await open_database("intake")
    with pytest.raises(Exception, match="no_such_table"):
        async with db.read() as tx:
            await tx.raw.execute("SELECT * FROM no_such_table")
    assert since("carillon_postgres_transient_errors_total") == 0


async def _look(db: Database) -> None:
    async with db.read():
        pass


async def _is_waited_for() -> bool:
    return sample("carillon_postgres_pool_waiting") == 1


# NATS


async def test_a_lost_connection_and_the_next_one_are_told(private_nats: NatsServer, open_bus: OpenBus) -> None:
    """1 and 0 and 1; the first connection is no reconnect."""
    since = Since()
    url = private_nats.url
    bus = await open_bus("one", url)
    assert sample("carillon_nats_connected") == 1
    assert since("carillon_nats_reconnects_total") == 0
    private_nats.stop()
    await until(_is_disconnected)
    private_nats.start()
    await bus.wait_connected(20 * SECOND)
    assert sample("carillon_nats_connected") == 1
    assert since("carillon_nats_reconnects_total") == 1


async def test_a_stream_is_present_once_it_was_made_sure_of(private_nats: NatsServer, open_bus: OpenBus) -> None:
    """And not any more when nobody could look."""
    bus = await open_bus("one", private_nats.url)
    await bus.ensure_stream("BELLS", ["bells.>"])
    assert sample("carillon_jetstream_stream_present", stream="BELLS") == 1
    private_nats.stop()
    await until(_is_disconnected)
    with pytest.raises(Unavailable):
        await bus.ensure_stream("BELLS", ["bells.>"])
    assert sample("carillon_jetstream_stream_present", stream="BELLS") == 0
    private_nats.start()
    await bus.wait_connected(20 * SECOND)
    await bus.ensure_stream("BELLS", ["bells.>"])
    assert sample("carillon_jetstream_stream_present", stream="BELLS") == 1


async def test_a_stream_that_is_otherwise_than_declared_is_not_present(bus: Bus) -> None:
    """Somebody else made it, and it cannot become ours."""
    await bus.ensure_stream("BELLS", ["bells.>"])
    with pytest.raises(FailedPrecondition):
        await bus.ensure_stream("BELLS", ["bells.>"], is_work_queue=False)
    assert sample("carillon_jetstream_stream_present", stream="BELLS") == 0


async def _is_disconnected() -> bool:
    return sample("carillon_nats_connected") == 0
