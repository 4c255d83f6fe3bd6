"""The digest service without its links: what comes in is applied by hand, what goes out is read from the outbox."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from carillon.digest.v1 import digest_pb2 as pb
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2

from libs.ids import new_id
from libs.links.frames import decoded
from libs.links.receiver import Applied, IncomingFrame
from libs.links.sender import Sender
from libs.postgres import Database
from libs.rpc_context import Deadline, Principal, acting
from libs.settings import LinkSettings
from libs.wire import to_duration, to_timestamp
from services.digest import (
    store_catalog,
    store_expansion,
    store_formatting,
    store_rendering,
    store_stories,
    store_subscribers,
    store_traces,
    store_views,
    store_windows,
)
from services.digest.boundaries import Boundaries
from services.digest.loops import Alarm, Closing
from services.digest.loops_aside import Aside
from services.digest.loops_formatting import Formatter
from services.digest.loops_press import Press
from services.digest.rpc import DigestRpc
from services.digest.settings import DigestSettings
from services.digest.stream import Inlet, Post, Timers
from tests.support.fixtures import OpenDatabase
from tests.support.schemas import create_tables

START = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
"""A Monday noon, in winter everywhere north."""

SHARDS = 4


class HandClock:
    """Business time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.at = START

    def now(self) -> datetime:
        """The time as set."""
        return self.at

    async def wait_until(self, at: datetime | None, wake: object) -> None:
        """Not needed here."""
        raise NotImplementedError


class _NoBroker:
    async def publish(self, subject: str, payload: bytes, *, headers: Mapping[str, str], msg_id: str) -> object:
        raise NotImplementedError

    async def ensure_stream(self, name: str, subjects: Sequence[str]) -> bool:
        raise NotImplementedError

    async def subscribe(self, subject: str, callback: object) -> object:
        raise NotImplementedError


class _NoMessage:
    data = b""
    headers: Mapping[str, str] = {}
    num_delivered = 1

    async def ack(self) -> None: ...
    async def nak(self, delay: timedelta) -> None: ...


