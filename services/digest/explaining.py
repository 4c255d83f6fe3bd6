"""Why something was or was not told, or when it will be, in sentences for people. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from services.digest.catalog import ItemState, WindowState
from services.digest.views import DigestView, ItemView, NotificationView, WindowView

REASONS: Mapping[str, str] = {
    "off": "the subscriber has turned this type off",
    "filter": "the subscription's filter left it out",
    "no_address": "the subscriber has no address for this channel",
    "no_subscriber": "nobody listens to this topic for this type",
    "unknown_type": "the notification type is not in the catalog",
    "unknown_subscriber": "there is no such subscriber",
    "unknown_cadence": "the chosen cadence does not exist",
    "cadence_over": "the chosen cadence has no next time any more",
    "subscriber_deleted": "the subscriber was deleted while it waited",
    "payload_invalid": "its payload is not what the type's schema asks for",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """One entry of a story; see carillon.explain.v1.Entry."""

    at: datetime
    kind: str
    sentence: str
    details: Mapping[str, str] = field(default_factory=dict)
    related: Sequence[str] = ()
    is_expected: bool = False


def of_notification(one: NotificationView) -> Told:
    """How a notification came."""
    about = f" about {one.entity}" if one.entity else ""
    topics = f" and the topics {', '.join(one.topics)}" if one.topics else ""
    return Told(
        at=one.received_at,
        kind="notification_received",
        sentence=f"A notification of the type {one.type}{about} arrived for {one.subscribers} subscribers{topics}.",
        details={"notification_id": str(one.id), "type": one.type, "entity": one.entity},
    )


def of_item(item: ItemView, window: WindowView | None) -> Told:
    """Where an item is, and why."""
    state = item.state.name.lower()
    details = {
        "item_id": str(item.id),
        "subscriber": item.subscriber,
        "choice": item.choice,
        "state": state,
    }
    if item.reason:
        details["reason"] = item.reason
    related = [str(item.window_id)] if item.window_id else []
    if item.state is ItemState.PENDING and window is not None:
        when = "waits to be rendered" if window.state is WindowState.CLOSING else "goes out with the window"
        return Told(
            at=window.due_at,
            kind="item_pending",
            sentence=f"For {item.subscriber} it {when} (cadence {window.cadence}), due {window.due_at.isoformat()}.",
            details=details,
            related=related,
            is_expected=True,
        )
    return Told(
        at=item.changed_at,
        kind=f"item_{state}",
        sentence=_verdict(item),
        details=details,
        related=related,
    )


def _verdict(item: ItemView) -> str:
    who = f"For {item.subscriber} it" if item.subscriber else "It"
    match item.state:
        case ItemState.DIGESTED:
            return f"{who} went out in the digest {item.window_id}."
        case ItemState.SENT_ALONE:
            return f"{who} was sent alone."
        case ItemState.SUPPRESSED:
            return f"{who} was not sent: {REASONS.get(item.reason, item.reason)}."
        case ItemState.CANCELLED:
            return f"{who} was cancelled before it left."
        case ItemState.EXPIRED:
            return f"{who} expired before it left."
        case ItemState.DEAD:
            return f"{who} could not be rendered."
        case ItemState.PENDING:
            return f"{who} waits."


def of_window(window: WindowView) -> Iterator[Told]:
    """A window's life."""
    details = {"subscriber": window.subscriber, "cadence": window.cadence, "channel": window.channel.value}
    yield Told(
        at=window.opened_at,
        kind="window_opened",
        sentence=f"A window of the cadence {window.cadence} opened for {window.subscriber}.",
        details=details,
    )
    if window.closed_at is None:
        yield Told(
            at=window.due_at,
            kind="window_due",
            sentence=f"The window closes with {window.items} items.",
            details=details,
            is_expected=True,
        )
    else:
        yield Told(at=window.closed_at, kind="window_closed", sentence="The window closed.", details=details)


def of_digest(digest: DigestView) -> Iterator[Told]:
    """A digest and what became of its deliveries."""
    count = f"{digest.item_count} {'item' if digest.item_count == 1 else 'items'}"
    template = {"template_error": digest.template_error} if digest.template_error else {}
    parts = f"was handed over in {len(digest.deliveries)} parts" if digest.deliveries else "could not be rendered"
    yield Told(
        at=digest.closed_at,
        kind="digest_rendered" if digest.deliveries else "digest_dead",
        sentence=f"A digest of {count} for {digest.subscriber} {parts}.",
        details={"subject": digest.subject, **template},
        related=[str(delivery.id) for delivery in digest.deliveries[:100]],
    )
    for part, delivery in enumerate(digest.deliveries, start=1):
        if delivery.ended_at is not None:
            because = f": {delivery.reason}" if delivery.reason else ""
            yield Told(
                at=delivery.ended_at,
                kind=f"delivery_{delivery.outcome}",
                sentence=f"The dispatcher reported part {part} as {delivery.outcome}{because}."[:1000],
                related=[str(delivery.id)],
            )
