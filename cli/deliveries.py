"""`carillon deliveries`: messages to addresses, and what came of them."""

from typing import Annotated

import typer
from carillon.dispatcher.v1 import dispatcher_pb2 as pb
from carillon.dispatcher.v1.dispatcher_pb2_grpc import DispatcherServiceStub
from carillon.scheduler.v1 import timer_pb2

from cli.output import NONE, short, show_json, show_list, show_pairs, show_table, when, word
from cli.session import Session, command
from cli.timers import Limit
from cli.values import enums_of

deliveries = typer.Typer(help="Messages to addresses, and what came of them.", no_args_is_help=True)
COLUMNS = ("made", "state", "subscriber", "channel", "tries", "reason", "subject", "id")


@command(deliveries, "list", services=("dispatcher",))
async def _list(
    session: Session,
    subscriber: Annotated[
        str, typer.Argument(metavar="[SUBSCRIBER]", help="Only this one's.", show_default=False)
    ] = "",
    digest_id: Annotated[str, typer.Option("--digest", help="Only of this digest.")] = "",
    states: Annotated[list[str] | None, typer.Option("--state", help="sent, retrying, …; may be repeated.")] = None,
    limit: Limit = 100,
) -> None:
    """List deliveries, newest first. With --json one object a line."""
    request = pb.ListDeliveriesRequest(
        subscriber=subscriber,
        digest_id=digest_id,
        states=enums_of(pb.DeliveryState, states or [], "--state"),
        page_size=min(limit, 1000) or 1000,
    )
    stub = session.stub("dispatcher", DispatcherServiceStub)
    await show_list(
        session.all_pages(stub.ListDeliveries, request, "deliveries", limit=limit),
        COLUMNS,
        row_of,
        is_json=session.is_json,
        nothing="There are no such deliveries.",
    )


@command(deliveries, "get", services=("dispatcher",))
async def _get(
    session: Session,
    delivery_id: Annotated[str, typer.Argument(metavar="ID", help="Its id.", show_default=False)],
    with_content: Annotated[bool, typer.Option("--content", help="With what it says.")] = False,
) -> None:
    """Show one delivery with its attempts."""
    stub = session.stub("dispatcher", DispatcherServiceStub)
    request = pb.GetDeliveryRequest(id=delivery_id, with_content=with_content)
    found: pb.GetDeliveryResponse = await stub.GetDelivery(request, timeout=session.timeout_s)
    if session.is_json:
        show_json(found)
        return
    one = found.delivery
    show_pairs(
        [
            ("id", one.id),
            ("digest", one.digest_id),
            ("subscriber", one.subscriber),
            ("channel", one.channel),
            ("address", one.address),
            ("subject", one.subject),
            ("priority", word(timer_pb2.Priority, one.priority)),
            ("state", word(pb.DeliveryState, one.state)),
            ("reason", one.reason),
            ("last error", one.last_error),
            ("made", when(one, "create_time")),
            ("ended", when(one, "end_time")),
            ("next attempt", when(one, "next_attempt_time")),
            ("parked until", when(one, "parked_until_time")),
        ]
    )
    if found.attempts:
        rows = [
            (str(each.number), when(each, "start_time"), when(each, "end_time"), each.reason or "sent", each.reply)
            for each in found.attempts
        ]
        show_table(("attempt", "began", "ended", "result", "reply"), rows)
    if with_content:
        typer.echo(found.content.text or found.content.json or found.content.html)


def row_of(one: pb.Delivery) -> tuple[str, ...]:
    """For people, as COLUMNS says."""
    return (
        when(one, "create_time"),
        word(pb.DeliveryState, one.state),
        one.subscriber,
        one.channel,
        str(one.attempts),
        one.reason or NONE,
        short(one.subject, 40),
        one.id,
    )
