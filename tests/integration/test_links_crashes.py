"""INV-1, INV-2: a process is killed between any two steps of a link, and started again; nothing is lost or doubled."""

from pathlib import Path

import pytest

from tests.support.fixtures import OpenDatabase
from tests.support.link_process import RECEIVER_STEPS, SENDER_STEPS
from tests.support.link_world import LinkWorld, killed, make_world

NUMBERS = 60
PER_FRAME = 5


@pytest.fixture
async def world(open_database: OpenDatabase, postgres_url: str, nats_url: str, tmp_path: Path) -> LinkWorld:
    """Both ends, not running."""
    return await make_world(open_database, postgres_url, nats_url, tmp_path)


@pytest.mark.parametrize("step", SENDER_STEPS)
async def test_a_sender_killed_at_any_step_loses_and_doubles_nothing(world: LinkWorld, step: str) -> None:
    """The next process finds in Postgres all there is to know."""
    async with world.process("receiver"):
        async with world.process("sender", count=NUMBERS, per_frame=PER_FRAME, die_at=step, die_on=3) as sender:
            await killed(sender)
        async with world.process("sender", count=NUMBERS, per_frame=PER_FRAME):
            await world.expect_all_once(NUMBERS)


@pytest.mark.parametrize("step", RECEIVER_STEPS)
async def test_a_receiver_killed_at_any_step_loses_and_doubles_nothing(world: LinkWorld, step: str) -> None:
    """What it had in hand comes again, and has effects only if it had none."""
    async with world.process("sender", count=NUMBERS, per_frame=PER_FRAME):
        async with world.process("receiver", die_at=step, die_on=2) as receiver:
            await killed(receiver)
        async with world.process("receiver"):
            await world.expect_all_once(NUMBERS)
