"""`carillon subscribers` and `carillon cadences`: who is told, and how often somebody may be told."""

from pathlib import Path
from typing import Annotated, Final

import typer
from carillon.digest.v1 import digest_pb2 as pb
from carillon.digest.v1.digest_pb2_grpc import DigestServiceStub

from cli.output import NONE, show_json, show_list
from cli.session import Session, command
from cli.timers import Limit
from cli.values import messages_in

subscribers = typer.Typer(help="Who is told.", no_args_is_help=True)
cadences = typer.Typer(help="How often somebody may be told.", no_args_is_help=True)
_AT_ONCE: Final = 1000


@command(subscribers, "list", services=("digest",))
async def _list_subscribers(session: Session, limit: Limit = 100) -> None:
    """List subscribers. With --json one object a line."""
    request = pb.ListSubscribersRequest(page_size=min(limit, 1000) or 1000)
    stub = session.stub("digest", DigestServiceStub)
    await show_list(
        session.all_pages(stub.ListSubscribers, request, "subscribers", limit=limit),
        ("id", "zone", "locale", "email", "webhook"),
        lambda one: (one.id, one.zone or "UTC", one.locale or "en", one.email or NONE, one.webhook_url or NONE),
        is_json=session.is_json,
        nothing="There are no subscribers.",
    )


@command(subscribers, "put", services=("digest",))
async def _put_subscribers(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML or JSON: one subscriber, or a list.")],
) -> None:
    """Store subscribers, whole: of a thousand all or none."""
    stub = session.stub("digest", DigestServiceStub)
    wanted = messages_in(file, pb.Subscriber)
    for first in range(0, len(wanted), _AT_ONCE):
        request = pb.PutSubscribersRequest(subscribers=wanted[first : first + _AT_ONCE])
        await stub.PutSubscribers(request, timeout=session.timeout_s)
    if session.is_json:
        show_json({"stored": [one.id for one in wanted]})
    else:
        typer.echo(f"Stored {len(wanted):,} subscribers.")


@command(subscribers, "delete", services=("digest",))
async def _delete_subscriber(
    session: Session,
    subscriber: Annotated[str, typer.Argument(metavar="ID", help="The subscriber.", show_default=False)],
) -> None:
    """Delete a subscriber with all subscriptions; what waits for it is suppressed. None is no error."""
    stub = session.stub("digest", DigestServiceStub)
    await stub.DeleteSubscriber(pb.DeleteSubscriberRequest(id=subscriber), timeout=session.timeout_s)
    if session.is_json:
        show_json({"deleted": subscriber})
    else:
        typer.echo(f"{subscriber} is no longer there.")


@command(cadences, "list", services=("digest",))
async def _list_cadences(session: Session, limit: Limit = 100) -> None:
    """List cadences. With --json one object a line."""
    request = pb.ListCadencesRequest(page_size=min(limit, 1000) or 1000)
    stub = session.stub("digest", DigestServiceStub)
    await show_list(
        session.all_pages(stub.ListCadences, request, "cadences", limit=limit),
        ("id", "name", "kind", "rule"),
        lambda one: (one.id, one.name, one.WhichOneof("kind") or NONE, _rule(one)),
        is_json=session.is_json,
        nothing="There are no cadences.",
    )


@command(cadences, "put", services=("digest",))
async def _put_cadences(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML or JSON: one cadence, or a list.")],
) -> None:
    """Store cadences, one after the other. Open windows keep their due time."""
    stub = session.stub("digest", DigestServiceStub)
    for cadence in messages_in(file, pb.Cadence):
        answer = await stub.PutCadence(pb.PutCadenceRequest(cadence=cadence), timeout=session.timeout_s)
        if session.is_json:
            show_json(answer.cadence, is_line=True)
        else:
            typer.echo(f"Stored {answer.cadence.id}.")


def _rule(one: pb.Cadence) -> str:
    match one.WhichOneof("kind"):
        case "aligned":
            return f"{one.aligned.cron or one.aligned.rrule} {one.aligned.zone}".strip()
        case "rolling":
            return f"{one.rolling.duration.ToTimedelta()} after the first"
        case "external":
            return f"batch {one.external.batch}"
        case _:
            return NONE
