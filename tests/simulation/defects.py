"""Bugs to plant, one at a time: each is a mistake that somebody could make, in a few lines.

with planted(DEFECTS["no epoch check"]):
    simulate(seed)
"""

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any
from unittest.mock import patch
from uuid import UUID

from libs.errors import Unavailable
from libs.links.frames import OutgoingFrame
from libs.links.receiver import Admission, IncomingFrame, Settlement, receipts_of
from libs.links.sender import Sender
from libs.recurrence import next_after
from services.scheduler import loops_leases
from services.scheduler.commands import Changes, Command, OrderTimers
from services.scheduler.ownership import trusted_until_s
from services.scheduler.recurrence import Recurrence
from services.scheduler.shard import Shard
from services.scheduler.store_leases import Grant
from services.scheduler.timer import Timer
from tests.simulation.commands import FIRST_STEPS
from tests.simulation.postgres import Session, Statement, Tx, UniqueViolation
from tests.simulation.stores import FakeLeaseStore, FakeTurnStore, write_changes

Defect = Callable[[], AbstractContextManager[Any]]


def no_epoch_check() -> AbstractContextManager[Any]:
    """INV-3: the fence locks the shards, and does not look whose they are."""

    async def fence(_: FakeTurnStore, tx: Tx, epochs: Mapping[int, int], *, longest_pause: timedelta) -> set[int]:
        def statement(session: Session) -> Any:
            session.idle_timeout = longest_pause
            for number in sorted(epochs):
                yield "shard", number

        await tx.run(statement)
        return set(epochs)

    return patch.object(FakeTurnStore, "fence", fence)


def ack_before_commit() -> AbstractContextManager[Any]:
    """INV-1: frames are acked and receipted when they have been admitted."""
    admit = Settlement.admit

    async def admit_and_settle(self: Settlement, tx: Any, frames: Sequence[IncomingFrame]) -> Admission:
        admission = await admit(self, tx, frames)
        fresh = [one for one in frames if one.id in admission.fresh]
        await self.settle(fresh, receipts_of(fresh, {}), fresh)
        return admission

    return patch.object(Settlement, "admit", admit_and_settle)


def watermark_apart() -> AbstractContextManager[Any]:
    """INV-2: the watermark is written a moment after what fired."""
    write = FakeTurnStore.write

    async def write_some(self: FakeTurnStore, tx: Tx, changes: Sequence[Changes], now: datetime) -> None:
        await write(self, tx, [replace(one, watermark=None) for one in changes], now)
        moved = [Changes(shard=one.shard, watermark=one.watermark) for one in changes if one.watermark]
        _afterwards(tx, moved)

    return patch.object(FakeTurnStore, "write", write_some)


def followers_apart() -> AbstractContextManager[Any]:
    """INV-2: follow-ups and next occurrences are written a moment after what they follow."""
    write = FakeTurnStore.write

    def is_follower(timer: Timer) -> bool:
        return timer.occurrence > 1 or (timer.step_of is not None and timer.step_of.step not in FIRST_STEPS)

    async def write_some(self: FakeTurnStore, tx: Tx, changes: Sequence[Changes], now: datetime) -> None:
        first = [
            replace(one, inserts={i: timer for i, timer in one.inserts.items() if not is_follower(timer)})
            for one in changes
        ]
        await write(self, tx, first, now)
        later = [{i: timer for i, timer in one.inserts.items() if is_follower(timer)} for one in changes]
        _afterwards(tx, [Changes(shard=one.shard, inserts=new) for one, new in zip(changes, later, strict=True) if new])

    return patch.object(FakeTurnStore, "write", write_some)


def _afterwards(tx: Tx, changes: Sequence[Changes]) -> None:
    def statement(session: Session) -> Any:
        for one in changes:
            is_new = one.watermark is None or one.watermark > session.get("shard", one.shard).watermark
            if is_new:
                yield from write_changes(session, one)

    if changes:
        _tasks.add(task := asyncio.create_task(_in_a_moment(tx, statement)))
        task.add_done_callback(_tasks.discard)


_tasks: set[asyncio.Task[None]] = set()


async def _in_a_moment(tx: Tx, statement: Statement) -> None:
    await asyncio.sleep(0.03)
    with suppress(Unavailable, UniqueViolation):
        other = tx.another()
        await other.run(statement)
        await other.commit()


def tombstones_ignored() -> AbstractContextManager[Any]:
    """INV-4: what arrives late does not look for the orders that came before it."""
    return patch.object(Shard, "_obedient", lambda _self, timer, *_: timer)


