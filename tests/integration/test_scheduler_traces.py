"""A timer remembers what set it, in its row: whoever fires it links to that."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from libs.telemetry.traces import span
from libs.trace_points import Point, carrier_at
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.scheduler_world import START, SchedulerWorld, scheduler_world
from tests.support.spans import links_of, parent_of, point_of_span, recorded

MINUTE = timedelta(minutes=1)
CALLS = [bytes([number] * 24) for number in (1, 2)]


@pytest.fixture
async def world(postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus) -> AsyncIterator[SchedulerWorld]:
    """A world with one replica."""
    async with scheduler_world(postgres_url, open_database, open_bus) as it:
        await it.start("a")
        yield it


async def _set(world: SchedulerWorld, entity: str, call: Point) -> None:
    with span("call", carrier=carrier_at(call)):
        await world.peer.send(world.peer.timer(entity, START + MINUTE))


async def test_a_timer_links_to_what_set_it_whoever_fires_it(
    world: SchedulerWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a handover as well; what nobody traces fires with them, and nobody is told who did not ask for it."""
    for entity, call in zip(("one", "other"), CALLS, strict=True):
        await _set(world, entity, call)
    await world.peer.send(world.peer.timer("nobody's", START + MINUTE))
    await world.stop("a")
    with recorded(monkeypatch) as spans:
        await world.start("b")
        world.clock.advance(MINUTE)
        await world.peer.received(3)
        await world.stop("b")
    fired = {links_of(one)[0]: one for one in spans.get_finished_spans() if one.name == "fire timer"}
    assert fired.keys() == set(CALLS)
    assert {parent_of(one) for one in fired.values()} == {b""}
    assert {(one.attributes or {})["carillon.timer.state"] for one in fired.values()} == {"fired"}
    sent = dict(zip((one.entity for one in world.peer.notifications), world.peer.traces, strict=True))
    owners = {point_of_span(one): point_of_span(one) for one in fired.values()}
    owners |= {point_of_span(one): parent_of(one) for one in spans.get_finished_spans() if one.name.startswith("send")}
    assert owners.get(sent["one"]) == point_of_span(fired[CALLS[0]])
    assert owners.get(sent["other"]) == point_of_span(fired[CALLS[1]])
    assert sent["nobody's"] == b""


async def test_without_spans_what_set_a_timer_is_passed_on(world: SchedulerWorld) -> None:
    """Whoever receives it may make spans, although the scheduler does not."""
    await _set(world, "one", CALLS[0])
    world.clock.advance(MINUTE)
    await world.peer.received(1)
    assert world.peer.traces == [CALLS[0]]
