"""The scheduler's gRPC API, on real Postgres."""

from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import grpc
import pytest
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import scheduler_pb2, timer_pb2
from google.protobuf.duration_pb2 import Duration

from libs.ids import new_id
from libs.rpc_client import refusal_of
from libs.wire import from_timestamp, to_timestamp
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.scheduler_world import SHARDS, START, SchedulerWorld, scheduler_world

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)


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


async def _violations(call: Any) -> dict[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return {one.field: one.description for one in refusal_of(caught.value).violations}


async def _code(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


def _conditional(world: SchedulerWorld, cel: str) -> link_pb2.Entry:
    return world.peer.timer("e", START, condition=timer_pb2.Condition(cel=cel))


async def _in_all_states(world: SchedulerWorld) -> dict[str, str]:
    """One timer of `e` per state that there can be; ids by state."""
    peer = world.peer
    entries = {
        "FIRED": peer.timer("e", START),
        "SKIPPED": _conditional(world, "false"),
        "FAILED": _conditional(world, "facts.gone"),
        "EXPIRED": peer.timer("e", START - SECOND, expire_time=to_timestamp(START)),
        "CANCELLED": peer.timer("e", START + HOUR, type="gone"),
    }
    await peer.send(*entries.values())
    await peer.send(peer.cancel("e", type="gone"))
    entries["SCHEDULED"] = peer.timer("e", START + HOUR)
    await peer.send(entries["SCHEDULED"])
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
    assert set(await _violations(stub.GetTimer(scheduler_pb2.GetTimerRequest(id="x")))) == {"id"}


async def test_timers_are_listed_in_each_of_their_states(world: SchedulerWorld, stub: Any) -> None:
    """FIRED is what is behind the watermark; each filter finds its own timer, with what was decided about it."""
    ids = await _in_all_states(world)
    for state, timer_id in ids.items():
        wanted = timer_pb2.TimerState.Value(f"TIMER_STATE_{state}")
        request = scheduler_pb2.ListTimersRequest(entity="e", states=[wanted])
        (timer,) = (await stub.ListTimers(request)).timers
        assert (timer.id, timer.state) == (timer_id, wanted)
        assert timer.HasField("decided_time") == (state != "SCHEDULED")
        assert bool(timer.last_error) == (state == "FAILED")
        assert bool(timer.verdict) == (state == "SKIPPED")
    several = [timer_pb2.TIMER_STATE_FIRED, timer_pb2.TIMER_STATE_SCHEDULED]
    found = (await stub.ListTimers(scheduler_pb2.ListTimersRequest(states=several))).timers
    assert {timer.id for timer in found} == {ids["FIRED"], ids["SCHEDULED"]}


async def test_pages_add_up_to_the_whole_list(world: SchedulerWorld, stub: Any) -> None:
    """In firing order for one entity; shard after shard for a tenant; no timer twice, none left out."""
    peer = world.peer
    await peer.send(*(peer.timer(f"e{n % 3}", START + HOUR + n % 4 * SECOND) for n in range(25)))
    for entity, expected in (("", 25), ("e1", 8)):
        listed: list[timer_pb2.Timer] = []
        token = ""
        while True:
            request = scheduler_pb2.ListTimersRequest(entity=entity, page_size=4, page_token=token)
            answer = await stub.ListTimers(request)
            listed += answer.timers
            token = answer.next_page_token
            if not token:
                break
        assert len({timer.id for timer in listed}) == len(listed) == expected
        places = [(timer.shard, from_timestamp(timer.fire_time), timer.id) for timer in listed]
        assert places == sorted(places)


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


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        ({"page_size": 1_001}, {"page_size"}),
        ({"page_token": "x"}, {"page_token"}),
        ({"entity": "x" * 257, "type": "x" * 129}, {"entity", "type"}),
        ({"from_time": to_timestamp(START), "until_time": to_timestamp(START)}, {"until_time"}),
        ({"states": [0, 99]}, {"states[0]", "states[1]"}),
    ],
)
async def test_a_bad_question_is_answered_with_the_field(request_: dict[str, Any], fields: set[str], stub: Any) -> None:
    """All of them at once."""
    assert set(await _violations(stub.ListTimers(scheduler_pb2.ListTimersRequest(**request_)))) == fields


async def test_a_page_token_is_for_its_own_filters(world: SchedulerWorld, stub: Any) -> None:
    """Changing the entity under it is refused."""
    await world.peer.send(*(world.peer.timer("e", START + HOUR) for _ in range(2)))
    token = (await stub.ListTimers(scheduler_pb2.ListTimersRequest(page_size=1))).next_page_token
    request = scheduler_pb2.ListTimersRequest(entity="f", page_size=1, page_token=token)
    assert set(await _violations(stub.ListTimers(request))) == {"page_token"}


