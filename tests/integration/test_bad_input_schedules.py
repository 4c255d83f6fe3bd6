"""Bad input at the front door, in schedules: what is wrong, where, and what would be right."""

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc
import pytest
from carillon.intake.v1 import intake_pb2
from carillon.scheduler.v1 import timer_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from libs.rpc_client import refusal_of
from libs.wire import to_duration
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.intake_world import (
    IntakeWorld,
    assert_all_refused,
    content,
    days,
    event,
    intake_world,
    schedule,
)


@pytest.fixture
async def world(postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus) -> AsyncIterator[IntakeWorld]:
    """Intake; nobody takes its frames, so what it stores can be counted: nothing."""
    async with intake_world(postgres_url, open_database, open_bus, peers_run=False) as it:
        yield it
        assert await it.stored() == {}


Condition, Retry = timer_pb2.Condition, timer_pb2.RetryPolicy


def span(**parts: float) -> Duration:
    """A Duration."""
    return to_duration(timedelta(**parts))


HOUR = span(hours=1)


def recurring(target: timer_pb2.Target | None = None, **rule: Any) -> intake_pb2.Schedule:
    """A schedule with a recurrence."""
    more = {} if target is None else {"target": target}
    return schedule(recurrence=timer_pb2.Recurrence(**rule), **more)


def retrying(**policy: Any) -> intake_pb2.Schedule:
    """A schedule with a retry policy."""
    return schedule(after=HOUR, target=event(), retry_policy=Retry(**policy))


def asking(**asked: Any) -> intake_pb2.Schedule:
    """A schedule with a condition that a service decides."""
    service = timer_pb2.ServiceCondition(**({"service": "credit-check"} | asked))
    return schedule(after=HOUR, condition=Condition(service=service))


