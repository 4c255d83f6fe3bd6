"""`carillon subscriptions`: who hears what, and how often."""

from pathlib import Path
from typing import Annotated, Final

import typer
from carillon.digest.v1 import digest_pb2 as pb
from carillon.digest.v1.digest_pb2_grpc import DigestServiceStub

from cli.output import NONE, show_json, show_list, word
from cli.session import Session, command
from cli.timers import Limit
from cli.values import messages_in

subscriptions = typer.Typer(help="Who hears what, and how often.", no_args_is_help=True)
_AT_ONCE: Final = 1000
SubscriptionId = Annotated[str, typer.Argument(metavar="ID", help="The subscription's id.", show_default=False)]


@command(subscriptions, "list", services=("digest",))
async def _list(
    session: Session,
    subscriber: Annotated[
        str, typer.Argument(metavar="[SUBSCRIBER]", help="Only this one's.", show_default=False)
    ] = "",
    limit: Limit = 100,
) -> None:
    """List subscriptions. With --json one object a line."""
    request = pb.ListSubscriptionsRequest(subscriber=subscriber, page_size=min(limit, 1000) or 1000)
    stub = session.stub("digest", DigestServiceStub)
    await show_list(
        session.all_pages(stub.ListSubscriptions, request, "subscriptions", limit=limit),
        ("id", "subscriber", "type", "topic", "choices", "filter"),
        lambda one: (one.id, one.subscriber, one.type, one.topic or NONE, choices_of(one), one.filter or NONE),
        is_json=session.is_json,
        nothing="There are no subscriptions.",
    )


@command(subscriptions, "get", services=("digest",))
async def _get(session: Session, subscription_id: SubscriptionId) -> None:
    """Show one subscription, as the JSON that `put` takes."""
    stub = session.stub("digest", DigestServiceStub)
    answer = await stub.GetSubscription(pb.GetSubscriptionRequest(id=subscription_id), timeout=session.timeout_s)
    show_json(answer.subscription)


@command(subscriptions, "put", services=("digest",))
async def _put(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML or JSON: one subscription, or a list.")],
) -> None:
    """Store subscriptions, whole: of a thousand all or none. They count for what happens from now on."""
    stub = session.stub("digest", DigestServiceStub)
    wanted = messages_in(file, pb.Subscription)
    for first in range(0, len(wanted), _AT_ONCE):
        request = pb.PutSubscriptionsRequest(subscriptions=wanted[first : first + _AT_ONCE])
        await stub.PutSubscriptions(request, timeout=session.timeout_s)
    if session.is_json:
        show_json({"stored": [one.id for one in wanted]})
    else:
        typer.echo(f"Stored {len(wanted):,} subscriptions.")


@command(subscriptions, "delete", services=("digest",))
async def _delete(session: Session, subscription_id: SubscriptionId) -> None:
    """Delete a subscription; one that is not there is no error. What waits in digests stays there."""
    stub = session.stub("digest", DigestServiceStub)
    await stub.DeleteSubscription(pb.DeleteSubscriptionRequest(id=subscription_id), timeout=session.timeout_s)
    if session.is_json:
        show_json({"deleted": subscription_id})
    else:
        typer.echo(f"{subscription_id} is no longer there.")


def choices_of(one: pb.Subscription) -> str:
    """All ways in which it is told."""
    return ", ".join(
        choice.cadence + (f" by {word(pb.Channel, choice.channel)}" if choice.channel else "") for choice in one.choices
    )
