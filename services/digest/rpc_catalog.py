"""The catalog's RPCs: types, subscribers, subscriptions, cadences, templates."""

import asyncio
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol, TypeVar

from carillon.digest.v1 import digest_pb2 as pb

from libs.clock import Clock
from libs.errors import Violations
from libs.postgres import Database
from libs.rpc_context import Context, tenant_of
from libs.wire import check_count, check_page_size, page_token, read_page_token
from services.digest import metrics
from services.digest import rpc_cadences as cadences
from services.digest import rpc_messages as messages
from services.digest.boundaries import Boundaries
from services.digest.catalog import Aligned, NotificationType
from services.digest.rpc_previews import check_compiles
from services.digest.rpc_stores import CatalogStore, Formatter, MovingStore, Press, SubscriberStore, Timers
from services.digest.rpc_words import check_name, check_type_id
from services.digest.templates import key_of

_MOST_TEMPLATES = 12
"""As many as fit into an answer of 4 MiB, whatever their size."""

_MOST_TEXT_BYTES = 3 << 20
"""What the texts of the types in one answer add up to; clients take 4 MiB."""


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


OneT = TypeVar("OneT", bound=_HasId)


class CatalogRpc:
    """Half of DigestService; the other half is ViewsRpc."""

    def __init__(
        self,
        *,
        db: Database,
        catalog: CatalogStore,
        subscribers: SubscriberStore,
        formatter: Formatter,
        moving: MovingStore,
        timers: Timers,
        press: Press,
        boundaries: Boundaries,
        clock: Clock,
        ring: Callable[[], None],
    ) -> None:
        """`ring` wakes what closes windows."""
        self._subscribers, self._formatter = subscribers, formatter
        self._db, self._catalog, self._moving, self._timers = db, catalog, moving, timers
        self._press, self._boundaries, self._clock, self._ring = press, boundaries, clock, ring

    # Notification types

    async def PutNotificationType(
        self, request: pb.PutNotificationTypeRequest, context: Context
    ) -> pb.PutNotificationTypeResponse:
        """See the contract."""
        names = self._formatter.names
        one = _checked(
            lambda v: messages.notification_type(v, "notification_type", request.notification_type, services=names)
        )
        async with self._db.transaction() as tx:
            await self._catalog.put_type(tx, tenant_of(context), one)
        return pb.PutNotificationTypeResponse(notification_type=messages.from_type(one))

    async def GetNotificationType(
        self, request: pb.GetNotificationTypeRequest, context: Context
    ) -> pb.GetNotificationTypeResponse:
        """See the contract."""
        one_id = _checked(lambda v: check_type_id(v, "id", request.id))
        async with self._db.read() as tx:
            one = await self._catalog.get_type(tx, tenant_of(context), one_id)
        return pb.GetNotificationTypeResponse(notification_type=messages.from_type(one))

    async def ListNotificationTypes(
        self, request: pb.ListNotificationTypesRequest, context: Context
    ) -> pb.ListNotificationTypesResponse:
        """See the contract."""
        limit, after = _page(request.page_size, request.page_token)
        async with self._db.read() as tx:
            found = await self._catalog.list_types(tx, tenant_of(context), after=after, limit=limit + 1)
        limit = _fitting(found, limit)
        return pb.ListNotificationTypesResponse(
            notification_types=map(messages.from_type, found[:limit]), next_page_token=_next(found, limit)
        )

    async def DeleteNotificationType(
        self, request: pb.DeleteNotificationTypeRequest, context: Context
    ) -> pb.DeleteNotificationTypeResponse:
        """See the contract."""
        one_id = _checked(lambda v: check_type_id(v, "id", request.id))
        async with self._db.transaction() as tx:
            await self._catalog.delete_type(tx, tenant_of(context), one_id)
        return pb.DeleteNotificationTypeResponse()

    # Subscribers

    async def PutSubscribers(self, request: pb.PutSubscribersRequest, context: Context) -> pb.PutSubscribersResponse:
        """See the contract."""
        subscribers = _checked(
            lambda v: _each(v, "subscribers", request.subscribers, lambda f, one: messages.subscriber(v, f, one))
        )
        tenant, now = tenant_of(context), self._clock.now()
        async with self._db.transaction() as tx:
            moved = await self._subscribers.put_subscribers(tx, tenant, subscribers)
            released = await self._moving.release_windows(tx, tenant, [one.id for one in subscribers])
            timers = (
                await self._moving.move_windows(tx, tenant, moved, now=now, boundaries=self._boundaries)
                if moved
                else []
            )
            frames = await self._timers.schedule(tx, timers, now=now)
        self._timers.publish(frames)
        if released:
            self._ring()
        return pb.PutSubscribersResponse()

    async def GetSubscriber(self, request: pb.GetSubscriberRequest, context: Context) -> pb.GetSubscriberResponse:
        """See the contract."""
        one_id = _checked(lambda v: check_name(v, "id", request.id))
        async with self._db.read() as tx:
            one = await self._subscribers.get_subscriber(tx, tenant_of(context), one_id)
        return pb.GetSubscriberResponse(subscriber=messages.from_subscriber(one))

    async def ListSubscribers(self, request: pb.ListSubscribersRequest, context: Context) -> pb.ListSubscribersResponse:
        """See the contract."""
        limit, after = _page(request.page_size, request.page_token)
        async with self._db.read() as tx:
            found = await self._subscribers.list_subscribers(tx, tenant_of(context), after=after, limit=limit + 1)
        return pb.ListSubscribersResponse(
            subscribers=map(messages.from_subscriber, found[:limit]), next_page_token=_next(found, limit)
        )

    async def DeleteSubscriber(
        self, request: pb.DeleteSubscriberRequest, context: Context
    ) -> pb.DeleteSubscriberResponse:
        """See the contract."""
        one_id = _checked(lambda v: check_name(v, "id", request.id))
        tenant = tenant_of(context)
        async with self._db.transaction() as tx:
            await self._subscribers.delete_subscriber(tx, tenant, one_id)
            suppressed = await self._moving.suppress_subscriber(tx, tenant, one_id, now=self._clock.now())
        metrics.items_of("suppressed", "subscriber_deleted").inc(suppressed)
        return pb.DeleteSubscriberResponse()

    # Subscriptions

    async def PutSubscriptions(
        self, request: pb.PutSubscriptionsRequest, context: Context
    ) -> pb.PutSubscriptionsResponse:
        """See the contract."""
        subscriptions = _checked(
            lambda v: _each(v, "subscriptions", request.subscriptions, lambda f, one: messages.subscription(v, f, one))
        )
        async with self._db.transaction() as tx:
            await self._subscribers.put_subscriptions(tx, tenant_of(context), subscriptions)
        return pb.PutSubscriptionsResponse()

    async def GetSubscription(self, request: pb.GetSubscriptionRequest, context: Context) -> pb.GetSubscriptionResponse:
        """See the contract."""
        one_id = _checked(lambda v: check_name(v, "id", request.id))
        async with self._db.read() as tx:
            one = await self._subscribers.get_subscription(tx, tenant_of(context), one_id)
        return pb.GetSubscriptionResponse(subscription=messages.from_subscription(one))

    async def ListSubscriptions(
        self, request: pb.ListSubscriptionsRequest, context: Context
    ) -> pb.ListSubscriptionsResponse:
        """See the contract."""
        mine = _checked(lambda v: check_name(v, "subscriber", request.subscriber)) if request.subscriber else ""
        limit, after = _page(request.page_size, request.page_token, query=mine)
        async with self._db.read() as tx:
            found = await self._subscribers.list_subscriptions(
                tx, tenant_of(context), subscriber=mine, after=after, limit=limit + 1
            )
        return pb.ListSubscriptionsResponse(
            subscriptions=map(messages.from_subscription, found[:limit]),
            next_page_token=_next(found, limit, query=mine),
        )

    async def DeleteSubscription(
        self, request: pb.DeleteSubscriptionRequest, context: Context
    ) -> pb.DeleteSubscriptionResponse:
        """See the contract."""
        one_id = _checked(lambda v: check_name(v, "id", request.id))
        async with self._db.transaction() as tx:
            await self._subscribers.delete_subscription(tx, tenant_of(context), one_id)
        return pb.DeleteSubscriptionResponse()

    # Cadences

    async def PutCadence(self, request: pb.PutCadenceRequest, context: Context) -> pb.PutCadenceResponse:
        """See the contract."""
        one = _checked(lambda v: cadences.cadence(v, "cadence", request.cadence))
        if isinstance(one.kind, Aligned):
            violations = Violations()
            # Not here: a rule that never occurs is searched for thousands of years.
            await asyncio.to_thread(cadences.check_occurs, violations, "cadence.aligned", one.kind)
            violations.raise_if_any()
        async with self._db.transaction() as tx:
            await self._catalog.put_cadence(tx, tenant_of(context), one)
        return pb.PutCadenceResponse(cadence=cadences.from_cadence(one))

    async def GetCadence(self, request: pb.GetCadenceRequest, context: Context) -> pb.GetCadenceResponse:
        """See the contract."""
        one_id = _checked(lambda v: check_type_id(v, "id", request.id))
        async with self._db.read() as tx:
            one = await self._catalog.get_cadence(tx, tenant_of(context), one_id)
        return pb.GetCadenceResponse(cadence=cadences.from_cadence(one))

    async def ListCadences(self, request: pb.ListCadencesRequest, context: Context) -> pb.ListCadencesResponse:
        """See the contract."""
        limit, after = _page(request.page_size, request.page_token)
        async with self._db.read() as tx:
            found = await self._catalog.list_cadences(tx, tenant_of(context), after=after, limit=limit + 1)
        return pb.ListCadencesResponse(
            cadences=map(cadences.from_cadence, found[:limit]), next_page_token=_next(found, limit)
        )

    async def DeleteCadence(self, request: pb.DeleteCadenceRequest, context: Context) -> pb.DeleteCadenceResponse:
        """See the contract."""
        one_id = _checked(lambda v: check_type_id(v, "id", request.id))
        async with self._db.transaction() as tx:
            await self._catalog.delete_cadence(tx, tenant_of(context), one_id)
        return pb.DeleteCadenceResponse()

    # Templates

    async def PutTemplate(self, request: pb.PutTemplateRequest, context: Context) -> pb.PutTemplateResponse:
        """See the contract."""
        one = _checked(lambda v: messages.template(v, "template", request.template))
        await check_compiles(self._press, one)
        async with self._db.transaction() as tx:
            await self._catalog.put_template(tx, tenant_of(context), one)
        return pb.PutTemplateResponse(template=messages.from_template(one))

    async def GetTemplate(self, request: pb.GetTemplateRequest, context: Context) -> pb.GetTemplateResponse:
        """See the contract."""
        key = _checked(lambda v: messages.template_key(v, "", request))
        async with self._db.read() as tx:
            one = await self._catalog.get_template(tx, tenant_of(context), key)
        return pb.GetTemplateResponse(template=messages.from_template(one))

    async def ListTemplates(self, request: pb.ListTemplatesRequest, context: Context) -> pb.ListTemplatesResponse:
        """See the contract."""
        limit = min(_checked(lambda v: check_page_size(v, request.page_size)), _MOST_TEMPLATES)
        names = ("id", "format", "style", "locale")
        cursor = read_page_token(request.page_token, dict.fromkeys(names, str))
        after = None if cursor is None else (cursor["id"], cursor["format"], cursor["style"], cursor["locale"])
        async with self._db.read() as tx:
            found = await self._catalog.list_templates(tx, tenant_of(context), after=after, limit=limit + 1)
        token = page_token(dict(zip(names, key_of(found[limit - 1]), strict=True))) if len(found) > limit else ""
        return pb.ListTemplatesResponse(templates=map(messages.from_template, found[:limit]), next_page_token=token)

    async def DeleteTemplate(self, request: pb.DeleteTemplateRequest, context: Context) -> pb.DeleteTemplateResponse:
        """See the contract."""
        key = _checked(lambda v: messages.template_key(v, "", request))
        async with self._db.transaction() as tx:
            await self._catalog.delete_template(tx, tenant_of(context), key)
        return pb.DeleteTemplateResponse()


