"""The scheduler's gRPC API, on real Postgres."""

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import grpc
import pytest
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import scheduler_pb2, timer_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from libs.ids import new_id
from libs.wire import from_timestamp, page_token, to_duration, to_timestamp
from services.scheduler.queries import TimerFilter
from services.scheduler.store_queries import QueryStore
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.scheduler_api import listed, until_in, violations_of
from tests.support.scheduler_world import SHARDS, START, SchedulerWorld, scheduler_world

YEAR_10000 = Timestamp(seconds=253_402_300_800)
ALL = repr(TimerFilter(tenant="acme"))
SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


@pytest.fixture
async def world(postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus) -> AsyncIterator[SchedulerWorld]:
    """A world with one replica."""
    async with scheduler_world(postgres_url, open_database, open_bus) as it:
        await it.start("a")
        yield it


@pytest.fixture
async def stub(world: SchedulerWorld) -> AsyncIterator[Any]:
    """A client for the tenant of the peer."""
    async with world.stub() as it:
        yield it


async def _code(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


def _with_event(world: SchedulerWorld, entity: str, due_at: datetime, **more: Any) -> link_pb2.Entry:
    """A timer whose event must be reported on within an hour."""
    entry = world.peer.timer(entity, due_at, **more)
    event = timer_pb2.EventContent(type="trial.over", report_within=to_duration(HOUR))
    entry.schedule_timer.target.event.CopyFrom(event)
    return entry


def _report(world: SchedulerWorld, entry: link_pb2.Entry, *, error: str = "") -> link_pb2.Entry:
    schedule = entry.schedule_timer
    report = link_pb2.ReportOutcome(timer_id=schedule.id, entity=schedule.entity, attempt=1)
    report.is_done, report.error = not error, error
    return world.peer.entry(report_outcome=report)


async def _in_all_states(world: SchedulerWorld, stub: Any) -> dict[str, str]:
    """One timer of `e` per state that a one-shot can have; ids by state."""
    peer = world.peer

    def conditional(condition: timer_pb2.Condition) -> link_pb2.Entry:
        return peer.timer("e", START, condition=condition)

    entries = {
        "FIRED": peer.timer("e", START),
        "SKIPPED": conditional(timer_pb2.Condition(cel="false")),
        "FAILED": conditional(timer_pb2.Condition(cel="facts.gone")),
        "EXPIRED": peer.timer("e", START - SECOND, expire_time=to_timestamp(START)),
        "CANCELLED": peer.timer("e", START + HOUR, type="gone"),
        "PAUSED": peer.timer("e", START + HOUR, type="later"),
        "ASKING": conditional(timer_pb2.Condition(service=timer_pb2.ServiceCondition(service="nobody"))),
        "AWAITING": _with_event(world, "e", START),
        "RETRYING": _with_event(world, "e", START),
        "DONE": _with_event(world, "e", START),
    }
    await peer.send(*entries.values())
    await peer.send(peer.cancel("e", type="gone"))
    later = link_pb2.PauseTimers(selector=link_pb2.TimerSelector(entity="e", type="later"), is_paused=True)
    await peer.send(peer.entry(pause_timers=later))
    entries["SCHEDULED"] = peer.timer("e", START + HOUR)
    await peer.send(entries["SCHEDULED"])
    await until_in(stub, "AWAITING", 3)
    await peer.send(_report(world, entries["RETRYING"], error="try later"), _report(world, entries["DONE"]))
    await until_in(stub, "ASKING", 1)
    await peer.received(1)
    return {state: str(_id_of(entry)) for state, entry in entries.items()}


def _id_of(entry: link_pb2.Entry) -> Any:
    return UUID(bytes=entry.schedule_timer.id)


async def test_a_timer_is_told_as_it_was_scheduled(world: SchedulerWorld, stub: Any) -> None:
    """What went in comes out, with its shard and its turn."""
    entry = world.peer.timer("order-1", START + MINUTE, type="reminder", text='{"n": 1}')
    await world.peer.send(entry)
    timer = (await stub.GetTimer(scheduler_pb2.GetTimerRequest(id=str(_id_of(entry))))).timer
    assert (timer.entity, timer.type, timer.state) == ("order-1", "reminder", timer_pb2.TIMER_STATE_SCHEDULED)
    assert from_timestamp(timer.due_time) == from_timestamp(timer.fire_time) == START + MINUTE
    assert timer.target.notification.payload == '{"n": 1}'
    assert timer.schedule_id == timer.id
    assert not timer.HasField("decided_time")


async def test_an_unknown_timer_is_not_found_and_a_bad_id_is_named(stub: Any) -> None:
    """Two different mistakes, two different answers."""
    assert await _code(stub.GetTimer(scheduler_pb2.GetTimerRequest(id=str(new_id())))) is grpc.StatusCode.NOT_FOUND
    assert set(await violations_of(stub.GetTimer(scheduler_pb2.GetTimerRequest(id="x")))) == {"id"}


async def test_a_timer_is_told_with_its_attempts(world: SchedulerWorld, stub: Any) -> None:
    """What was tried, how it ended, and how often; of no other timer, and to no other tenant."""
    entry = _with_event(world, "e", START)
    await world.peer.send(entry, _with_event(world, "e", START))
    await until_in(stub, "AWAITING", 2)
    request = scheduler_pb2.GetTimerRequest(id=str(_id_of(entry)))
    assert not (await stub.GetTimer(request)).attempts
    world.clock.advance(MINUTE)
    await world.peer.send(_report(world, entry, error="no such account"))
    answer = await stub.GetTimer(request)
    assert (answer.timer.attempts, answer.timer.last_error) == (1, "no such account")
    (attempt,) = answer.attempts
    assert (attempt.number, attempt.error) == (1, "no such account")
    assert (from_timestamp(attempt.start_time), from_timestamp(attempt.end_time)) == (START, START + MINUTE)
    (timer_id,) = [UUID(answer.timer.id)]
    assert await QueryStore(world.db).attempts("other", [timer_id]) == {}


async def test_timers_are_listed_in_each_of_their_states(world: SchedulerWorld, stub: Any) -> None:
    """FIRED is what is behind the watermark; each filter finds its own timer, with what was decided about it."""
    ids = await _in_all_states(world, stub)
    decided = {"FIRED", "SKIPPED", "FAILED", "EXPIRED", "CANCELLED", "DONE"}
    for state, timer_id in ids.items():
        wanted = timer_pb2.TimerState.Value(f"TIMER_STATE_{state}")
        for entity in ("", "e"):
            (timer,) = await listed(stub, entity=entity, states=[wanted])
            assert (timer.id, timer.state) == (timer_id, wanted)
            assert timer.HasField("decided_time") == (state in decided)
            assert bool(timer.last_error) == (state in {"FAILED", "RETRYING", "ASKING"})
            assert bool(timer.verdict) == (state in {"FAILED", "SKIPPED"})
            assert timer.attempts == (state in {"AWAITING", "RETRYING", "DONE"})
    several = ["FIRED", "SCHEDULED", "DONE"]
    found = await listed(stub, states=[timer_pb2.TimerState.Value(f"TIMER_STATE_{state}") for state in several])
    assert {timer.id for timer in found} == {ids[state] for state in several}
    assert {timer.id for timer in await listed(stub)} == set(ids.values())


async def test_a_buffered_occurrence_is_listed_and_explained(world: SchedulerWorld, stub: Any) -> None:
    """By the occurrence it waits for."""
    entry = _with_event(world, "e", START)
    entry.schedule_timer.ClearField("due_time")
    every_minute = timer_pb2.Recurrence(cron="* * * * *", overlap_policy=timer_pb2.OVERLAP_POLICY_BUFFER_ONE)
    entry.schedule_timer.recurrence.CopyFrom(every_minute)
    await world.peer.send(entry)
    world.clock.advance(MINUTE)
    (first,) = await until_in(stub, "AWAITING", 1)
    world.clock.advance(MINUTE)
    (buffered,) = await until_in(stub, "BUFFERED", 1)
    assert (buffered.occurrence, buffered.schedule_id) == (2, str(_id_of(entry)))
    assert from_timestamp(buffered.nominal_time) == START + 2 * MINUTE
    (told,) = (await stub.Explain(scheduler_pb2.ExplainRequest(id=buffered.id))).entries
    assert f"waits until {first.id} has an outcome" in told.sentence
    assert list(told.related_ids) == [str(_id_of(entry)), first.id]
    whole = (await stub.Explain(scheduler_pb2.ExplainRequest(id=str(_id_of(entry))))).entries
    assert [one.kind for one in whole] == ["timer_awaiting", "timer_buffered", "timer_expected"]


async def test_pages_add_up_to_the_whole_list(world: SchedulerWorld, stub: Any) -> None:
    """In the order of fire time and id, for one entity and over all shards; no timer twice, none left out."""
    peer = world.peer
    await peer.send(*(peer.timer(f"e{n % 7}", START + HOUR + n % 4 * SECOND) for n in range(50)))
    scheduled = {"states": [timer_pb2.TIMER_STATE_SCHEDULED]}
    cases: list[tuple[int, int, dict[str, Any]]] = [
        (7, 50, {}),
        (50, 50, {}),
        (9, 50, scheduled),
        (1, 7, {"entity": "e1"}),
    ]
    for page_size, expected, filters in cases:
        found = await listed(stub, page_size=page_size, **filters)
        places = [(from_timestamp(timer.fire_time), timer.id) for timer in found]
        assert places == sorted(places)
        assert len(places) == expected
        assert (len({timer.shard for timer in found}) == 1) == ("entity" in filters)


async def test_a_page_ends_before_it_is_too_large_to_be_sent(world: SchedulerWorld, stub: Any) -> None:
    """The token goes on, so nothing is lost; timers of an entity and of the tenant alike."""
    peer = world.peer
    text = f'{{"x": "{"x" * 60_000}"}}'
    await peer.send(*(peer.timer(f"e{n % 2}", START + HOUR, text=text) for n in range(140)))
    for entity, expected in (("", 140), ("e1", 70)):
        first = await stub.ListTimers(scheduler_pb2.ListTimersRequest(page_size=1_000, entity=entity))
        assert 50 < len(first.timers) < 70
        assert 3 << 20 < first.ByteSize() < 7 << 19
        assert len(await listed(stub, page_size=1_000, entity=entity)) == expected


async def test_five_thousand_timers_of_one_entity_are_no_trouble(world: SchedulerWorld, stub: Any) -> None:
    """They are listed in pages, explained as far as there is room, and cancelled by one command."""
    peer = world.peer
    for start in range(0, 5_000, 500):
        await peer.send(*(peer.timer("e", START + HOUR + n * SECOND) for n in range(start, start + 500)))
    timers = await listed(stub, entity="e", page_size=1_000)
    assert [(from_timestamp(one.fire_time) - START - HOUR) / SECOND for one in timers] == [*range(5_000)]
    story = await stub.Explain(scheduler_pb2.ExplainRequest(id="e"))
    assert [one.details["timer_id"] for one in story.entries] == [one.id for one in timers[:1_000]]
    assert story.is_cut
    (result,) = await peer.send(peer.cancel("e"))
    assert result.changed == 5_000
    assert not await listed(stub, entity="e", states=[timer_pb2.TIMER_STATE_SCHEDULED])


async def test_timers_are_filtered_by_type_and_time(world: SchedulerWorld, stub: Any) -> None:
    """From included, until excluded."""
    peer = world.peer
    await peer.send(*(peer.timer("e", START + n * HOUR, type="a" if n % 2 else "b") for n in range(1, 5)))

    async def hours(**filters: Any) -> list[float]:
        timers = (await stub.ListTimers(scheduler_pb2.ListTimersRequest(**filters))).timers
        return [(from_timestamp(timer.due_time) - START) / HOUR for timer in timers]

    assert await hours(type="a") == [1, 3]
    times = {"from_time": to_timestamp(START + 2 * HOUR), "until_time": to_timestamp(START + 4 * HOUR)}
    assert await hours(**times) == [2, 3]
    assert await hours(**times, type="b") == [2]


async def test_timers_that_services_set_for_themselves_are_listed_only_when_asked_for(
    world: SchedulerWorld, stub: Any
) -> None:
    """Pages are full and lead on however many lie between; a named entity needs no asking; shards count both."""
    peer = world.peer
    names = [f"carillon:window:{n}" if n % 4 else f"e{n}" for n in range(20)]
    await peer.send(*(peer.timer(name, START + HOUR + n * SECOND) for n, name in enumerate(names)))
    first = await stub.ListTimers(scheduler_pb2.ListTimersRequest(page_size=3))
    assert [one.entity for one in first.timers] == ["e0", "e4", "e8"]
    assert [one.entity for one in await listed(stub, page_size=3)] == ["e0", "e4", "e8", "e12", "e16"]
    assert [one.entity for one in await listed(stub, page_size=3, include_internal=True)] == names
    assert [one.entity for one in await listed(stub, entity="carillon:window:7")] == ["carillon:window:7"]
    shards = (await stub.ListShards(scheduler_pb2.ListShardsRequest())).shards
    assert (sum(one.pending for one in shards), sum(one.pending_internal for one in shards)) == (20, 15)
    token = first.next_page_token
    other = scheduler_pb2.ListTimersRequest(page_size=3, page_token=token, include_internal=True)
    assert set(await violations_of(stub.ListTimers(other))) == {"page_token"}


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        ({"page_size": 1_001}, {"page_size"}),
        ({"page_token": "x"}, {"page_token"}),
        ({"entity": "x" * 257, "type": "x" * 129}, {"entity", "type"}),
        ({"from_time": to_timestamp(START), "until_time": to_timestamp(START)}, {"until_time"}),
        ({"states": [0, 99]}, {"states[0]", "states[1]"}),
        ({"from_time": YEAR_10000, "until_time": Timestamp(seconds=-1)}, {"from_time", "until_time"}),
        ({"until_time": Timestamp(nanos=-1)}, {"until_time"}),
        ({"entity": "e" * 10_240}, {"entity"}),
        ({"entity": "a\x00b", "type": "\x00"}, {"entity", "type"}),
        ({"page_token": page_token({"at": "tomorrow", "id": str(new_id())}, query=ALL)}, {"page_token"}),
        ({"page_token": page_token({"at": START.isoformat(), "id": "x"}, query=ALL)}, {"page_token"}),
        ({"page_token": page_token({"at": "2013-07-01T12:00:00", "id": str(new_id())}, query=ALL)}, {"page_token"}),
    ],
)
async def test_a_bad_question_is_answered_with_the_field(request_: dict[str, Any], fields: set[str], stub: Any) -> None:
    """All of them at once."""
    assert set(await violations_of(stub.ListTimers(scheduler_pb2.ListTimersRequest(**request_)))) == fields


