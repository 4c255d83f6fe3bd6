"""`carillon dead-letters`: what was given up: deliveries, and frames between the services; and sending it again."""

from typing import Annotated, Final

import grpc
import typer
from carillon.dispatcher.v1 import dispatcher_pb2 as pb
from carillon.dispatcher.v1.dispatcher_pb2_grpc import DispatcherServiceStub
from carillon.link.v1 import dead_frame_pb2
from carillon.link.v1.dead_frame_pb2_grpc import DeadFrameServiceStub

from cli.connection import refusal_text
from cli.deliveries import COLUMNS, row_of
from cli.output import NONE, as_json, show_json, show_list, show_table, when, word
from cli.session import SERVICES, Exit, Session, command
from cli.timers import Limit
from cli.values import TIME_HELP, enum_of, time_of
from libs.ids import new_id

dead_letters = typer.Typer(help="What was given up, and sending it again.", no_args_is_help=True)
Channel = Annotated[str, typer.Option("--channel", help="email, webhook, apprise or log.")]
Reason = Annotated[str, typer.Option("--reason", help="As `count` tells them.")]
Subscriber = Annotated[str, typer.Option("--subscriber", help="Only this one's.")]
Since = Annotated[str, typer.Option("--from", help=f"Given up then or later: {TIME_HELP}.")]
Until = Annotated[str, typer.Option("--until", help=f"Given up before: {TIME_HELP}.")]
State = Annotated[str, typer.Option("--state", help="dead or held.")]
_AT_ONCE: Final = 1000
_MOST: Final = 10_000


@command(dead_letters, "list", services=("dispatcher",))
async def _list(
    session: Session,
    channel: Channel = "",
    reason: Reason = "",
    subscriber: Subscriber = "",
    since: Since = "",
    until: Until = "",
    state: State = "",
    limit: Limit = 100,
) -> None:
    """List deliveries that were given up or are held, the last first. With --json one object a line."""
    request = pb.ListDeadLettersRequest(
        filter=_filter(channel, reason, subscriber, since, until, state), page_size=min(limit, 1000) or 1000
    )
    stub = session.stub("dispatcher", DispatcherServiceStub)
    await show_list(
        session.all_pages(stub.ListDeadLetters, request, "deliveries", limit=limit),
        COLUMNS,
        row_of,
        is_json=session.is_json,
        nothing="Nothing was given up.",
    )


@command(dead_letters, "count", services=("dispatcher",))
async def _count(
    session: Session,
    channel: Channel = "",
    reason: Reason = "",
    subscriber: Subscriber = "",
    since: Since = "",
    until: Until = "",
    state: State = "",
) -> None:
    """Count them by channel, state and reason."""
    request = pb.CountDeadLettersRequest(filter=_filter(channel, reason, subscriber, since, until, state))
    stub = session.stub("dispatcher", DispatcherServiceStub)
    found: pb.CountDeadLettersResponse = await stub.CountDeadLetters(request, timeout=session.timeout_s)
    if session.is_json:
        show_json(found)
        return
    rows = [
        (
            one.channel,
            word(pb.DeliveryState, one.state),
            one.reason or NONE,
            f"{one.count:,}",
            when(one, "first_time"),
            when(one, "last_time"),
        )
        for one in found.counts
    ]
    if rows:
        show_table(("channel", "state", "reason", "count", "first", "last"), rows)
    typer.echo(f"{found.total:,} in all.")


