"""The catalog in Postgres: types, subscribers, subscriptions, cadences, templates.

What is named is locked while it is being named (FOR KEY SHARE), and what is deleted is looked for afterwards: so
nothing ends up naming what is not there. Lists are in order of ids; `after` is the last id of the page before.
"""

from collections.abc import Collection, Sequence
from datetime import time
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, Table, delete, func, or_, select
from sqlalchemy.dialects.postgresql import insert

from libs.errors import FailedPrecondition, NotFound
from libs.postgres import Transaction
from services.digest import store_tables as tables
from services.digest.catalog import (
    IMMEDIATE,
    OFF,
    Aligned,
    Cadence,
    Channel,
    Choice,
    External,
    Format,
    NotificationType,
    QuietRange,
    Rolling,
    Style,
    Subscriber,
    Subscription,
    Template,
    WindowKind,
)
from services.digest.payload_schemas import schema_id
from services.digest.templates import TemplateKey

_UNSPECIFIED = ""

_WAITING = """
    SELECT 1 FROM digest_window w
    JOIN item i ON i.window_id = w.id AND i.tenant = w.tenant AND i.state = 1
    JOIN notification n ON n.tenant = i.tenant AND n.id = i.notification_id
    WHERE w.tenant = %(tenant)s AND w.state IN (1, 2) AND n.type = %(type)s LIMIT 1"""


# Notification types


async def put_type(tx: Transaction, tenant: str, one: NotificationType) -> None:
    """Store a type; FailedPrecondition when its default cadence does not exist."""
    await _require(tx, tables.cadence, tenant, {one.default_cadence} - {IMMEDIATE, OFF}, "cadence")
    await _put(
        tx,
        tables.notification_type,
        [
            {
                "tenant": tenant,
                "id": one.id,
                "name": one.name,
                "description": one.description,
                "default_cadence": one.default_cadence,
                "default_channel": one.default_channel.value,
                "is_mandatory": one.is_mandatory,
                "payload_schema": one.payload_schema,
                "schema_id": schema_id(one.payload_schema) if one.payload_schema else None,
                "retention": one.retention,
            }
        ],
    )


async def get_type(tx: Transaction, tenant: str, type_id: str) -> NotificationType:
    """One type; raises NotFound."""
    return _type(await _get(tx, tables.notification_type, tenant, type_id, "notification type"))


async def list_types(tx: Transaction, tenant: str, *, after: str, limit: int) -> list[NotificationType]:
    """A page of types."""
    return [_type(row) for row in await _list(tx, tables.notification_type, tenant, after, limit)]


async def delete_type(tx: Transaction, tenant: str, type_id: str) -> None:
    """Delete a type; FailedPrecondition while items of it wait in open windows."""
    await _delete(tx, tables.notification_type, tenant, type_id)
    if await (await tx.raw.execute(_WAITING, {"tenant": tenant, "type": type_id})).fetchone():
        raise FailedPrecondition(
            f"Items of the type {type_id} wait in open windows.", reason="TYPE_IN_USE", metadata={"type": type_id}
        )


def _type(row: Row[Any]) -> NotificationType:
    return NotificationType(
        id=row.id,
        name=row.name,
        description=row.description,
        default_cadence=row.default_cadence,
        default_channel=Channel(row.default_channel),
        is_mandatory=row.is_mandatory,
        payload_schema=row.payload_schema,
        retention=row.retention,
    )


# Subscribers


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
    await _put(tx, table, rows)
    return {one.id: one.zone for one in subscribers if before.get(one.id, one.zone) != one.zone}


async def get_subscriber(tx: Transaction, tenant: str, subscriber_id: str) -> Subscriber:
    """One subscriber; raises NotFound."""
    return _subscriber(await _get(tx, tables.subscriber, tenant, subscriber_id, "subscriber"))


async def list_subscribers(tx: Transaction, tenant: str, *, after: str, limit: int) -> list[Subscriber]:
    """A page of subscribers."""
    return [_subscriber(row) for row in await _list(tx, tables.subscriber, tenant, after, limit)]


async def delete_subscriber(tx: Transaction, tenant: str, subscriber_id: str) -> None:
    """Delete a subscriber and its subscriptions; what waits for it is the caller's to suppress."""
    await _delete(tx, tables.subscriber, tenant, subscriber_id)
    for table in (tables.choice, tables.subscription):
        await tx.conn.execute(delete(table).where(table.c.tenant == tenant, table.c.subscriber == subscriber_id))