async def test_a_page_token_is_for_its_own_filters(world: SchedulerWorld, stub: Any) -> None:
    """Changing the entity under it is refused."""
    await world.peer.send(*(world.peer.timer("e", START + HOUR) for _ in range(2)))
    token = (await stub.ListTimers(scheduler_pb2.ListTimersRequest(page_size=1))).next_page_token
    request = scheduler_pb2.ListTimersRequest(entity="f", page_size=1, page_token=token)
    assert set(await violations_of(stub.ListTimers(request))) == {"page_token"}


async def test_inv8_a_tenant_sees_nothing_of_another(world: SchedulerWorld, stub: Any) -> None:
    """Not by id, list, explain, count or timeline."""
    entry = world.peer.timer("e", START + HOUR)
    await world.peer.send(entry)
    step = timer_pb2.TimelineStep(
        name="remind", target=timer_pb2.Target(notification=entry.schedule_timer.target.notification)
    )
    timeline = timer_pb2.Timeline(name="trial", steps=[step])
    await stub.PutTimeline(scheduler_pb2.PutTimelineRequest(timeline=timeline))
    timer_id = str(_id_of(entry))
    async with world.stub("other") as other:
        request = scheduler_pb2.GetTimerRequest(id=timer_id)
        assert await _code(other.GetTimer(request)) is grpc.StatusCode.NOT_FOUND
        assert not (await other.ListTimers(scheduler_pb2.ListTimersRequest(entity="e"))).timers
        for text in (timer_id, "e"):
            assert not (await other.Explain(scheduler_pb2.ExplainRequest(id=text))).entries
        assert not (await other.ListTimelines(scheduler_pb2.ListTimelinesRequest())).timelines
        assert sum(one.pending for one in (await other.ListShards(scheduler_pb2.ListShardsRequest())).shards) == 0
    assert sum(one.pending for one in (await stub.ListShards(scheduler_pb2.ListShardsRequest())).shards) == 1


