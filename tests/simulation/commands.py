"""From a plan's actions to link entries: what intake sends for its callers."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2
from google.protobuf.duration_pb2 import Duration

from libs.ids import derived_id
from libs.wire import to_timestamp
from services.scheduler.timelines import Step, Timeline
from services.scheduler.timer import TargetKind
from tests.simulation import plan
from tests.simulation.history import Sent
from tests.simulation.plan import Action

TENANT = "acme"
REPORT_WITHIN_S = 90
MOST_ATTEMPTS = 3

Draft = tuple[str, link_pb2.Entry, Sent]
"""(entity, entry without its sequence, what to record)"""

_TARGETS = {
    "": link_pb2.TimerTarget(notification=timer_pb2.NotificationContent(type="test", subscribers=["s"], payload="{}")),
    "event": link_pb2.TimerTarget(event=timer_pb2.EventContent(type="test")),
    "report": link_pb2.TimerTarget(
        event=timer_pb2.EventContent(type="test", report_within=Duration(seconds=REPORT_WITHIN_S))
    ),
}
_RETRY = timer_pb2.RetryPolicy(
    initial_delay=Duration(seconds=20), maximum_delay=Duration(seconds=60), maximum_attempts=MOST_ATTEMPTS
)
_NO_ANSWER = {
    "fail": timer_pb2.NO_ANSWER_POLICY_FAIL,
    "fire": timer_pb2.NO_ANSWER_POLICY_FIRE,
    "skip": timer_pb2.NO_ANSWER_POLICY_SKIP,
}
_MISFIRE = {"": timer_pb2.MISFIRE_POLICY_FIRE_ONCE, "all": timer_pb2.MISFIRE_POLICY_FIRE_ALL}
_OVERLAP = {"": timer_pb2.OVERLAP_POLICY_ALLOW, "skip": timer_pb2.OVERLAP_POLICY_SKIP}


class Commands:
    """Makes entries, and remembers under which ids timers go by their names."""

    def __init__(self, seed: int, new_id: Callable[[], UUID]) -> None:
        self._seed = seed
        self._new_id = new_id
        self._ids: dict[str, tuple[UUID, ...]] = {}

    def drafts(self, action: Action, now: datetime) -> list[Draft] | None:
        """What a caller's call becomes, as one frame; None for what no caller does."""
        match action:
            case plan.Schedule():
                return self._schedule(action, now)
            case plan.Recur():
                schedule_id = derived_id("schedule", action.name, self._seed)
                self._ids[action.name] = (schedule_id,)
                return [_draft(action, now, (schedule_id,), schedule_timer=_recurring(action, schedule_id, now))]
            case plan.Start():
                anchor_at = now + timedelta(seconds=action.anchor_in_s)
                run_id = derived_id("run", action.timeline, action.entity, anchor_at)
                start = link_pb2.StartTimeline(
                    id=run_id.bytes,
                    timeline=action.timeline,
                    entity=action.entity,
                    anchor_time=to_timestamp(anchor_at),
                )
                return [_draft(action, now, (run_id,), start_timeline=start)]
            case plan.Facts():
                facts = {True: '{"paid": true}', False: '{"paid": false}', None: '{"paid": null}'}[action.is_paid]
                return [_draft(action, now, put_facts=link_pb2.PutFacts(entity=action.entity, facts=facts))]
            case plan.Cancel() | plan.Pause() | plan.Resume() | plan.Move():
                return [self._order(action, now)]
            case plan.Trigger() | plan.Backfill():
                return [self._once_more(action, now)]
        return None

    def _schedule(self, action: plan.Schedule, now: datetime) -> list[Draft]:
        """A caller that asks twice does so with an id that derives from its request."""
        derived = (derived_id("timer", action.name, self._seed),) * 2
        ids = derived if action.is_repeated else tuple(self._new_id() for _ in range(action.count))
        self._ids[action.name] = ids
        return [_draft(action, now, (one,), schedule_timer=_one_shot(action, one, now)) for one in ids]

    def _order(self, action: plan.Order, now: datetime) -> Draft:
        ids = tuple(one for name in action.names for one in self._ids.get(name, (UUID(int=1),)))
        selector = link_pb2.TimerSelector(
            entity=action.entity, type=action.type, timeline=action.timeline, ids=[one.bytes for one in ids]
        )
        match action:
            case plan.Cancel():
                cancel = link_pb2.CancelTimers(selector=selector, cause="the plan")
                return _draft(action, now, ids, cancel_timers=cancel)
            case plan.Move():
                due_at = now + timedelta(seconds=action.due_in_s)
                move = link_pb2.RescheduleTimers(selector=selector, due_time=to_timestamp(due_at))
                return _draft(action, now, ids, reschedule_timers=move)
            case _:
                is_paused = isinstance(action, plan.Pause)
                pause = link_pb2.PauseTimers(selector=selector, is_paused=is_paused)
                return _draft(action, now, ids, pause_timers=pause)

    def _once_more(self, action: plan.Trigger | plan.Backfill, now: datetime) -> Draft:
        (schedule_id,) = self._ids.get(action.name, (UUID(int=1),))
        if isinstance(action, plan.Backfill):
            backfill = link_pb2.BackfillSchedule(
                schedule_id=schedule_id.bytes,
                entity=action.entity,
                start_time=to_timestamp(now - timedelta(seconds=action.last_s)),
                end_time=to_timestamp(now),
            )
            return _draft(action, now, (schedule_id,), backfill_schedule=backfill)
        timer_id = self._new_id()
        trigger = link_pb2.TriggerSchedule(
            id=timer_id.bytes, schedule_id=schedule_id.bytes, entity=action.entity, due_time=to_timestamp(now)
        )
        return _draft(action, now, (timer_id,), trigger_schedule=trigger)