SCHEDULES = [
    (schedule(), "at_time", "one of at_time, after and recurrence must be given"),
    (schedule(after=HOUR, entity=""), "entity", "must be 1-256 characters, got 0"),
    (schedule(after=HOUR, entity="carillon:request:1"), "entity", 'must not start with "carillon:"'),
    (schedule(after=HOUR, type="a b"), "type", "must be 0-128 characters of [a-zA-Z0-9._/-]"),
    (schedule(after=HOUR, target=None), "target", "must have a notification or an event"),
    (schedule(at_time=Timestamp(seconds=-1)), "at_time", "must be a valid time, year 1970 to 2199"),
    (schedule(at_time=Timestamp(seconds=7_258_118_400)), "at_time", "must be a valid time, year 1970 to 2199"),
    (schedule(after=to_duration(timedelta(seconds=-1))), "after", "must be 0s to 3,653 days"),
    (schedule(after=to_duration(timedelta(days=4_000))), "after", "must be 0s to 3,653 days"),
    (schedule(at_time=days(2), expire_time=days(1)), "expire_time", "must be after 2026-03-04T12:00:00+00:00"),
    (schedule(at_time=days(-2), expire_time=days(-1)), "expire_time", "must be after 2026-03-02T12:00:00+00:00"),
    (schedule(after=HOUR, condition=Condition()), "condition.cel", "must be given, or service"),
    (schedule(after=HOUR, condition=Condition(cel="a ==")), "condition.cel", "is not a CEL expression"),
    (schedule(after=HOUR, condition=Condition(cel="paid")), "condition.cel", "knows no 'paid'"),
    (schedule(after=HOUR, retry_policy=Retry()), "retry_policy", "is for event targets only"),
    (
        schedule(after=HOUR, target=event(), retry_policy=Retry(multiplier=11)),
        "retry_policy.multiplier",
        "must be 1.0 to 10.0, got 11",
    ),
    (
        schedule(after=HOUR, target=event(), retry_policy=Retry(maximum_attempts=101)),
        "retry_policy.maximum_attempts",
        "must be 1-100, got 101",
    ),
    (recurring(), "recurrence.cron", "one of cron and rrule must be given"),
    (recurring(cron="61 * * * *"), "recurrence.cron", "'61 * * * *' is not a cron expression"),
    (recurring(cron="* * * * * *"), "recurrence.cron", "must have five fields"),
    (recurring(cron="* " * 129), "recurrence.cron", "must be at most 256 characters, got 258"),
    (recurring(cron="0 9 * * *", zone="Mars/Base"), "recurrence.zone", "'Mars/Base' is not an IANA time zone"),
    (recurring(cron="0 9 * * *", zone="../etc/passwd"), "recurrence.zone", "'../etc/passwd' is not an IANA"),
    (recurring(rrule="FREQ=SOMETIMES"), "recurrence.rrule", ""),
    (recurring(rrule="FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30"), "recurrence.rrule", "has no occurrence any more"),
    (recurring(rrule="FREQ=DAILY;UNTIL=20200101T000000Z"), "recurrence.rrule", "has no occurrence any more"),
    (recurring(cron="0 9 * * *", end_time=days(-1)), "recurrence.end_time", "must be after 2026-03-02T12:00:00"),
    (recurring(cron="0 9 * * *", end_time=days(0.5)), "recurrence.cron", "has no occurrence any more"),
    (recurring(cron="* * * * *", count=10_001), "recurrence.count", "must be at most 10,000, got 10,001"),
    (recurring(cron="0 9 * * *", jitter=to_duration(timedelta(hours=2))), "recurrence.jitter", "must be 0s to 3600s"),
    (recurring(cron="0 9 * * *", exclusions=[days(1)] * 367), "recurrence.exclusions", "must have 0-366 entries"),
    (recurring(cron="0 9 * * *", misfire_policy=9), "recurrence.misfire_policy", "must be one of MISFIRE_POLICY_"),
    (recurring(rrule="FREQ=MINUTELY;INTERVAL=7;BYDAY=MO"), "recurrence.rrule", "must have an INTERVAL that divides"),
    (recurring(rrule="FREQ=DAILY;COUNT=10001"), "recurrence.rrule", "COUNT must be at most 10,000, got 10001"),
    (
        recurring(cron="0 9 * * *", gap_policy=9),
        "recurrence.gap_policy",
        "must be one of GAP_POLICY_SHIFT, GAP_POLICY_",
    ),
    (recurring(cron="0 9 * * *", fold_policy=-1), "recurrence.fold_policy", "must be one of FOLD_POLICY_FIRST, FOLD_"),
    (recurring(cron="0 9 * * *", overlap_policy=9), "recurrence.overlap_policy", "must be one of OVERLAP_POLICY_ALLOW"),
    (recurring(cron="0 9 * * *", jitter=span(hours=-1)), "recurrence.jitter", "must be 0s to 3600s"),
    (recurring(cron="0 9 * * *", catch_up_window=span(days=31)), "recurrence.catch_up_window", "must be 0s to 30 days"),
    (
        recurring(cron="0 9 * * *", catch_up_window=HOUR, misfire_policy=timer_pb2.MISFIRE_POLICY_SKIP),
        "recurrence.catch_up_window",
        "must be absent with MISFIRE_POLICY_SKIP",
    ),
    *(
        (
            recurring(cron="0 9 * * *", overlap_policy=policy, target=target),
            "recurrence.overlap_policy",
            "must be OVERLAP_POLICY_ALLOW, unless the target is an event with report_within",
        )
        for policy in (timer_pb2.OVERLAP_POLICY_SKIP, timer_pb2.OVERLAP_POLICY_BUFFER_ONE)
        for target in (timer_pb2.Target(notification=content()), event(report_within=None), event(report_within=span()))
    ),
    (
        recurring(
            cron="0 9 * * *",
            overlap_policy=timer_pb2.OVERLAP_POLICY_SKIP,
            target=event(report_within=Duration(seconds=1 << 62)),
        ),
        "target.event.report_within",
        "must be 0s to 7 days",
    ),
    (schedule(after=HOUR, target=event(type="")), "target.event.type", "must be 1-128 characters of [a-z0-9._/-]"),
    (schedule(after=HOUR, target=event(payload="[]")), "target.event.payload", "must be a JSON object"),
    *(
        (schedule(after=HOUR, target=event(report_within=one)), "target.event.report_within", "must be 0s to 7 days")
        for one in (span(seconds=-1), span(days=8), Duration(seconds=1 << 62), Duration(seconds=1, nanos=-1))
    ),
    (
        schedule(after=HOUR, target=timer_pb2.Target(notification=content(priority=9))),
        "target.notification.priority",
        "must be one of PRIORITY_LOW, PRIORITY_NORMAL, PRIORITY_HIGH, got 9",
    ),
    (retrying(initial_delay=span()), "retry_policy.initial_delay", "must be 1s to 86400s"),
    (retrying(maximum_delay=span(days=8)), "retry_policy.maximum_delay", "must be 1s to 7 days"),
    (retrying(initial_delay=span(hours=2)), "retry_policy.maximum_delay", "must not be shorter than initial_delay"),
    (retrying(multiplier=float("nan")), "retry_policy.multiplier", "must be 1.0 to 10.0, got nan"),
    (retrying(maximum_age=span(days=31)), "retry_policy.maximum_age", "must be 1s to 30 days"),
    (asking(service=""), "condition.service.service", "must be 1-64 characters of [a-z0-9._-]"),
    (asking(service="Credit Check"), "condition.service.service", "must be 1-64 characters of [a-z0-9._-]"),
    (asking(timeout=span(milliseconds=99)), "condition.service.timeout", "must be 0.1s to 30s"),
    (asking(timeout=span(seconds=31)), "condition.service.timeout", "must be 0.1s to 30s"),
    (asking(no_answer_policy=9), "condition.service.no_answer_policy", "must be one of NO_ANSWER_POLICY_FAIL, NO_"),
    (
        schedule(after=HOUR, condition=Condition(cel="true", service=timer_pb2.ServiceCondition(service="a"))),
        "condition.cel",
        "must be absent where service is given",
    ),
]


