"""`carillon batch trigger`: what a CronJob runs.

The logical window of a run follows from when it was scheduled, not from when it came to run: so a run that is late,
repeated, or made up for names the same window, and intake closes it once.

Kubernetes tells a Job when it was scheduled (the annotation batch.kubernetes.io/cronjob-scheduled-timestamp, from 1.28)
but not the Job's pods, which have the annotations of the pod template. What they do have is the Job's name, as a label;
and the CronJob controller ends it with the scheduled minute, because that keeps it from making a Job twice.
"""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import typer
from carillon.intake.v1 import intake_pb2 as pb
from carillon.intake.v1.intake_pb2_grpc import IntakeServiceStub
from cronsim import CronSim, CronSimError

from cli.bulk import say_applied
from cli.notify import Waits, wait_of
from cli.output import moment, show_json
from cli.retries import persistently
from cli.session import Session, command
from cli.values import TIME_HELP, duration_of, time_of
from libs.wire import from_duration, from_timestamp, to_timestamp

batch = typer.Typer(help="Batches: windows that close when somebody says so.", no_args_is_help=True)
_MINUTE: Final = timedelta(minutes=1)
_MINUTE_IN_NAME: Final = re.compile(r"-(\d{8})$")  # Since 1970: 29,000,000 is in 2025, and 99,999,999 in 2160.
_OLDEST_RUN: Final = timedelta(days=31)
_SKEW: Final = timedelta(minutes=5)
Window = tuple[datetime | None, datetime | None]


@batch.callback()
def _root() -> None:
    """Keeps sub-commands sub-commands, even while there is only one."""


@command(batch, "trigger", services=("intake",))
async def _trigger(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="BATCH", help="The batch.", show_default=False)],
    window_start: Annotated[str, typer.Option("--window-start", help=f"For the record: {TIME_HELP}.")] = "",
    window_end: Annotated[str, typer.Option("--window-end", help=f"Which run this is: {TIME_HELP}.")] = "",
    is_from_schedule: Annotated[
        bool, typer.Option("--window-from-schedule", help="The window that ends when this run was scheduled.")
    ] = False,
    scheduled_time: Annotated[
        str,
        typer.Option(
            "--scheduled-time",
            envvar="CARILLON_SCHEDULED_TIME",
            help="When it was scheduled, if whoever runs this knows: 2026-12-01T12:00:00Z.",
        ),
    ] = "",
    job_name: Annotated[
        str,
        typer.Option(
            "--job-name",
            envvar="CARILLON_JOB_NAME",
            help="Else this says it: the name of the CronJob's Job, which the pod has as its label job-name.",
        ),
    ] = "",
    schedule: Annotated[
        str,
        typer.Option("--schedule", help="The CronJob's cron, for the window's start, and for its end if need be."),
    ] = "",
    zone: Annotated[str, typer.Option("--time-zone", help="IANA zone of --schedule.")] = "UTC",
    length: Annotated[
        str, typer.Option("--window-length", help="How long the window is: 4h. Without it, since the run before.")
    ] = "",
    attempts: Annotated[int, typer.Option("--attempts", min=1, max=100, help="Tries, with growing pauses.")] = 10,
    within: Annotated[str, typer.Option("--within", help="No try later than this.")] = "5m",
    waits: Waits = True,
) -> None:
    """Close a batch's windows: everybody with something waiting in it gets one message.

    Run twice for one window, it changes nothing the second time. Without any window it ends now, and each run is one of
    its own.

    Exit codes, for a Job: 0 closed, or closed before, or accepted and durable; 1 refused, or intake could not be
    reached in all tries; 2 the command line cannot be used (trying again is no use).
    """
    if is_from_schedule:
        if window_start or window_end:
            raise typer.BadParameter("--window-from-schedule takes no --window-start and no --window-end.")
        start, end = window_from_schedule(scheduled_time, job_name, schedule, zone, datetime.now(UTC))
        if length and end is not None:
            start = end - from_duration(duration_of(length, "--window-length"))
    else:
        start, end = (
            from_timestamp(time_of(text, option)) if text else None
            for text, option in ((window_start, "--window-start"), (window_end, "--window-end"))
        )
    request = pb.TriggerBatchRequest(batch=name, wait_for=wait_of(waits))
    if start is not None:
        request.window_start_time.CopyFrom(to_timestamp(start))
    if end is not None:
        request.window_end_time.CopyFrom(to_timestamp(end))
    elif attempts > 1:
        # Tried again, "now" would be another window; named here, it is the same.
        request.window_end_time.CopyFrom(to_timestamp(datetime.now(UTC)))
    stub = session.stub("intake", IntakeServiceStub)
    answer: pb.TriggerBatchResponse = await persistently(
        lambda: stub.TriggerBatch(request, timeout=session.timeout_s),
        attempts=attempts,
        within=from_duration(duration_of(within, "--within")),
    )
    if session.is_json:
        show_json(answer)
        return
    say_applied(answer)
    up_to = f" up to {moment(request.window_end_time)}" if request.HasField("window_end_time") else ""
    if answer.is_repeated:
        typer.echo(f"{name}{up_to} had been triggered before: there is nothing to do.")
    else:
        typer.echo(f"Closed {answer.windows:,} windows of {name}{up_to}.")


def window_from_schedule(scheduled: str, job_name: str, cron: str, zone: str, now: datetime) -> Window:
    """The window (start, end] of the run that was scheduled at `scheduled`, else at the minute that the Job's name ends
    with, else of the schedule's latest run at `now`.

    Its start is known where there is a cron. BadParameter where nothing says when the run was scheduled.
    """
    if scheduled:
        end = from_timestamp(time_of(scheduled, "CARILLON_SCHEDULED_TIME"))
    elif (minute := minute_in(job_name, now)) is not None:
        end = minute
    elif cron:
        end = _before(cron, zone, now.replace(second=0, microsecond=0) + _MINUTE)
    else:
        raise typer.BadParameter(
            "Nothing says when this run was scheduled: set CARILLON_SCHEDULED_TIME or CARILLON_JOB_NAME, or give"
            " --schedule.",
            param_hint="--window-from-schedule",
        )
    return (_before(cron, zone, end) if cron else None), end


def minute_in(job_name: str, now: datetime) -> datetime | None:
    """When the CronJob's run with this name was scheduled.

    None for a name that somebody gave (`kubectl create job --from=cronjob/…`): it does not end with a minute, or with
    one that is to come, or over a month ago, as 20261201 would be.
    """
    found = _MINUTE_IN_NAME.search(job_name)
    if found is None:
        return None
    minute = datetime.fromtimestamp(int(found[1]) * 60, UTC)
    return minute if now - _OLDEST_RUN < minute <= now + _SKEW else None


def _before(cron: str, zone: str, moment_: datetime) -> datetime:
    """The latest occurrence before a moment."""
    try:
        return next(CronSim(cron, moment_.astimezone(ZoneInfo(zone)), reverse=True)).astimezone(UTC)
    except CronSimError as error:
        raise typer.BadParameter(f"{cron} is no cron of five fields: {error}.", param_hint="--schedule") from error
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise typer.BadParameter(f"{zone} is no time zone.", param_hint="--time-zone") from error
    except StopIteration as error:
        raise typer.BadParameter(f"{cron} has never occurred.", param_hint="--schedule") from error
