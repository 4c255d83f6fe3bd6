"""Timelines from requests: every field of every step, checked and read."""

import math
from datetime import timedelta
from typing import Any

import pytest
from carillon.scheduler.v1 import timer_pb2
from google.protobuf.duration_pb2 import Duration

from libs.errors import InvalidArgument, Violations
from libs.wire import to_duration
from services.scheduler.attempts import RetryPolicy
from services.scheduler.conditions import NoAnswer, ServiceCondition
from services.scheduler.rpc_messages import timeline_message
from services.scheduler.rpc_timelines import read_steps
from services.scheduler.timelines import Step, Timeline
from services.scheduler.timer import TargetKind
from tests.support.scheduler_table import DAY, HOUR, MINUTE, NOW, SECOND

NOTIFICATION = timer_pb2.Target(notification=timer_pb2.NotificationContent(type="trial", subscribers=["s"]))
SERVICES = frozenset({"billing", "crm"})


def _event(**content: Any) -> timer_pb2.Target:
    return timer_pb2.Target(event=timer_pb2.EventContent(**{"type": "trial.over", **content}))


def _notification(**content: Any) -> timer_pb2.Target:
    full = {"type": "trial", "subscribers": ["s"], **content}
    return timer_pb2.Target(notification=timer_pb2.NotificationContent(**full))


def _step(name: str = "a", **more: Any) -> timer_pb2.TimelineStep:
    return timer_pb2.TimelineStep(**{"name": name, "offset": to_duration(DAY), "target": NOTIFICATION, **more})


def _asks(**service: Any) -> timer_pb2.Condition:
    return timer_pb2.Condition(service=timer_pb2.ServiceCondition(**{"service": "crm", **service}))


def _retries(**policy: Any) -> dict[str, Any]:
    return {"target": _event(), "retry_policy": timer_pb2.RetryPolicy(**policy)}


def _nested(depth: int) -> timer_pb2.TimelineStep:
    return _step(f"s{depth}", follow_ups=[_nested(depth - 1)] if depth > 1 else [])


def _read(*steps: timer_pb2.TimelineStep, name: str = "trial", description: str = "") -> tuple[Step, ...]:
    violations = Violations(limit=100)
    timeline = timer_pb2.Timeline(name=name, description=description, steps=steps)
    read = read_steps(violations, timeline, services=SERVICES)
    violations.raise_if_any()
    return read


def _refused(*steps: timer_pb2.TimelineStep, **more: str) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        _read(*steps, **more)
    return {one.field: one.description for one in caught.value.violations}


def test_a_step_with_everything_is_told_as_it_was_put() -> None:
    """Event, report, retry policy, a service that decides, and follow-ups."""
    policy = timer_pb2.RetryPolicy(
        initial_delay=to_duration(SECOND),
        maximum_delay=to_duration(HOUR),
        multiplier=1.5,
        maximum_attempts=3,
        maximum_age=to_duration(DAY),
    )
    asks = _asks(timeout=to_duration(2 * SECOND), no_answer_policy=timer_pb2.NO_ANSWER_POLICY_SKIP)
    target = _event(payload='{"n": 1}', report_within=to_duration(MINUTE))
    decided = _step("b", condition=timer_pb2.Condition(cel="facts.x"))
    put = _step(condition=asks, target=target, retry_policy=policy, follow_ups=[decided])
    steps = _read(put)
    told = timeline_message(Timeline(name="trial", version=1, description="", steps=steps, created_at=NOW))
    assert list(told.steps) == [put]
    (read,) = steps
    assert (read.target_kind, read.report_within) == (TargetKind.EVENT, MINUTE)
    assert read.asked == ServiceCondition(service="crm", timeout=2 * SECOND, no_answer=NoAnswer.SKIP)


def test_what_is_left_out_has_the_defaults_of_the_contract() -> None:
    """No retry policy is none: the default is what applies then."""
    (read,) = _read(_step(target=_event(), retry_policy=timer_pb2.RetryPolicy(), condition=_asks()))
    assert read.retry == RetryPolicy()
    assert read.asked == ServiceCondition(service="crm", timeout=5 * SECOND, no_answer=NoAnswer.FAIL)
    assert read.report_within is None
    (plain,) = _read(_step())
    assert (plain.retry, plain.asked, plain.condition) == (None, None, "")


def test_four_levels_of_follow_ups_are_allowed() -> None:
    """The steps of all levels count, and all names are one timeline's."""
    assert len(_read(_nested(4))) == 1
    many = _step(follow_ups=[_step(f"f{n}") for n in range(63)])
    assert len(_read(many)[0].follow_ups) == 63
    assert _refused(many, _step("z")) == {"timeline.steps": "must have 1-64 entries, got 65"}
    assert _refused(_step("a", follow_ups=[_step("a")])) == {
        "timeline.steps": "must have unique names, 'a' is there twice"
    }


