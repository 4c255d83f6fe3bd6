"""From the scheduler's domain to its API messages."""

from carillon.explain.v1 import explain_pb2
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import scheduler_pb2, timer_pb2

from libs.wire import to_duration, to_timestamp
from services.scheduler.attempts import EndedAttempt, RetryPolicy
from services.scheduler.conditions import ServiceCondition
from services.scheduler.explain import Entry
from services.scheduler.queries import ShardSummary
from services.scheduler.recurrence import Misfire, Recurrence
from services.scheduler.timelines import Step, Timeline
from services.scheduler.timer import State, Timer


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
        attempts=timer.attempts,
        last_error=timer.last_error or "",
        # The note of a cancel is its cause; Explain tells it.
        verdict=timer.note or "" if timer.state is not State.CANCELLED else "",
    )
    condition = _condition_message(timer.condition, timer.asked)
    if condition is not None:
        message.condition.CopyFrom(condition)
    if timer.recurrence is not None:
        message.recurrence.CopyFrom(_recurrence_message(timer.recurrence))
    if timer.retry is not None:
        message.retry_policy.CopyFrom(_retry_message(timer.retry))
    if timer.step_of is not None:
        message.timeline_run_id = str(timer.step_of.run_id)
        message.step = timer.step_of.step
    for field, at in (
        (message.nominal_time, timer.nominal_at),
        (message.expire_time, timer.expires_at),
        (message.decided_time, timer.decided_at or (timer.fire_at if timer.state is State.FIRED else None)),
    ):
        if at is not None:
            field.CopyFrom(to_timestamp(at))
    return message


def attempt_message(attempt: EndedAttempt) -> timer_pb2.Attempt:
    """An ended attempt as callers see it."""
    return timer_pb2.Attempt(
        number=attempt.number,
        start_time=to_timestamp(attempt.started_at),
        end_time=to_timestamp(attempt.ended_at),
        error=attempt.error or "",
    )


def entry_message(entry: Entry) -> explain_pb2.Entry:
    """An entry of an explanation as callers see it."""
    return explain_pb2.Entry(
        time=to_timestamp(entry.at),
        service="scheduler",
        kind=entry.kind,
        sentence=entry.sentence,
        details=entry.details,
        related_ids=entry.related_ids,
        is_expected=entry.is_expected,
    )


def shard_message(shard: ShardSummary) -> scheduler_pb2.Shard:
    """A shard as callers see it."""
    message = scheduler_pb2.Shard(
        number=shard.number,
        holder=shard.holder,
        epoch=shard.epoch,
        watermark_time=to_timestamp(shard.watermark_at),
        pending=shard.pending,
        due=shard.due,
        pending_internal=shard.pending_internal,
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
    return timer_pb2.TimelineStep(
        name=step.name,
        offset=to_duration(step.offset),
        condition=_condition_message(step.condition, step.asked),
        target=_target_message(step.target),
        follow_ups=[_step_message(one) for one in step.follow_ups],
        retry_policy=None if step.retry is None else _retry_message(step.retry),
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


def _condition_message(cel: str, asked: ServiceCondition | None) -> timer_pb2.Condition | None:
    if asked is None:
        return timer_pb2.Condition(cel=cel) if cel else None
    return timer_pb2.Condition(
        service=timer_pb2.ServiceCondition(
            service=asked.service,
            timeout=to_duration(asked.timeout),
            no_answer_policy=timer_pb2.NoAnswerPolicy.ValueType(int(asked.no_answer)),
        )
    )


def _retry_message(retry: RetryPolicy) -> timer_pb2.RetryPolicy:
    return timer_pb2.RetryPolicy(
        initial_delay=to_duration(retry.initial),
        maximum_delay=to_duration(retry.longest),
        multiplier=retry.multiplier,
        maximum_attempts=retry.most_attempts,
        maximum_age=to_duration(retry.most_age),
    )


def _recurrence_message(recurrence: Recurrence) -> timer_pb2.Recurrence:
    """With the defaults of what the caller left out."""
    rule = recurrence.rule
    message = timer_pb2.Recurrence(
        zone=rule.zone,
        start_time=to_timestamp(rule.start),
        count=rule.count,
        exclusions=[to_timestamp(one) for one in sorted(rule.exclusions)],
        gap_policy=timer_pb2.GapPolicy.ValueType(rule.gap.value),
        fold_policy=timer_pb2.FoldPolicy.ValueType(rule.fold.value),
        misfire_policy=timer_pb2.MisfirePolicy.ValueType(int(recurrence.misfire)),
        overlap_policy=timer_pb2.OverlapPolicy.ValueType(int(recurrence.overlap)),
    )
    if rule.cron:
        message.cron = rule.cron
    else:
        message.rrule = rule.rrule
    if rule.end is not None:
        message.end_time.CopyFrom(to_timestamp(rule.end))
    if recurrence.jitter:
        message.jitter.CopyFrom(to_duration(recurrence.jitter))
    if recurrence.misfire is not Misfire.SKIP:
        message.catch_up_window.CopyFrom(to_duration(recurrence.catch_up))
    return message