async def test_inv8_a_tenant_sees_nothing_of_another(world: SchedulerWorld, stub: Any) -> None:
    """Not by id, list, explain, count or timeline."""
    entry = world.peer.timer("e", START + HOUR)
    await world.peer.send(entry)
    await stub.PutTimeline(scheduler_pb2.PutTimelineRequest(timeline=_timeline()))
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


def _duration(length: timedelta) -> Duration:
    message = Duration()
    message.FromTimedelta(length)
    return message


async def _preview(stub: Any, recurrence: timer_pb2.Recurrence, **more: Any) -> list[str]:
    request = scheduler_pb2.PreviewOccurrencesRequest(recurrence=recurrence, **more)
    answer = await stub.PreviewOccurrences(request)
    return [from_timestamp(at).isoformat() for at in answer.times]


async def test_a_preview_shows_the_next_occurrences(stub: Any) -> None:
    """Strictly after now, or after the time given, in UTC."""
    daily = timer_pb2.Recurrence(cron="0 9 * * *", zone="America/New_York")
    assert await _preview(stub, daily, count=2) == ["2013-07-01T13:00:00+00:00", "2013-07-02T13:00:00+00:00"]
    weekly = timer_pb2.Recurrence(rrule="FREQ=WEEKLY;BYDAY=FR;BYHOUR=8;BYMINUTE=0;BYSECOND=0")
    after = to_timestamp(START + timedelta(days=30))
    assert await _preview(stub, weekly, after_time=after, count=1) == ["2013-08-02T08:00:00+00:00"]
    assert len(await _preview(stub, daily)) == 10


@pytest.mark.parametrize(
    ("recurrence", "more", "fields"),
    [
        ({"cron": "61 * * * *"}, {}, {"recurrence.cron"}),
        ({"cron": "* * * *"}, {}, {"recurrence.cron"}),
        ({"rrule": "FREQ=SOMETIMES"}, {}, {"recurrence.rrule"}),
        ({"cron": "* * * * *", "zone": "Mars/Base"}, {}, {"recurrence.zone"}),
        ({}, {}, {"recurrence.cron"}),
        ({"cron": "* * * * *"}, {"count": 1_001}, {"count"}),
        ({"rrule": "FREQ=MINUTELY;INTERVAL=7;BYDAY=MO;BYHOUR=3"}, {}, {"recurrence.rrule"}),
        ({"cron": "1 " * 200}, {}, {"recurrence.cron"}),
        ({"cron": "* * * * *", "jitter": _duration(timedelta(seconds=1))}, {}, {"recurrence.jitter"}),
        ({"cron": "* * * * *", "catch_up_window": _duration(timedelta(hours=1))}, {}, {"recurrence.catch_up_window"}),
        ({"cron": "* * * * *", "misfire_policy": 3}, {}, {"recurrence.misfire_policy"}),
        ({"cron": "* * * * *", "overlap_policy": 2}, {}, {"recurrence.overlap_policy"}),
        (
            {"cron": "* * * * *", "gap_policy": 9, "fold_policy": 9},
            {},
            {"recurrence.gap_policy", "recurrence.fold_policy"},
        ),
        ({"cron": "* * * * *", "exclusions": 400 * [to_timestamp(START)]}, {}, {"recurrence.exclusions"}),
    ],
)
async def test_a_preview_names_the_part_of_the_rule_that_is_wrong(
    recurrence: dict[str, Any], more: dict[str, Any], fields: set[str], stub: Any
) -> None:
    """Whatever is sent, an answer comes at once."""
    request = scheduler_pb2.PreviewOccurrencesRequest(recurrence=timer_pb2.Recurrence(**recurrence), **more)
    assert set(await _violations(stub.PreviewOccurrences(request))) == fields


_NONSENSE = timer_pb2.Condition(cel="(")


def _step(name: str, days: int, follow_ups: Sequence[timer_pb2.TimelineStep] = (), **more: Any) -> Any:
    return timer_pb2.TimelineStep(
        name=name,
        offset=_duration(timedelta(days=days)),
        target=timer_pb2.Target(notification=timer_pb2.NotificationContent(type="trial", subscribers=["s"])),
        follow_ups=follow_ups,
        **more,
    )


