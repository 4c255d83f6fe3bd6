"""Why something was or was not told, or when it will be, in sentences for people. Pure."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Final

from services.digest.catalog import DEFAULT_RETENTION, OFF, Channel, ItemState, WindowKind, WindowState
from services.digest.explaining_windows import ADDRESSES, STOOD_IN, fate, name_of, prospects
from services.digest.payload_schemas import BadSchema, compiled
from services.digest.stories import Facts, KnownCancel, Told, clock_time, counted, cut, listed, quoted
from services.digest.views import ItemView, NotificationView, WindowView

_MOST_NAMED = 2
_FAULT = "That is a fault; carillon audit shows all that is like it."


def of_notification(one: NotificationView, facts: Facts) -> Told:
    """How a notification came."""
    about = f" about {one.entity}" if one.entity else ""
    known = "" if one.type in facts.types else ", which is not in the catalog,"
    audience = [counted(one.subscribers, "subscriber")] if one.subscribers else []
    if one.topics:
        audience.append(f"the topic{'' if len(one.topics) == 1 else 's'} {listed(one.topics)}")
    came = f"came for {' and '.join(audience) or 'nobody'}."
    expiry = f" It expires on {clock_time(one.expires_at, 'UTC')}." if one.expires_at else ""
    return Told(
        at=one.received_at,
        kind="notification_received",
        sentence=cut(f"A notification of the type {one.type}{known}{about} {came}{expiry}"),
        details={
            "notification_id": str(one.id),
            "type": one.type,
            "entity": one.entity,
            "sequence": str(one.sequence),
            "occurred": one.occurred_at.isoformat(),
        },
        related=[str(other) for other in (one.timer_id, one.schedule_id) if other is not None],
    )


def of_item(item: ItemView, about: NotificationView, facts: Facts) -> Told:
    """Where an item is, and why."""
    window = facts.windows.get(item.window_id) if item.window_id else None
    if item.state is ItemState.PENDING and window is not None and window.state is not WindowState.CLOSED:
        sentence, at = _waiting(item, about, window, facts)
    else:
        sentence, at = _ENDS[item.state](item, about, facts), item.changed_at
    who = f"For {item.subscriber} it" if item.subscriber else "It"
    return Told(
        at=at,
        kind=f"item_{item.state.name.lower()}",
        sentence=cut(f"{who} {sentence}"),
        details=_details(item),
        related=[str(item.window_id)] if item.window_id else [],
        is_expected=at > item.changed_at and item.state is ItemState.PENDING,
    )


def kept_until(about: NotificationView, items: Sequence[ItemView], facts: Facts) -> Iterator[Told]:
    """When a notification of which everything has ended will be forgotten."""
    ends: list[datetime] = []
    for item in items:
        window = facts.windows.get(item.window_id) if item.window_id else None
        if item.state is ItemState.PENDING or (window is not None and window.closed_at is None):
            return
        ends.append(window.closed_at if window and window.closed_at else item.changed_at)
    if ends:
        known = facts.types.get(about.type)
        retention = known.retention if known else DEFAULT_RETENTION
        days = f"{retention.total_seconds() / 86_400:g}"
        yield Told(
            at=max(ends) + retention,
            kind="notification_forgotten",
            sentence=f"It is kept for {days} days after it was over, as its type says, and then forgotten.",
            details={"notification_id": str(about.id)},
            is_expected=True,
        )


def _details(item: ItemView) -> dict[str, str]:
    details = {
        "item_id": str(item.id),
        "subscriber": item.subscriber,
        "choice": item.choice,
        "state": item.state.name.lower(),
    }
    return details | ({"reason": item.reason} if item.reason else {})


# What waits


def _waiting(item: ItemView, about: NotificationView, window: WindowView, facts: Facts) -> tuple[str, datetime]:
    words, at = prospects(window, facts)
    if window.kind is WindowKind.ALONE:
        sentence = f"is to be sent alone by {window.channel}; it {words}."
    else:
        sentence = f"waits for the digest {name_of(window, facts)} by {window.channel}, which {words}."
    return " ".join([sentence, *_provisos(item, about, window, at, facts)]), at


def _provisos(item: ItemView, about: NotificationView, window: WindowView, at: datetime, facts: Facts) -> Iterator[str]:
    who = item.subscriber
    if about.expires_at is not None and about.expires_at <= at:
        yield f"But it expires before that, on {facts.when(about.expires_at, who)}, and will then not be sent."
    known = facts.subscribers.get(who)
    if known is not None and not known.address(window.channel):
        yield f"As things are it will not be sent then, because {who} has no {ADDRESSES[window.channel]}."
    type_ = facts.types.get(item.type)
    if type_ is not None and type_.is_mandatory:
        deciding = facts.deciding(item.type, who, about.topics)
        if any(one.cadence == OFF for one in deciding):
            yield f"{who} has turned this type off, but it is mandatory."
        elif any(one.filter for one in deciding):
            yield f"The filters of {who} do not count, because the type is mandatory."


# What is over


def _stranded(item: ItemView, _about: NotificationView, facts: Facts) -> str:
    window = facts.windows.get(item.window_id) if item.window_id else None
    which = "does not exist" if window is None else "has closed without it"
    return f"waits in the window {item.window_id}, which {which}. {_FAULT}"


def _out(item: ItemView, _about: NotificationView, facts: Facts) -> str:
    digest = facts.digests.get(item.window_id) if item.window_id else None
    if digest is None:
        return f"went out in the digest {item.window_id}, of which nothing is on record. {_FAULT}"
    when = facts.when(digest.closed_at, item.subscriber)
    if item.state is ItemState.SENT_ALONE:
        how = f"left alone by {digest.channel} on {when}"
    else:
        name = facts.cadence(digest.cadence)
        how = f"went out by {digest.channel} in the digest {name} of {when}, with {counted(digest.item_count, 'item')},"
    fallback = f" {STOOD_IN}: {quoted(digest.template_error)}"
    return f"{how} {fate(digest)}." + (fallback if digest.template_error else "")


def _suppressed(item: ItemView, about: NotificationView, facts: Facts) -> str:
    why = REASONS.get(item.reason)
    return f"was not sent: {why(item, about, facts) if why else item.reason}."


def _cancelled(item: ItemView, about: NotificationView, facts: Facts) -> str:
    how = "was cancelled before it left" if item.window_id else "had been cancelled before it came"
    cancel = next((one for one in facts.cancels if _hits(one, about)), None)
    if cancel is None:
        return f"{how}, by a command that is no longer on record."
    of_type = f", the type {cancel.type}" if cancel.type else ""
    on_timeline = f", the timeline {cancel.timeline}" if cancel.timeline else ""
    timers = f", {counted(len(cancel.timer_ids), 'timer')} by id" if cancel.timer_ids else ""
    return f"{how}, by the cancel number {cancel.sequence} of {about.entity}{of_type}{on_timeline}{timers}."


def _hits(cancel: KnownCancel, about: NotificationView) -> bool:
    return (
        cancel.entity == about.entity
        and cancel.sequence > about.sequence
        and cancel.type in ("", about.type, about.timer_type)
        and cancel.timeline in ("", about.timeline)
        and (not cancel.timer_ids or bool({about.timer_id, about.schedule_id}.intersection(cancel.timer_ids)))
    )


def _expired(item: ItemView, about: NotificationView, facts: Facts) -> str:
    at = f" on {facts.when(about.expires_at, item.subscriber)}" if about.expires_at else ""
    return f"expired{at}, before it could leave." if item.window_id else f"had expired{at} when it came."


def _dead(item: ItemView, _about: NotificationView, facts: Facts) -> str:
    digest = facts.digests.get(item.window_id) if item.window_id else None
    why = quoted(digest.template_error) if digest and digest.template_error else "nobody said why"
    return f"could not be rendered, not even by the built-in templates: {why}"


_Verdict = Callable[[ItemView, NotificationView, Facts], str]

_ENDS: Final[Mapping[ItemState, _Verdict]] = {
    ItemState.PENDING: _stranded,
    ItemState.DIGESTED: _out,
    ItemState.SENT_ALONE: _out,
    ItemState.SUPPRESSED: _suppressed,
    ItemState.CANCELLED: _cancelled,
    ItemState.EXPIRED: _expired,
    ItemState.DEAD: _dead,
}


# Why something was suppressed


def _off(item: ItemView, about: NotificationView, facts: Facts) -> str:
    by = [one for one in facts.deciding(item.type, item.subscriber, about.topics) if one.cadence == OFF]
    if by:
        return f"{item.subscriber} has turned it off, by the subscription {by[0].subscription} to {by[0].type}"
    known = facts.types.get(item.type)
    if known is not None and known.default_cadence == OFF:
        return f"{item.subscriber} has not asked for the type {item.type}, which is off unless somebody does"
    return "it was turned off; that has changed since, and counts for what comes from now on"


def _filter(item: ItemView, about: NotificationView, facts: Facts) -> str:
    by = [one for one in facts.deciding(item.type, item.subscriber, about.topics) if one.filter]
    if not by:
        return "a subscription's filter left it out; the subscription has changed since"
    said = [f"the filter of the subscription {one.subscription} left it out: {quoted(one.filter)}" for one in by]
    return "; and ".join(dict.fromkeys(said[:_MOST_NAMED]))


def _no_address(item: ItemView, _about: NotificationView, facts: Facts) -> str:
    channel = _channel(item)
    known = facts.subscribers.get(item.subscriber)
    has_now = channel is not None and known is not None and bool(known.address(channel))
    what = ADDRESSES[channel] if channel else "address for its channel"
    return f"{item.subscriber} had no {what}" + ("; there is one now, for what comes from now on" if has_now else "")


def _no_subscriber(item: ItemView, _about: NotificationView, _facts: Facts) -> str:
    topic = item.choice.removeprefix("topic:")
    return f"nobody had subscribed to the type {item.type} by the topic {topic}"


def _unknown_type(item: ItemView, _about: NotificationView, facts: Facts) -> str:
    return f"the type {item.type} was not in the catalog" + ("; it is now" if item.type in facts.types else "")


def _unknown_subscriber(item: ItemView, _about: NotificationView, facts: Facts) -> str:
    now = "; there is now" if item.subscriber in facts.subscribers else ""
    return f"there was no subscriber {item.subscriber}{now}"


def _unknown_cadence(item: ItemView, _about: NotificationView, facts: Facts) -> str:
    cadence = _cadence(item)
    return f"the cadence {cadence} did not exist" + ("; it does now" if cadence in facts.cadences else "")


def _cadence_over(item: ItemView, _about: NotificationView, facts: Facts) -> str:
    return f"the cadence {facts.cadence(_cadence(item))} had no next time any more"


def _subscriber_deleted(item: ItemView, _about: NotificationView, _facts: Facts) -> str:
    return f"{item.subscriber} was deleted while it waited"


def _payload_invalid(item: ItemView, about: NotificationView, facts: Facts) -> str:
    says = "its payload is not what the type's schema asks for"
    known = facts.types.get(item.type)
    try:
        problem = compiled(known.payload_schema).problem(about.payload) if known and known.payload_schema else ""
    except BadSchema:
        problem = ""
    return f"{says}: {quoted(problem)}" if problem else f"{says}, or was not then: the schema has changed"


REASONS: Final[Mapping[str, _Verdict]] = {
    "off": _off,
    "filter": _filter,
    "no_address": _no_address,
    "no_subscriber": _no_subscriber,
    "unknown_type": _unknown_type,
    "unknown_subscriber": _unknown_subscriber,
    "unknown_cadence": _unknown_cadence,
    "cadence_over": _cadence_over,
    "subscriber_deleted": _subscriber_deleted,
    "payload_invalid": _payload_invalid,
}


def cadence_of(item: ItemView) -> str:
    """The cadence that an item was decided by; empty for a topic nobody listens to."""
    return "" if item.choice.startswith("topic:") else _cadence(item)


def _cadence(item: ItemView) -> str:
    return item.choice.rsplit("/", 3)[0]


def _channel(item: ItemView) -> Channel | None:
    """Of cadence/channel/format/style; a cadence may have slashes of its own."""
    parts = item.choice.rsplit("/", 3)
    return Channel(parts[1]) if len(parts) == 4 and parts[1] in set(Channel) else None
