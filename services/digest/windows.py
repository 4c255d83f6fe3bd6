"""A window on its way out: what the store claims, and what the renderer decides about it. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from uuid import UUID
from zoneinfo import ZoneInfo

from libs.ids import derived_id
from libs.trace_points import NOWHERE, Point
from services.digest.catalog import IMMEDIATE, Channel, ItemState, Priority, Subscriber, WindowKind
from services.digest.formatting import Formatted, Order
from services.digest.quiet import quiet_until
from services.digest.rendering_jobs import Job, Line, Message, Rendered, Source
from services.digest.templates import TemplateKey, chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosingWindow:
    """A claimed window with the items that are still pending. `subscriber` is None when it has been deleted.

    `services` names, for those of its items' types that business services format, which; `formatting_error` says why
    they did not format what they should have. `is_mandatory`: an item's type is. `trace`: what closed it, until it is
    in the making, then that; of what is sent alone and has not waited, what caused it. `rest_from`: there are more
    items, those of the notifications from this one on; see store_rendering.part_off.
    """

    tenant: str
    id: UUID
    kind: WindowKind
    subscriber_id: str
    subscriber: Subscriber | None
    cadence: str
    cadence_name: str
    channel: Channel
    format: str
    style: str
    lines: Sequence[Line]
    expires_at: datetime | None = None
    priority: Priority = Priority.NORMAL
    formatting_error: str = ""
    is_mandatory: bool = False
    services: Mapping[str, str] = field(default_factory=dict)
    trace: Point = NOWHERE
    rest_from: UUID | None = None

    @property
    def is_alone(self) -> bool:
        """Whether it holds one item that is sent alone."""
        return self.kind is WindowKind.ALONE

    @property
    def list_id(self) -> str:
        """What a reader who wants no more of this unsubscribes from; empty: with a mandatory item in it, from nothing.

        What is sent alone is on the list of its type, a digest on that of its cadence.
        """
        if self.is_mandatory or not self.lines:
            return ""
        return f"type:{self.lines[0].type}" if self.is_alone else f"cadence:{self.cadence}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """What became of a window: the state of its items, and the digest, unless nothing went out.

    `result` is sent, empty, no_address, subscriber_deleted or dead; a digest without messages is one that could not be
    rendered.
    """

    window: ClosingWindow
    result: str
    state: ItemState | None = None
    reason: str = ""
    address: str = ""
    subject: str = ""
    template_error: str = ""
    messages: Sequence[Message] = ()

    @property
    def is_digest(self) -> bool:
        """Whether there is a digest to remember."""
        return self.result in ("sent", "dead")


def held_until(window: ClosingWindow, *, now: datetime) -> datetime | None:
    """When the subscriber's quiet hours let the window leave; None for at once, as what is urgent always does."""
    if window.subscriber is None or not window.subscriber.quiet_hours or window.priority is Priority.HIGH:
        return None
    return quiet_until(window.subscriber.quiet_hours, ZoneInfo(window.subscriber.zone), window.channel, now)


def without_rendering(window: ClosingWindow) -> Closed | None:
    """The verdict on a window that has nothing to say or nobody to say it to; None when it must be rendered."""
    if not window.lines:
        return Closed(window=window, result="empty")
    if window.subscriber is None:
        return Closed(
            window=window, result="subscriber_deleted", state=ItemState.SUPPRESSED, reason="subscriber_deleted"
        )
    if not window.subscriber.address(window.channel):
        return Closed(window=window, result="no_address", state=ItemState.SUPPRESSED, reason="no_address")
    return None


def job_of(window: ClosingWindow, templates: Mapping[TemplateKey, Source], *, now: datetime) -> Job:
    """What is to be rendered for a window whose subscriber exists."""
    assert window.subscriber is not None
    return Job(
        tenant=window.tenant,
        id=str(window.id),
        is_alone=window.is_alone,
        format=window.format,
        style=window.style,
        subscriber=window.subscriber_id,
        zone=window.subscriber.zone,
        locale=window.subscriber.locale,
        cadence=IMMEDIATE if window.is_alone else window.cadence,
        cadence_name=window.cadence_name,
        closed_at=now.isoformat(),
        lines=window.lines,
        templates=chosen(
            templates,
            types={line.type for line in window.lines},
            cadence=window.cadence,
            text_format=window.format,
            style=window.style,
            locale=window.subscriber.locale,
        ),
    )


def order_of(window: ClosingWindow) -> Order:
    """What business services are to format, of a window whose subscriber exists."""
    assert window.subscriber is not None
    return Order(
        tenant=window.tenant,
        format=window.format,
        style=window.style,
        is_alone=window.is_alone,
        zone=window.subscriber.zone,
        locale=window.subscriber.locale,
        lines=window.lines,
        services=window.services,
    )


def with_format(window: ClosingWindow, formatted: Formatted) -> ClosingWindow:
    """The window with what services wrote for the items that it still has."""
    own = {line.notification_id: line.formatted for line in formatted.lines if line.formatted}
    lines = [line._replace(formatted=own.get(line.notification_id)) for line in window.lines] if own else window.lines
    return replace(window, lines=lines, formatting_error=formatted.error)


def error_of(window: ClosingWindow, rendered: Rendered) -> str:
    """Why others wrote than should have, or nobody could; empty when all is well."""
    return "; ".join(filter(None, (window.formatting_error, rendered.error)))


def closed_by(window: ClosingWindow, rendered: Rendered) -> Closed:
    """The verdict on a window that was rendered."""
    assert window.subscriber is not None
    address = window.subscriber.address(window.channel)
    if not rendered.parts:
        return Closed(
            window=window,
            result="dead",
            state=ItemState.DEAD,
            reason="rendering_failed",
            address=address,
            template_error=error_of(window, rendered),
        )
    messages = [
        Message(
            tenant=window.tenant,
            delivery_id=derived_id("delivery", window.id, number),
            digest_id=window.id,
            subscriber=window.subscriber_id,
            channel=window.channel,
            address=address,
            part=part,
            priority=window.priority,
            expires_at=window.expires_at,
            list_id=window.list_id,
            trace=window.trace,
        )
        for number, part in enumerate(rendered.parts, start=1)
    ]
    return Closed(
        window=window,
        result="sent",
        state=ItemState.SENT_ALONE if window.is_alone else ItemState.DIGESTED,
        address=address,
        subject=rendered.parts[0].subject,
        template_error=error_of(window, rendered),
        messages=messages,
    )
