"""What millions of waiting timers cost: memory, and processor time per timer."""

import asyncio
import statistics
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from local.stack import Stack
from tests.bench.link_peer import LinkPeer
from tests.bench.machine import peak_rss_bytes, rss_bytes
from tests.bench.pending import Block, far_ahead, preload
from tests.bench.report import RATIO, Figure, at_most
from tests.bench.rig import Rig, Spending, Stopwatch, query, scheduler_pid

_LONG = timedelta(minutes=4)
_MB = 1_000_000


async def memory(rig: Rig) -> list[Figure]:
    """The most one scheduler ever has resident."""
    pending, herd = rig.pick(5_000_000, 200_000), rig.pick(1_000_000, 50_000)
    async with rig.stack() as stack, LinkPeer.connect(stack.nats_url, shards=rig.shards, keeps=False) as peer:
        # Overdue when the scheduler comes back, which is a herd like any other.
        blocks = [far_ahead(pending), Block(count=herd, first_at=datetime.now(UTC))]
        await preload(stack, peer, blocks, shards=rig.shards, say=rig.say)
        rig.say(f"{herd:,} timers are due")
        pid = scheduler_pid(stack)
        watch = Stopwatch()
        await peer.until_fired(herd, timeout=_LONG)
        took_s, peak, after = watch.elapsed_s, peak_rss_bytes(pid), rss_bytes(pid)
    return [
        Figure(
            figure="memory of one scheduler",
            value=peak / _MB,
            unit="MB",
            target=at_most(300),
            how=f"The most it ever had resident (VmHWM) with {pending:,} timers waiting and {herd:,} due at one "
            f"instant, which had all fired {took_s:.0f} s after it was ready; {after / _MB:.0f} MB afterwards.",
        )
    ]


@dataclass(slots=True, kw_only=True)
class _Side:
    """A stack with so many waiting timers, and what it spent per timer in each round, in µs."""

    pending: int
    stack: Stack
    peer: LinkPeer
    scheduler_us: list[float] = field(default_factory=list)
    postgres_us: list[float] = field(default_factory=list)

    @property
    def cost_us(self) -> float:
        """Of both together, the median of the rounds."""
        return statistics.median(map(sum, zip(self.scheduler_us, self.postgres_us, strict=True)))


async def cost(rig: Rig) -> list[Figure]:
    """Processor time per timer, applied and fired, with few and with many waiting."""
    few, many = rig.pick(100_000, 20_000), rig.pick(5_000_000, 400_000)
    count, rounds = rig.pick(50_000, 10_000), rig.pick(5, 3)
    async with AsyncExitStack() as exits:
        sides = []
        for pending in (few, many):
            stack = await exits.enter_async_context(rig.stack())
            peer = await exits.enter_async_context(LinkPeer.connect(stack.nats_url, shards=rig.shards, keeps=False))
            await preload(stack, peer, [far_ahead(pending)], shards=rig.shards, say=rig.say)
            await query(stack, "ALTER TABLE scheduler.timer SET (autovacuum_enabled = false)")
            sides.append(_Side(pending=pending, stack=stack, peer=peer))
        for number in range(rounds + 1):
            rig.say(f"round {number} of {rounds}: {count:,} timers applied and fired on either side")
            for side in sides:
                await _round(side, count)
        for side in sides:  # The first round warms up.
            del side.scheduler_us[0], side.postgres_us[0]
    low, high = sides
    return [
        Figure(
            figure=f"cost per timer, {many:,} against {few:,} pending",
            value=high.cost_us / low.cost_us,
            unit=RATIO,
            target=at_most(1.15),
            how=f"Processor time of scheduler and Postgres per timer applied and fired: {_told(low)}; {_told(high)}."
            f" Two stacks take turns, {rounds} rounds of {count:,} timers after one to warm up; the median. "
            f"Autovacuum of the timer table is off on both, since it would run on the small one only.",
        )
    ]


async def _round(side: _Side, count: int) -> None:
    due_at = datetime.now(UTC) + timedelta(seconds=2 + count / 10_000)
    frames, fired = side.peer.frames(count, lambda _: due_at), side.peer.fired
    spending = Spending(side.stack, "scheduler")
    await side.peer.send(frames, timeout=_LONG)
    await side.peer.until_fired(fired + count, timeout=_LONG)
    await asyncio.sleep(1)  # Receipts are confirmed.
    spent = spending.per_timer_us(count)
    side.scheduler_us.append(spent["scheduler"])
    side.postgres_us.append(spent["Postgres"])


def _told(side: _Side) -> str:
    scheduler, postgres = statistics.median(side.scheduler_us), statistics.median(side.postgres_us)
    spread = [a + b for a, b in zip(side.scheduler_us, side.postgres_us, strict=True)]
    return (
        f"{side.pending:,} pending {side.cost_us:.0f} µs (scheduler {scheduler:.0f}, Postgres {postgres:.0f}; "
        f"rounds {min(spread):.0f} to {max(spread):.0f})"
    )
