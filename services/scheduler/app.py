"""Wires the scheduler: the only place that constructs."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress

from libs.errors import FailedPrecondition, Unavailable
from libs.links.frames import all_subjects, stream_name, subject_of
from libs.links.receiver import ACK_WAIT, MAX_ACK_PENDING, Message, Settlement
from libs.service import Runtime, Service
from services.scheduler import rpc, stream, stream_fired
from services.scheduler.loops_asking import Asker
from services.scheduler.loops_engine import Engine
from services.scheduler.loops_events import EventPublisher
from services.scheduler.loops_history import History
from services.scheduler.loops_leases import Leases
from services.scheduler.settings import Settings
from services.scheduler.store import TurnStore
from services.scheduler.store_events import EventStore
from services.scheduler.store_history import HistoryStore
from services.scheduler.store_leases import LeaseStore
from services.scheduler.store_queries import QueryStore

RECEIVERS = ("digest", "intake", "dispatcher")
"""Where fired timers send to."""

_NUDGES = "carillon.scheduler.nudge"


class _Codec:
    """Frames in and out."""

    commands_of = staticmethod(stream.commands_of)
    results_of = staticmethod(stream.results_of)
    encode = staticmethod(stream_fired.encode)


async def build(runtime: Runtime, settings: Settings) -> Service:
    """The scheduler of one replica."""
    own = settings.scheduler
    lease_store = LeaseStore(runtime.db, replica=runtime.replica, ttl=own.lease_ttl)
    await _check_shard_count(lease_store, runtime.shards)
    settlement = Settlement(db=runtime.db, bus=runtime.bus, service=runtime.service, settings=runtime.links)
    events = EventPublisher(db=runtime.db, bus=runtime.bus, store=EventStore(), settings=own, links=runtime.links)
    asker = Asker(settings=own)
    engine = Engine(
        db=runtime.db,
        store=TurnStore(replica=runtime.replica),
        codec=_Codec(),
        settlement=settlement,
        sender=runtime.sender,
        events=events,
        asker=asker,
        clock=runtime.clock,
        settings=own,
        shard_count=runtime.shards,
        receivers=RECEIVERS,
    )
    asker.on_answer = engine.answer

    history = History(
        store=HistoryStore(runtime.db), holder=engine, clock=runtime.clock, retention=own.history_retention
    )

    def consume(shard: int) -> AsyncGenerator[Sequence[Message], None]:
        return runtime.bus.consume(
            stream_name(runtime.service),
            durable=f"{runtime.service}-{shard}",
            filter_subject=subject_of(runtime.service, shard),
            batch=runtime.links.fetch_frames,
            ack_wait=ACK_WAIT,
            max_ack_pending=MAX_ACK_PENDING,
        )

    async def nudge() -> None:
        await runtime.bus.send(_NUDGES, b"")

    leases = Leases(
        engine=engine,
        store=lease_store,
        replica=runtime.replica,
        shard_count=runtime.shards,
        ttl=own.lease_ttl,
        tombstones_after=runtime.links.tombstone_retention,
        consume=consume,
        nudge=nudge,
    )

    async def on_nudge(_payload: bytes) -> None:
        leases.wake.set()

    await runtime.bus.subscribe(_NUDGES, on_nudge)
    with suppress(Unavailable):  # Declared all the same; the bus makes it once NATS is there.
        await runtime.bus.ensure_stream(stream_name(runtime.service), [all_subjects(runtime.service)])
    return Service(
        servicers=[
            rpc.servicer(
                store=QueryStore(runtime.db),
                clock=runtime.clock,
                condition_services=frozenset(own.condition_services),
            )
        ],
        loops={
            "link housekeeping": settlement.run_housekeeping,
            "events": events.run,
            "asking": asker.run,
            "engine": engine.run,
            "history": history.run,
            "housekeeping": leases.run_housekeeping,
            # Last, so that it closes first: the shards are given back while the engine still runs.
            "leases": leases.run,
        },
    )


async def _check_shard_count(store: LeaseStore, count: int) -> None:
    there_are = await store.ensure_shards(count)
    if there_are != count:
        raise FailedPrecondition(
            f"CARILLON_SHARDS is {count}, but this database was installed with {there_are}; it is fixed at install",
            reason="SHARD_COUNT_CHANGED",
        )