def _subscriber(row: Row[Any]) -> Subscriber:
    return Subscriber(
        id=row.id,
        zone=row.zone,
        locale=row.locale,
        email=row.email,
        webhook_url=row.webhook_url,
        apprise_url=row.apprise_url,
        quiet_hours=quiet_ranges(row.quiet_hours),
    )


def _quiet_text(one: QuietRange) -> str:
    return f"{one.channel or ''}/{one.start:%H:%M}/{one.until:%H:%M}"


def quiet_ranges(texts: Sequence[str]) -> tuple[QuietRange, ...]:
    """Quiet hours as the table writes them."""
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
    await _require(tx, tables.subscriber, tenant, {one.subscriber for one in subscriptions}, "subscriber")
    cadences = {choice.cadence for one in subscriptions for choice in one.choices}
    await _require(tx, tables.cadence, tenant, cadences - {IMMEDIATE, OFF}, "cadence")
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
    await _put(tx, tables.subscription, rows)  # Locks them, so that the same one put twice at once ends up whole.
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
    row = await _get(tx, tables.subscription, tenant, subscription_id, "subscription")
    (found,) = await _with_choices(tx, tenant, [row])
    return found


async def list_subscriptions(
    tx: Transaction, tenant: str, *, subscriber: str, after: str, limit: int
) -> list[Subscription]:
    """A page of subscriptions, of one subscriber or (empty) of all."""
    table = tables.subscription
    mine = [table.c.subscriber == subscriber] if subscriber else []
    return await _with_choices(tx, tenant, await _list(tx, table, tenant, after, limit, *mine))


async def delete_subscription(tx: Transaction, tenant: str, subscription_id: str) -> None:
    """Delete a subscription; what waits because of it stays."""
    await _delete(tx, tables.subscription, tenant, subscription_id)
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


# Cadences


async def put_cadence(tx: Transaction, tenant: str, one: Cadence) -> None:
    """Store a cadence."""
    row: dict[str, object] = {
        "tenant": tenant,
        "id": one.id,
        "name": one.name,
        "cron": "",
        "rrule": "",
        "zone": "",
        "batch": "",
        "fallback_after": None,
        "duration": None,
        "extension": None,
        "cap": None,
        "maximum_items": None,
        "is_leading": None,
    }
    match one.kind:
        case Aligned(cron=cron, rrule=rrule, zone=zone):
            row |= {"kind": int(WindowKind.ALIGNED), "cron": cron, "rrule": rrule, "zone": zone}
        case External(batch=batch, fallback_after=fallback_after):
            row |= {"kind": int(WindowKind.EXTERNAL), "batch": batch, "fallback_after": fallback_after}
        case Rolling(duration=duration, extension=extension, cap=cap, is_leading=is_leading):
            row |= {"kind": int(WindowKind.ROLLING), "duration": duration, "extension": extension, "cap": cap}
            row |= {"maximum_items": one.kind.maximum_items or None, "is_leading": is_leading}
    await _put(tx, tables.cadence, [row])


async def get_cadence(tx: Transaction, tenant: str, cadence_id: str) -> Cadence:
    """One cadence; raises NotFound."""
    return _cadence(await _get(tx, tables.cadence, tenant, cadence_id, "cadence"))


async def list_cadences(tx: Transaction, tenant: str, *, after: str, limit: int) -> list[Cadence]:
    """A page of cadences."""
    return [_cadence(row) for row in await _list(tx, tables.cadence, tenant, after, limit)]


async def delete_cadence(tx: Transaction, tenant: str, cadence_id: str) -> None:
    """Delete a cadence; FailedPrecondition while a type or subscription uses it."""
    await _delete(tx, tables.cadence, tenant, cadence_id)
    types, choice = tables.notification_type, tables.choice
    by_type = select(types.c.id).where(types.c.tenant == tenant, types.c.default_cadence == cadence_id)
    by_choice = select(choice.c.subscription).where(choice.c.tenant == tenant, choice.c.cadence == cadence_id)
    for what, query in (("notification type", by_type), ("subscription", by_choice)):
        if (row := (await tx.conn.execute(query.limit(1))).first()) is not None:
            raise FailedPrecondition(
                f"The {what} {row[0]} uses the cadence {cadence_id}.",
                reason="CADENCE_IN_USE",
                metadata={"cadence": cadence_id, "used_by": row[0]},
            )