def _fitting(found: Sequence[NotificationType], limit: int) -> int:
    """How many of them, at least one, fit into an answer."""
    ends = accumulate(len(f"{one.name}{one.description}{one.payload_schema}".encode()) for one in found[:limit])
    return max(1, sum(end <= _MOST_TEXT_BYTES for end in ends)) if found else limit


T = TypeVar("T")
MessageT = TypeVar("MessageT")


def _checked(read: Callable[[Violations], T]) -> T:
    """What `read` makes of the request; raises InvalidArgument with everything that was wrong."""
    violations = Violations()
    result = read(violations)
    violations.raise_if_any()
    return result


def _each(v: Violations, field: str, given: Sequence[MessageT], read: Callable[[str, MessageT], OneT]) -> list[OneT]:
    """1 to 1,000 of a list's messages, no id twice."""
    check_count(v, field, given, most=1000)
    found = [read(f"{field}[{number}]", one) for number, one in enumerate(given[:1000])]
    seen: set[str] = set()
    for number, one in enumerate(found):
        if one.id and one.id in seen:
            v.add(f"{field}[{number}].id", "must not be given twice")
        seen.add(one.id)
    return found


def _page(page_size: int, token: str, *, query: str = "") -> tuple[int, str]:
    limit = _checked(lambda v: check_page_size(v, page_size))
    cursor = read_page_token(token, {"id": str}, query=query)
    return limit, "" if cursor is None else str(cursor["id"])


def _next(found: Sequence[_HasId], limit: int, *, query: str = "") -> str:
    return page_token({"id": found[limit - 1].id}, query=query) if len(found) > limit else ""
