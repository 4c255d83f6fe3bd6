"""What Postgres knows of those that a story mentions. Reads only, in a fixed number of statements."""

from collections.abc import Collection, Sequence
from typing import Any
from uuid import UUID

from libs.postgres import Transaction
from services.digest.catalog import Subscriber, WindowKind
from services.digest.store_subscribers import subscriber_of
from services.digest.stories import KnownCadence, KnownCancel, KnownChoice, KnownType
from services.digest.views import NotificationView

_MOST_CHOICES = 2_000
_MOST_CANCELS = 1_000

_NOTIFICATIONS = """
    SELECT id, type, entity, payload, occurred_at, received_at, expires_at, cardinality(subscribers), topics, sequence,
        timer_type, timeline, timer_id, schedule_id
    FROM notification WHERE tenant = %(tenant)s"""

_CHOICES = """
    SELECT subscription, subscriber, topic, type || CASE WHEN is_prefix THEN '*' ELSE '' END, cadence, channel, filter
    FROM choice WHERE tenant = %(tenant)s AND topic = ANY (%(topics)s) AND subscriber = ANY (%(subscribers)s)
    ORDER BY subscriber, topic, type, subscription, position LIMIT %(limit)s"""

# The index finds a subscriber's subscriptions, whatever their topics are.
_CHOICES_OF = """
    SELECT c.subscription, c.subscriber, c.topic, c.type || CASE WHEN c.is_prefix THEN '*' ELSE '' END, c.cadence,
        c.channel, c.filter
    FROM subscription s JOIN choice c ON c.tenant = s.tenant AND c.subscription = s.id
    WHERE s.tenant = %(tenant)s AND s.subscriber = %(subscriber)s ORDER BY s.id, c.position LIMIT %(limit)s"""


async def notifications(tx: Transaction, tenant: str, ids: Sequence[UUID]) -> list[NotificationView]:
    """Those of these notifications that are there, in any order."""
    return await _notifications(tx, " AND id = ANY (%(ids)s)", {"tenant": tenant, "ids": list(ids)})


async def notifications_about(tx: Transaction, tenant: str, entity: str, *, limit: int) -> list[NotificationView]:
    """The newest notifications about an entity."""
    values = {"tenant": tenant, "entity": entity, "limit": limit}
    where = " AND entity = %(entity)s AND entity <> '' ORDER BY received_at DESC, id LIMIT %(limit)s"
    return await _notifications(tx, where, values)


async def _notifications(tx: Transaction, where: str, values: dict[str, object]) -> list[NotificationView]:
    rows = await _rows(tx, f"{_NOTIFICATIONS}{where}", values)
    names = (
        *("id", "type", "entity", "payload", "occurred_at", "received_at", "expires_at", "subscribers", "topics"),
        *("sequence", "timer_type", "timeline", "timer_id", "schedule_id"),
    )
    return [NotificationView(**dict(zip(names, row, strict=True))) for row in rows]


async def subscribers(tx: Transaction, tenant: str, ids: Collection[str]) -> list[Subscriber]:
    """Those of these subscribers that exist."""
    rows = await _rows(
        tx,
        "SELECT id, zone, locale, email, webhook_url, apprise_url, quiet_hours FROM subscriber"
        " WHERE tenant = %(tenant)s AND id = ANY (%(ids)s)",
        {"tenant": tenant, "ids": sorted(ids)},
    )
    return [subscriber_of(*row) for row in rows]


async def types(tx: Transaction, tenant: str, ids: Collection[str]) -> list[KnownType]:
    """Those of these notification types that are in the catalog."""
    rows = await _rows(
        tx,
        "SELECT id, default_cadence, is_mandatory, payload_schema, retention FROM notification_type"
        " WHERE tenant = %(tenant)s AND id = ANY (%(ids)s)",
        {"tenant": tenant, "ids": sorted(ids)},
    )
    return [
        KnownType(
            id=one_id,
            default_cadence=default_cadence,
            is_mandatory=is_mandatory,
            payload_schema=payload_schema,
            retention=retention,
        )
        for one_id, default_cadence, is_mandatory, payload_schema, retention in rows
    ]


async def cadences(tx: Transaction, tenant: str, ids: Collection[str]) -> list[KnownCadence]:
    """Those of these cadences that exist."""
    rows = await _rows(
        tx,
        "SELECT id, name, kind, cron, rrule, zone, batch, duration, maximum_items FROM cadence"
        " WHERE tenant = %(tenant)s AND id = ANY (%(ids)s)",
        {"tenant": tenant, "ids": sorted(ids)},
    )
    return [
        KnownCadence(
            id=one_id,
            name=name,
            kind=WindowKind(kind),
            cron=cron,
            rrule=rrule,
            zone=zone,
            batch=batch,
            duration=duration,
            maximum_items=maximum_items,
        )
        for one_id, name, kind, cron, rrule, zone, batch, duration, maximum_items in rows
    ]


async def choices(
    tx: Transaction, tenant: str, subscribers: Collection[str], topics: Collection[str]
) -> list[KnownChoice]:
    """Choices of these subscribers for what they are told directly and by these topics; at most 2,000."""
    wanted = {"subscribers": sorted(subscribers), "topics": sorted({"", *topics}), "limit": _MOST_CHOICES}
    return [_choice(row) for row in await _rows(tx, _CHOICES, {"tenant": tenant, **wanted})]


async def choices_of(tx: Transaction, tenant: str, subscriber: str, *, limit: int) -> list[KnownChoice]:
    """All choices of one subscriber, in the order of its subscriptions."""
    values = {"tenant": tenant, "subscriber": subscriber, "limit": limit}
    return [_choice(row) for row in await _rows(tx, _CHOICES_OF, values)]


async def cancels(tx: Transaction, tenant: str, entities: Collection[str]) -> list[KnownCancel]:
    """The cancels of these entities that are still on record, the oldest first; at most 1,000."""
    rows = await _rows(
        tx,
        "SELECT entity, type, timeline, timer_ids, sequence FROM tombstone"
        " WHERE tenant = %(tenant)s AND entity = ANY (%(entities)s) ORDER BY sequence LIMIT %(limit)s",
        {"tenant": tenant, "entities": sorted(entities), "limit": _MOST_CANCELS},
    )
    return [
        KnownCancel(entity=entity, type=kind, timeline=timeline, timer_ids=timer_ids, sequence=sequence)
        for entity, kind, timeline, timer_ids, sequence in rows
    ]


def _choice(row: tuple[Any, ...]) -> KnownChoice:
    subscription, subscriber, topic, kind, cadence, channel, text = row
    return KnownChoice(
        subscription=subscription,
        subscriber=subscriber,
        topic=topic,
        type=kind,
        cadence=cadence,
        channel=channel,
        filter=text,
    )


async def _rows(tx: Transaction, query: str, values: dict[str, Any]) -> list[tuple[Any, ...]]:
    return await (await tx.raw.execute(query, values)).fetchall()
