"""Between the scheduler's API messages and its domain."""

from datetime import datetime, timedelta

import orjson
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import scheduler_pb2, timer_pb2
from google.protobuf.duration_pb2 import Duration

from libs.conditions import BadCondition, compile_condition
from libs.errors import Violations
from libs.recurrence import MAX_RULE_CHARACTERS, MAX_ZONE_CHARACTERS, Fold, Gap, Rule
from libs.wire import (
    check_count,
    check_duration,
    check_instant,
    check_text,
    from_timestamp,
    to_duration,
    to_timestamp,
)
from services.scheduler.queries import ShardSummary
from services.scheduler.recurrence import Recurrence
from services.scheduler.timelines import Step, Timeline
from services.scheduler.timer import State, TargetKind, Timer

_NAME = r"[a-z0-9._/-]+"
_STEP_NAME = r"[a-z0-9_-]+"
_MAX_STEPS = 64
_MAX_DEPTH = 4
_MAX_EXCLUSIONS = 366
_MAX_PAYLOAD_BYTES = 64 * 1024
_MAX_NESTING = 64
_MAX_CONTENT_BYTES = 384 * 1024  # Of 512 KiB that a frame takes.


def timer_message(timer: Timer) -> timer_pb2.Timer:
    """A timer as callers see it."""
    message = timer_pb2.Timer(
        id=str(timer.id),
        entity=timer.entity,
        type=timer.type,
        due_time=to_timestamp(timer.due_at),
        fire_time=to_timestamp(timer.fire_at),
        state=timer_pb2.TimerState.ValueType(int(timer.state)),
        target=_target_message(timer.target),
        schedule_id=str(timer.schedule_id),
        shard=timer.shard,
        occurrence=timer.occurrence,
    )
    if timer.condition:
        message.condition.cel = timer.condition
    if timer.recurrence is not None:
        message.recurrence.CopyFrom(recurrence_message(timer.recurrence))
    if timer.step_of is not None:
        message.timeline_run_id = str(timer.step_of.run_id)
        message.step = timer.step_of.step
    if timer.state is State.FAILED:
        message.last_error = (timer.note or "")[:2048]
    elif timer.condition and timer.note and timer.state is not State.CANCELLED:
        message.verdict = timer.note
    if timer.expires_at is not None:
        message.expire_time.CopyFrom(to_timestamp(timer.expires_at))
    decided_at = timer.decided_at or (timer.fire_at if timer.state is State.FIRED else None)
    if decided_at is not None:
        message.decided_time.CopyFrom(to_timestamp(decided_at))
    return message


def recurrence_message(recurrence: Recurrence) -> timer_pb2.Recurrence:
    """A recurrence as callers see it."""
    rule = recurrence.rule
    message = timer_pb2.Recurrence(
        zone=rule.zone,
        start_time=to_timestamp(rule.start),
        count=rule.count,
        exclusions=[to_timestamp(one) for one in sorted(rule.exclusions)],
        gap_policy=timer_pb2.GAP_POLICY_SKIP if rule.gap is Gap.SKIP else timer_pb2.GAP_POLICY_SHIFT,
        fold_policy=timer_pb2.FOLD_POLICY_BOTH if rule.fold is Fold.BOTH else timer_pb2.FOLD_POLICY_FIRST,
    )
    if rule.cron:
        message.cron = rule.cron
    else:
        message.rrule = rule.rrule
    if rule.end is not None:
        message.end_time.CopyFrom(to_timestamp(rule.end))
    return message