def report_of(action: plan.Report, timer_id: UUID, now: datetime) -> Draft:
    """What a business service says of an event."""
    report = link_pb2.ReportOutcome(
        timer_id=timer_id.bytes,
        entity=action.entity,
        attempt=action.attempt,
        is_done=action.is_done,
        error="" if action.is_done else "it did not work",
    )
    return _draft(action, now, (timer_id,), report_outcome=report)


def _draft(action: Action, now: datetime, ids: tuple[UUID, ...] = (), **kind: object) -> Draft:
    sent = Sent(frame_id=UUID(int=0), index=0, sequence=0, action=action, accepted_at=now, ids=ids)
    entry = link_pb2.Entry(tenant=TENANT, **kind)  # type: ignore[arg-type]
    return str(getattr(action, "entity")), entry, sent  # noqa: B009 - actions of callers have one.


def _one_shot(action: plan.Schedule, timer_id: UUID, now: datetime) -> link_pb2.ScheduleTimer:
    message = link_pb2.ScheduleTimer(
        id=timer_id.bytes,
        entity=action.entity,
        type=action.type,
        due_time=to_timestamp(now + timedelta(seconds=action.due_in_s)),
        accept_time=to_timestamp(now),
        target=_TARGETS[action.sends],
        retry_policy=_RETRY if action.sends == "report" else None,
    )
    if action.condition:
        message.condition.cel = action.condition
    if action.asks:
        service = message.condition.service
        service.service, service.no_answer_policy = "oracle", _NO_ANSWER[action.asks]
        service.timeout.CopyFrom(Duration(seconds=10))
    if action.expires_in_s is not None:
        message.expire_time.CopyFrom(to_timestamp(now + timedelta(seconds=action.expires_in_s)))
    return message


def _recurring(action: plan.Recur, schedule_id: UUID, now: datetime) -> link_pb2.ScheduleTimer:
    message = link_pb2.ScheduleTimer(
        id=schedule_id.bytes,
        entity=action.entity,
        type=action.type,
        accept_time=to_timestamp(now),
        target=_TARGETS[action.sends],
        retry_policy=_RETRY if action.sends == "report" else None,
        recurrence=timer_pb2.Recurrence(
            cron=action.cron,
            count=action.count,
            jitter=Duration(seconds=action.jitter_s),
            misfire_policy=_MISFIRE.get(action.misfire, timer_pb2.MISFIRE_POLICY_SKIP),
            overlap_policy=_OVERLAP.get(action.overlap, timer_pb2.OVERLAP_POLICY_BUFFER_ONE),
        ),
    )
    if action.condition:
        message.condition.cel = action.condition
    return message


def _step(name: str, offset_s: int, condition: str = "", *follow_ups: Step) -> Step:
    return Step(
        name=name,
        offset=timedelta(seconds=offset_s),
        condition=condition,
        target_kind=TargetKind.NOTIFICATION,
        target=_TARGETS[""].SerializeToString(),
        follow_ups=follow_ups,
    )


def _timeline(name: str, *steps: Step) -> Timeline:
    return Timeline(name=name, version=1, description="", steps=steps, created_at=datetime(2013, 7, 1, tzinfo=UTC))


TIMELINES = (
    _timeline(
        "trial",
        _step("remind", 60, plan.UNPAID, _step("remind again", 60, plan.UNPAID)),
        _step("end", 150, "", _step("deactivate", 30, "", _step("look again", 60))),
    ),
    _timeline("order", _step("thank", 0), _step("ask", 90, "", _step("ask again", 0))),
)
"""What can be started, each in its only version."""

FIRST_STEPS = {step.name for timeline in TIMELINES for step in timeline.steps}
"""The steps that a start makes; the others follow."""
