"""The loop that keeps this replica's leases: renews, takes, gives back, three times per TTL and when nudged.

States of a shard, as one replica sees it:

    somebody else's ──(free or expired, and rendezvous says ours)──▶ taken: epoch + 1 ──▶ in the engine
          ▲                                                                                 │
          └───────── released (rendezvous says another's; we leave) ◀───────────────────────┤
          └───────── lost (another epoch at a turn or renewal; turn failed) ◀───────────────┘

While a lease is not renewed in time, its shard stands still here: it goes on when a renewal finds the epoch unchanged,
and is dropped when not. Consumers and mail live a little longer than the shard: through a failed turn, until it is
clear whose the shard is.

What protects the data is the epoch in every transaction, not this loop. What this loop protects is time: no shard
should be without an owner for longer than a lease, and none should change hands without need.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from datetime import timedelta
from typing import Protocol

from libs.errors import Unavailable
from libs.lifecycle import heed_cancellation
from libs.links.receiver import Message
from services.scheduler import metrics
from services.scheduler.loops_engine import Engine
from services.scheduler.ownership import trusted_until_s, until_next_beat, wanted_shards
from services.scheduler.timer import Mark

log = logging.getLogger(__name__)

_FORGET_INTERVAL_S = 60.0
_RETRY_TAKE = timedelta(milliseconds=50)


class Grant(Protocol):
    """A shard that has become ours."""

    @property
    def shard(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def watermark(self) -> Mark: ...
    @property
    def newest_tombstones(self) -> Mapping[str, int]: ...
    @property
    def unheld(self) -> timedelta: ...


class Situation(Protocol):
    """What there is to see."""

    @property
    def members(self) -> Mapping[str, timedelta]: ...
    @property
    def lease_ends_in(self) -> Mapping[int, timedelta]: ...


class Store(Protocol):
    """Leases in Postgres; services.scheduler.store_leases.LeaseStore."""

    async def look(self) -> Situation: ...
    async def renew(self, held: Mapping[int, int]) -> frozenset[int]: ...
    async def take(self, shards: Collection[int]) -> Sequence[Grant]: ...
    async def release(self, shards: Collection[int]) -> None: ...
    async def resign(self) -> None: ...
    async def forget(self, *, tombstones_after: timedelta, members_after: timedelta) -> None: ...


class Leases:
    """The leases of this replica. `consume` yields the frames of one shard; `nudge` wakes the other replicas.

    `monotonic_s` is read at the moment it counts; the loop's own time is as old as the loop's present round.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        store: Store,
        replica: str,
        shard_count: int,
        ttl: timedelta,
        tombstones_after: timedelta,
        consume: Callable[[int], AsyncGenerator[Sequence[Message], None]],
        nudge: Callable[[], Awaitable[None]],
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._store = store
        self._replica = replica
        self._shard_count = shard_count
        metrics.SHARDS.set(shard_count)
        self._ttl = ttl
        self._tombstones_after = tombstones_after
        self._consume = consume
        self._nudge = nudge
        self._monotonic_s = monotonic_s
        self._trusted_until_s = 0.0
        self._renew_at_s = 0.0
        self._consumers: dict[int, asyncio.Task[None]] = {}
        self._known_members: frozenset[str] = frozenset()
        self.wake = asyncio.Event()
        engine.is_trusted = self.is_trusted
        engine.on_lost = self.wake.set

    def is_trusted(self) -> bool:
        """Whether our leases still count, by our own reckoning."""
        return self._monotonic_s() < self._trusted_until_s

    async def run(self) -> None:
        """Keep leases until cancelled, then give them all back."""
        try:
            while True:
                wait = await self._attempt()
                heed_cancellation()
                try:
                    async with asyncio.timeout(wait.total_seconds()):
                        await self.wake.wait()
                except TimeoutError:
                    pass
                self.wake.clear()
        finally:
            await self._leave()

    async def run_housekeeping(self) -> None:
        """Forget old tombstones and members, and read gauges, until cancelled."""
        next_forget_s = 0.0
        while True:
            self._engine.measure()
            if self._monotonic_s() >= next_forget_s:
                next_forget_s = self._monotonic_s() + _FORGET_INTERVAL_S
                try:
                    await self._store.forget(tombstones_after=self._tombstones_after, members_after=self._ttl * 100)
                except Exception:
                    log.warning("Could not forget old tombstones; trying again.", exc_info=True)
                heed_cancellation()
            await asyncio.sleep(1)

    async def _attempt(self) -> timedelta:
        try:
            wait = await self.beat()
        except Unavailable as err:
            metrics.RENEWALS.labels("failed").inc()
            log.warning("Could not renew the leases; trying again.", extra={"error": str(err)})
            if not self.is_trusted():
                await self._stop_consumers(list(self._consumers))  # Others may have the shards, and wait for the mail.
                await self._engine.hand_back_mail()
            return self._ttl / 20
        return wait

    async def beat(self) -> timedelta:
        """Take what is ours to take, renew what is held, give back what is another's; returns when to come again.

        Taking comes first: nothing fires in those shards, while renewing waits for the turns of all others.
        """
        if not self._known_members:
            await self._store.renew({})  # Be seen: two that start at once would both take everything.
        situation = await self._store.look()
        wanted = wanted_shards(self._replica, situation.members, self._shard_count)
        missing = await self._take_free(wanted, situation)
        if self._monotonic_s() >= self._renew_at_s:
            await self._renew()
        if unwanted := self._engine.epochs.keys() - wanted:
            await self._give_back(unwanted)
        free = {shard for shard, left in situation.lease_ends_in.items() if left <= timedelta(0)}
        metrics.SHARDS_UNHELD.set(len(free - self._engine.epochs.keys()))
        metrics.LIVE_REPLICAS.set(len(situation.members))
        await self._match_consumers()
        if situation.members.keys() != self._known_members:
            await self._meet(situation.members.keys())
        if missing:
            return _RETRY_TAKE
        awaited = [left for shard, left in situation.lease_ends_in.items() if shard in wanted and left > timedelta(0)]
        awaited += [left for member, left in situation.members.items() if member != self._replica]
        return min(until_next_beat(self._ttl, awaited), timedelta(seconds=self._renew_at_s - self._monotonic_s()))

    async def _renew(self) -> None:
        """Renew what is held, and let go of what has another epoch by now."""
        began_s = self._monotonic_s()
        held = self._engine.epochs
        renewed = await self._store.renew(held)
        metrics.RENEWALS.labels("committed").inc()
        if gone := held.keys() - renewed:
            metrics.FENCED.inc(len(gone))
            await self._drop(gone)
        # From the start of the call: when the answer came says nothing about when the lease began.
        self._trusted_until_s = trusted_until_s(began_s, self._ttl)
        self._renew_at_s = began_s + self._ttl.total_seconds() / 3
        self._engine.wake()

    async def _take_free(self, wanted: Collection[int], situation: Situation) -> set[int]:
        """Take what is ours to take; returns what is free and could not be taken, a transaction of its being open."""
        missing = set(wanted) - self._engine.epochs.keys()
        # Those not in lease_ends_in are ours in Postgres and were lost here: taken anew, under a new epoch.
        free = {s for s in missing if situation.lease_ends_in.get(s, timedelta(0)) <= timedelta(0)}
        for grant in await self._store.take(free) if free else ():
            metrics.TAKEOVERS.inc()
            metrics.UNHELD_SECONDS.observe(grant.unheld.total_seconds())
            self._engine.add(
                number=grant.shard,
                epoch=grant.epoch,
                watermark=grant.watermark,
                newest_tombstones=grant.newest_tombstones,
            )
        return free - self._engine.epochs.keys()

    async def _meet(self, members: Collection[str]) -> None:
        log.info("The live replicas are %s.", ", ".join(sorted(members)))
        is_new_here = not self._known_members
        self._known_members = frozenset(members)
        if is_new_here:
            await self._nudge()  # The others should give us our share now, not at their next beat.

    # Consumers

    async def _match_consumers(self) -> None:
        """Have a consumer for each shard that is here, and none for others."""
        here = self._engine.epochs.keys()
        if homeless := self._consumers.keys() - here:
            await self._drop(homeless)
        for shard in here:
            if shard not in self._consumers or self._consumers[shard].done():
                self._consumers[shard] = asyncio.create_task(self._take_frames(shard))

    async def _take_frames(self, shard: int) -> None:
        try:
            async with aclosing(self._consume(shard)) as lists:
                async for messages in lists:
                    await self._engine.deliver(shard, messages)
        except Exception:  # Outermost frame of a task nobody waits for; the next beat starts it again.
            log.exception("A shard's consumer ended.", extra={"shard": shard})

    async def _stop_consumers(self, shards: Collection[int]) -> None:
        running = {task for shard in shards if (task := self._consumers.pop(shard, None)) is not None}
        while running:
            for task in running:
                task.cancel()
            # Again and again: `asyncio.wait_for`, which nats-py uses, loses a cancellation now and then (before 3.12).
            _, running = await asyncio.wait(running, timeout=0.1)

    async def _drop(self, shards: Collection[int]) -> None:
        await self._stop_consumers(shards)
        await self._engine.drop(shards)

    async def _give_back(self, shards: Collection[int]) -> None:
        """Hand shards over, a lane's at a time: the others go on firing until it is their turn."""
        for part in self._engine.by_lane(shards):
            await self._drop(part)
            await self._store.release(part)
            await self._nudge()

    async def _leave(self) -> None:
        """Graceful handover: finish the turns, give everything back, tell the others."""
        here = self._engine.epochs.keys() | self._consumers.keys()
        try:
            await self._store.resign()  # Or the others would not want what they are given.
            await self._give_back(here)
            # What stopping met halfway: a take whose answer was lost, a release, a shard that a failed turn threw away.
            await self._store.release(range(self._shard_count))
            await self._nudge()
        except Unavailable as err:
            await self._drop(here)
            log.warning("Could not give the shards back; their leases run out.", extra={"error": str(err)})
            return
        log.info("Gave back all shards.", extra={"shards": len(here)})
