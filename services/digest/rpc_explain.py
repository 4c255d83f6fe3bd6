"""Explain: of whatever an id or a name belongs to, what happened and what will."""

from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Protocol
from uuid import UUID

from carillon.digest.v1 import digest_pb2 as pb
from carillon.explain.v1 import explain_pb2

from libs.clock import Clock
from libs.errors import Violations
from libs.explaining import Bounds, nearest
from libs.postgres import Database, Transaction
from libs.recurrence import BadRule
from libs.rpc_context import Context, tenant_of
from libs.wire import check_text, to_timestamp
from services.digest.boundaries import Boundaries, LocalRule
from services.digest.catalog import ItemState, Subscriber, WindowState
from services.digest.explaining import cadence_of, kept_until, of_item, of_notification
from services.digest.explaining_subscribers import of_subscriber
from services.digest.explaining_windows import Counts, digest_told, of_digest, of_window
from services.digest.stories import Facts, KnownCadence, KnownCancel, KnownChoice, KnownType, Told
from services.digest.views import DigestView, ItemView, NotificationView, WindowView

_MOST_ITEMS = 300
_MOST_SEARCHED = 10_000
_MOST_NOTIFICATIONS = 100
_MOST_CHOICES = 200
_MOST_WINDOWS = 100
_MOST_DIGESTS = 20


class Views(Protocol):
    """See store_views."""

    async def list_windows(
        self, tx: Transaction, tenant: str, *, subscriber: str = "", states: Sequence[WindowState] = (), limit: int
    ) -> list[WindowView]: ...
    async def get_windows(self, tx: Transaction, tenant: str, ids: Sequence[UUID]) -> list[WindowView]: ...
    async def list_digests(
        self, tx: Transaction, tenant: str, *, subscriber: str = "", limit: int
    ) -> list[DigestView]: ...
    async def get_digests(self, tx: Transaction, tenant: str, ids: Sequence[UUID]) -> list[DigestView]: ...
    async def items_of(
        self, tx: Transaction, tenant: str, notification_ids: Sequence[UUID], *, limit: int
    ) -> list[ItemView]: ...
    async def items_near(self, tx: Transaction, tenant: str, item: UUID, *, limit: int) -> list[ItemView]: ...
    async def items_in(self, tx: Transaction, tenant: str, window_id: UUID) -> Sequence[tuple[ItemState, str, int]]: ...


class Stories(Protocol):
    """See store_stories."""

    async def notifications(self, tx: Transaction, tenant: str, ids: Sequence[UUID]) -> list[NotificationView]: ...
    async def notifications_about(
        self, tx: Transaction, tenant: str, entity: str, *, limit: int
    ) -> list[NotificationView]: ...
    async def subscribers(self, tx: Transaction, tenant: str, ids: Collection[str]) -> list[Subscriber]: ...
    async def types(self, tx: Transaction, tenant: str, ids: Collection[str]) -> list[KnownType]: ...
    async def cadences(self, tx: Transaction, tenant: str, ids: Collection[str]) -> list[KnownCadence]: ...
    async def choices(
        self, tx: Transaction, tenant: str, subscribers: Collection[str], topics: Collection[str]
    ) -> list[KnownChoice]: ...
    async def choices_of(self, tx: Transaction, tenant: str, subscriber: str, *, limit: int) -> list[KnownChoice]: ...
    async def cancels(self, tx: Transaction, tenant: str, entities: Collection[str]) -> list[KnownCancel]: ...


