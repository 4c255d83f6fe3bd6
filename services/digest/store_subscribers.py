"""Subscribers and their subscriptions in Postgres. See store_rows for how what names another stays true."""

from collections.abc import Sequence
from datetime import time
from typing import Any

from sqlalchemy import Row, delete, select
from sqlalchemy.dialects.postgresql import insert

from libs.postgres import Transaction
from services.digest import store_tables as tables
from services.digest.catalog import IMMEDIATE, OFF, Channel, Choice, Format, QuietRange, Style, Subscriber, Subscription
from services.digest.store_rows import delete_row, get_row, list_rows, put_rows, require

_UNSPECIFIED = ""


async def put_subscribers(tx: Transaction, tenant: str, subscribers: Sequence[Subscriber]) -> dict[str, str]:
    """Store subscribers; returns the new zones of those whose zone has changed.

    What quiet hours hold is the caller's to look at again: `store_windows.release_windows`.
    """
    table = tables.subscriber
    ids = sorted(one.id for one in subscribers)
    query = select(table.c.id, table.c.zone).where(table.c.tenant == tenant, table.c.id.in_(ids)).order_by(table.c.id)
    before = {row.id: row.zone for row in await tx.conn.execute(query.with_for_update())}
    rows: list[dict[str, object]] = [
        {
            "tenant": tenant,
            "id": one.id,
            "zone": one.zone,
            "locale": one.locale,
            "email": one.email,
            "webhook_url": one.webhook_url,
            "apprise_url": one.apprise_url,
            "quiet_hours": [_quiet_text(quiet) for quiet in one.quiet_hours],
        }
        for one in subscribers
    ]
    await put_rows(tx, table, rows)
    return {one.id: one.zone for one in subscribers if before.get(one.id, one.zone) != one.zone}


async def get_subscriber(tx: Transaction, tenant: str, subscriber_id: str) -> Subscriber:
    """One subscriber; raises NotFound."""
    return _subscriber(await get_row(tx, tables.subscriber, tenant, subscriber_id, "subscriber"))


async def list_subscribers(tx: Transaction, tenant: str, *, after: str, limit: int) -> list[Subscriber]:
    """A page of subscribers."""
    return [_subscriber(row) for row in await list_rows(tx, tables.subscriber, tenant, after, limit)]


async def delete_subscriber(tx: Transaction, tenant: str, subscriber_id: str) -> None:
    """Delete a subscriber and its subscriptions; what waits for it is the caller's to suppress."""
    await delete_row(tx, tables.subscriber, tenant, subscriber_id)
    for table in (tables.choice, tables.subscription):
        await tx.conn.execute(delete(table).where(table.c.tenant == tenant, table.c.subscriber == subscriber_id))


def _subscriber(row: Row[Any]) -> Subscriber:
    return subscriber_of(row.id, row.zone, row.locale, row.email, row.webhook_url, row.apprise_url, row.quiet_hours)


def subscriber_of(
    one_id: str, zone: str, locale: str, email: str, webhook_url: str, apprise_url: str, quiet_hours: Sequence[str]
) -> Subscriber:
    """A subscriber from the table's columns, in their order."""
    return Subscriber(
        id=one_id,
        zone=zone,
        locale=locale,
        email=email,
        webhook_url=webhook_url,
        apprise_url=apprise_url,
        quiet_hours=_quiet_ranges(quiet_hours),
    )


def _quiet_text(one: QuietRange) -> str:
    return f"{one.channel or ''}/{one.start:%H:%M}/{one.until:%H:%M}"


def _quiet_ranges(texts: Sequence[str]) -> tuple[QuietRange, ...]:
    parts = [text.split("/") for text in texts]
    return tuple(
        QuietRange(
            channel=Channel(channel) if channel else None,
            start=time.fromisoformat(start),
            until=time.fromisoformat(until),
        )
        for channel, start, until in parts
    )


# Subscriptions


async def put_subscriptions(tx: Transaction, tenant: str, subscriptions: Sequence[Subscription]) -> None:
    """Store subscriptions whole; FailedPrecondition names subscribers and cadences that do not exist."""
    await require(tx, tables.subscriber, tenant, {one.subscriber for one in subscriptions}, "subscriber")
    cadences = {choice.cadence for one in subscriptions for choice in one.choices}
    await require(tx, tables.cadence, tenant, cadences - {IMMEDIATE, OFF}, "cadence")
    rows: list[dict[str, object]] = [
        {
            "tenant": tenant,
            "id": one.id,
            "subscriber": one.subscriber,
            "type": one.type,
            "topic": one.topic,
            "filter": one.filter,
        }
        for one in subscriptions
    ]
    await put_rows(tx, tables.subscription, rows)  # Locks them, so that the same one put twice at once ends up whole.
    choice = tables.choice
    ids = [one.id for one in subscriptions]
    await tx.conn.execute(delete(choice).where(choice.c.tenant == tenant, choice.c.subscription.in_(ids)))
    await tx.conn.execute(insert(choice), [row for one in subscriptions for row in _choice_rows(tenant, one)])


def _choice_rows(tenant: str, one: Subscription) -> list[dict[str, object]]:
    return [
        {
            "tenant": tenant,
            "subscription": one.id,
            "position": position,
            "subscriber": one.subscriber,
            "topic": one.topic,
            "type": one.type.removesuffix("*"),
            "is_prefix": one.type.endswith("*"),
            "cadence": choice.cadence,
            "channel": choice.channel or _UNSPECIFIED,
            "format": choice.format or _UNSPECIFIED,
            "style": choice.style or _UNSPECIFIED,
            "filter": one.filter,
        }
        for position, choice in enumerate(one.choices)
    ]


async def get_subscription(tx: Transaction, tenant: str, subscription_id: str) -> Subscription:
    """One subscription; raises NotFound."""
    row = await get_row(tx, tables.subscription, tenant, subscription_id, "subscription")
    (found,) = await _with_choices(tx, tenant, [row])
    return found


async def list_subscriptions(
    tx: Transaction, tenant: str, *, subscriber: str, after: str, limit: int
) -> list[Subscription]:
    """A page of subscriptions, of one subscriber or (empty) of all."""
    table = tables.subscription
    mine = [table.c.subscriber == subscriber] if subscriber else []
    return await _with_choices(tx, tenant, await list_rows(tx, table, tenant, after, limit, *mine))


async def delete_subscription(tx: Transaction, tenant: str, subscription_id: str) -> None:
    """Delete a subscription; what waits because of it stays."""
    await delete_row(tx, tables.subscription, tenant, subscription_id)
    choice = tables.choice
    await tx.conn.execute(delete(choice).where(choice.c.tenant == tenant, choice.c.subscription == subscription_id))


async def _with_choices(tx: Transaction, tenant: str, rows: Sequence[Row[Any]]) -> list[Subscription]:
    table = tables.choice
    query = (
        select(table)
        .where(table.c.tenant == tenant, table.c.subscription.in_([row.id for row in rows]))
        .order_by(table.c.subscription, table.c.position)
    )
    choices: dict[str, list[Choice]] = {row.id: [] for row in rows}
    for row in await tx.conn.execute(query):
        choices[row.subscription].append(
            Choice(
                cadence=row.cadence,
                channel=Channel(row.channel) if row.channel else None,
                format=Format(row.format) if row.format else None,
                style=Style(row.style) if row.style else None,
            )
        )
    return [
        Subscription(
            id=row.id,
            subscriber=row.subscriber,
            type=row.type,
            topic=row.topic,
            choices=tuple(choices[row.id]),
            filter=row.filter,
        )
        for row in rows
    ]
