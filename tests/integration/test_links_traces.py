"""A trace crosses a link: from the caller, through the outbox row and NATS's headers, to where the entry is applied."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from libs.links.receiver import Applied, IncomingFrame
from libs.postgres import Transaction
from libs.telemetry.traces import inject, span
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.link_process import count
from tests.support.link_world import make_world, running

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


@pytest.mark.parametrize("is_swept", [False, True], ids=["published after the commit", "swept up later"])
async def test_what_is_applied_belongs_to_the_trace_of_the_caller(
    postgres_url: str,
    nats_url: str,
    open_database: OpenDatabase,
    open_bus: OpenBus,
    tmp_path: Path,
    is_swept: bool,
) -> None:
    """Both ways: the context is kept in the outbox, so a frame that only the sweeper publishes has it too."""
    world = await make_world(open_database, postgres_url, nats_url, tmp_path)
    seen: list[str] = []

    async def apply(tx: Transaction, frames: Sequence[IncomingFrame]) -> Applied:
        seen.append(inject().get("traceparent", ""))
        return await count(tx, frames)

    sender, receiver = world.sender(await open_bus("sender")), world.receiver(await open_bus("receiver"), apply)
    if is_swept:
        sender.publish = lambda _: None  # type: ignore[assignment, method-assign]
    with span("caller", carrier=CALLER):
        await world.send(sender, [0])
    async with running(sender.run(), receiver.run()):
        await world.expect_all_once(1)
    assert [one.split("-")[1] for one in seen] == [TRACE]
