"""How timers come to be: from commands, and from other timers whose time has come. Pure."""

from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from uuid import UUID

from msgspec.structs import replace

from services.scheduler.commands import BackfillSchedule, ScheduleTimer, StartTimeline, TriggerSchedule
from services.scheduler.needs import Past
from services.scheduler.recurrence import backfill_id, occurrence_id
from services.scheduler.timelines import Timeline, step_timer
from services.scheduler.timer import Mark, State, Timer, fire_time

MAX_BACKFILL = 1_000
"""Occurrences in one range."""

_ON_TIME = timedelta(minutes=1)
"""A step that fires within it of its due time counts as fired then: what follows stays on the exact time of day."""

_MICROSECOND = timedelta(microseconds=1)


def scheduled(command: ScheduleTimer, *, shard: int, watermark: Mark) -> Timer | None:
    """The timer that was asked for, or the first occurrence; None: there is none."""
    timer_id, due_at, nominal_at, recurrence = command.id, command.due_at, None, command.recurrence
    if recurrence is not None and command.accepted_at is not None:
        recurrence = recurrence.uncounted()
        nominal_at = recurrence.first(command.accepted_at)
        if nominal_at is not None:
            timer_id = occurrence_id(command.id, nominal_at)
            due_at = recurrence.due_at(command.id, nominal_at)
    if due_at is None:
        return None
    return Timer(
        id=timer_id,
        shard=shard,
        tenant=command.tenant,
        entity=command.entity,
        type=command.type,
        due_at=due_at,
        fire_at=fire_time(due_at, watermark),
        target_kind=command.target_kind,
        target=command.target,
        sequence=command.sequence,
        schedule_id=command.id,
        occurrence=int(recurrence is not None),
        recurrence=recurrence,
        nominal_at=nominal_at,
        condition=command.condition,
        asked=command.asked,
        expires_at=command.expires_at,
        report_within=command.report_within,
        retry=command.retry,
        trace=command.trace,
    )


def started(command: StartTimeline, timeline: Timeline, *, shard: int, watermark: Mark) -> Iterator[Timer]:
    """The first steps of a run."""
    for step in timeline.steps:
        yield step_timer(
            step,
            timeline=timeline,
            run_id=command.run_id,
            tenant=command.tenant,
            entity=command.entity,
            due_at=command.anchor_at + step.offset,
            sequence=command.sequence,
            watermark=watermark,
            shard=shard,
            trace=command.trace,
        )


def following(timer: Timer, *, watermark: Mark, now: datetime) -> Iterator[Timer]:
    """The occurrence after one whose time has come, if there is one that can still fire."""
    if timer.recurrence is None or timer.nominal_at is None:
        return
    recurrence = timer.recurrence.uncounted()  # An older version kept the count.
    is_missed = recurrence.is_missed(timer.due_at, timer.nominal_at, now)
    nominal_at = recurrence.following(timer.schedule_id, timer.nominal_at, now, is_missed=is_missed)
    if nominal_at is None or (timer.expires_at is not None and nominal_at >= timer.expires_at):
        return
    due_at = recurrence.due_at(timer.schedule_id, nominal_at)
    yield replace(
        timer,
        id=occurrence_id(timer.schedule_id, nominal_at),
        nominal_at=nominal_at,
        due_at=due_at,
        fire_at=fire_time(due_at, watermark),
        occurrence=timer.occurrence + 1,
        recurrence=recurrence,
        **_FRESH,
    )


def follow_ups(timer: Timer, timeline: Timeline, *, watermark: Mark, now: datetime) -> Iterator[Timer]:
    """The steps that begin when this one has fired, which is now: it may have been paused for weeks, or asked about."""
    assert timer.step_of is not None
    fired_at = timer.due_at if now - timer.due_at <= _ON_TIME else now
    step = timeline.step(timer.step_of.step)
    for follow_up in step.follow_ups if step else ():
        yield step_timer(
            follow_up,
            timeline=timeline,
            run_id=timer.step_of.run_id,
            tenant=timer.tenant,
            entity=timer.entity,
            due_at=fired_at + follow_up.offset,
            sequence=timer.sequence,
            watermark=watermark,
            shard=timer.shard,
            trace=timer.trace,
        )


def triggered(newest: Timer, command: TriggerSchedule, *, watermark: Mark) -> Timer:
    """A schedule's timer once more, besides its occurrences."""
    timer = _extra(newest, command.id, command.due_at, fire_time(command.due_at, watermark), command.sequence)
    return replace(timer, trace=command.trace)


def made_up_for(
    newest: Timer,
    command: BackfillSchedule,
    nominal_times: Iterable[datetime],
    past: Iterable[Past],
    *,
    watermark: Mark,
) -> Iterator[Timer]:
    """The occurrences at these times that have not fired and are not about to, each once, in order.

    While the newest waits, what comes after it is not missed yet: it will make that itself, as its misfire policy says.
    """
    schedule_id = newest.schedule_id
    is_waiting = newest.mark > watermark if newest.state is State.SCHEDULED else newest.is_held_back
    covered: set[datetime | None] = {
        one.nominal_at for one in past if not one.is_over or one.timer_id == backfill_id(schedule_id, one.nominal_at)
    }
    if newest.state not in {State.SKIPPED, State.EXPIRED}:
        covered.add(newest.nominal_at)  # It may be of this very turn, and so not in `past`.
    fire_at = fire_time(watermark.at, watermark)
    for nominal_at in nominal_times:
        if nominal_at in covered or (is_waiting and newest.nominal_at is not None and nominal_at > newest.nominal_at):
            continue
        timer_id = backfill_id(schedule_id, nominal_at)
        timer = _extra(newest, timer_id, nominal_at, fire_at, command.sequence)
        yield replace(timer, nominal_at=nominal_at, trace=command.trace)
        fire_at += _MICROSECOND


def _extra(newest: Timer, timer_id: UUID, due_at: datetime, fire_at: datetime, sequence: int) -> Timer:
    return replace(
        newest,
        id=timer_id,
        due_at=due_at,
        fire_at=fire_at,
        sequence=sequence,
        occurrence=0,
        recurrence=None,
        nominal_at=None,
        **_FRESH,
    )


_FRESH = {
    "state": State.SCHEDULED,
    "decided_at": None,
    "note": None,
    "attempts": 0,
    "first_attempt_at": None,
    "last_error": None,
    "asks": 0,
    "holds": None,
}
"""What a timer that has not had its time yet has not."""