def check_recurrence(violations: Violations, field: str, message: timer_pb2.Recurrence) -> None:
    """The bounds of a recurrence's fields; whether its rule can be read shows when it is."""
    check_text(violations, f"{field}.cron", message.cron, shortest=0, longest=MAX_RULE_CHARACTERS)
    check_text(violations, f"{field}.rrule", message.rrule, shortest=0, longest=MAX_RULE_CHARACTERS)
    check_text(violations, f"{field}.zone", message.zone, shortest=0, longest=MAX_ZONE_CHARACTERS)
    for name in ("start_time", "end_time"):
        if message.HasField(name):
            check_instant(violations, f"{field}.{name}", getattr(message, name))
    check_count(violations, f"{field}.exclusions", message.exclusions, least=0, most=_MAX_EXCLUSIONS)
    for index, one in enumerate(message.exclusions[:_MAX_EXCLUSIONS]):
        check_instant(violations, f"{field}.exclusions[{index}]", one)
    _check_policies(violations, field, message)


def _check_policies(violations: Violations, field: str, message: timer_pb2.Recurrence) -> None:
    """A preview of what intake would refuse would promise too much."""
    if message.HasField("jitter") and message.jitter != Duration():
        violations.add(f"{field}.jitter", "is not built yet; leave it out")
    if message.HasField("catch_up_window"):
        violations.add(f"{field}.catch_up_window", "is not built yet; leave it out")
    if message.misfire_policy not in (0, timer_pb2.MISFIRE_POLICY_FIRE_ONCE):
        violations.add(f"{field}.misfire_policy", "is not built yet other than as MISFIRE_POLICY_FIRE_ONCE")
    if message.overlap_policy not in (0, timer_pb2.OVERLAP_POLICY_ALLOW):
        violations.add(f"{field}.overlap_policy", "is not built yet other than as OVERLAP_POLICY_ALLOW")
    for name, value, enum in (
        ("gap_policy", message.gap_policy, timer_pb2.GapPolicy),
        ("fold_policy", message.fold_policy, timer_pb2.FoldPolicy),
    ):
        if value not in enum.values():
            violations.add(f"{field}.{name}", f"must be one of {', '.join(enum.keys()[1:])}")


def rule_of(message: timer_pb2.Recurrence, now: datetime) -> Rule:
    """The rule in a message, unchecked; one without a start starts now."""
    return Rule(
        cron=message.cron,
        rrule=message.rrule,
        zone=message.zone or "UTC",
        start=from_timestamp(message.start_time) if message.HasField("start_time") else now,
        end=from_timestamp(message.end_time) if message.HasField("end_time") else None,
        count=message.count,
        exclusions=frozenset(from_timestamp(one) for one in message.exclusions),
        gap=Gap.SKIP if message.gap_policy == timer_pb2.GAP_POLICY_SKIP else Gap.SHIFT,
        fold=Fold.BOTH if message.fold_policy == timer_pb2.FOLD_POLICY_BOTH else Fold.FIRST,
    )


def _target_message(stored: bytes) -> timer_pb2.Target:
    target = link_pb2.TimerTarget.FromString(stored)
    match target.WhichOneof("kind"):
        case "notification":
            return timer_pb2.Target(notification=target.notification)
        case "event":
            return timer_pb2.Target(event=target.event)
        case _:
            return timer_pb2.Target()  # Internal timers are between services.


def shard_message(shard: ShardSummary) -> scheduler_pb2.Shard:
    """A shard as callers see it."""
    message = scheduler_pb2.Shard(
        number=shard.number,
        holder=shard.holder,
        epoch=shard.epoch,
        watermark_time=to_timestamp(shard.watermark_at),
        pending=shard.pending,
        due=shard.due,
    )
    if shard.lease_until is not None:
        message.lease_until_time.CopyFrom(to_timestamp(shard.lease_until))
    return message


def timeline_message(timeline: Timeline) -> timer_pb2.Timeline:
    """A timeline as callers see it."""
    return timer_pb2.Timeline(
        name=timeline.name,
        version=timeline.version,
        description=timeline.description,
        steps=[_step_message(step) for step in timeline.steps],
        create_time=to_timestamp(timeline.created_at),
    )


