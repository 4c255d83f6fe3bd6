"""What windows will do and have done, and what became of digests, in sentences for people. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Final
from zoneinfo import ZoneInfo

from services.digest.catalog import Channel, ItemState, Priority, QuietRange, WindowKind, WindowState
from services.digest.quiet import quiet_until
from services.digest.stories import Facts, Told, counted, cut, quoted
from services.digest.views import DeliveryView, DigestView, WindowView

Counts = Sequence[tuple[ItemState, str, int]]
"""Items by state and reason."""

ADDRESSES: Final[Mapping[Channel, str]] = {
    Channel.EMAIL: "email address",
    Channel.WEBHOOK: "webhook URL",
    Channel.APPRISE: "Apprise URL",
    Channel.LOG: "name for the log",
}

STOOD_IN: Final = "Not all of it was written as it should have been, and other templates stood in"
"""What a template's failure and a business service's have in common; the error says which it was."""

_FATES: Final = {
    "dead": "but could not be delivered",
    "suppressed": "but was not delivered, because the address is suppressed",
    "held": "but whether it arrived is not known, and somebody must decide whether to send it again",
    "expired": "but had expired before it could be delivered",
}
_OUTCOMES: Final = {
    "sent": "was sent",
    "dead": "could not be delivered",
    "suppressed": "was not sent, because the address is suppressed",
    "held": "is held, because whether it arrived is not known and somebody must decide whether to send it again",
    "expired": "had expired before it could be sent",
}


def name_of(window: WindowView, facts: Facts) -> str:
    """What people call the cadence of a window."""
    return facts.cadence(window.cadence)


def who_of(window: WindowView) -> str:
    """For whom a window is, and by what channel."""
    return f"{window.subscriber} by {window.channel}"


def prospects(window: WindowView, facts: Facts) -> tuple[str, datetime]:
    """What a window that has not closed will do, to follow "it" or "which", and when what is in it leaves."""

    def when(at: datetime) -> str:
        return facts.when(at, window.subscriber)

    if window.is_held:
        return f"is held by the quiet hours of {window.subscriber} until {when(window.due_at)}", window.due_at
    at = window.due_at if window.state is WindowState.OPEN else max(window.due_at, facts.now)
    until = _quiet_until(window, at, facts)
    then = f"; then quiet hours hold it until {when(until)}" if until else ""
    if window.state is WindowState.CLOSING:
        asking = "waits for business services to format its items, and is then rendered"
        return f"{asking if window.is_asked_about else 'is about to be rendered'}{then}", until or window.due_at
    match window.kind:
        case WindowKind.EXTERNAL:
            words = f"closes when the batch {window.batch} is triggered, or else on {when(window.due_at)}"
        case WindowKind.ROLLING:
            words = f"closes on {when(window.due_at)}"
            if window.latest_at is not None and window.latest_at > window.due_at:
                words += f", or later if more comes, on {when(window.latest_at)} at the latest"
            if window.full_at is not None:
                words += f", or as soon as it has been given {counted(window.full_at, 'item')}"
        case _:
            words = f"closes on {when(window.due_at)}"
    return words + then, until or window.due_at


def _quiet_until(window: WindowView, at: datetime, facts: Facts) -> datetime | None:
    """Until when today's quiet hours would hold what leaves at `at`; see windows.held_until."""
    known = facts.subscribers.get(window.subscriber)
    if known is None or not known.quiet_hours or window.priority is Priority.HIGH:
        return None
    return quiet_until(known.quiet_hours, ZoneInfo(known.zone), window.channel, at)


def quiet_words(ranges: Sequence[QuietRange]) -> str:
    """As in "22:00–07:00, 12:00–13:00 (email)"."""
    return ", ".join(
        f"{one.start:%H:%M}–{one.until:%H:%M}" + (f" ({one.channel})" if one.channel else "") for one in ranges
    )


def of_window(window: WindowView, counts: Counts, facts: Facts) -> Iterator[Told]:
    """A window's life."""
    details = {
        "window_id": str(window.id),
        "subscriber": window.subscriber,
        "cadence": window.cadence,
        "channel": window.channel.value,
        "state": window.state.name.lower(),
    }
    opened = (
        f"Something for {who_of(window)} came that is sent alone."
        if window.kind is WindowKind.ALONE
        else f"A window of the cadence {name_of(window, facts)} opened for {who_of(window)}."
    )
    yield Told(at=window.opened_at, kind="window_opened", sentence=opened, details=details)
    if window.closed_at is None:
        words, at = prospects(window, facts)
        gone = f" {_gone(counts)} already." if _gone(counts) else ""
        held = counted(window.items, "item")
        sentence = f"The window has {held}, and {words}.{gone}"
        kind = "window_held" if window.is_held else "window_due"
        yield Told(at=at, kind=kind, sentence=cut(sentence), details=details, is_expected=True)
    else:
        sentence = f"The window closed{_came_to(window, counts, facts)}."
        yield Told(at=window.closed_at, kind="window_closed", sentence=cut(sentence), details=details)


