"""A notification, an item, windows and a digest to tell stories of; tests say how theirs differ."""

from dataclasses import replace
from datetime import UTC, datetime, time, timedelta
from typing import Any
from uuid import UUID

from services.digest.catalog import Channel, ItemState, Priority, QuietRange, Subscriber, WindowKind, WindowState
from services.digest.stories import Facts, KnownCadence, KnownCancel, KnownChoice, KnownType
from services.digest.views import DeliveryView, DigestView, ItemView, NotificationView, WindowView

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
TYPE, WINDOW, DELIVERY, TIMER = "flight.delayed", UUID(int=7), UUID(int=8), UUID(int=9)
CHOICE = "daily/email/html/summary"

ABOUT = NotificationView(
    id=UUID(int=1),
    type=TYPE,
    entity="UA1",
    payload='{"n": 1}',
    occurred_at=NOW - HOUR,
    received_at=NOW - HOUR,
    expires_at=None,
    subscribers=2,
    topics=("news",),
    sequence=5,
    timer_type="",
    timeline="",
    timer_id=TIMER,
    schedule_id=None,
)
ITEM = ItemView(
    notification_id=ABOUT.id,
    subscriber="ann",
    choice=CHOICE,
    type=TYPE,
    entity="UA1",
    payload="{}",
    occurred_at=NOW - HOUR,
    state=ItemState.PENDING,
    reason="",
    window_id=WINDOW,
    changed_at=NOW - HOUR,
)
OPEN = WindowView(
    tenant="acme",
    id=WINDOW,
    subscriber="ann",
    cadence="daily",
    channel=Channel.EMAIL,
    kind=WindowKind.ALIGNED,
    priority=Priority.NORMAL,
    state=WindowState.OPEN,
    opened_at=NOW - HOUR,
    due_at=NOW + 19 * HOUR,
    closed_at=None,
    items=3,
    batch="",
    is_held=False,
    is_asked_about=False,
    latest_at=None,
    full_at=None,
)
ALONE = replace(OPEN, kind=WindowKind.ALONE, cadence="immediate", state=WindowState.CLOSING, due_at=NOW - HOUR)
HELD: dict[str, Any] = {"state": WindowState.CLOSING, "is_held": True, "due_at": NOW + HOUR}
ROLLING = replace(OPEN, kind=WindowKind.ROLLING, due_at=NOW + HOUR, latest_at=NOW + 4 * HOUR, full_at=10)
EXTERNAL = replace(OPEN, kind=WindowKind.EXTERNAL, batch="rebooking", due_at=NOW + 2 * DAY)
SENT = DeliveryView(id=DELIVERY, outcome="sent", reason="", ended_at=NOW)
PART_1 = replace(SENT, id=UUID(int=10))
DIGEST = DigestView(
    id=WINDOW,
    subscriber="ann",
    cadence="daily",
    channel=Channel.EMAIL,
    subject="Daily: 3 × Flight delayed",
    closed_at=NOW,
    item_count=3,
    template_error="",
    deliveries=(SENT,),
)
DEAD = replace(DIGEST, deliveries=(), template_error="out of memory")
ANN = Subscriber(id="ann", zone="Europe/Berlin", email="ann@example.com")
QUIET = replace(ANN, quiet_hours=(QuietRange(start=time(8), until=time(9), channel=Channel.EMAIL),))
QUIET_AT_NOON = replace(ANN, quiet_hours=(QuietRange(start=time(12), until=time(14)),))
KNOWN = KnownType(id=TYPE, default_cadence="daily", is_mandatory=False, payload_schema="", retention=30 * DAY)
DAILY = KnownCadence(id="daily", name="Daily", kind=WindowKind.ALIGNED, cron="0 8 * * *")
SUBSCRIBED = KnownChoice(
    subscription="s1", subscriber="ann", topic="", type="flight.*", cadence="daily", channel="email", filter=""
)
CANCEL = KnownCancel(entity="UA1", type="", timeline="", timer_ids=(), sequence=9)
FACTS = Facts(
    now=NOW,
    windows={WINDOW: OPEN},
    digests={WINDOW: DIGEST},
    subscribers={"ann": ANN},
    cadences={"daily": DAILY},
    types={TYPE: KNOWN},
    choices=(SUBSCRIBED,),
    cancels=(CANCEL,),
)
FALL = "That is a fault; carillon audit shows all that is like it."
BACK = "Not all of it was written as it should have been, and other templates stood in: division by zero"


def facts(**changes: Any) -> Facts:
    """As FACTS, with these changes; a window and a digest may be given alone."""
    if "window" in changes:
        changes["windows"] = {WINDOW: changes.pop("window")}
    if "digest" in changes:
        changes["digests"] = {WINDOW: changes.pop("digest")}
    return replace(FACTS, **changes)


def window(base: WindowView = OPEN, **changes: Any) -> Facts:
    """FACTS with this window."""
    return facts(window=replace(base, **changes))


def delivered(outcome: str, reason: str = "", *others: DeliveryView) -> DigestView:
    """The digest, of which a delivery came to this."""
    return replace(DIGEST, deliveries=(*others, replace(SENT, outcome=outcome, reason=reason)))