async def test_shards_are_told_with_their_holder_and_what_waits(world: SchedulerWorld, stub: Any) -> None:
    """All of them, ascending. What awaits its report is pending as well, and due once that is late; what is paused has
    no turn to come."""
    await world.until_held("a")
    peer = world.peer
    await peer.send(*(peer.timer(f"e{n}", START + DAY) for n in range(10)), _with_event(world, "f", START))
    paused = link_pb2.PauseTimers(selector=link_pb2.TimerSelector(entity="e9"), is_paused=True)
    await peer.send(peer.entry(pause_timers=paused))
    await until_in(stub, "AWAITING", 1)
    shards = (await stub.ListShards(scheduler_pb2.ListShardsRequest())).shards
    assert [shard.number for shard in shards] == list(range(SHARDS))
    assert {shard.holder for shard in shards} == {"a"}
    assert all(shard.epoch >= 1 and shard.HasField("lease_until_time") for shard in shards)
    assert (sum(shard.pending for shard in shards), sum(shard.due for shard in shards)) == (10, 0)
    later = await QueryStore(world.db).shards("acme", START + HOUR)
    assert (sum(shard.pending for shard in later), sum(shard.due for shard in later)) == (10, 1)


async def test_explain_tells_what_happened_and_what_will(world: SchedulerWorld, stub: Any) -> None:
    """For the entity all of it, in order; for an id that timer; for what nobody knows, nothing."""
    ids = await _in_all_states(world, stub)

    async def told(text: str) -> list[Any]:
        entries = list((await stub.Explain(scheduler_pb2.ExplainRequest(id=text))).entries)
        times = [from_timestamp(entry.time) for entry in entries]
        assert times == sorted(times)
        assert {entry.service for entry in entries} <= {"scheduler"}
        return entries

    entries = await told("e")
    of_states = {f"timer_{state.lower()}" for state in ids if state != "SCHEDULED"}
    assert {one.kind for one in entries} == of_states | {"timer_expected", "attempt_failed", "attempt_done"}
    assert {one.kind for one in entries if one.is_expected} == {"timer_expected", "timer_retrying"}
    (cancelled,) = await told(ids["CANCELLED"])
    assert cancelled.sentence == f"The timer {ids['CANCELLED']} of e was cancelled: a test says so."
    assert [one.kind for one in await told(ids["DONE"])] == ["attempt_done", "timer_done"]
    assert await told(str(new_id())) == []


async def test_a_bad_id_is_not_explained(stub: Any) -> None:
    """Neither nothing nor too much."""
    for text in ("", "e" * 10_240, "a\x00b"):
        assert set(await violations_of(stub.Explain(scheduler_pb2.ExplainRequest(id=text)))) == {"id"}