class ExplainRpc:
    """The part of DigestService that tells stories."""

    def __init__(self, *, db: Database, views: Views, stories: Stories, boundaries: Boundaries, clock: Clock) -> None:
        self._told_db, self._told_views, self._stories = db, views, stories
        self._told_boundaries, self._told_clock = boundaries, clock

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        """See the contract."""
        violations = Violations()
        check_text(violations, "id", request.id, longest=256)
        violations.raise_if_any()
        one_id = None
        with suppress(ValueError):
            one_id = UUID(request.id)
        tenant, now, bounds = tenant_of(context), self._told_clock.now(), Bounds()
        async with self._told_db.read() as tx:
            told = [*await self._of_subscriber(tx, tenant, request.id, now, bounds)]
            told += await self._of_notifications(tx, tenant, request.id, one_id, now, bounds)
            if one_id is not None:
                told += await self._of_window(tx, tenant, one_id, now)
        entries, is_cut = nearest(told, now, _entry)
        return pb.ExplainResponse(entries=entries, is_cut=is_cut or bounds.are_met)

    async def _of_notifications(
        self, tx: Transaction, tenant: str, text: str, one_id: UUID | None, now: datetime, bounds: Bounds
    ) -> list[Told]:
        """Of a notification or an item by its id, or of what there was about an entity."""
        about = await self._stories.notifications_about(tx, tenant, text, limit=_MOST_NOTIFICATIONS)
        bounds.noted(about, _MOST_NOTIFICATIONS)
        if one_id is not None:
            about += await self._stories.notifications(tx, tenant, [one_id])
        known = {one.id: one for one in about}
        items = await self._told_views.items_of(tx, tenant, list(known), limit=_MOST_ITEMS) if known else []
        bounds.noted(items, _MOST_ITEMS)
        is_whole = len(items) < _MOST_ITEMS
        if one_id is not None and not known:
            near = await self._told_views.items_near(tx, tenant, one_id, limit=_MOST_SEARCHED)
            items = [item for item in near if item.id == one_id]
            found = await self._stories.notifications(tx, tenant, [item.notification_id for item in items])
            known |= {one.id: one for one in found}
            is_whole = False
        facts = await self._facts_of(tx, tenant, list(known.values()), items, now)
        told = [of_notification(one, facts) for one in about]
        told += [of_item(item, known[item.notification_id], facts) for item in items if item.notification_id in known]
        told += [one for digest in facts.digests.values() for one in of_digest(digest, facts)]
        if is_whole:
            for one in about:
                told += kept_until(one, [item for item in items if item.notification_id == one.id], facts)
        return told

    async def _facts_of(
        self,
        tx: Transaction,
        tenant: str,
        about: Sequence[NotificationView],
        items: Sequence[ItemView],
        now: datetime,
    ) -> Facts:
        if not about:
            return Facts(now=now)
        ids = list({item.window_id for item in items if item.window_id})
        subscribers = {item.subscriber for item in items}
        topics = {topic for one in about for topic in one.topics}
        windows = await self._told_views.get_windows(tx, tenant, ids)
        digests = await self._told_views.get_digests(tx, tenant, ids)
        names = {cadence_of(item) for item in items} | {window.cadence for window in windows}
        return Facts(
            now=now,
            windows={one.id: one for one in windows},
            digests={one.id: one for one in digests},
            subscribers={one.id: one for one in await self._stories.subscribers(tx, tenant, subscribers)},
            cadences={one.id: one for one in await self._stories.cadences(tx, tenant, names)},
            types={one.id: one for one in await self._stories.types(tx, tenant, {one.type for one in about})},
            choices=await self._stories.choices(tx, tenant, subscribers, topics),
            cancels=await self._stories.cancels(tx, tenant, {one.entity for one in about if one.entity}),
        )

    async def _of_window(self, tx: Transaction, tenant: str, one_id: UUID, now: datetime) -> list[Told]:
        """Of a window, and of the digest that it became."""
        windows = await self._told_views.get_windows(tx, tenant, [one_id])
        digests = await self._told_views.get_digests(tx, tenant, [one_id])
        who = {window.subscriber for window in windows} | {digest.subscriber for digest in digests}
        names = {window.cadence for window in windows} | {digest.cadence for digest in digests}
        facts = Facts(
            now=now,
            digests={one.id: one for one in digests},
            subscribers={one.id: one for one in await self._stories.subscribers(tx, tenant, who)},
            cadences={one.id: one for one in await self._stories.cadences(tx, tenant, names)},
        )
        told: list[Told] = []
        for window in windows:
            counts: Counts = await self._told_views.items_in(tx, tenant, window.id)
            told += of_window(window, counts, facts)
        for digest in digests:
            told += of_digest(digest, facts)
        return told

    async def _of_subscriber(
        self, tx: Transaction, tenant: str, text: str, now: datetime, bounds: Bounds
    ) -> list[Told]:
        """Of a subscriber: what holds now, what waits for it, and what it got last."""
        found = await self._stories.subscribers(tx, tenant, [text])
        if not found:
            return []
        (subscriber,) = found
        choices = await self._stories.choices_of(tx, tenant, text, limit=_MOST_CHOICES)
        bounds.noted(choices, _MOST_CHOICES)
        states = (WindowState.OPEN, WindowState.CLOSING)
        windows = await self._told_views.list_windows(tx, tenant, subscriber=text, states=states, limit=_MOST_WINDOWS)
        bounds.noted(windows, _MOST_WINDOWS)
        digests = await self._told_views.list_digests(tx, tenant, subscriber=text, limit=_MOST_DIGESTS)
        names = {choice.cadence for choice in choices} | {window.cadence for window in windows}
        names |= {digest.cadence for digest in digests}
        facts = Facts(
            now=now,
            subscribers={text: subscriber},
            cadences={one.id: one for one in await self._stories.cadences(tx, tenant, names)},
        )
        told = list(of_subscriber(subscriber, choices, facts, _NextClose(self._told_boundaries, now)))
        told += [one for window in windows for one in of_window(window, (), facts) if one.is_expected]
        return [*told, *(digest_told(digest, facts) for digest in digests)]


class _NextClose:
    """See explaining_subscribers.NextClose."""

    def __init__(self, boundaries: Boundaries, now: datetime) -> None:
        self._boundaries, self._now = boundaries, now

    def __call__(self, cadence: KnownCadence, zone: str) -> datetime | None:
        rule = LocalRule(cron=cadence.cron, rrule=cadence.rrule, zone=cadence.zone or zone)
        try:
            return self._boundaries.after(rule, self._now)
        except BadRule:
            return None


def _entry(one: Told) -> explain_pb2.Entry:
    return explain_pb2.Entry(
        time=to_timestamp(one.at),
        service="digest",
        kind=one.kind,
        sentence=one.sentence,
        details=dict(one.details),
        related_ids=one.related,
        is_expected=one.is_expected,
    )
