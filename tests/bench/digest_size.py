"""What size costs: one very large digest, and an item when very many windows are open."""

import asyncio
import random
import statistics
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import timedelta

from local.stack import Stack
from tests.bench.digest_peer import DigestPeer, name
from tests.bench.digest_speed import check, count_items
from tests.bench.digest_windows import preload
from tests.bench.machine import children, peak_rss_bytes
from tests.bench.report import RATIO, Figure, at_most
from tests.bench.rig import Rig, Spending, Stopwatch, query

_LONG = timedelta(minutes=4)
_MB = 1_000_000


async def large(rig: Rig) -> list[Figure]:
    """One digest with very many items."""
    items = rig.pick(50_000, 10_000)
    async with rig.stack(["digest"]) as stack, DigestPeer.connect(stack) as peer:
        await peer.put_catalog(2)
        await peer.sender.send(peer.notifications([name(1)]), timeout=_LONG)
        await peer.until_timers(1, timeout=_LONG)
        await peer.sender.send(peer.wake(), timeout=_LONG)  # Warm: the rendering process runs.
        await peer.until_delivered(1, timeout=_LONG)
        peer.timers.clear()
        rig.say(f"filling one window with {items:,} items")
        await peer.sender.send(peer.notifications([name(0)] * items), timeout=_LONG)
        await peer.until_timers(1, timeout=_LONG)
        pid = stack.replicas["digest", 0].process.pid
        assert pid is not None
        rig.say("closing it")
        spending, watch = Spending(stack, "digest"), Stopwatch()
        await peer.sender.publish(peer.wake())
        [(parts, held)] = await _digest(stack, items)
        await peer.until_delivered(parts + 1, timeout=_LONG)
        took_s, spent = watch.elapsed_s, spending.told(items, "item")
        check(held, items, "items in the digest")
        rendering = max(peak_rss_bytes(one) for one in children(pid)) / _MB
        service = peak_rss_bytes(pid) / _MB
    return [
        Figure(
            figure=f"one digest with {items:,} items",
            value=took_s,
            unit="s",
            target=at_most(3),
            how=f"HTML with its text twin, in {parts:,} parts; from its timer published until the last part has landed "
            f"at the dispatcher. {spent}",
        ),
        Figure(
            figure=f"memory of rendering {items:,} items",
            value=rendering,
            unit="MB",
            target=at_most(300),
            how="The most the rendering process ever had resident (VmHWM).",
        ),
        Figure(
            figure=f"memory of the service, {items:,} items in one digest",
            value=service,
            unit="MB",
            target=at_most(300),
            how="The same of the service's own process, which reads the items and packs the parts into frames.",
        ),
    ]


async def _digest(stack: Stack, items: int) -> list[tuple[int, int]]:
    async with asyncio.timeout(_LONG.total_seconds()):
        while True:
            rows = await query(stack, "SELECT parts, item_count FROM digest.digest WHERE item_count = %s", items)
            if rows:
                return [(int(parts), int(held)) for parts, held in rows]
            await asyncio.sleep(0.02)


@dataclass(slots=True, kw_only=True)
class _Side:
    """A stack with so many open windows, and what it spent per item in each round, in µs."""

    windows: int
    stack: Stack
    peer: DigestPeer
    digest_us: list[float] = field(default_factory=list)
    postgres_us: list[float] = field(default_factory=list)

    @property
    def costs_us(self) -> list[float]:
        """Of both together, round by round."""
        return [a + b for a, b in zip(self.digest_us, self.postgres_us, strict=True)]


async def cost(rig: Rig) -> list[Figure]:
    """Processor time per item with few and with many windows open."""
    few, many = rig.pick(10_000, 5_000), rig.pick(1_000_000, 100_000)
    count, rounds = rig.pick(50_000, 10_000), rig.pick(5, 3)
    async with AsyncExitStack() as exits:
        sides = []
        for windows in (few, many):
            stack = await exits.enter_async_context(rig.stack(["digest"]))
            peer = await exits.enter_async_context(DigestPeer.connect(stack))
            await peer.put_catalog(1)
            await peer.sender.send(peer.notifications([name(0)]), timeout=_LONG)
            rig.say(f"opening {windows:,} windows")
            await preload(stack, windows)
            sides.append(_Side(windows=windows, stack=stack, peer=peer))
        for number in range(rounds + 1):
            rig.say(f"round {number} of {rounds}: {count:,} items on either side")
            for side in sides:
                await _round(side, count)
        for side in sides:  # The first round warms up.
            del side.digest_us[0], side.postgres_us[0]
    low, high = sides
    return [
        Figure(
            figure=f"cost per item, {many:,} against {few:,} open windows",
            value=statistics.median(high.costs_us) / statistics.median(low.costs_us),
            unit=RATIO,
            target=at_most(1.15),
            how=f"Processor time of digest and Postgres per notification that lands in the open window of a random "
            f"subscriber: {_told(low)}; {_told(high)}. Two stacks take turns, {rounds} rounds of {count:,} after one "
            f"to warm up; the median. Autovacuum of the growing tables is off on both, since it would run at other "
            f"times on the small one.",
        )
    ]


async def _round(side: _Side, count: int) -> None:
    frames = side.peer.notifications(name(random.randrange(side.windows)) for _ in range(count))
    before = await count_items(side.stack)
    await query(side.stack, "CHECKPOINT")  # Full-page images are part of the cost, and the same share on both sides.
    spending = Spending(side.stack, "digest")
    await side.peer.sender.send(frames, timeout=_LONG)
    spent = spending.per_timer_us(count)
    check(await count_items(side.stack) - before, count, "items")
    side.digest_us.append(spent["digest"])
    side.postgres_us.append(spent["Postgres"])


def _told(side: _Side) -> str:
    return (
        f"{side.windows:,} windows {statistics.median(side.costs_us):.0f} µs (digest "
        f"{statistics.median(side.digest_us):.0f}, Postgres {statistics.median(side.postgres_us):.0f}; "
        f"rounds {min(side.costs_us):.0f} to {max(side.costs_us):.0f})"
    )