def _cadence(row: Row[Any]) -> Cadence:
    kind: Aligned | Rolling | External
    if row.kind == WindowKind.ALIGNED:
        kind = Aligned(cron=row.cron, rrule=row.rrule, zone=row.zone)
    elif row.kind == WindowKind.ROLLING:
        kind = Rolling(
            duration=row.duration,
            extension=row.extension,
            cap=row.cap,
            maximum_items=row.maximum_items or 0,
            is_leading=row.is_leading,
        )
    else:
        kind = External(batch=row.batch, fallback_after=row.fallback_after)
    return Cadence(id=row.id, name=row.name, kind=kind)


# Templates


async def put_template(tx: Transaction, tenant: str, one: Template) -> None:
    """Store a template, which compiles."""
    row = dict(zip(("id", "format", "style", "locale"), _key(one), strict=True))
    await _put(tx, tables.template, [{"tenant": tenant, **row, "subject": one.subject, "body": one.body}])


async def get_template(tx: Transaction, tenant: str, key: TemplateKey) -> Template:
    """One template; raises NotFound."""
    row = (await tx.conn.execute(select(tables.template).where(*_is(tenant, key)))).first()
    if row is None:
        raise NotFound(f"There is no template {key[0]} of this format, style and locale.", metadata={"id": key[0]})
    return _template(row)


async def list_templates(tx: Transaction, tenant: str, *, after: TemplateKey | None, limit: int) -> list[Template]:
    """A page of templates, ordered by id, format, style and locale."""
    table = tables.template
    key = (table.c.id, table.c.format, table.c.style, table.c.locale)
    query = select(table).where(table.c.tenant == tenant).order_by(*key).limit(limit)
    if after is not None:
        query = query.where(func.row(*key) > func.row(*after))
    return [_template(row) for row in await tx.conn.execute(query)]


async def delete_template(tx: Transaction, tenant: str, key: TemplateKey) -> None:
    """Delete a template; the next best is used from then on."""
    await tx.conn.execute(delete(tables.template).where(*_is(tenant, key)))


def _key(one: Template) -> TemplateKey:
    return (one.id, one.format.value, one.style.value, one.locale)


def _is(tenant: str, key: TemplateKey) -> list[ColumnElement[bool]]:
    table = tables.template
    names = ("id", "format", "style", "locale")
    return [table.c.tenant == tenant, *(table.c[name] == value for name, value in zip(names, key, strict=True))]


def _template(row: Row[Any]) -> Template:
    return Template(
        id=row.id,
        format=Format(row.format),
        style=Style(row.style),
        locale=row.locale,
        subject=row.subject,
        body=row.body,
    )


# Any of them


async def _put(tx: Transaction, table: Table, rows: Sequence[dict[str, object]]) -> None:
    """Insert or replace rows, in the order of their keys, so that two callers do not wait for each other crosswise."""
    keys = [column.name for column in table.primary_key]
    ordered = sorted(rows, key=lambda row: [str(row[key]) for key in keys])
    statement = insert(table)
    changes = {name: statement.excluded[name] for name in ordered[0] if name not in keys}
    is_other = or_(*(table.c[name].is_distinct_from(value) for name, value in changes.items()))
    await tx.conn.execute(statement.on_conflict_do_update(index_elements=keys, set_=changes, where=is_other), ordered)


async def _get(tx: Transaction, table: Table, tenant: str, one_id: str, what: str) -> Row[Any]:
    row = (await tx.conn.execute(select(table).where(table.c.tenant == tenant, table.c.id == one_id))).first()
    if row is None:
        raise NotFound(f"There is no {what} {one_id}.", metadata={"id": one_id})
    return row


async def _list(
    tx: Transaction, table: Table, tenant: str, after: str, limit: int, *filters: ColumnElement[bool]
) -> Sequence[Row[Any]]:
    query: Select[Any] = select(table).where(table.c.tenant == tenant, table.c.id > after, *filters)
    return list(await tx.conn.execute(query.order_by(table.c.id).limit(limit)))


async def _delete(tx: Transaction, table: Table, tenant: str, one_id: str) -> None:
    await tx.conn.execute(delete(table).where(table.c.tenant == tenant, table.c.id == one_id))


async def _require(tx: Transaction, table: Table, tenant: str, ids: Collection[str], what: str) -> None:
    """Raise FailedPrecondition unless all are there, and keep them there until the end of the transaction."""
    if not ids:
        return
    query = select(table.c.id).where(table.c.tenant == tenant, table.c.id.in_(sorted(ids))).order_by(table.c.id)
    found = {row.id for row in await tx.conn.execute(query.with_for_update(read=True, key_share=True))}
    if missing := sorted(set(ids) - found):
        named = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise FailedPrecondition(
            f"There is no {what} {named}.", reason=f"{what.upper()}_MISSING", metadata={what: missing[0]}
        )