async def test_wrong_schedules_name_their_fields(world: IntakeWorld) -> None:
    """Every bound of the contract, all in one batch."""
    items = [item for item, _, _ in SCHEDULES]
    answer = await world.stub.Schedule(intake_pb2.ScheduleRequest(schedules=items, idempotency_key="k"))
    assert_all_refused(answer.results, "schedules", SCHEDULES)


async def error_of(world: IntakeWorld, item: intake_pb2.Schedule) -> tuple[str, str]:
    """The field and the message with which a schedule is refused."""
    (result,) = (await world.stub.Schedule(intake_pb2.ScheduleRequest(schedules=[item]))).results
    assert not result.id
    assert (result.error.code, result.error.reason) == (3, "INVALID_ARGUMENT")
    return result.error.field, result.error.message


@pytest.mark.parametrize(
    ("cel", "why"),
    [
        ("facts.paid ==", "is not a CEL expression: at 14: "),
        ("(" * 2_048, "is not a CEL expression"),
        ("true" + " " * 2_045, "must be 1-2,048 characters, got 2,049"),
        ("paid", "knows no 'paid'; it may read facts, timer and now"),
        ("fetch('https://example.com')", "knows no function 'fetch'; there are "),
        ("1 + 1", "must give true or false, gave a number"),
    ],
)
async def test_malformed_cel(world: IntakeWorld, cel: str, why: str) -> None:
    """It is compiled at the door: what is no condition is never stored."""
    field, message = await error_of(world, schedule(after=HOUR, condition=Condition(cel=cel)))
    assert field == "schedules[0].condition.cel"
    assert message.startswith(f"condition.cel {why}")


@pytest.mark.parametrize(
    ("cel", "why"),
    [
        ("facts.a.all(x, facts.a.all(y, x == y))", "must not have .all() inside of another comprehension"),
        ("facts.a.exists(x, x.matches('(a+)+b'))", "must not use matches() inside of a comprehension"),
        (" && ".join(["facts.a.all(x, x > 0)"] * 5), "must not have more than 4 comprehensions, and one .map()"),
        ("facts.a.map(x, x).map(x, [x, x]).size() > 0", "must not have more than 4 comprehensions, and one .map()"),
    ],
)
async def test_cel_that_is_too_expensive(world: IntakeWorld, cel: str, why: str) -> None:
    """What could take the scheduler long is refused by its shape, and the message says by which."""
    field, message = await error_of(world, schedule(after=HOUR, condition=Condition(cel=cel)))
    assert (field, message) == ("schedules[0].condition.cel", f"condition.cel {why}")