@dataclass(kw_only=True)
class Rig:
    """One replica of digest over a real Postgres."""

    db: Database
    clock: HandClock
    inlet: Inlet
    closing: Closing
    rpc: DigestRpc
    boundaries: Boundaries
    rung: asyncio.Event
    """Set when the closing loops are woken."""
    sequence: int = 0
    tenant: str = "acme"
    sent_ids: list[UUID] = field(default_factory=list)

    async def apply(self, *entries: link_pb2.Entry) -> Applied:
        """Apply one frame with these entries, as the receiver would."""
        frame_id = new_id()
        frame = link_pb2.Frame(id=frame_id.bytes, sender="intake", receiver="digest", entries=entries)
        async with self.db.transaction() as tx:
            incoming = IncomingFrame(
                id=frame_id, frame=frame, message=_NoMessage(), has_traces=any(one.trace for one in entries)
            )
            return await self.inlet.apply(tx, [incoming])

    async def result(self, entry: link_pb2.Entry) -> link_pb2.EntryResult:
        """Apply one entry and return what came of it."""
        applied = await self.apply(entry)
        ((result,),) = applied.results.values()
        return result

    def notification(
        self,
        *subscribers: str,
        topics: Sequence[str] = (),
        type: str = "flight.delayed",  # noqa: A002 - the contract's word.
        entity: str = "",
        payload: Mapping[str, Any] | None = None,
        at: datetime | None = None,
        expires: datetime | None = None,
        one_id: UUID | None = None,
        sequence: int | None = None,
        priority: timer_pb2.Priority.ValueType = timer_pb2.PRIORITY_UNSPECIFIED,
        **origin: Any,
    ) -> link_pb2.Entry:
        """An entry that tells something; without a sequence it gets the next one."""
        self.sequence += 1
        return link_pb2.Entry(
            tenant=self.tenant,
            sequence=self.sequence if sequence is None else sequence,
            notification=link_pb2.Notification(
                id=(one_id or new_id()).bytes,
                content=timer_pb2.NotificationContent(
                    type=type,
                    subscribers=subscribers,
                    topics=topics,
                    payload=json.dumps(payload or {}),
                    priority=priority,
                ),
                entity=entity,
                occur_time=to_timestamp(at or self.clock.at),
                expire_time=to_timestamp(expires) if expires else None,
                **origin,
            ),
        )

    def cancel(self, entity: str, *, sequence: int | None = None, **selector: Any) -> link_pb2.Entry:
        """An entry that cancels; without a sequence it gets the next one."""
        self.sequence += 1
        return link_pb2.Entry(
            tenant=self.tenant,
            sequence=self.sequence if sequence is None else sequence,
            cancel_items=link_pb2.CancelItems(entity=entity, **selector),
        )

    def trigger(self, batch: str, end: datetime) -> link_pb2.Entry:
        """An entry that triggers a batch."""
        return link_pb2.Entry(
            tenant=self.tenant, trigger_batch=link_pb2.TriggerBatch(batch=batch, window_end_time=to_timestamp(end))
        )

    async def due(self) -> int:
        """Let the scheduler fire every timer that was asked for and is due; returns how many there were."""
        closes = [
            link_pb2.Entry(tenant=entry.tenant, close_window=entry.schedule_timer.target.close_window)
            for entry in await self.outgoing("scheduler")
            if entry.schedule_timer.due_time.ToDatetime(tzinfo=UTC) <= self.clock.at
        ]
        if closes:
            await self.apply(*closes)
        return len(closes)

    async def close(self) -> int:
        """Close everything that is closing; returns how many windows that were."""
        total = 0
        while closed := await self.closing.close_once():
            total += closed
        return total

    async def outgoing(self, receiver: str) -> list[link_pb2.Entry]:
        """Everything sent to a receiver so far, oldest first."""
        async with self.db.read() as tx:
            cursor = await tx.raw.execute(
                "SELECT payload FROM outbox WHERE receiver = %s ORDER BY frame_id", (receiver,)
            )
            frames = [decoded(row[0]) for row in await cursor.fetchall()]
        return [entry for frame in frames for entry in frame.entries]

    async def deliveries(self) -> list[link_pb2.Delivery]:
        """Every message handed over so far, oldest first."""
        return [entry.delivery for entry in await self.outgoing("dispatcher")]

    async def items(self) -> list[tuple[str, str, int, str]]:
        """Every item as (subscriber, choice, state, reason)."""
        async with self.db.read() as tx:
            cursor = await tx.raw.execute(
                "SELECT subscriber, choice, state, reason FROM item ORDER BY subscriber, choice, notification_id"
            )
            return [tuple(row) for row in await cursor.fetchall()]

    async def call(self, method: str, request: Any = None, /, **fields: Any) -> Any:
        """Call an RPC as the rig's tenant."""
        handler = getattr(self.rpc, method)
        request = request or getattr(pb, f"{method}Request")(**fields)
        with acting(Principal(tenant=self.tenant, subject="test"), deadline=Deadline.after(timedelta(seconds=30))):
            return await handler(request, None)

    async def windows(self, *states: int) -> list[pb.Window]:
        """ListWindows, open ones unless said otherwise."""
        answer = await self.call("ListWindows", states=states or (pb.WINDOW_STATE_OPEN,))
        return list(answer.windows)

    async def ledger(self) -> dict[tuple[str, str], int]:
        """GetLedger's items by state and reason; asserts that nothing is unaccounted for."""
        answer = await self.call("GetLedger")
        assert answer.unaccounted == 0
        return {(pb.ItemState.Name(one.state)[11:].lower(), one.suppressed_reason): one.items for one in answer.items}

    # Catalog, with what most tests want as defaults

    async def put_type(self, one_id: str = "flight.delayed", **fields: Any) -> None:
        """Store a type."""
        fields = {"id": one_id, "name": one_id.replace(".", " ").capitalize(), **fields}
        await self.call("PutNotificationType", notification_type=pb.NotificationType(**fields))

    async def put_subscriber(self, one_id: str = "ann", zone: str = "UTC", **fields: Any) -> None:
        """Store a subscriber, with an email address unless told otherwise."""
        fields = {"id": one_id, "zone": zone, "email": f"{one_id}@example.com", **fields}
        await self.call("PutSubscribers", subscribers=[pb.Subscriber(**fields)])

    async def put_daily(self, one_id: str = "daily", cron: str = "0 8 * * *", zone: str = "") -> None:
        """Store an aligned cadence, 08:00 unless told otherwise."""
        aligned = pb.AlignedCadence(cron=cron, zone=zone)
        await self.call("PutCadence", cadence=pb.Cadence(id=one_id, name=one_id.capitalize(), aligned=aligned))

    async def put_external(self, one_id: str = "rebooking", batch: str = "rebooking") -> None:
        """Store an external cadence."""
        await self.call("PutCadence", cadence=pb.Cadence(id=one_id, external=pb.ExternalCadence(batch=batch)))

    async def put_rolling(
        self,
        one_id: str = "rolling",
        *,
        duration: timedelta,
        extension: timedelta | None = None,
        cap: timedelta | None = None,
        maximum_items: int = 0,
        is_leading: bool = False,
    ) -> None:
        """Store a rolling cadence."""
        rolling = pb.RollingCadence(
            duration=to_duration(duration),
            extension=None if extension is None else to_duration(extension),
            cap=None if cap is None else to_duration(cap),
            maximum_items=maximum_items,
            is_leading=is_leading,
        )
        await self.call("PutCadence", cadence=pb.Cadence(id=one_id, rolling=rolling))

    async def subscribe(
        self,
        subscriber: str,
        *cadences: str,
        type: str = "flight.delayed",  # noqa: A002 - the contract's word.
        topic: str = "",
        filter: str = "",  # noqa: A002 - the contract's word.
        one_id: str = "",
        **choice: Any,
    ) -> None:
        """Store a subscription with one choice per cadence."""
        one = pb.Subscription(
            id=one_id or f"{subscriber}/{type}/{topic}",
            subscriber=subscriber,
            type=type,
            topic=topic,
            filter=filter,
            choices=[pb.Choice(cadence=cadence, **choice) for cadence in cadences],
        )
        await self.call("PutSubscriptions", subscriptions=[one])