def next_from_now() -> AbstractContextManager[Any]:
    """INV-2: the next occurrence is the next one from now, whatever the policy."""

    def following(
        self: Recurrence, _schedule_id: UUID, nominal_at: datetime, now: datetime, **_: Any
    ) -> datetime | None:
        return next_after(self.rule, max(nominal_at, now))

    return patch.object(Recurrence, "following", following)


def page_gap() -> AbstractContextManager[Any]:
    """INV-2: after a page, everything counts as read."""
    add_page = Shard.add_page

    def add_page_and_all(self: Shard, timers: Sequence[Timer], limit: int) -> None:
        add_page(self, timers, limit)
        self.horizon = None

    return patch.object(Shard, "add_page", add_page_and_all)


def takeover_unread() -> AbstractContextManager[Any]:
    """INV-2: a new owner believes that its shard has no timers yet."""
    init = Shard.__init__

    def init_empty(self: Shard, **more: Any) -> None:
        init(self, **more)
        self.horizon = None

    return patch.object(Shard, "__init__", init_empty)


def lease_from_response() -> AbstractContextManager[Any]:
    """DESIGN §5: a lease is trusted from the moment at which its renewal was answered.

    Data is safe all the same: the epoch protects it. What breaks is that nobody trusts a lease that has ended.
    """

    def from_response(_began_s: float, ttl: timedelta) -> float:
        return trusted_until_s(asyncio.get_running_loop().time(), ttl)

    return patch.object(loops_leases, "trusted_until_s", from_response)


def lease_stolen() -> AbstractContextManager[Any]:
    """DESIGN §5: who wants a shard takes it, lease or no lease. The epoch protects the data."""
    take = FakeLeaseStore.take

    async def steal(self: FakeLeaseStore, shards: Collection[int]) -> list[Grant]:
        def statement(session: Session) -> Any:
            for number in sorted(shards):
                row = session.get("shard", number)
                yield from session.put("shard", number, replace(row, holder=None))

        async with self._db.transaction() as tx:
            await tx.run(statement)
        return await take(self, shards)

    return patch.object(FakeLeaseStore, "take", steal)


def inbox_apart() -> AbstractContextManager[Any]:
    """INV-1: frames are claimed in a transaction of their own."""
    admit = Settlement.admit

    async def admit_apart(self: Settlement, _tx: Any, frames: Sequence[IncomingFrame]) -> Admission:
        async with self._db.transaction() as tx:
            return await admit(self, tx, frames)

    return patch.object(Settlement, "admit", admit_apart)


@contextmanager
def cancels_last() -> Iterator[None]:
    """INV-4: within a turn, what is due fires before cancels are handled."""
    handle, take_changes = Shard.handle, Shard.take_changes
    waiting: dict[Shard, list[tuple[list[Command], Any, datetime]]] = {}

    def handle_some(self: Shard, commands: Sequence[Command], known: Any, now: datetime) -> None:
        handle(self, [one for one in commands if not isinstance(one, OrderTimers)], known, now)
        orders: list[Command] = [one for one in commands if isinstance(one, OrderTimers)]
        waiting.setdefault(self, []).append((orders, known, now))

    def handle_rest(self: Shard) -> Changes:
        for orders, known, now in waiting.pop(self, []):
            handle(self, orders, known, now)
        return take_changes(self)

    with patch.object(Shard, "handle", handle_some), patch.object(Shard, "take_changes", handle_rest):
        yield


def publish_before_commit() -> AbstractContextManager[Any]:
    """INV-2: frames are published when they are inserted."""
    insert = Sender.insert

    async def insert_and_publish(self: Sender, tx: Any, frames: Sequence[OutgoingFrame]) -> None:
        await insert(self, tx, frames)
        self.publish(frames)

    return patch.object(Sender, "insert", insert_and_publish)


DEFECTS: dict[str, Defect] = {
    "no epoch check": no_epoch_check,
    "ack before commit": ack_before_commit,
    "watermark not in the transaction": watermark_apart,
    "followers not in the transaction": followers_apart,
    "inbox check outside the transaction": inbox_apart,
    "published before commit": publish_before_commit,
    "tombstones ignored": tombstones_ignored,
    "cancels handled after firing": cancels_last,
    "next occurrence from now": next_from_now,
    "page gap": page_gap,
    "takeover without reading": takeover_unread,
    "lease trusted from the response": lease_from_response,
    "lease taken before it ends": lease_stolen,
}