def _timeline(name: str = "trial", days: int = 25, **more: Any) -> timer_pb2.Timeline:
    return timer_pb2.Timeline(name=name, steps=[_step("remind", days, [_step("again", 2)])], **more)


async def test_a_timeline_gets_a_new_version_when_it_changes_and_only_then(stub: Any) -> None:
    """The newest of each is listed, or all versions of one, newest first."""

    async def put(timeline: timer_pb2.Timeline) -> int:
        answer = await stub.PutTimeline(scheduler_pb2.PutTimelineRequest(timeline=timeline))
        return int(answer.timeline.version)

    assert [await put(_timeline()), await put(_timeline()), await put(_timeline(days=26))] == [1, 1, 2]
    assert await put(_timeline(days=26, description="says more")) == 3
    assert await put(_timeline()) == 4
    assert await put(_timeline("other")) == 1

    async def listed(**request: Any) -> tuple[list[tuple[str, int]], str]:
        answer = await stub.ListTimelines(scheduler_pb2.ListTimelinesRequest(**request))
        return [(one.name, one.version) for one in answer.timelines], answer.next_page_token

    assert (await listed())[0] == [("other", 1), ("trial", 4)]
    first, token = await listed(name="trial", page_size=3)
    second, end = await listed(name="trial", page_size=3, page_token=token)
    assert (first + second, end) == ([("trial", version) for version in (4, 3, 2, 1)], "")
    assert (await listed(page_size=1))[0] == [("other", 1)]


@pytest.mark.parametrize(
    ("timeline", "fields"),
    [
        (timer_pb2.Timeline(name="Trial!", steps=[_step("a", 1)]), {"timeline.name"}),
        (timer_pb2.Timeline(name="trial"), {"timeline.steps"}),
        (timer_pb2.Timeline(name="trial", steps=[_step("a", 1), _step("a", 2)]), {"timeline.steps"}),
        (timer_pb2.Timeline(name="trial", steps=[_step("A b", 1)]), {"timeline.steps[0].name"}),
        (
            timer_pb2.Timeline(name="t", steps=[_step("a", 1, [_step("b", 1, condition=_NONSENSE)])]),
            {"timeline.steps[0].follow_ups[0].condition.cel"},
        ),
        (
            timer_pb2.Timeline(name="t", steps=[timer_pb2.TimelineStep(name="a", offset=_duration(SECOND))]),
            {"timeline.steps[0].target"},
        ),
        (timer_pb2.Timeline(name="t", steps=[_step("a", 366 * 11)]), {"timeline.steps[0].offset"}),
    ],
)
async def test_a_bad_timeline_is_refused_with_the_step_and_field(
    timeline: timer_pb2.Timeline, fields: set[str], stub: Any
) -> None:
    """Nothing is stored."""
    request = scheduler_pb2.PutTimelineRequest(timeline=timeline)
    assert set(await _violations(stub.PutTimeline(request))) == fields
    assert not (await stub.ListTimelines(scheduler_pb2.ListTimelinesRequest())).timelines


async def test_shards_are_told_with_their_holder_and_what_waits(world: SchedulerWorld, stub: Any) -> None:
    """All of them, ascending; pending and due are counted."""
    await world.until_held("a")
    await world.peer.send(*(world.peer.timer(f"e{n}", START + HOUR) for n in range(10)))
    shards = (await stub.ListShards(scheduler_pb2.ListShardsRequest())).shards
    assert [shard.number for shard in shards] == list(range(SHARDS))
    assert {shard.holder for shard in shards} == {"a"}
    assert all(shard.epoch >= 1 and shard.HasField("lease_until_time") for shard in shards)
    assert (sum(shard.pending for shard in shards), sum(shard.due for shard in shards)) == (10, 0)


async def test_explain_tells_what_happened_and_what_will(world: SchedulerWorld, stub: Any) -> None:
    """For the entity all of it, in order; for an id that timer; for what nobody knows, nothing."""
    ids = await _in_all_states(world)

    async def kinds(text: str) -> list[str]:
        answer = await stub.Explain(scheduler_pb2.ExplainRequest(id=text))
        times = [from_timestamp(entry.time) for entry in answer.entries]
        assert times == sorted(times)
        assert {entry.service for entry in answer.entries} <= {"scheduler"}
        return [entry.kind for entry in answer.entries]

    told = await kinds("e")
    assert told[-1] == "timer_expected"
    assert set(told) == {"timer_expected"} | {f"timer_{state.lower()}" for state in ids if state != "SCHEDULED"}
    assert await kinds(ids["CANCELLED"]) == ["timer_cancelled"]
    assert await kinds(str(new_id())) == []
