"""What the RPCs need of the store, and of the press."""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Protocol
from uuid import UUID

from libs.links.frames import OutgoingFrame
from libs.postgres import Transaction
from services.digest.boundaries import Boundaries
from services.digest.catalog import Cadence, NotificationType, Subscriber, Subscription, Template, WindowState
from services.digest.commands import WindowTimer
from services.digest.formatting import Formatted, Order
from services.digest.rendering_jobs import Job, Rendered, Source
from services.digest.templates import TemplateKey
from services.digest.views import DigestView, ItemView, Ledger, WindowView
from services.digest.windows import ClosingWindow


class CatalogStore(Protocol):
    """See store_catalog."""

    async def put_type(self, tx: Transaction, tenant: str, one: NotificationType) -> None: ...
    async def get_type(self, tx: Transaction, tenant: str, type_id: str) -> NotificationType: ...
    async def list_types(self, tx: Transaction, tenant: str, *, after: str, limit: int) -> list[NotificationType]: ...
    async def delete_type(self, tx: Transaction, tenant: str, type_id: str) -> None: ...
    async def put_cadence(self, tx: Transaction, tenant: str, one: Cadence) -> None: ...
    async def get_cadence(self, tx: Transaction, tenant: str, cadence_id: str) -> Cadence: ...
    async def list_cadences(self, tx: Transaction, tenant: str, *, after: str, limit: int) -> list[Cadence]: ...
    async def delete_cadence(self, tx: Transaction, tenant: str, cadence_id: str) -> None: ...
    async def put_template(self, tx: Transaction, tenant: str, one: Template) -> None: ...
    async def get_template(self, tx: Transaction, tenant: str, key: TemplateKey) -> Template: ...
    async def list_templates(
        self, tx: Transaction, tenant: str, *, after: TemplateKey | None, limit: int
    ) -> list[Template]: ...
    async def delete_template(self, tx: Transaction, tenant: str, key: TemplateKey) -> None: ...


class SubscriberStore(Protocol):
    """See store_subscribers."""

    async def put_subscribers(
        self, tx: Transaction, tenant: str, subscribers: Sequence[Subscriber]
    ) -> dict[str, str]: ...
    async def get_subscriber(self, tx: Transaction, tenant: str, subscriber_id: str) -> Subscriber: ...
    async def list_subscribers(self, tx: Transaction, tenant: str, *, after: str, limit: int) -> list[Subscriber]: ...
    async def delete_subscriber(self, tx: Transaction, tenant: str, subscriber_id: str) -> None: ...
    async def put_subscriptions(self, tx: Transaction, tenant: str, subscriptions: Sequence[Subscription]) -> None: ...
    async def get_subscription(self, tx: Transaction, tenant: str, subscription_id: str) -> Subscription: ...
    async def list_subscriptions(
        self, tx: Transaction, tenant: str, *, subscriber: str, after: str, limit: int
    ) -> list[Subscription]: ...
    async def delete_subscription(self, tx: Transaction, tenant: str, subscription_id: str) -> None: ...


class MovingStore(Protocol):
    """What changes of subscribers do to their windows; see store_windows."""

    async def move_windows(
        self, tx: Transaction, tenant: str, zones: Mapping[str, str], *, now: datetime, boundaries: Boundaries
    ) -> list[WindowTimer]: ...
    async def release_windows(self, tx: Transaction, tenant: str, subscribers: Sequence[str]) -> int: ...
    async def suppress_subscriber(self, tx: Transaction, tenant: str, subscriber: str, *, now: datetime) -> int: ...


class Timers(Protocol):
    """Asks the scheduler to wake windows; see stream.Timers."""

    async def schedule(
        self, tx: Transaction, timers: Sequence[WindowTimer], *, now: datetime
    ) -> list[OutgoingFrame]: ...
    def publish(self, frames: Sequence[OutgoingFrame]) -> None: ...


class ViewStore(Protocol):
    """See store_views."""

    async def list_windows(
        self,
        tx: Transaction,
        tenant: str,
        *,
        subscriber: str = "",
        cadence: str = "",
        states: Sequence[WindowState] = (),
        after: UUID | None = None,
        limit: int,
    ) -> list[WindowView]: ...
    async def get_window(self, tx: Transaction, tenant: str, window_id: UUID) -> WindowView | None: ...
    async def list_digests(
        self,
        tx: Transaction,
        tenant: str,
        *,
        subscriber: str = "",
        cadence: str = "",
        after: tuple[datetime, UUID] | None = None,
        limit: int,
    ) -> list[DigestView]: ...
    async def get_digest(self, tx: Transaction, tenant: str, digest_id: UUID) -> DigestView | None: ...
    async def items_of_window(self, tx: Transaction, tenant: str, window_id: UUID, *, limit: int) -> list[ItemView]: ...
    async def ledger(self, tx: Transaction, tenant: str) -> Ledger: ...


class PreviewStore(Protocol):
    """What a preview reads; see store_rendering."""

    async def read_windows(
        self, tx: Transaction, tenants: Collection[str], ids: Sequence[UUID], *, now: datetime
    ) -> list[ClosingWindow]: ...
    async def templates_for(
        self, tx: Transaction, windows: Sequence[ClosingWindow]
    ) -> Mapping[str, Mapping[TemplateKey, Source]]: ...


class FormattingStore(Protocol):
    """See store_formatting."""

    async def services_of(
        self, tx: Transaction, types: Collection[tuple[str, str]]
    ) -> Mapping[str, Mapping[str, str]]: ...


class Formatter(Protocol):
    """Has business services format items; see loops_formatting."""

    @property
    def names(self) -> frozenset[str]: ...
    async def format(self, orders: Sequence[Order]) -> list[Formatted]: ...


class Press(Protocol):
    """Renders and checks templates in a process of its own; see loops_press."""

    async def render(self, jobs: Sequence[Job]) -> list[Rendered]: ...
    async def check(self, source: Source, *, is_html: bool) -> None: ...
