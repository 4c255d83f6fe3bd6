"""`carillon timelines`: sets of timers that begin together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from carillon.intake.v1 import intake_pb2
from carillon.intake.v1.intake_pb2_grpc import IntakeServiceStub
from carillon.scheduler.v1 import scheduler_pb2 as pb
from carillon.scheduler.v1 import timer_pb2
from carillon.scheduler.v1.scheduler_pb2_grpc import SchedulerServiceStub

from cli.bulk import show_results
from cli.notify import Key, Waits, key_of, wait_of
from cli.output import how_long, show_json, show_list, show_table, when
from cli.session import Session, command
from cli.timers import Limit, target_of
from cli.values import TIME_HELP, messages_in, time_of

timelines = typer.Typer(help="Sets of timers that begin together.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NAME", help="The timeline.", show_default=False)]


@command(timelines, "list", services=("scheduler",))
async def _list(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="All versions of it.", show_default=False)] = "",
    limit: Limit = 100,
) -> None:
    """List timelines, the newest version of each. With --json one object a line, with the steps."""
    stub = session.stub("scheduler", SchedulerServiceStub)
    request = pb.ListTimelinesRequest(name=name, page_size=min(limit, 1000) or 1000)
    await show_list(
        session.all_pages(stub.ListTimelines, request, "timelines", limit=limit),
        ("name", "version", "stored", "steps", "description"),
        lambda one: (
            one.name,
            str(one.version),
            when(one, "create_time"),
            ", ".join(f"{step.name} +{how_long(step.offset)}" for step in one.steps),
            one.description,
        ),
        is_json=session.is_json,
        nothing="There are no timelines.",
    )


@command(timelines, "get", services=("scheduler",))
async def _get(session: Session, name: Name) -> None:
    """Show the newest version of a timeline, step by step."""
    stub = session.stub("scheduler", SchedulerServiceStub)
    found = await stub.ListTimelines(pb.ListTimelinesRequest(name=name, page_size=1), timeout=session.timeout_s)
    if not found.timelines:
        typer.echo(f"There is no timeline {name}.", err=True)
        raise typer.Exit(1)
    timeline = found.timelines[0]
    if session.is_json:
        show_json(timeline)
        return
    title = f"{timeline.name}, version {timeline.version}"
    show_table(("step", "after", "if", "then"), _rows(timeline.steps, 0), title=title)


@command(timelines, "put", services=("scheduler",))
async def _put(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML or JSON: one timeline, or a list.")],
) -> None:
    """Store timelines. The same again changes nothing; changed, it is a new version, and what runs keeps its own."""
    stub = session.stub("scheduler", SchedulerServiceStub)
    for timeline in messages_in(file, timer_pb2.Timeline):
        answer = await stub.PutTimeline(pb.PutTimelineRequest(timeline=timeline), timeout=session.timeout_s)
        if session.is_json:
            show_json(answer.timeline, is_line=True)
        else:
            typer.echo(f"{answer.timeline.name} is stored as version {answer.timeline.version}.")


@command(timelines, "start", services=("intake",))
async def _start(
    session: Session,
    name: Name,
    entity: Annotated[str, typer.Argument(metavar="ENTITY", help="What it is about.", show_default=False)],
    anchor: Annotated[str, typer.Option("--anchor", help=f"Offsets count from it: {TIME_HELP}; now without it.")] = "",
    key: Key = "",
    waits: Waits = True,
) -> int:
    """Start a timeline for an entity. Started twice with one anchor, it runs once."""
    start = intake_pb2.TimelineStart(timeline=name, entity=entity)
    if anchor:
        start.anchor_time.CopyFrom(time_of(anchor, "--anchor"))
    request = intake_pb2.StartTimelineRequest(starts=[start], idempotency_key=key_of(key), wait_for=wait_of(waits))
    stub = session.stub("intake", IntakeServiceStub)
    return show_results(session, await stub.StartTimeline(request, timeout=session.timeout_s), "Started")


def _rows(steps: Sequence[timer_pb2.TimelineStep], depth: int) -> list[tuple[str, str, str, str]]:
    rows: list[tuple[str, str, str, str]] = []
    for step in steps:
        condition = step.condition.cel or step.condition.service.service
        rows.append(("  " * depth + step.name, how_long(step.offset), condition, target_of(step.target)))
        rows += _rows(step.follow_ups, depth + 1)
    return rows