def _came_to(window: WindowView, counts: Counts, facts: Facts) -> str:
    gone = _gone(counts)
    if window.id in facts.digests:
        return (
            f", and what was in it left as the digest of the same id; {gone}" if gone else ", and what was in it left"
        )
    if gone:
        return f" with nothing to send: {gone}"
    return " empty: what was in it has moved to another window of the same cadence, or is kept no longer"


def _gone(counts: Counts) -> str:
    """Of the items that did not leave, how many ended how."""
    words = {
        ItemState.CANCELLED: "cancelled",
        ItemState.EXPIRED: "expired",
        ItemState.SUPPRESSED: "suppressed",
        ItemState.DEAD: "not to be rendered",
    }
    return ", ".join(
        f"{counted(count, 'item')} {'was' if count == 1 else 'were'} {words[state]}"
        + (f" ({reason})" if reason and state is ItemState.SUPPRESSED else "")
        for state, reason, count in counts
        if state in words
    )


def of_digest(digest: DigestView, facts: Facts) -> Iterator[Told]:
    """A digest and what became of its deliveries."""
    yield digest_told(digest, facts)
    for part, delivery in enumerate(digest.deliveries, start=1):
        yield _of_delivery(digest, part, delivery)


def digest_told(digest: DigestView, facts: Facts) -> Told:
    """That a digest was rendered, or could not be, and what it became in all."""
    what = f"A digest ({facts.cadence(digest.cadence)}) of {counted(digest.item_count, 'item')} for {digest.subscriber}"
    error = quoted(digest.template_error)
    if not digest.deliveries:
        sentence = f"{what} could not be rendered, not even by the built-in templates: {error}"
    else:
        parts = f" in {counted(len(digest.deliveries), 'part')}" if len(digest.deliveries) > 1 else ""
        sentence = f"{what} was handed to the dispatcher{parts} for {digest.channel} {fate(digest)}."
        if error:
            sentence += f" {STOOD_IN}: {error}"
    return Told(
        at=digest.closed_at,
        kind="digest_rendered" if digest.deliveries else "digest_dead",
        sentence=cut(sentence),
        details={
            "digest_id": str(digest.id),
            "subject": digest.subject,
            "outcome": digest.outcome,
            **({"template_error": digest.template_error} if digest.template_error else {}),
        },
        related=[str(delivery.id) for delivery in digest.deliveries[:100]],
    )


def fate(digest: DigestView) -> str:
    """What became of a digest's deliveries in all, to follow "it was handed over"."""
    if not digest.deliveries:
        return "but could not be rendered"
    match digest.outcome:
        case "sent":
            return "and was sent"
        case "pending":
            return "and is with the dispatcher, which has not said yet what became of it"
    worst = next(one for one in digest.deliveries if one.outcome not in ("pending", "sent"))
    parts = len(digest.deliveries)
    which = f" (part {digest.deliveries.index(worst) + 1} of {parts})" if parts > 1 else ""
    return f"{_FATES.get(worst.outcome, f'but ended as {worst.outcome}')}{which}{_because(worst)}"


def _of_delivery(digest: DigestView, part: int, delivery: DeliveryView) -> Told:
    parts = len(digest.deliveries)
    which = "It" if parts == 1 else f"Part {part} of {parts}"
    became = _OUTCOMES.get(delivery.outcome, f"ended as {delivery.outcome}")
    said = (
        f"{which} is with the dispatcher, which has not said yet what became of it."
        if delivery.outcome == "pending"
        else f"{which} {became}, the dispatcher reported{_because(delivery)}."
    )
    return Told(
        at=delivery.ended_at or digest.closed_at,
        kind=f"delivery_{delivery.outcome}",
        sentence=cut(said),
        details={
            "delivery_id": str(delivery.id),
            "outcome": delivery.outcome,
            **({"reason": delivery.reason} if delivery.reason else {}),
        },
        related=[str(delivery.id)],
    )


def _because(delivery: DeliveryView) -> str:
    return f": {quoted(delivery.reason)}" if delivery.reason and delivery.outcome != "sent" else ""
