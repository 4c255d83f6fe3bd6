"""Rules and timelines through the scheduler's gRPC API, on real Postgres."""

from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import scheduler_pb2, timer_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from libs.ids import new_id
from libs.wire import from_timestamp, to_duration, to_timestamp
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.scheduler_api import until_in, violations_of
from tests.support.scheduler_world import START, SchedulerWorld, scheduler_world

SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
YEAR_10000 = Timestamp(seconds=253_402_300_800)
BOTH_TIMES = {"recurrence.start_time", "after_time"}


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


async def test_a_preview_shows_times_by_the_rule(stub: Any) -> None:
    """Policies are taken and change nothing: the jitter depends on a schedule that there is not."""
    hourly = timer_pb2.Recurrence(
        cron="0 * * * *",
        jitter=to_duration(HOUR),
        catch_up_window=to_duration(30 * DAY),
        misfire_policy=timer_pb2.MISFIRE_POLICY_FIRE_ALL,
        overlap_policy=timer_pb2.OVERLAP_POLICY_BUFFER_ONE,
    )
    assert await _preview(stub, hourly, count=2) == ["2013-07-01T13:00:00+00:00", "2013-07-01T14:00:00+00:00"]


async def test_a_rule_from_long_ago_is_no_trouble(stub: Any) -> None:
    """One that never ends goes on now, and one that has ended is over."""
    for rrule in ("FREQ=MINUTELY", "FREQ=MINUTELY;INTERVAL=7", "FREQ=YEARLY"):
        endless = timer_pb2.Recurrence(rrule=rrule, start_time=Timestamp())
        assert len(await _preview(stub, endless, count=1_000)) == (1_000 if "MIN" in rrule else 50)
    ended = timer_pb2.Recurrence(rrule="FREQ=DAILY", start_time=Timestamp(), end_time=to_timestamp(START))
    assert await _preview(stub, ended) == []


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
        ({"cron": "* * * * *", "jitter": to_duration(2 * HOUR)}, {}, {"recurrence.jitter"}),
        ({"cron": "* * * * *", "jitter": to_duration(-SECOND)}, {}, {"recurrence.jitter"}),
        ({"cron": "* * * * *", "catch_up_window": to_duration(timedelta(31))}, {}, {"recurrence.catch_up_window"}),
        (
            {"cron": "* * * * *", "catch_up_window": to_duration(HOUR), "misfire_policy": 3},
            {},
            {"recurrence.catch_up_window"},
        ),
        (
            {"cron": "* * * * *", "misfire_policy": 4, "overlap_policy": 4},
            {},
            {"recurrence.misfire_policy", "recurrence.overlap_policy"},
        ),
        ({"cron": "* * * * *", "start_time": YEAR_10000}, {"after_time": YEAR_10000}, BOTH_TIMES),
        ({"cron": "* * * * *", "count": 10_001}, {}, {"recurrence.count"}),
        ({"rrule": "FREQ=DAILY;UNTIL=100000101T000000Z"}, {}, {"recurrence.rrule"}),
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
    assert set(await violations_of(stub.PreviewOccurrences(request))) == fields


def _step(name: str, days: int, follow_ups: Sequence[timer_pb2.TimelineStep] = (), **more: Any) -> Any:
    return timer_pb2.TimelineStep(
        name=name,
        offset=to_duration(timedelta(days=days)),
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


async def test_a_timeline_with_events_runs_as_it_was_put(world: SchedulerWorld, stub: Any) -> None:
    """Its steps are tried again by their own policies."""
    event = timer_pb2.EventContent(type="trial.over", payload="{}", report_within=to_duration(HOUR))
    policy = timer_pb2.RetryPolicy(initial_delay=to_duration(SECOND), maximum_attempts=1)
    end = timer_pb2.TimelineStep(name="end", target=timer_pb2.Target(event=event), retry_policy=policy)
    put = timer_pb2.Timeline(name="trial", steps=[end])
    stored = (await stub.PutTimeline(scheduler_pb2.PutTimelineRequest(timeline=put))).timeline
    assert list((await stub.ListTimelines(scheduler_pb2.ListTimelinesRequest())).timelines) == [stored]
    start = link_pb2.StartTimeline(id=new_id().bytes, timeline="trial", entity="e", anchor_time=to_timestamp(START))
    await world.peer.send(world.peer.entry(start_timeline=start))
    (timer,) = await until_in(stub, "AWAITING", 1, entity="e")
    assert (timer.step, timer.retry_policy, timer.target.event) == ("end", stored.steps[0].retry_policy, event)
    report = link_pb2.ReportOutcome(timer_id=UUID(timer.id).bytes, entity="e", attempt=1, error="no such account")
    await world.peer.send(world.peer.entry(report_outcome=report))
    failed, end_of_it = (await stub.Explain(scheduler_pb2.ExplainRequest(id=timer.timeline_run_id))).entries
    name = "step end of the timeline trial for e"
    assert failed.sentence.startswith(f"Attempt 1 of the {name}, begun at 2013-07-01 12:00:00 UTC, failed: no such")
    assert end_of_it.sentence == f"The {name} failed for good after 1 attempt: no such account."


async def test_a_bad_timeline_is_refused_with_the_step_and_field(stub: Any) -> None:
    """Nothing is stored. No service is registered here."""
    asks = timer_pb2.Condition(service=timer_pb2.ServiceCondition(service="crm"))
    bad = timer_pb2.Timeline(name="Trial!", steps=[_step("a", 366 * 11, [_step("b", 1, condition=asks)])])
    assert await violations_of(stub.PutTimeline(scheduler_pb2.PutTimelineRequest(timeline=bad))) == {
        "timeline.name": "must be of lower-case letters, digits and . _ / -",
        "timeline.steps[0].offset": "must be a valid duration of 0s to 3.16224e+08s",
        "timeline.steps[0].follow_ups[0].condition.service.service": (
            "'crm' is not registered with the scheduler (none is)"
        ),
    }
    assert not (await stub.ListTimelines(scheduler_pb2.ListTimelinesRequest())).timelines


async def test_timelines_too_large_for_one_answer_come_in_several(stub: Any) -> None:
    """As with timers."""
    large = timer_pb2.NotificationContent(type="trial", subscribers=["s"], payload=f'{{"x": "{"x" * 60_000}"}}')
    for name in "abc":
        steps = [_step(f"s{n}", n) for n in range(40)]
        for step in steps:
            step.target.notification.CopyFrom(large)
        await stub.PutTimeline(scheduler_pb2.PutTimelineRequest(timeline=timer_pb2.Timeline(name=name, steps=steps)))
    names: list[list[str]] = []
    token = ""
    while not names or token:
        answer = await stub.ListTimelines(scheduler_pb2.ListTimelinesRequest(page_token=token))
        names.append([one.name for one in answer.timelines])
        token = answer.next_page_token
    assert names == [["a"], ["b"], ["c"]]
