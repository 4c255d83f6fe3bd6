"""`carillon timers`: what is upcoming and what has fired; holding back, moving, firing once more."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import typer
from carillon.intake.v1 import intake_pb2
from carillon.intake.v1.intake_pb2_grpc import IntakeServiceStub
from carillon.scheduler.v1 import scheduler_pb2 as pb
from carillon.scheduler.v1 import timer_pb2
from carillon.scheduler.v1.scheduler_pb2_grpc import SchedulerServiceStub

from cli.bulk import say_applied, show_results
from cli.notify import Key, Waits, key_of, wait_of
from cli.output import moment, show_json, show_list, show_pairs, show_table, when, word
from cli.schedule import (
    Cron,
    RRule,
    TimelineName,
    TimerIds,
    TimerType,
    Zone,
    recurrence_of,
    selector_of,
)
from cli.session import Session, command
from cli.values import TIME_HELP, duration_of, enums_of, time_of

timers = typer.Typer(help="What is upcoming, and what has fired.", no_args_is_help=True)
Limit = Annotated[int, typer.Option("--limit", min=0, help="At most so many; 0 is all.")]
EntityArgument = Annotated[str, typer.Argument(metavar="ENTITY", help="What they are about.", show_default=False)]
ScheduleId = Annotated[str, typer.Argument(metavar="SCHEDULE", help="Its id.", show_default=False)]


@command(timers, "list", services=("scheduler",))
async def _list(
    session: Session,
    entity: Annotated[str, typer.Argument(metavar="[ENTITY]", help="Only of this entity.", show_default=False)] = "",
    timer_type: TimerType = "",
    states: Annotated[list[str] | None, typer.Option("--state", help="scheduled, fired, …; may be repeated.")] = None,
    since: Annotated[str, typer.Option("--from", help=f"Firing then or later: {TIME_HELP}.")] = "",
    until: Annotated[str, typer.Option("--until", help=f"Firing before: {TIME_HELP}.")] = "",
    with_internal: Annotated[bool, typer.Option("--internal", help="Carillon's own as well.")] = False,
    limit: Limit = 100,
) -> None:
    """List timers in the order in which they fire. With --json one object a line."""
    request = pb.ListTimersRequest(
        entity=entity,
        type=timer_type,
        states=enums_of(timer_pb2.TimerState, states or [], "--state"),
        page_size=min(limit, 1000) or 1000,
        include_internal=with_internal,
    )
    if since:
        request.from_time.CopyFrom(time_of(since, "--from"))
    if until:
        request.until_time.CopyFrom(time_of(until, "--until"))
    stub = session.stub("scheduler", SchedulerServiceStub)
    await show_list(
        session.all_pages(stub.ListTimers, request, "timers", limit=limit),
        ("fires", "state", "entity", "type", "then", "id"),
        lambda one: (when(one, "fire_time"), state_of(one), one.entity, one.type, target_of(one.target), one.id),
        is_json=session.is_json,
        nothing="There are no such timers.",
    )


@command(timers, "get", services=("scheduler",))
async def _get(
    session: Session, timer_id: Annotated[str, typer.Argument(metavar="ID", help="Its id.", show_default=False)]
) -> None:
    """Show one timer, with its attempts."""
    stub = session.stub("scheduler", SchedulerServiceStub)
    found: pb.GetTimerResponse = await stub.GetTimer(pb.GetTimerRequest(id=timer_id), timeout=session.timeout_s)
    if session.is_json:
        show_json(found)
        return
    timer = found.timer
    show_pairs(
        [
            ("id", timer.id),
            ("entity", timer.entity),
            ("type", timer.type),
            ("state", state_of(timer)),
            ("due", when(timer, "due_time")),
            ("fires", when(timer, "fire_time")),
            ("decided", when(timer, "decided_time")),
            ("expires", when(timer, "expire_time")),
            ("then", target_of(timer.target)),
            ("if", timer.condition.cel or timer.condition.service.service),
            ("verdict", timer.verdict),
            ("rule", timer.recurrence.cron or timer.recurrence.rrule),
            ("zone", timer.recurrence.zone),
            ("occurrence", str(timer.occurrence or "")),
            ("schedule", timer.schedule_id if timer.schedule_id != timer.id else ""),
            ("timeline run", timer.timeline_run_id),
            ("step", timer.step),
            ("attempts", str(timer.attempts or "")),
            ("last error", timer.last_error),
        ]
    )
    if found.attempts:
        rows = [
            (str(one.number), when(one, "start_time"), when(one, "end_time"), one.error or "done")
            for one in found.attempts
        ]
        show_table(("attempt", "began", "ended", "result"), rows)


@command(timers, "preview", services=("scheduler",))
async def _preview(
    session: Session,
    cron: Cron = "",
    rrule: RRule = "",
    zone: Zone = "",
    after: Annotated[str, typer.Option("--after", help=f"Occurrences after it: {TIME_HELP}.")] = "now",
    count: Annotated[int, typer.Option("--count", min=1, max=1000, help="How many.")] = 10,
) -> None:
    """Show when a rule would fire. Nothing is stored."""
    recurrence = recurrence_of(cron, rrule, zone, 0)
    if recurrence is None:
        raise typer.BadParameter("Say --cron or --rrule.")
    request = pb.PreviewOccurrencesRequest(recurrence=recurrence, count=count)
    if after != "now":  # The scheduler's now is business time.
        request.after_time.CopyFrom(time_of(after, "--after"))
    stub = session.stub("scheduler", SchedulerServiceStub)
    found: pb.PreviewOccurrencesResponse = await stub.PreviewOccurrences(request, timeout=session.timeout_s)
    if session.is_json:
        show_json(found)
        return
    for time in found.times:
        typer.echo(moment(time))


@command(timers, "pause", services=("intake",))
async def _pause(
    session: Session,
    entity: EntityArgument,
    timer_type: TimerType = "",
    ids: TimerIds = None,
    timeline: TimelineName = "",
    key: Key = "",
    waits: Waits = True,
) -> None:
    """Hold waiting timers back, and with them their recurrences."""
    selector = selector_of(entity, timer_type, ids, timeline)
    request = intake_pb2.PauseRequest(selector=selector, idempotency_key=key_of(key), wait_for=wait_of(waits))
    await _order(session, session.stub("intake", IntakeServiceStub).Pause, request, "Paused")


@command(timers, "resume", services=("intake",))
async def _resume(
    session: Session,
    entity: EntityArgument,
    timer_type: TimerType = "",
    ids: TimerIds = None,
    timeline: TimelineName = "",
    key: Key = "",
    waits: Waits = True,
) -> None:
    """Let paused timers go on."""
    selector = selector_of(entity, timer_type, ids, timeline)
    request = intake_pb2.ResumeRequest(selector=selector, idempotency_key=key_of(key), wait_for=wait_of(waits))
    await _order(session, session.stub("intake", IntakeServiceStub).Resume, request, "Resumed")


@command(timers, "move", services=("intake",))
async def _move(
    session: Session,
    entity: EntityArgument,
    at: Annotated[str, typer.Option("--at", help=f"To then: {TIME_HELP}.")] = "",
    after: Annotated[str, typer.Option("--in", help="To so long from now: 90s, 1h30m, 30d.")] = "",
    timer_type: TimerType = "",
    ids: TimerIds = None,
    timeline: TimelineName = "",
    key: Key = "",
    waits: Waits = True,
) -> None:
    """Move waiting timers to another due time; of a recurrence only the waiting occurrence."""
    if bool(at) == bool(after):
        raise typer.BadParameter("Say when: either --at or --in.")
    request = intake_pb2.RescheduleRequest(
        selector=selector_of(entity, timer_type, ids, timeline), idempotency_key=key_of(key), wait_for=wait_of(waits)
    )
    if at:
        request.at_time.CopyFrom(time_of(at, "--at"))
    else:
        request.after.CopyFrom(duration_of(after, "--in"))
    await _order(session, session.stub("intake", IntakeServiceStub).Reschedule, request, "Moved")


@command(timers, "fire", services=("intake",))
async def _fire(session: Session, schedule_id: ScheduleId, entity: EntityArgument, key: Key = "") -> int:
    """Fire a recurrence once more, now. Without --key every call fires."""
    trigger = intake_pb2.ScheduleTrigger(schedule_id=schedule_id, entity=entity)
    request = intake_pb2.TriggerScheduleRequest(triggers=[trigger], idempotency_key=key_of(key))
    stub = session.stub("intake", IntakeServiceStub)
    return show_results(session, await stub.TriggerSchedule(request, timeout=session.timeout_s), "Fires now:")


@command(timers, "backfill", services=("intake",))
async def _backfill(
    session: Session,
    schedule_id: ScheduleId,
    entity: EntityArgument,
    since: Annotated[str, typer.Option("--from", help=f"After: {TIME_HELP}.", show_default=False)],
    until: Annotated[str, typer.Option("--until", help=f"Up to: {TIME_HELP}.")] = "now",
) -> int:
    """Fire the occurrences of a recurrence that were missed in (from, until], each once however often this is run."""
    one = intake_pb2.ScheduleBackfill(
        schedule_id=schedule_id,
        entity=entity,
        start_time=time_of(since, "--from"),
        end_time=time_of(until, "--until"),
    )
    request = intake_pb2.BackfillScheduleRequest(backfills=[one], idempotency_key=key_of(""))
    stub = session.stub("intake", IntakeServiceStub)
    answer: intake_pb2.BackfillScheduleResponse = await stub.BackfillSchedule(request, timeout=session.timeout_s)
    return show_results(session, answer, f"Made up for {answer.timers:,} occurrences.")


async def _order(session: Session, method: Callable[..., Awaitable[Any]], request: Any, done: str) -> None:
    answer = await method(request, timeout=session.timeout_s)
    if session.is_json:
        show_json(answer)
        return
    say_applied(answer)
    if answer.is_applied:
        typer.echo(f"{done} {answer.timers:,} timers.")


def state_of(timer: timer_pb2.Timer) -> str:
    """In one word."""
    return word(timer_pb2.TimerState, timer.state)


def target_of(target: timer_pb2.Target) -> str:
    """What happens when it fires."""
    match target.WhichOneof("kind"):
        case "notification":
            return f"notify {target.notification.type}"
        case "event":
            return f"event {target.event.type}"
        case _:
            return "–"
