"""`carillon schedule` and `carillon cancel`: something is to happen later, and then it is not."""

from typing import Annotated

import typer
from carillon.intake.v1 import intake_pb2 as pb
from carillon.intake.v1.intake_pb2_grpc import IntakeServiceStub
from carillon.scheduler.v1 import timer_pb2

from cli.bulk import Batch, say_applied, send_file, show_results
from cli.notify import (
    FilePath,
    GroupKey,
    Key,
    PayloadText,
    Priority,
    Subscribers,
    Topics,
    Waits,
    content_of,
    key_of,
    wait_of,
)
from cli.output import show_json
from cli.session import Session, command
from cli.values import TIME_HELP, duration_of, json_object_of, time_of

Zone = Annotated[str, typer.Option("--zone", help="IANA time zone of the rule; UTC without it.")]
Cron = Annotated[str, typer.Option("--cron", help="Again and again: five fields, as '0 9 * * 1-5'.")]
RRule = Annotated[str, typer.Option("--rrule", help="Again and again: an RFC 5545 rule, as FREQ=DAILY;BYHOUR=9.")]
Entity = Annotated[str, typer.Option("--entity", help="What they are about.", show_default=False)]
TimerType = Annotated[str, typer.Option("--type", help="Only this kind of timer.")]
TimerIds = Annotated[list[str] | None, typer.Option("--id", help="Only this timer or schedule; may be repeated.")]
TimelineName = Annotated[str, typer.Option("--timeline", help="Only what this timeline started.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(app, "schedule", services=("intake",))(_schedule)
    command(app, "cancel", services=("intake",))(_cancel)


async def _schedule(
    session: Session,
    entity: Annotated[str, typer.Argument(metavar="ENTITY", help="What it is about.", show_default=False)] = "",
    at: Annotated[str, typer.Option("--at", help=f"When: {TIME_HELP}.")] = "",
    after: Annotated[str, typer.Option("--in", help="So long after it is accepted: 90s, 1h30m, 30d.")] = "",
    cron: Cron = "",
    rrule: RRule = "",
    zone: Zone = "",
    count: Annotated[int, typer.Option("--count", min=0, help="At most so many occurrences; 0 is no limit.")] = 0,
    timer_type: Annotated[str, typer.Option("--type", help="Your own kind of timer.")] = "",
    notify: Annotated[str, typer.Option("--notify", help="Then tell subscribers this notification type.")] = "",
    event: Annotated[str, typer.Option("--event", help="Then tell business services this event.")] = "",
    report_within: Annotated[str, typer.Option("--report-within", help="An event wants a report within this.")] = "",
    subscribers: Subscribers = None,
    topics: Topics = None,
    payload: PayloadText = "",
    group_key: GroupKey = "",
    priority: Priority = "normal",
    condition: Annotated[str, typer.Option("--if", help="CEL over facts, timer and now; skipped unless true.")] = "",
    expires: Annotated[str, typer.Option("--expires", help=f"Not worth firing from then on: {TIME_HELP}.")] = "",
    file: FilePath = None,
    key: Key = "",
    waits: Waits = True,
) -> int:
    """Do something later: --at a time, --in a while, or again and again by --cron or --rrule.

    What then happens is --notify TYPE or --event TYPE.

    Exit codes: as of notify.
    """
    stub = session.stub("intake", IntakeServiceStub)
    if file is not None:
        if entity:
            raise typer.BadParameter("ENTITY and --file exclude each other.")

        async def send(batch: Batch[pb.Schedule]) -> pb.ScheduleResponse:
            request = pb.ScheduleRequest(
                schedules=batch.messages, idempotency_key=batch.key, wait_for=pb.WAIT_FOR_ACCEPTED
            )
            answer: pb.ScheduleResponse = await stub.Schedule(request, timeout=session.timeout_s)
            return answer

        return await send_file(session, file, pb.Schedule, send, key=key)
    if not entity:
        raise typer.BadParameter("Say ENTITY, or --file.")
    if bool(notify) == bool(event):
        raise typer.BadParameter("Say what then happens: either --notify TYPE or --event TYPE.")
    if notify:
        content = content_of(notify, subscribers, topics, payload, group_key, priority)
        target = timer_pb2.Target(notification=content)
    else:
        target = timer_pb2.Target(event=_event(event, payload, report_within))
    schedule = pb.Schedule(entity=entity, type=timer_type, target=target)
    _set_when(schedule, at, after, recurrence_of(cron, rrule, zone, count))
    if condition:
        schedule.condition.cel = condition
    if expires:
        schedule.expire_time.CopyFrom(time_of(expires, "--expires"))
    request = pb.ScheduleRequest(schedules=[schedule], idempotency_key=key_of(key), wait_for=wait_of(waits))
    return show_results(session, await stub.Schedule(request, timeout=session.timeout_s), "Scheduled")


async def _cancel(
    session: Session,
    entity: Annotated[str, typer.Argument(metavar="ENTITY", help="What they are about.", show_default=False)],
    timer_type: TimerType = "",
    ids: TimerIds = None,
    timeline: TimelineName = "",
    cause: Annotated[str, typer.Option("--cause", help="Kept with what is cancelled.")] = "",
    key: Key = "",
    waits: Waits = True,
) -> None:
    """Cancel what is upcoming for an entity: timers, and what waits in open digests.

    Cancelling nothing is not an error. Exit codes: 0 cancelled; 1 refused, or intake cannot be reached; 2 usage.
    """
    request = pb.CancelRequest(
        selector=selector_of(entity, timer_type, ids, timeline),
        cause=cause,
        idempotency_key=key_of(key),
        wait_for=wait_of(waits),
    )
    stub = session.stub("intake", IntakeServiceStub)
    answer: pb.CancelResponse = await stub.Cancel(request, timeout=session.timeout_s)
    if session.is_json:
        show_json(answer)
        return
    say_applied(answer)
    if answer.is_applied:
        typer.echo(
            f"Cancelled {answer.timers:,} timers and {answer.items:,} items that waited in digests; "
            f"{answer.already_left:,} had already left."
        )


def selector_of(entity: str, timer_type: str, ids: list[str] | None, timeline: str) -> pb.Selector:
    """Which timers; BadParameter where two ways are given."""
    if sum(map(bool, (timer_type, ids, timeline))) > 1:
        raise typer.BadParameter("--type, --id and --timeline exclude each other.")
    if ids:
        return pb.Selector(ids=pb.IdSelector(ids=ids, entity=entity))
    if timeline:
        return pb.Selector(timeline=pb.TimelineSelector(entity=entity, timeline=timeline))
    return pb.Selector(entity=pb.EntitySelector(entity=entity, type=timer_type))


def recurrence_of(cron: str, rrule: str, zone: str, count: int) -> timer_pb2.Recurrence | None:
    """A rule; None where none is given, BadParameter where two are."""
    if cron and rrule:
        raise typer.BadParameter("--cron and --rrule exclude each other.")
    if not cron and not rrule:
        return None
    found = timer_pb2.Recurrence(zone=zone, count=count)
    if cron:
        found.cron = cron
    else:
        found.rrule = rrule
    return found


def _set_when(schedule: pb.Schedule, at: str, after: str, recurrence: timer_pb2.Recurrence | None) -> None:
    if (bool(at), bool(after), recurrence is not None).count(True) != 1:
        raise typer.BadParameter("Say when, in one way: --at, --in, --cron or --rrule.")
    if at:
        schedule.at_time.CopyFrom(time_of(at, "--at"))
    elif after:
        schedule.after.CopyFrom(duration_of(after, "--in"))
    elif recurrence is not None:
        schedule.recurrence.CopyFrom(recurrence)


def _event(event: str, payload: str, report_within: str) -> timer_pb2.EventContent:
    found = timer_pb2.EventContent(type=event, payload=json_object_of(payload, "--payload"))
    if report_within:
        found.report_within.CopyFrom(duration_of(report_within, "--report-within"))
    return found