@pytest.mark.parametrize(
    "rule",
    [
        {"rrule": "FREQ=DAILY;UNTIL=20200101T000000Z"},
        {"rrule": "FREQ=DAILY;COUNT=3", "start_time": days(-20)},
        {"rrule": "FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30"},
        {"rrule": "FREQ=DAILY;COUNT=1", "start_time": days(1), "exclusions": [days(1)]},
        {"rrule": "FREQ=YEARLY;BYMONTH=1;BYMONTHDAY=1", "start_time": Timestamp(seconds=7_258_118_399)},
    ],
)
async def test_an_rrule_that_never_fires_again(world: IntakeWorld, rule: dict[str, Any]) -> None:
    """Over, counted out, impossible, all excluded, or beyond the last year: no timer would ever be seen of it."""
    field, message = await error_of(world, recurring(**rule))
    assert field == "schedules[0].recurrence.rrule"
    assert message == (
        "recurrence.rrule has no occurrence any more, to the year 2199; "
        "look at its dates, end_time, count and exclusions"
    )


YEAR_10000 = Timestamp(seconds=253_402_300_800)


@pytest.mark.parametrize(
    ("item", "field"),
    [
        (schedule(at_time=YEAR_10000), "at_time"),
        (schedule(after=HOUR, expire_time=YEAR_10000), "expire_time"),
        (recurring(cron="0 9 * * *", start_time=YEAR_10000), "recurrence.start_time"),
        (recurring(cron="0 9 * * *", end_time=YEAR_10000), "recurrence.end_time"),
    ],
)
async def test_the_year_10000(world: IntakeWorld, item: intake_pb2.Schedule, field: str) -> None:
    """Python's calendar ends before it, and Carillon's in 2199: said, and never an overflow."""
    why = "must be a valid time, year 1970 to 2199"
    assert await error_of(world, item) == (f"schedules[0].{field}", f"{field} {why}")


async def test_an_rrule_until_the_year_10000(world: IntakeWorld) -> None:
    """Within the text of a rule too."""
    field, message = await error_of(world, recurring(rrule="FREQ=DAILY;UNTIL=100000101T000000Z"))
    assert field == "schedules[0].recurrence.rrule"
    assert "UNTIL=100000101T000000Z is not a date and time: it looks like 20131231T235959Z" in message


async def test_an_entity_of_10_kb(world: IntakeWorld) -> None:
    """Stored, it would be in every index and every frame."""
    why = "must be 1-256 characters, got 10,240"
    assert await error_of(world, schedule(after=HOUR, entity="e" * 10_240)) == ("schedules[0].entity", f"entity {why}")


async def test_a_payload_over_the_limit(world: IntakeWorld) -> None:
    """Of a notification and of an event, by one byte."""
    payload = json.dumps({"a": "x" * (65_536 - 8)})
    for name, target in (
        ("notification", timer_pb2.Target(notification=content(payload=payload))),
        ("event", event(payload=payload)),
    ):
        path = f"target.{name}.payload"
        why = f"{path} must be at most 64 KiB, got 65,537 bytes"
        assert await error_of(world, schedule(after=HOUR, target=target)) == (f"schedules[0].{path}", why)


@pytest.mark.parametrize(("count", "got"), [(0, "0"), (1_001, "1,001"), (5_000, "5,000")])
async def test_five_thousand_timers_in_one_call(world: IntakeWorld, count: int, got: str) -> None:
    """As many for one entity are welcome, a thousand at a time; a call of none is a mistake."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await world.stub.Schedule(intake_pb2.ScheduleRequest(schedules=[schedule(after=HOUR)] * count))
    (violation,) = refusal_of(raised.value).violations
    assert violation.field == "schedules"
    assert violation.description == f"must have 1-1,000 entries per call, got {got}"
