"""What digest shows of windows, digests, items and its ledger. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final
from uuid import UUID

from libs.ids import derived_id
from services.digest.catalog import Channel, ItemState, Priority, WindowKind, WindowState

_HALF: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowView:
    """A window and how many items wait in it.

    `is_held`: quiet hours hold it until `due_at`. `is_asked_about`: it is closing, and business services are asked to
    format its items. Of rolling ones `latest_at` is when they close at the latest, and `full_at` how many items make
    them full (None: any number).
    """

    tenant: str
    id: UUID
    subscriber: str
    cadence: str
    channel: Channel
    kind: WindowKind
    priority: Priority
    state: WindowState
    opened_at: datetime
    due_at: datetime
    closed_at: datetime | None
    items: int
    batch: str
    is_held: bool
    is_asked_about: bool
    latest_at: datetime | None
    full_at: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowBacklog:
    """Windows that are not closed, of all tenants: how many, and the earliest times, None without such a window.

    A batch's window is halfway between its opening and its fallback at `batch_halfway_at`.
    `closing` are those that wait to be rendered, `held` those that quiet hours keep from it.
    """

    open: Mapping[WindowKind, int]
    open_due_at: datetime | None
    batch_opened_at: datetime | None
    batch_halfway_at: datetime | None
    closing: int
    closing_due_at: datetime | None
    held: int
    held_due_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryView:
    """One message of a digest; `outcome` is pending or as the dispatcher said."""

    id: UUID
    outcome: str
    reason: str
    ended_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DigestView:
    """What went out, or could not be rendered."""

    id: UUID
    subscriber: str
    cadence: str
    channel: Channel
    subject: str
    closed_at: datetime
    item_count: int
    template_error: str
    deliveries: Sequence[DeliveryView]

    @property
    def outcome(self) -> str:
        """pending, sent or failed: the worst of its deliveries; failed when it has none."""
        outcomes = {delivery.outcome for delivery in self.deliveries}
        if not outcomes or outcomes - {"pending", "sent"}:
            return "failed"
        return "pending" if "pending" in outcomes else "sent"


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemView:
    """One notification for one subscriber by one choice."""

    notification_id: UUID
    subscriber: str
    choice: str
    type: str
    entity: str
    payload: str
    occurred_at: datetime
    state: ItemState
    reason: str
    window_id: UUID | None
    changed_at: datetime

    @property
    def id(self) -> UUID:
        """The item's public id; see `item_id`."""
        return item_id(self.notification_id, self.subscriber, self.choice)


@dataclass(frozen=True, slots=True, kw_only=True)
class NotificationView:
    """What was taken over; `sequence`, `timer_type`, `timeline` and the ids are what cancels select by."""

    id: UUID
    type: str
    entity: str
    payload: str
    occurred_at: datetime
    received_at: datetime
    expires_at: datetime | None
    subscribers: int
    topics: Sequence[str]
    sequence: int
    timer_type: str
    timeline: str
    timer_id: UUID | None
    schedule_id: UUID | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeCount:
    """Digests with one outcome, and what they hold."""

    outcome: str
    digests: int
    items: int
    deliveries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """What is not where it must be; see store_ledger.

    `kind`: item_missing, item_unexpected, notification_missing, window_missing, digest_missing or delivery_missing.
    `ids` are examples, ten at most: of digests for deliveries, else of notifications.
    """

    kind: str
    count: int
    ids: Sequence[UUID]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """How many notifications there are, and items by state."""

    notifications: int = 0
    items: Counter[ItemState] = field(default_factory=Counter)

    def __add__(self, other: "Kept") -> "Kept":
        """Together."""
        return Kept(notifications=self.notifications + other.notifications, items=self.items + other.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Where everything is (INV-6): items by state and reason, deliveries by outcome. There must be no gaps.

    `longest_pending`: the hundred deliveries that have been pending longest.
    """

    notifications: int
    items: Sequence[tuple[ItemState, str, int]]
    digests: Sequence[OutcomeCount]
    deliveries: Sequence[tuple[str, int]]
    longest_pending: Sequence[UUID]
    gaps: Sequence[Gap]

    @property
    def unaccounted(self) -> int:
        """How many items, notifications and deliveries are missing, or are there and should not be."""
        return sum(gap.count for gap in self.gaps)


def item_id(notification_id: UUID, subscriber: str, choice: str) -> UUID:
    """An item's public id: the notification's first half, and a digest of what tells its items apart.

    It is derived when shown, not stored: an index on it would cost every item more than the rest of its row. The first
    half leads back to the notification, which the primary key finds.
    """
    rest = derived_id("item", notification_id, subscriber, choice).int & _HALF
    return UUID(int=(notification_id.int & ~_HALF) | rest)


def notifications_near(item: UUID) -> tuple[UUID, UUID]:
    """The smallest and largest notification id that an item with this id can have come from."""
    return UUID(int=item.int & ~_HALF), UUID(int=item.int | _HALF)
