"""`carillon digests`: what went out together, and what waits to."""

from typing import Annotated

import typer
from carillon.digest.v1 import digest_pb2 as pb
from carillon.digest.v1.digest_pb2_grpc import DigestServiceStub

from cli.output import short, show_json, show_list, show_pairs, show_table, when, word
from cli.session import Session, command
from cli.timers import Limit
from cli.values import enums_of

digests = typer.Typer(help="What went out together, and what waits to.", no_args_is_help=True)
Subscriber = Annotated[str, typer.Argument(metavar="[SUBSCRIBER]", help="Only this one's.", show_default=False)]
Cadence = Annotated[str, typer.Option("--cadence", help="Only of this cadence.")]


@command(digests, "list", services=("digest",))
async def _list(session: Session, subscriber: Subscriber = "", cadence: Cadence = "", limit: Limit = 100) -> None:
    """List what went out, newest first. With --json one object a line."""
    request = pb.ListDigestsRequest(subscriber=subscriber, cadence=cadence, page_size=min(limit, 1000) or 1000)
    stub = session.stub("digest", DigestServiceStub)
    await show_list(
        session.all_pages(stub.ListDigests, request, "digests", limit=limit),
        ("closed", "subscriber", "cadence", "channel", "items", "outcome", "subject", "id"),
        lambda one: (
            when(one, "close_time"),
            one.subscriber,
            one.cadence,
            word(pb.Channel, one.channel),
            f"{one.item_count:,}",
            one.outcome,
            short(one.subject, 40),
            one.id,
        ),
        is_json=session.is_json,
        nothing="Nothing has gone out.",
    )


@command(digests, "get", services=("digest",))
async def _get(
    session: Session, digest_id: Annotated[str, typer.Argument(metavar="ID", help="Its id.", show_default=False)]
) -> None:
    """Show one digest with its items."""
    stub = session.stub("digest", DigestServiceStub)
    found: pb.GetDigestResponse = await stub.GetDigest(pb.GetDigestRequest(id=digest_id), timeout=session.timeout_s)
    if session.is_json:
        show_json(found)
        return
    one = found.digest
    show_pairs(
        [
            ("id", one.id),
            ("subscriber", one.subscriber),
            ("cadence", one.cadence),
            ("channel", word(pb.Channel, one.channel)),
            ("closed", when(one, "close_time")),
            ("subject", one.subject),
            ("outcome", one.outcome),
            ("deliveries", ", ".join(one.delivery_ids)),
        ]
    )
    rows = [
        (when(item, "occur_time"), item.type, item.entity, word(pb.ItemState, item.state), item.notification_id)
        for item in found.items
    ]
    show_table(("happened", "type", "entity", "state", "notification"), rows)


@command(digests, "waiting", services=("digest",))
async def _waiting(
    session: Session,
    subscriber: Subscriber = "",
    cadence: Cadence = "",
    states: Annotated[list[str] | None, typer.Option("--state", help="open, closing or closed.")] = None,
    limit: Limit = 100,
) -> None:
    """List open windows with what waits in them. With --json one object a line."""
    request = pb.ListWindowsRequest(
        subscriber=subscriber,
        cadence=cadence,
        states=enums_of(pb.WindowState, states or ["open", "closing"], "--state"),
        page_size=min(limit, 1000) or 1000,
    )
    stub = session.stub("digest", DigestServiceStub)
    await show_list(
        session.all_pages(stub.ListWindows, request, "windows", limit=limit),
        ("due", "subscriber", "cadence", "channel", "items", "state", "id"),
        lambda one: (
            when(one, "due_time"),
            one.subscriber,
            one.cadence,
            word(pb.Channel, one.channel),
            f"{one.items:,}",
            word(pb.WindowState, one.state),
            one.id,
        ),
        is_json=session.is_json,
        nothing="Nothing waits.",
    )


@command(digests, "preview", services=("digest",))
async def _preview(
    session: Session,
    window_id: Annotated[str, typer.Argument(metavar="WINDOW", help="An open window's id.", show_default=False)],
    is_html: Annotated[bool, typer.Option("--html", help="The HTML instead of the text.")] = False,
) -> None:
    """Show an open window as it would go out now. It stays open."""
    stub = session.stub("digest", DigestServiceStub)
    request = pb.PreviewDigestRequest(window_id=window_id)
    found: pb.PreviewDigestResponse = await stub.PreviewDigest(request, timeout=session.timeout_s)
    if session.is_json:
        show_json(found)
        return
    if found.template_error:
        typer.echo(f"A built-in template wrote some of it instead: {found.template_error}", err=True)
    typer.echo(found.html if is_html else f"{found.subject}\n\n{found.text}")
