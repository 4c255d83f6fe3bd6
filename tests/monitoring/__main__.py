"""Draw the dashboards for the docs: `make dashboard-pictures`. A few minutes of load, with accidents to be seen.

python -m tests.monitoring [--minutes 6] [--to docs/dashboards]
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

from tests.monitoring.living import World, living
from tools.dashboards.draw import draw


async def story(world: World, minutes: float) -> None:
    """Quiet, then one thing after another, then quiet again."""
    stack, some = world.stack, minutes * 60 / 8
    await world.wait(2 * some)
    await world.pause("digest", 8)
    await world.wait(some)
    await asyncio.to_thread(stack.kill, "scheduler")
    await world.wait(6)
    await asyncio.to_thread(stack.restart, "scheduler")
    await world.wait(some)
    if stack.nats is not None:
        await asyncio.to_thread(stack.nats.kill)
        await world.wait(6)
        await asyncio.to_thread(stack.nats.start)
    await world.wait(some)
    await asyncio.to_thread(stack.kill, "dispatcher")
    await asyncio.to_thread(stack.restart, "dispatcher")
    await world.wait(2 * some)


async def main() -> None:
    """Start everything, tell the story, draw what Prometheus saw."""
    parser = argparse.ArgumentParser(prog="python -m tests.monitoring")
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--to", type=Path, default=Path("docs/dashboards"))
    typed = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        async with living(Path(scratch)) as world:
            start = time.time()
            await story(world, typed.minutes)
            await asyncio.to_thread(draw, world.watcher.url, start, time.time(), typed.to)


if __name__ == "__main__":
    asyncio.run(main())
