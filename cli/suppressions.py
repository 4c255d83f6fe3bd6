"""`carillon suppressions`: addresses that get nothing any more, or nothing of one list."""

from typing import Annotated

import typer
from carillon.dispatcher.v1 import dispatcher_pb2 as pb
from carillon.dispatcher.v1.dispatcher_pb2_grpc import DispatcherServiceStub

from cli.output import NONE, show_json, show_list, when, word
from cli.session import Session, command
from cli.timers import Limit
from cli.values import enum_of

suppressions = typer.Typer(help="Addresses that get nothing, or nothing of one list.", no_args_is_help=True)
Address = Annotated[str, typer.Argument(metavar="ADDRESS", help="As its channel has it.", show_default=False)]
Channel = Annotated[str, typer.Option("--channel", help="email, webhook, apprise or log.")]
ListId = Annotated[
    str, typer.Option("--list", help="Only of this list, type:shop/closed or cadence:daily. Without: all messages.")
]


@command(suppressions, "list", services=("dispatcher",))
async def _list(
    session: Session,
    address: Annotated[str, typer.Option("--address", help="Only of this address.")] = "",
    limit: Limit = 100,
) -> None:
    """List suppressed addresses, with who wanted it so. With --json one object a line."""
    request = pb.ListSuppressionsRequest(address=address, page_size=min(limit, 1000) or 1000)
    stub = session.stub("dispatcher", DispatcherServiceStub)
    await show_list(
        session.all_pages(stub.ListSuppressions, request, "suppressions", limit=limit),
        ("address", "channel", "list", "source", "since", "reason"),
        lambda one: (
            one.address,
            one.channel,
            one.list_id or "all",
            word(pb.SuppressionSource, one.source),
            when(one, "create_time"),
            one.reason or NONE,
        ),
        is_json=session.is_json,
        nothing="Nobody is suppressed.",
    )


@command(suppressions, "add", services=("dispatcher",))
async def _add(
    session: Session,
    address: Address,
    reason: Annotated[str, typer.Option("--reason", help="Why, for those who look later.", show_default=False)],
    channel: Channel = "email",
    list_id: ListId = "",
) -> None:
    """Never send to an address again. What is for it already ends as suppressed."""
    stub = session.stub("dispatcher", DispatcherServiceStub)
    wanted = pb.Suppression(channel=channel, address=address, reason=reason, list_id=list_id)
    answer = await stub.PutSuppression(pb.PutSuppressionRequest(suppression=wanted), timeout=session.timeout_s)
    if session.is_json:
        show_json(answer.suppression)
    else:
        typer.echo(f"{address} gets {f'nothing of {list_id}' if list_id else 'nothing'} any more.")


@command(suppressions, "remove", services=("dispatcher",))
async def _remove(
    session: Session,
    address: Address,
    channel: Channel = "email",
    list_id: ListId = "",
    source: Annotated[
        str,
        typer.Option("--source", help="Only what a caller, bounce or unsubscribe stored. Without: whoever it was."),
    ] = "",
) -> None:
    """Lift a suppression. Without --source that may take back what a reader asked for. None is no error."""
    stub = session.stub("dispatcher", DispatcherServiceStub)
    request = pb.DeleteSuppressionRequest(channel=channel, address=address, list_id=list_id)
    if source:
        request.source = enum_of(pb.SuppressionSource, source, "--source")
    await stub.DeleteSuppression(request, timeout=session.timeout_s)
    if session.is_json:
        show_json({"removed": address, "channel": channel, "list_id": list_id})
    else:
        typer.echo(f"{address} is not suppressed{f' for {list_id}' if list_id else ''} any more.")
