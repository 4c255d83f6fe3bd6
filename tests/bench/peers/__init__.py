"""The herd done by others: things stored to happen at one instant, and how long until the last of them has happened.

Each is set up as its documentation recommends for speed, on the same Postgres or NATS with the same fsync, in the same
run, with as many as it manages within about a minute: fewer where storing them takes until they are due. What happens
is as little as possible: it is counted. One that cannot be measured is reported as such and does not stop the others.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.report import formatted

if TYPE_CHECKING:
    from tests.bench.rig import Rig

NATS = "NATS message schedules"
PROCRASTINATE = "Procrastinate"

_PEERS = {
    NATS: ("nats_schedules", "measure"),
    f"{NATS} without fsync": ("nats_schedules", "measure_unsynced"),
    PROCRASTINATE: ("procrastinate_jobs", "measure"),
    "APScheduler": ("apscheduler_jobs", "measure"),
    "Temporal": ("temporal_workflows", "measure"),
}
_LIMIT_S = 150
_MARGIN = timedelta(seconds=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Herd:
    """What came of it. `rate`: things a second from the instant they were due; None when it failed, `how` says why."""

    name: str
    version: str
    rate: float | None
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """`count` things were stored in `stored_s`; the last happened `took_s` after they were due."""

    version: str
    count: int
    stored_s: float
    took_s: float
    how: str


async def herds(rig: "Rig") -> list[Herd]:
    """All peers, one after the other."""
    return [await _herd(rig, name, module, function) for name, (module, function) in _PEERS.items()]


async def _herd(rig: "Rig", name: str, module: str, function: str) -> Herd:
    rig.say(f"the same with {name}")
    directory = rig.directory / f"{module}-{function}"
    directory.mkdir()
    directory.chmod(0o755)
    try:
        # Imported late: the peers are not installed where nobody benchmarks.
        measure: Callable[[Rig, Path], Awaitable[Measured]] = getattr(
            import_module(f"tests.bench.peers.{module}"), function
        )
        async with asyncio.timeout(_LIMIT_S):
            measured = await measure(rig, directory)
    except Exception as error:  # noqa: BLE001 - a peer's failure must not lose everybody else's figures.
        why = f"not measured: {type(error).__name__}: {error}"
        rig.say(f"{name} was {why}")
        return Herd(name=name, version="", rate=None, how=why)
    stored = (
        f"{measured.count:,} stored in {measured.stored_s:.1f} s ({formatted(measured.count / measured.stored_s)}/s)"
    )
    return Herd(
        name=name,
        version=measured.version,
        rate=measured.count / measured.took_s,
        how=f"{name} {measured.version}: {measured.how} {stored}, the last happened {measured.took_s:.1f} s after the "
        f"instant they were due.",
    )


def due_after(rig: "Rig", full_s: int, quick_s: int) -> datetime:
    """A whole second so far ahead, since some know no finer ones."""
    at = datetime.now(UTC) + timedelta(seconds=rig.pick(full_s, quick_s))
    return at.replace(microsecond=0) + timedelta(seconds=1)


def numbers_until(due_at: datetime, most: int) -> Iterator[int]:
    """0, 1, 2… to store as long as there is time before they are due."""
    for number in range(most):
        if datetime.now(UTC) > due_at - _MARGIN:
            return
        yield number


async def until_due(due_at: datetime) -> None:
    """Wait until then."""
    await asyncio.sleep(max(0.0, (due_at - datetime.now(UTC)).total_seconds()))


async def until(is_so: Callable[[], bool]) -> None:
    """Wait until it is so; the caller bounds the time."""
    while True:
        if is_so():
            return
        await asyncio.sleep(0.02)
