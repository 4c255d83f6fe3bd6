"""From a timeline in a request to the steps that are stored, each field checked; as intake checks schedules."""

from datetime import timedelta
from typing import NamedTuple

import orjson
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2

from libs.conditions import BadCondition, compile_condition
from libs.errors import Violations
from libs.wire import check_count, check_duration, check_enum, check_number, check_text
from services.scheduler.attempts import RetryPolicy
from services.scheduler.conditions import NoAnswer, ServiceCondition
from services.scheduler.timelines import Step
from services.scheduler.timer import TargetKind

_NAME = r"[a-z0-9._/-]+"
_STEP_NAME = r"[a-z0-9_-]+"
_SERVICE_NAME = r"[a-z0-9._-]+"
_MAX_STEPS = 64
_MAX_DEPTH = 4
_MAX_PAYLOAD_BYTES = 64 * 1024
_MAX_NESTING = 64
_MAX_CONTENT_BYTES = 384 * 1024  # Of 512 KiB that a frame takes.
_SECOND, _DAY = timedelta(seconds=1), timedelta(days=1)
_ASK_TIMEOUT = 5 * _SECOND


class _Target(NamedTuple):
    """What a step does, and how long its report may take."""

    kind: TargetKind
    stored: bytes = b""
    report_within: timedelta | None = None


def read_steps(violations: Violations, timeline: timer_pb2.Timeline, *, services: frozenset[str]) -> tuple[Step, ...]:
    """The steps of a timeline that is to be stored; what is wrong is collected.

    `services`: names that conditions may ask.
    """
    _check_name(violations, "timeline.name", timeline.name)
    check_text(violations, "timeline.description", timeline.description, shortest=0, longest=1_000)
    reader = _Reader(violations, services)
    steps = tuple(reader.step(f"timeline.steps[{index}]", step, depth=1) for index, step in enumerate(timeline.steps))
    check_count(violations, "timeline.steps", reader.names, most=_MAX_STEPS)
    for name in sorted({name for name in reader.names if name and reader.names.count(name) > 1}):
        violations.add("timeline.steps", f"must have unique names, {name!r} is there twice")
    return steps


class _Reader:
    """Reads steps, and remembers their names."""

    def __init__(self, violations: Violations, services: frozenset[str]) -> None:
        self.names: list[str] = []
        self._violations = violations
        self._services = services

    def step(self, field: str, step: timer_pb2.TimelineStep, *, depth: int) -> Step:
        words = "of lower-case letters, digits, _ and -"
        self.names.append(
            check_text(self._violations, f"{field}.name", step.name, longest=64, pattern=_STEP_NAME, described_as=words)
        )
        follow_ups = step.follow_ups if depth < _MAX_DEPTH else ()
        if len(follow_ups) < len(step.follow_ups):
            self._violations.add(f"{field}.follow_ups", f"must not be nested more than {_MAX_DEPTH} deep")
        target = _read_target(self._violations, f"{field}.target", step.target)
        cel, asked = self._condition(f"{field}.condition", step)
        return Step(
            name=step.name,
            offset=check_duration(self._violations, f"{field}.offset", step.offset) or timedelta(0),
            condition=cel,
            asked=asked,
            target_kind=target.kind,
            target=target.stored,
            report_within=target.report_within,
            retry=self._retry(f"{field}.retry_policy", step),
            follow_ups=tuple(
                self.step(f"{field}.follow_ups[{index}]", one, depth=depth + 1) for index, one in enumerate(follow_ups)
            ),
        )

    def _condition(self, field: str, step: timer_pb2.TimelineStep) -> tuple[str, ServiceCondition | None]:
        condition = step.condition
        if condition.HasField("service"):
            if condition.cel:
                self._violations.add(f"{field}.cel", "must be absent where service is given")
            return "", self._asked(f"{field}.service", condition.service)
        if step.HasField("condition") and not condition.cel:
            self._violations.add(f"{field}.cel", "must be given, or service")
        elif condition.cel:
            try:
                compile_condition(condition.cel)
            except BadCondition as err:
                self._violations.add(f"{field}.cel", str(err))
        return condition.cel, None

    def _asked(self, field: str, asked: timer_pb2.ServiceCondition) -> ServiceCondition:
        words = "of lower-case letters, digits and . _ -"
        name = check_text(
            self._violations,
            f"{field}.service",
            asked.service,
            longest=64,
            pattern=_SERVICE_NAME,
            described_as=words,
        )
        if name and name not in self._services:
            known = ", ".join(sorted(self._services)) or "none is"
            self._violations.add(f"{field}.service", f"{name!r} is not registered with the scheduler ({known})")
        timeout: timedelta | None = _ASK_TIMEOUT
        if asked.HasField("timeout"):
            least, most = timedelta(milliseconds=100), 30 * _SECOND
            timeout = check_duration(self._violations, f"{field}.timeout", asked.timeout, least=least, most=most)
        policy = check_enum(
            self._violations,
            f"{field}.no_answer_policy",
            asked.no_answer_policy,
            timer_pb2.NoAnswerPolicy,
            default=NoAnswer.FAIL,
        )
        return ServiceCondition(service=name, timeout=timeout or _ASK_TIMEOUT, no_answer=NoAnswer(policy))

    def _retry(self, field: str, step: timer_pb2.TimelineStep) -> RetryPolicy | None:
        if not step.HasField("retry_policy"):
            return None
        if not step.target.HasField("event"):
            self._violations.add(field, "is for event targets only")
            return None
        return _read_retry_policy(self._violations, field, step.retry_policy)


