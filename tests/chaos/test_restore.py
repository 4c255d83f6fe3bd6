"""What a restore of Postgres to an earlier moment repeats and what it loses; docs/production.md tells it to operators.

Real processes and a real base backup. After the backup work goes on: timers fire, mails leave, commands are accepted.
Then Postgres is as it was at the backup, while JetStream has what came later, or nothing.
"""

import asyncio
from pathlib import Path

import pytest

from tests.support.link_world import until
from tests.support.restored_stack import ALONE, GATHERED, RestoredStack, soon

SOON_S = 8
"""Time enough to come to rest and begin the backup, before what is to fire after it is due."""
LATER_S = 3600
NAMES = (
    *("fired-before", "fired-between", "gathered", "late", "uncancelled", "forgotten", "repeated"),
    *("on-its-way", "after-stale-cancel", "after-stale-timer", "cancelled-between", "handed-over"),
)
_SEQUENCES_AHEAD = 40
"""Calls between the backup and what is left in JetStream: Postgres itself skips 32 numbers after a crash."""


@pytest.mark.timeout(180)
@pytest.mark.parametrize("is_wiped", [True, False], ids=["JetStream wiped", "JetStream ahead"])
async def test_a_restore_repeats_what_had_left_and_forgets_what_was_accepted_since(
    tmp_path: Path, is_wiped: bool
) -> None:
    """Repeated: what fired or left since. Lost: commands since, unless JetStream has them still. Nothing else."""
    async with RestoredStack.running(tmp_path, env={}) as world:
        later = soon(LATER_S)
        await world.know(NAMES)
        await world.schedule("fired-before", soon(0))
        await world.notify("gathered")
        await world.schedule("late", later)
        await world.schedule("uncancelled", later)
        await world.until_told(["fired-before"])
        await world.schedule("fired-between", between_at := soon(SOON_S))
        await world.back_up(before=between_at)

        assert await world.trigger() == 1
        assert await world.cancel("uncancelled") == 1
        await world.schedule("forgotten", later)
        await world.schedule("repeated", later, key="repeated")
        for _ in range(_SEQUENCES_AHEAD):
            await world.cancel("nobody")
        await world.until_told(["fired-between", "gathered"])
        await world.rest()
        await _leave_in_jetstream(world)

        await world.stop_services()
        await world.restore()
        assert world.stack.nats is not None
        if is_wiped:
            await asyncio.to_thread(world.stack.nats.wipe)
        await world.start_services()
        await world.until_told(["fired-between"], times=2)

        # Whoever had no chance to hear that the answer is void says it again under the same key.
        await world.schedule("repeated", later, key="repeated")
        assert await world.trigger() == 1
        assert [await world.hasten(name) for name in ("late", "uncancelled", "repeated", "forgotten")] == [1, 1, 1, 0]
        # New commands are later than anything accepted before the restore, whatever of that still comes.
        await world.schedule("after-stale-cancel", soon(1), entity="stale-cancel")
        assert await world.cancel("stale-timer") == int(not is_wiped)
        await world.schedule("after-stale-timer", soon(1), entity="stale-timer")
        expected = {"fired-before": 1, "fired-between": 2, "gathered": 2, "late": 1, "uncancelled": 1, "repeated": 1}
        expected |= {"after-stale-cancel": 1, "after-stale-timer": 1}
        # A message whose digest is forgotten leaves all the same: it had been decided.
        expected |= {} if is_wiped else {"on-its-way": 1, "handed-over": 1}
        await asyncio.gather(*(world.until_told([name], times) for name, times in expected.items()))
        await world.rest()
        told = await world.told()
        assert {name: len(mails) for name, mails in told.items()} == expected
        for name in ("gathered", "fired-between"):
            assert len(set(told[name])) == 1, f"{name} was told again under another Message-ID"
        assert await world.unaccounted() == 0


@pytest.mark.timeout(180)
async def test_a_failover_that_loses_the_last_seconds_loses_no_timer(tmp_path: Path) -> None:
    """INV-2: the services live through it with their leases; what fired in those seconds fires again, by the database.

    The base backup is a replica that lags: it takes the primary's place at the same address within a lease.
    """
    env = {"CARILLON_SCHEDULER_LEASE_TTL": "1m", "CARILLON_SHARDS": "1"}
    async with RestoredStack.running(tmp_path, env=env) as world:
        await world.know(["fired-between", "gathered-between", "next"])
        await world.schedule("next", soon(LATER_S))
        await world.schedule("gathered-between", between_at := soon(SOON_S), kind=GATHERED)
        await world.schedule("fired-between", between_at)
        await world.back_up(before=between_at)

        await world.until_told(["fired-between"])
        await world.until_gathered(1)
        await world.rest()  # JetStream has nothing of it any more.
        assert world.stack.postgres is not None
        await world.restore()

        assert await world.hasten("next") == 1
        await world.until_told(["next"])
        await world.until_gathered(1)
        assert await world.trigger() == 1
        await world.until_told(["gathered-between", "fired-between"])
        await world.rest()
        told = await world.told()
        assert {name: len(mails) for name, mails in told.items()} == {
            "fired-between": 2,
            "gathered-between": 1,
            "next": 1,
        }
        assert len(set(told["fired-between"])) == 1
        assert await world.unaccounted() == 0


async def _leave_in_jetstream(world: RestoredStack) -> None:
    """What JetStream has when the lights go out: three commands for the scheduler, and a message for the dispatcher."""
    await asyncio.to_thread(world.stack.kill, "dispatcher")
    await world.notify("handed-over", ALONE)
    await asyncio.to_thread(world.stack.kill, "scheduler")
    await world.schedule("on-its-way", soon(1), waits=False)
    await world.cancel("stale-cancel", waits=False)
    await world.schedule("cancelled-between", soon(600), entity="stale-timer", waits=False)

    async def are_there() -> bool:
        return await world.messages("scheduler") >= 3 and await world.messages("dispatcher") >= 1

    await until(are_there)