BAD_STEPS = [
    ({"name": "A b"}, "name", "must be of lower-case letters, digits, _ and -"),
    ({"name": "a" * 65}, "name", "must be 1-64 characters, got 65"),
    ({"offset": to_duration(timedelta(days=3_661))}, "offset", "must be a valid duration of 0s to "),
    ({"offset": to_duration(-SECOND)}, "offset", "must be 0s to "),
    ({"offset": Duration(seconds=1, nanos=-1)}, "offset", "must be a valid duration"),
    ({"target": timer_pb2.Target()}, "target", "must have a notification or an event"),
    ({"target": _notification(type="No!")}, "target.notification.type", "must be of lower-case"),
    ({"target": _notification(subscribers=[])}, "target.notification.subscribers", "or topics must have"),
    ({"target": _notification(subscribers=["x"] * 1_001)}, "target.notification.subscribers", "must have 0-1,000"),
    ({"target": _notification(topics=["\x00"])}, "target.notification.topics[0]", "must not hold control"),
    ({"target": _notification(group_key="g" * 257)}, "target.notification.group_key", "must be 0-256 characters"),
    ({"target": _notification(priority=9)}, "target.notification.priority", "must be one of PRIORITY_LOW"),
    ({"target": _notification(payload="[]")}, "target.notification.payload", "must be a JSON object"),
    ({"target": _event(type="")}, "target.event.type", "must be 1-128 characters, got 0"),
    ({"target": _event(type="Trial Over")}, "target.event.type", "must be of lower-case"),
    ({"target": _event(payload="{")}, "target.event.payload", "must be a JSON object"),
    ({"target": _event(payload='{"a": "\\u0000"}')}, "target.event.payload", "must not hold NUL"),
    ({"target": _event(payload='{"a":' * 65 + "1" + "}" * 65)}, "target.event.payload", "must not be nested deeper"),
    ({"target": _event(payload=f'{{"a": "{"x" * 65_536}"}}')}, "target.event.payload", "must be at most 64 KiB"),
    ({"target": _event(report_within=to_duration(8 * DAY))}, "target.event.report_within", "must be 0s to 604800s"),
    ({"target": _event(report_within=to_duration(-SECOND))}, "target.event.report_within", "must be 0s to 604800s"),
    ({"retry_policy": timer_pb2.RetryPolicy()}, "retry_policy", "is for event targets only"),
    (_retries(initial_delay=to_duration(0.5 * SECOND)), "retry_policy.initial_delay", "must be 1s to 86400s"),
    (_retries(maximum_delay=to_duration(8 * DAY)), "retry_policy.maximum_delay", "must be 1s to 604800s"),
    (_retries(initial_delay=to_duration(2 * HOUR)), "retry_policy.maximum_delay", "must not be shorter than initial"),
    (_retries(multiplier=0.5), "retry_policy.multiplier", "must be 1.0-10.0, got 0.5"),
    (_retries(multiplier=math.nan), "retry_policy.multiplier", "must be 1.0-10.0, got nan"),
    (_retries(maximum_attempts=101), "retry_policy.maximum_attempts", "must be 1-100, got 101"),
    (_retries(maximum_age=to_duration(31 * DAY)), "retry_policy.maximum_age", "must be 1s to "),
    ({"condition": timer_pb2.Condition()}, "condition.cel", "must be given, or service"),
    ({"condition": timer_pb2.Condition(cel="(")}, "condition.cel", ""),
    ({"condition": timer_pb2.Condition(cel="1 + 1")}, "condition.cel", ""),
    ({"condition": timer_pb2.Condition(cel="x" * 2_049)}, "condition.cel", ""),
    (
        {"condition": timer_pb2.Condition(cel="true", service=timer_pb2.ServiceCondition(service="crm"))},
        "condition.cel",
        "must be absent where service is given",
    ),
    ({"condition": _asks(service="")}, "condition.service.service", "must be 1-64 characters, got 0"),
    (
        {"condition": _asks(service="erp")},
        "condition.service.service",
        "'erp' is not registered with the scheduler (billing, crm)",
    ),
    ({"condition": _asks(timeout=to_duration(31 * SECOND))}, "condition.service.timeout", "must be 0.1s to 30s"),
    ({"condition": _asks(timeout=Duration())}, "condition.service.timeout", "must be 0.1s to 30s"),
    ({"condition": _asks(no_answer_policy=9)}, "condition.service.no_answer_policy", "must be one of NO_ANSWER_"),
]


@pytest.mark.parametrize(("step", "field", "why"), BAD_STEPS, ids=[f"{field}: {why}" for _, field, why in BAD_STEPS])
def test_a_wrong_field_is_named_with_its_step(step: dict[str, Any], field: str, why: str) -> None:
    """Wherever the step is; and nothing else is found wrong."""
    for refused, where in (
        (_refused(_step("first"), _step(**step)), "timeline.steps[1]"),
        (_refused(_step("first", follow_ups=[_step(**step)])), "timeline.steps[0].follow_ups[0]"),
    ):
        assert list(refused) == [f"{where}.{field}"]
        assert refused[f"{where}.{field}"].startswith(why)


def test_everything_that_is_wrong_is_told_at_once() -> None:
    """The timeline's own fields too."""
    refused = _refused(_step("!"), _nested(5), name="", description="d" * 1_001)
    assert list(refused) == [
        "timeline.name",
        "timeline.description",
        "timeline.steps[0].name",
        "timeline.steps[1].follow_ups[0].follow_ups[0].follow_ups[0].follow_ups",
    ]