@command(dead_letters, "redrive", services=("dispatcher",))
async def _redrive(
    session: Session,
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="These.", show_default=False)] = None,
    channel: Channel = "",
    reason: Reason = "",
    subscriber: Subscriber = "",
    since: Since = "",
    until: Until = "",
    state: State = "",
    is_all: Annotated[bool, typer.Option("--all", help="All there are, without a filter.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, max=_MOST, help="With a filter: at most so many.")] = 1000,
    is_agreed: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    key: Annotated[str, typer.Option("--key", help="Idempotency key, of 1 to 128 characters.")] = "",
) -> int:
    """Send dead or held deliveries again: those named, or those of a filter.

    Exit codes: 0 they wait for an attempt again; 1 refused, or it cannot be reached; 2 usage; 3 you said no.
    """
    stub = session.stub("dispatcher", DispatcherServiceStub)
    wanted = _filter(channel, reason, subscriber, since, until, state)
    has_filter = wanted != pb.DeadLetterFilter()
    if [bool(ids), has_filter, is_all].count(True) != 1:
        raise typer.BadParameter("Say which, in one way: ids, a filter, or --all.")
    request = pb.RedriveRequest(idempotency_key=key or new_id().hex)
    if ids:
        request.delivery_ids.extend(ids)
        question = f"Send {len(ids):,} again?"
    else:
        request.filter.CopyFrom(wanted)
        request.limit = limit
        counting = pb.CountDeadLettersRequest(filter=wanted)
        found: pb.CountDeadLettersResponse = await stub.CountDeadLetters(counting, timeout=session.timeout_s)
        question = f"Send {min(limit, found.total):,} of {found.total:,} again?"
    if not is_agreed and not _agrees(question, is_json=session.is_json):
        return Exit.NOT_ALL
    answer: pb.RedriveResponse = await stub.Redrive(request, timeout=session.timeout_s)
    if session.is_json:
        show_json(answer)
        return Exit.DONE
    typer.echo(f"{answer.redriven:,} wait for an attempt again.")
    if answer.remaining:
        typer.echo(f"{answer.remaining:,} more match; run it again for those.")
    return Exit.DONE


@command(dead_letters, "frames", services=SERVICES, at_least=1)
async def _frames(
    session: Session,
    sender: Annotated[str, typer.Option("--sender", help="Only what this service had sent.")] = "",
    limit: Limit = 100,
) -> int:
    """List frames between services that could not be applied; needs the role operator. With --json one object a line.

    Exit codes: 0 all services that are known have answered; 1 none has; 3 some have not.
    """
    refused = 0
    rows: list[tuple[str, ...]] = []
    for service in session.connections:
        request = dead_frame_pb2.ListDeadFramesRequest(sender=sender, page_size=min(limit, 1000) or 1000)
        stub = session.stub(service, DeadFrameServiceStub)
        try:
            async for one in session.all_pages(stub.ListDeadFrames, request, "dead_frames", limit=limit):
                if session.is_json:
                    show_json({"service": service, **as_json(one)}, is_line=True)
                rows.append(_frame_row(service, one))
        except grpc.aio.AioRpcError as error:
            refused += 1
            typer.echo(f"{service}: {refusal_text(error)}", err=True)
    if not session.is_json:
        if rows:
            show_table(("put aside", "service", "sender", "entries", "reason", "id"), rows)
        elif not refused:
            typer.echo("No frame was put aside.")
    if not refused:
        return Exit.DONE
    return Exit.REFUSED if refused == len(session.connections) else Exit.NOT_ALL


@command(dead_letters, "redrive-frames", services=SERVICES, at_least=1)
async def _redrive_frames(
    session: Session,
    service: Annotated[str, typer.Argument(metavar="SERVICE", help="Which put them aside.", show_default=False)],
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="The frames.", show_default=False)],
) -> int:
    """Have a service apply frames once more, that it had put aside; needs the role operator.

    Exit codes: 0 all are on their way; 1 refused, or it cannot be reached; 2 usage; 3 some stay where they are.
    """
    if service not in session.connections:
        raise typer.BadParameter(f"it is not known where {service} can be reached.", param_hint="SERVICE")
    stub = session.stub(service, DeadFrameServiceStub)
    left: list[str] = []
    redriven = 0
    for first in range(0, len(ids), _AT_ONCE):
        request = dead_frame_pb2.RedriveDeadFramesRequest(ids=ids[first : first + _AT_ONCE])
        answer = await stub.RedriveDeadFrames(request, timeout=session.timeout_s)
        redriven += answer.redriven
        left += answer.left_ids
    if session.is_json:
        show_json({"redriven": redriven, "leftIds": left})
    else:
        typer.echo(f"{redriven:,} are on their way again.")
        for one in left:
            typer.echo(f"{one} stays where it is: it is not there, no frame, or too old to be safe.", err=True)
    return Exit.NOT_ALL if left else Exit.DONE


def _filter(channel: str, reason: str, subscriber: str, since: str, until: str, state: str) -> pb.DeadLetterFilter:
    found = pb.DeadLetterFilter(channel=channel, reason=reason, subscriber=subscriber)
    if since:
        found.start_time.CopyFrom(time_of(since, "--from"))
    if until:
        found.end_time.CopyFrom(time_of(until, "--until"))
    if state:
        found.state = enum_of(pb.DeliveryState, state, "--state")
    return found


def _agrees(question: str, *, is_json: bool) -> bool:
    """No answer, as from a pipeline, is no; a program is not asked at all."""
    if is_json:
        raise typer.BadParameter("--json cannot ask: give --yes as well.")
    try:
        return typer.confirm(question)
    except typer.Abort:
        return False


def _frame_row(service: str, one: dead_frame_pb2.DeadFrame) -> tuple[str, ...]:
    return (when(one, "bury_time"), service, one.sender or NONE, f"{one.entries:,}", one.reason, one.id)
