"""How long nothing fires when replicas go: killed, and restarted one after the other."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from local.stack import Stack
from tests.bench.link_peer import Firing, LinkPeer, to_ns
from tests.bench.report import Figure, at_most
from tests.bench.rig import Rig, percentile, scheduler_pid, shards_by_holder, until_held

_RATE = 500
_LEAD = timedelta(seconds=3)
_TTL_S = 5  # The default.


@dataclass(frozen=True, slots=True, kw_only=True)
class _Steady:
    """A stack in which `count` timers fire at even distances from `began_at` on."""

    stack: Stack
    peer: LinkPeer
    began_at: datetime
    count: int

    async def until(self, offset: timedelta) -> None:
        """Wait until so long after the first is due."""
        await asyncio.sleep(max(0.0, (self.began_at + offset - datetime.now(UTC)).total_seconds()))

    async def firings(self, until_at: datetime) -> list[Firing]:
        """Those due until then; each fired exactly once (INV-2)."""
        count = min(self.count, int((until_at - self.began_at) / timedelta(seconds=1) * _RATE))
        await self.until(until_at - self.began_at)
        # Timers of one shard fire in order, those of others may be behind; what is late by more has failed.
        await self.peer.until_fired(count, timeout=timedelta(seconds=30))
        await asyncio.sleep(2)
        firings = [one for one in self.peer.firings() if one.due_ns < to_ns(until_at)]
        if not len(firings) == len({one.timer_id for one in firings}) >= count:
            raise RuntimeError(f"{len(firings):,} firings of at least {count:,} timers: one was lost or fired twice")
        return firings


async def kill(rig: Rig) -> list[Figure]:
    """kill -9 of one of two replicas."""
    seconds = 16
    async with _steady(rig, replicas=2, seconds=seconds) as run:
        victim = await _busiest(run.stack, 2)
        await run.until(timedelta(seconds=4))
        held = len((await shards_by_holder(run.stack)).get(victim[1], ()))
        rig.say(f"killing the replica that holds {held} of {rig.shards} shards")
        killed_at = datetime.now(UTC)
        await asyncio.to_thread(run.stack.kill, "scheduler", victim[0])
        firings = await run.firings(killed_at + timedelta(seconds=_TTL_S + 4))
        before = [one.lateness_s for one in firings if one.due_ns < to_ns(killed_at) - 10**9]
        after = [one.lateness_s for one in firings if one.due_ns >= to_ns(killed_at) - 10**9]
    return [
        Figure(
            figure="kill -9 of the owner, longest gap",
            value=max(after),
            unit="s",
            target=at_most(_TTL_S + 1),
            how=f"Two replicas, {_RATE} timers/s over {rig.shards} shards, lease TTL {_TTL_S} s; the one with {held} "
            f"shards is killed and stays away. The gap is the longest any timer was late, from due to in JetStream. "
            f"Before the kill the latest was {max(before) * 1000:.0f} ms late; "
            f"{len(firings):,} timers fired, once each.",
        )
    ]


async def restart(rig: Rig) -> list[Figure]:
    """SIGTERM and start again, one replica after the other."""
    replicas, seconds = 3, 60
    async with _steady(rig, replicas=replicas, seconds=seconds) as run:
        await run.until(timedelta(seconds=4))
        began_at = datetime.now(UTC)
        for number in range(replicas):
            rig.say(f"restarting replica {number + 1} of {replicas}")
            await asyncio.to_thread(run.stack.terminate, "scheduler", number)
            await asyncio.to_thread(run.stack.restart, "scheduler", number)
            await until_held(run.stack, replicas=replicas, shards=rig.shards)
        ended_at = datetime.now(UTC)
        if ended_at > run.began_at + timedelta(seconds=seconds):
            raise RuntimeError("restarting took longer than there were timers to fire; this machine is too busy")
        firings = await run.firings(ended_at)
    late = [one.lateness_s * 1000 for one in firings if one.due_ns >= to_ns(began_at) - 10**9]
    return [
        Figure(
            figure="rolling restart, longest gap",
            value=max(late),
            unit="ms",
            target=at_most(300),
            how=f"Three replicas, {_RATE} timers/s over {rig.shards} shards; each is sent SIGTERM, started again and "
            f"given shards before the next, {(ended_at - began_at).total_seconds():.0f} s in all. The gap is the "
            f"longest any timer was late, from due to in JetStream; p99 {percentile(late, 0.99):.0f} ms, p50 "
            f"{percentile(late, 0.5):.0f} ms. {len(firings):,} timers fired once each.",
        )
    ]


@asynccontextmanager
async def _steady(rig: Rig, *, replicas: int, seconds: int) -> AsyncIterator[_Steady]:
    async with (
        rig.stack(replicas=replicas) as stack,
        LinkPeer.connect(stack.nats_url, shards=rig.shards) as peer,
    ):
        await until_held(stack, replicas=replicas, shards=rig.shards)
        count = _RATE * seconds
        # All are in the table before anything happens: a gap in firing is asked for, not one in accepting.
        began_at = datetime.now(UTC) + _LEAD + timedelta(seconds=count / 5_000)
        frames = peer.frames(count, lambda number: began_at + number * timedelta(seconds=1) / _RATE)
        rig.say(f"{count:,} timers will fire in {seconds} s")
        await peer.send(frames, timeout=timedelta(seconds=60))
        yield _Steady(stack=stack, peer=peer, began_at=began_at, count=count)


async def _busiest(stack: Stack, replicas: int) -> tuple[int, str]:
    """Number and name of the replica that holds most shards."""
    held = await shards_by_holder(stack)
    name = max(held, key=lambda one: len(held[one]))
    # A replica's name contains its process id.
    number = next(n for n in range(replicas) if f"-{scheduler_pid(stack, n)}-" in name)
    return number, name
