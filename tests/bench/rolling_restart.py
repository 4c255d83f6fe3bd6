"""A rolling restart of everything under load: failed calls, and how long nothing fires."""

from datetime import UTC, datetime

from tests.bench.report import Figure, at_most
from tests.bench.rig import Rig, percentile
from tests.support.rolling_load import RollingLoad, restart_all

_RATE = 200


async def restart(rig: Rig) -> list[Figure]:
    """SIGTERM, start, wait until it has its share; all eight, one after the other."""
    seconds = rig.pick(150, 100)
    async with RollingLoad.running(rig.directory / "stack", rate=_RATE, seconds=seconds) as load:
        began_at = datetime.now(UTC)
        await restart_all(load)
        took_s = (datetime.now(UTC) - began_at).total_seconds()
        if datetime.now(UTC) > load.ends_at:
            raise RuntimeError("restarting took longer than there were timers to fire; this machine is too busy")
        await load.finish()
    seen = load.seen
    late_ms = [late_s * 1e3 for late_s in seen.late_s.values()]
    calls = sum(seen.calls.values())
    shares = ", ".join(f"{name} {taken_s:.1f}" for name, taken_s in seen.taken_s.items())
    how = (
        f"Two replicas of each service behind one name; {_RATE} timers/s and 40 calls/s without repetitions of the "
        f"caller's. Each of the eight is sent SIGTERM, started again and has its share before the next, {took_s:.0f} s "
        "in all; CARILLON_GRPC_DRAIN_DELAY 1s."
    )
    return [
        Figure(
            figure="rolling restart of everything, failed calls",
            value=len(seen.failed),
            unit="calls",
            target=at_most(0),
            how=f"{how} {calls:,} calls were answered. {' '.join(sorted(set(seen.failed))[:2])}",
        ),
        Figure(
            figure="rolling restart of everything, longest gap",
            value=max(late_ms),
            unit="ms",
            target=at_most(300),
            how=f"The latest of {len(late_ms):,} timers, from due to its event in JetStream; each fired once "
            f"({seen.repeated} repeated events); p99 {percentile(late_ms, 0.99):.0f} ms, p50 "
            f"{percentile(late_ms, 0.5):.0f} ms.",
        ),
        Figure(
            figure="rolling restart of everything, until it has its share",
            value=max(seen.taken_s.values()),
            unit="s",
            how=f"From ready until it answers calls and, for the scheduler, holds shards; seconds: {shares}.",
        ),
    ]