def _step_message(step: Step) -> timer_pb2.TimelineStep:
    message = timer_pb2.TimelineStep(
        name=step.name,
        offset=to_duration(step.offset),
        target=_target_message(step.target),
        follow_ups=[_step_message(one) for one in step.follow_ups],
    )
    if step.condition:
        message.condition.cel = step.condition
    return message


def read_steps(violations: Violations, timeline: timer_pb2.Timeline) -> tuple[Step, ...]:
    """The steps of a timeline that is to be stored; what is wrong is collected."""
    check_text(
        violations,
        "timeline.name",
        timeline.name,
        longest=128,
        pattern=_NAME,
        described_as="of lower-case letters, digits and . _ / -",
    )
    check_text(violations, "timeline.description", timeline.description, shortest=0, longest=1_000)
    names: list[str] = []
    steps = tuple(
        _read_step(violations, f"timeline.steps[{index}]", step, names, depth=1)
        for index, step in enumerate(timeline.steps)
    )
    check_count(violations, "timeline.steps", names, most=_MAX_STEPS)
    for name in sorted({name for name in names if names.count(name) > 1}):
        violations.add("timeline.steps", f"must have unique names, {name!r} is there twice")
    return steps


def _read_step(
    violations: Violations, field: str, step: timer_pb2.TimelineStep, names: list[str], *, depth: int
) -> Step:
    names.append(
        check_text(
            violations,
            f"{field}.name",
            step.name,
            longest=64,
            pattern=_STEP_NAME,
            described_as="of lower-case letters, digits, _ and -",
        )
    )
    if depth > _MAX_DEPTH:
        violations.add(f"{field}.follow_ups", f"must not be nested more than {_MAX_DEPTH} deep")
        return Step(name=step.name, offset=timedelta(0), condition="", target_kind=TargetKind.NOTIFICATION, target=b"")
    if step.HasField("retry_policy"):
        violations.add(f"{field}.retry_policy", "is for event targets, which are not built yet; leave it out")
    _check_condition(violations, f"{field}.condition.cel", step)
    return Step(
        name=step.name,
        offset=check_duration(violations, f"{field}.offset", step.offset) or timedelta(0),
        condition=step.condition.cel,
        target_kind=TargetKind.NOTIFICATION,
        target=_read_target(violations, f"{field}.target", step.target),
        follow_ups=tuple(
            _read_step(violations, f"{field}.follow_ups[{index}]", one, names, depth=depth + 1)
            for index, one in enumerate(step.follow_ups)
        ),
    )


def _check_condition(violations: Violations, field: str, step: timer_pb2.TimelineStep) -> None:
    if not step.HasField("condition"):
        return
    try:
        compile_condition(step.condition.cel)
    except BadCondition as err:
        violations.add(field, str(err))


def _read_target(violations: Violations, field: str, target: timer_pb2.Target) -> bytes:
    if target.WhichOneof("kind") != "notification":
        violations.add(field, "must be a notification; event targets are not built yet")
        return b""
    content = target.notification
    check_text(violations, f"{field}.notification.type", content.type, longest=128, pattern=_NAME)
    for name, values, most in (("subscribers", content.subscribers, 1_000), ("topics", content.topics, 16)):
        check_count(violations, f"{field}.notification.{name}", values, least=0, most=most)
        for index, value in enumerate(values):
            check_text(violations, f"{field}.notification.{name}[{index}]", value, longest=256)
    if not content.subscribers and not content.topics:
        violations.add(f"{field}.notification.subscribers", "or topics must have at least one entry")
    check_text(violations, f"{field}.notification.group_key", content.group_key, shortest=0, longest=256)
    _check_payload(violations, f"{field}.notification.payload", content.payload)
    if (size := content.ByteSize()) > _MAX_CONTENT_BYTES:
        violations.add(f"{field}.notification", f"must be at most 384 KiB in all, got {size:,} bytes")
    return link_pb2.TimerTarget(notification=content).SerializeToString()


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
