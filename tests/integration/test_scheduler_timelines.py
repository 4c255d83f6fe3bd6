"""Timelines, conditions and facts, through frames, on real Postgres and NATS."""

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from uuid import UUID

import pytest
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2

from libs.ids import derived_id
from libs.wire import to_timestamp
from services.scheduler.store_queries import QueryStore
from services.scheduler.timelines import Step, step_timer_id
from services.scheduler.timer import TargetKind
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.scheduler_world import START, SchedulerWorld, scheduler_world

DAY = timedelta(days=1)


@pytest.fixture
async def world(postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus) -> AsyncIterator[SchedulerWorld]:
    """A world with one replica and the trial: day 25 unless paid, day 30, and two days after that."""
    async with scheduler_world(postgres_url, open_database, open_bus) as it:
        await it.start("a")
        steps = (
            _step("remind", 25 * DAY, condition="!has(facts.paid)"),
            _step("check", 30 * DAY, follow_ups=(_step("again", 2 * DAY),)),
        )
        await QueryStore(it.db).put_timeline("acme", "trial", "", steps, START)
        yield it


def _step(name: str, offset: timedelta, *, condition: str = "", follow_ups: tuple[Step, ...] = ()) -> Step:
    content = timer_pb2.NotificationContent(type=name, subscribers=["s"])
    return Step(
        name=name,
        offset=offset,
        condition=condition,
        target_kind=TargetKind.NOTIFICATION,
        target=link_pb2.TimerTarget(notification=content).SerializeToString(),
        follow_ups=follow_ups,
    )


def _run_id(name: str, entity: str, anchor: datetime = START) -> UUID:
    """As intake names it: a second start of the same is the same run."""
    return derived_id("timeline-run", "acme", name, entity, int(anchor.timestamp() * 1_000_000))


def _start(world: SchedulerWorld, entity: str, *, name: str = "trial", anchor: datetime = START) -> link_pb2.Entry:
    run_id = _run_id(name, entity, anchor)
    return world.peer.entry(
        start_timeline=link_pb2.StartTimeline(
            id=run_id.bytes, timeline=name, entity=entity, anchor_time=to_timestamp(anchor)
        )
    )


def _put(world: SchedulerWorld, entity: str, facts: str) -> link_pb2.Entry:
    return world.peer.entry(put_facts=link_pb2.PutFacts(entity=entity, facts=facts))


def _told(world: SchedulerWorld) -> set[tuple[str, str, int]]:
    """(entity, step, day) of what was fired."""
    return {
        (one.entity, one.content.type, (one.occur_time.ToDatetime(tzinfo=START.tzinfo) - START).days)
        for one in world.peer.notifications
    }


async def test_a_timeline_runs_its_steps_and_follow_ups_on_their_days(world: SchedulerWorld) -> None:
    """Each tells its timeline; the follow-up counts from its parent."""
    (result,) = await world.peer.send(_start(world, "a"))
    assert result.changed == 2
    for count, day in ((1, 25), (2, 30), (3, 32)):
        world.clock.set(START + day * DAY)
        await world.peer.received(count)
    assert _told(world) == {("a", "remind", 25), ("a", "check", 30), ("a", "again", 32)}
    assert {one.timeline for one in world.peer.notifications} == {"trial"}


async def test_inv2_a_timeline_started_twice_runs_once(world: SchedulerWorld) -> None:
    """In one frame and over two."""
    results = await world.peer.send(_start(world, "a"), _start(world, "a"))
    results += await world.peer.send(_start(world, "a"))
    assert [result.changed for result in results] == [2, 0, 0]


async def test_a_condition_on_facts_decides_at_fire_time_and_the_verdict_is_kept(world: SchedulerWorld) -> None:
    """One paid and one did not; null takes a fact away again."""
    await world.peer.send(
        *(_start(world, entity) for entity in "abc"),
        _put(world, "a", '{"paid": true}'),
        _put(world, "c", '{"paid": true, "plan": "x"}'),
        _put(world, "c", '{"paid": null}'),
    )
    world.clock.set(START + 25 * DAY)
    await world.peer.received(2)
    assert _told(world) == {("b", "remind", 25), ("c", "remind", 25)}
    timer_id = step_timer_id(_run_id("trial", "a"), "remind")
    note = '{"condition": "!has(facts.paid)", "holds": false, "facts": {"paid": true}}'
    assert await world.stored(timer_id) == (4, note)


async def test_inv4_cancelling_a_timeline_cancels_its_steps_and_nothing_else(world: SchedulerWorld) -> None:
    """The follow-up that waits included; a plain timer of the same entity stays."""
    peer = world.peer
    await peer.send(_start(world, "a"), peer.timer("a", START + 40 * DAY), _put(world, "a", '{"paid": 1}'))
    world.clock.set(START + 30 * DAY)
    await peer.received(1)
    (result,) = await peer.send(peer.cancel("a", timeline="trial"))
    assert result.changed == 1
    world.clock.set(START + 60 * DAY)
    assert [one.content.type for one in await peer.received(2)] == ["check", "test"]


async def test_an_unknown_timeline_is_refused_in_the_receipt(world: SchedulerWorld) -> None:
    """The entry after it in the same frame is applied all the same."""
    bad, good = await world.peer.send(_start(world, "a", name="nope"), _start(world, "a"))
    assert (bad.error_code, bad.error_reason, bad.changed) == (9, "TIMELINE_NOT_FOUND", 0)
    assert "'nope'" in bad.error_message
    assert good.changed == 2


async def test_inv8_a_timeline_of_another_tenant_is_unknown(world: SchedulerWorld) -> None:
    """Names are per tenant."""
    world.peer.tenant = "other"
    (result,) = await world.peer.send(_start(world, "a"))
    assert result.error_reason == "TIMELINE_NOT_FOUND"