def _read_retry_policy(violations: Violations, field: str, policy: timer_pb2.RetryPolicy) -> RetryPolicy:
    default = RetryPolicy()

    def delay(name: str, absent: timedelta, most: timedelta) -> timedelta:
        if not policy.HasField(name):  # type: ignore[arg-type]
            return absent
        return check_duration(violations, f"{field}.{name}", getattr(policy, name), least=_SECOND, most=most) or absent

    initial = delay("initial_delay", default.initial, _DAY)
    longest = delay("maximum_delay", default.longest, 7 * _DAY)
    if longest < initial:
        violations.add(
            f"{field}.maximum_delay", "must not be shorter than initial_delay; where it is absent it is 1 hour"
        )
    multiplier = policy.multiplier or default.multiplier
    if not 1.0 <= multiplier <= 10.0:  # NaN neither.
        violations.add(f"{field}.multiplier", f"must be 1.0-10.0, got {multiplier:g}")
    most_attempts = policy.maximum_attempts or default.most_attempts
    return RetryPolicy(
        initial=initial,
        longest=longest,
        multiplier=multiplier,
        most_attempts=check_number(violations, f"{field}.maximum_attempts", most_attempts, least=1, most=100),
        most_age=delay("maximum_age", default.most_age, 30 * _DAY),
    )


def _read_target(violations: Violations, field: str, target: timer_pb2.Target) -> _Target:
    match target.WhichOneof("kind"):
        case "notification":
            _check_notification(violations, f"{field}.notification", target.notification)
            stored = link_pb2.TimerTarget(notification=target.notification)
            return _Target(TargetKind.NOTIFICATION, stored.SerializeToString())
        case "event":
            within = _read_report_within(violations, f"{field}.event", target.event)
            return _Target(TargetKind.EVENT, link_pb2.TimerTarget(event=target.event).SerializeToString(), within)
        case _:
            violations.add(field, "must have a notification or an event")
            return _Target(TargetKind.NOTIFICATION)


def _read_report_within(violations: Violations, field: str, event: timer_pb2.EventContent) -> timedelta | None:
    """How long the report may take; the rest of the event is checked."""
    _check_name(violations, f"{field}.type", event.type)
    _check_payload(violations, f"{field}.payload", event.payload)
    return check_duration(violations, f"{field}.report_within", event.report_within, most=7 * _DAY) or None


def _check_notification(violations: Violations, field: str, content: timer_pb2.NotificationContent) -> None:
    _check_name(violations, f"{field}.type", content.type)
    for name, values, most in (("subscribers", content.subscribers, 1_000), ("topics", content.topics, 16)):
        check_count(violations, f"{field}.{name}", values, least=0, most=most)
        for index, value in enumerate(values[:most]):
            check_text(violations, f"{field}.{name}[{index}]", value, longest=256)
    if not content.subscribers and not content.topics:
        violations.add(f"{field}.subscribers", "or topics must have at least one entry")
    check_text(violations, f"{field}.group_key", content.group_key, shortest=0, longest=256)
    _check_payload(violations, f"{field}.payload", content.payload)
    normal = timer_pb2.PRIORITY_NORMAL
    check_enum(violations, f"{field}.priority", content.priority, timer_pb2.Priority, default=normal)
    if (size := content.ByteSize()) > _MAX_CONTENT_BYTES:
        violations.add(field, f"must be at most 384 KiB in all, got {size:,} bytes")


def _check_name(violations: Violations, field: str, name: str) -> None:
    words = "of lower-case letters, digits and . _ / -"
    check_text(violations, field, name, longest=128, pattern=_NAME, described_as=words)


def _check_payload(violations: Violations, field: str, payload: str) -> None:
    """The same rules as intake's: whoever reads it later must be able to, and to store it as jsonb."""
    if not payload:
        return
    if (size := len(payload.encode())) > _MAX_PAYLOAD_BYTES:
        violations.add(field, f"must be at most {_MAX_PAYLOAD_BYTES // 1024} KiB, got {size:,} bytes")
        return
    try:
        value = orjson.loads(payload)  # Refuses NaN, lone surrogates, and more than 1,024 levels.
    except ValueError as err:
        violations.add(field, f"must be a JSON object: {err}")
        return
    if not isinstance(value, dict):
        violations.add(field, "must be a JSON object")
    elif "\\u0000" in payload:
        violations.add(field, "must not hold NUL characters")
    elif _nesting(value) > _MAX_NESTING:
        violations.add(field, f"must not be nested deeper than {_MAX_NESTING}")


def _nesting(value: object) -> int:
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, (dict, list))]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth
