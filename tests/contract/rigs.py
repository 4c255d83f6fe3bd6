"""What a contract is tried on: the real Postgres and NATS, or the simulation's fakes, behind the same few words."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

from pydantic import SecretStr

import services.scheduler
from libs import migrations
from libs.ids import new_id
from libs.settings import PostgresSettings
from services.scheduler.store import TurnStore
from services.scheduler.store_leases import LeaseStore
from tests.simulation import links
from tests.simulation.broker import Broker, Bus
from tests.simulation.loop import Process, VirtualLoop
from tests.simulation.network import Line
from tests.simulation.postgres import Database, Postgres
from tests.simulation.stores import FakeLeaseStore, FakeTurnStore, ShardRow
from tests.support.fixtures import OpenBus, OpenDatabase

SHARDS = 4
TTL = timedelta(seconds=2)


@dataclass(kw_only=True)
class Rig:
    """`stream` and `subject` are a work queue's; `leases` makes the lease store of a replica, `turns` is replica a's.

    `lose_takeovers` does what an asynchronous failover may: it sets all shards back to before anybody took them.
    """

    db: Any
    turns: Any
    leases: Callable[[str], Any]
    lose_takeovers: Callable[[], Awaitable[None]]
    bus: Any
    stream: str
    subject: str


Scenario = Callable[[Rig], Awaitable[None]]


def on_fakes(scenario: Scenario) -> None:
    """Try a scenario on the fakes, in virtual time."""
    loop = VirtualLoop()  # type: ignore[abstract] # See tests.simulation.world.
    process = Process("a")
    server = Postgres(loop, Random(1), datetime.now(UTC))

    async def lose_takeovers() -> None:
        for number in range(SHARDS):
            server.rows("shard")[number] = ShardRow()

    db = Database(server, Line(loop, process, Random(2)), "scheduler")
    rig = Rig(
        db=db,
        turns=FakeTurnStore(replica="a"),
        leases=lambda replica: FakeLeaseStore(db, replica=replica, ttl=TTL),
        lose_takeovers=lose_takeovers,
        bus=Bus(Broker(loop, Random(3)), Line(loop, process, Random(4)), process),
        stream="CARILLON_SCHEDULER",
        subject="carillon.link.scheduler.0",
    )

    async def run() -> None:
        await lose_takeovers()
        await asyncio.wait_for(loop.spawn(process, scenario(rig)), 60)  # type: ignore[arg-type]

    with links.installed():
        try:
            loop.run(run())
        finally:
            loop.bury([process])


async def on_servers(scenario: Scenario, url: str, open_database: OpenDatabase, open_bus: OpenBus) -> None:
    """Try a scenario on Postgres and NATS."""
    directory = Path(services.scheduler.__file__).parent / "migrations"
    await asyncio.to_thread(migrations.upgrade, PostgresSettings(url=SecretStr(url)), "scheduler", directory)
    db, bus = await open_database("scheduler", url), await open_bus()
    await LeaseStore(db, replica="a", ttl=TTL).ensure_shards(SHARDS)
    name = f"contract_{new_id().hex}"

    async def lose_takeovers() -> None:
        async with db.transaction() as tx:
            await tx.raw.execute("UPDATE shard SET holder = NULL, epoch = 0, lease_until = NULL")

    await scenario(
        Rig(
            db=db,
            turns=TurnStore(replica="a"),
            leases=lambda replica: LeaseStore(db, replica=replica, ttl=TTL),
            lose_takeovers=lose_takeovers,
            bus=bus,
            stream=name,
            subject=f"{name}.0",
        )
    )