def migrate(url: str) -> None:
    """Bring the schema up."""
    create_tables(url, "digest")


@asynccontextmanager
async def replica(
    postgres_url: str, open_database: OpenDatabase, *, clock: HandClock | None = None, **settings: Any
) -> AsyncIterator[Rig]:
    """A replica of digest; several of them share the database if they share the fixtures."""
    db = await open_database("digest")
    clock = clock or HandClock()
    sender = Sender(
        db=db,
        bus=_NoBroker(),
        service="digest",
        replica="test",
        receivers=("scheduler", "dispatcher"),
        settings=LinkSettings(),
    )
    boundaries, alarm = Boundaries(), Alarm()
    digest_settings = DigestSettings(**settings)
    timers = Timers(sender=sender, windows=store_windows, shards=SHARDS)
    press_of_it = Press(time_limit=digest_settings.render_timeout, memory_bytes=digest_settings.render_memory_bytes)
    formatter_of_it = Formatter(settings=digest_settings)
    aside_of_it = Aside(
        db=db, claims=store_rendering, store=store_formatting, formatter=formatter_of_it, ring=alarm.ring
    )
    async with press_of_it as press, formatter_of_it as formatter, aside_of_it as aside:
        yield Rig(
            db=db,
            clock=clock,
            boundaries=boundaries,
            rung=alarm.event(),
            inlet=Inlet(
                expansion=store_expansion,
                windows=store_windows,
                timers=timers,
                boundaries=boundaries,
                clock=clock,
                ring=alarm.ring,
            ),
            closing=Closing(
                db=db,
                claims=aside,
                store=store_rendering,
                traced=store_traces,
                press=press,
                post=Post(sender=sender, windows=store_windows),
                timers=timers,
                clock=clock,
                wake=alarm.event(),
                settings=digest_settings,
            ),
            rpc=DigestRpc(
                db=db,
                catalog=store_catalog,
                subscribers=store_subscribers,
                formatting=store_formatting,
                formatter=formatter,
                moving=store_windows,
                views=store_views,
                stories=store_stories,
                previews=store_rendering,
                timers=timers,
                press=press,
                boundaries=boundaries,
                clock=clock,
                ring=alarm.ring,
            ),
        )
