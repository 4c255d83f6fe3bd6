"""Types, cadences and templates in Postgres. See store_rows for how what names another stays true."""

from typing import Any

from sqlalchemy import ColumnElement, Row, delete, func, select

from libs.errors import FailedPrecondition, NotFound
from libs.postgres import Transaction
from services.digest import store_tables as tables
from services.digest.catalog import (
    IMMEDIATE,
    OFF,
    Aligned,
    Cadence,
    Channel,
    External,
    Format,
    NotificationType,
    Rolling,
    Style,
    Template,
    WindowKind,
)
from services.digest.payload_schemas import schema_id
from services.digest.store_rows import delete_row, get_row, list_rows, put_rows, require
from services.digest.templates import TemplateKey

_WAITING = """
    SELECT 1 FROM digest_window w
    JOIN item i ON i.window_id = w.id AND i.tenant = w.tenant AND i.state = 1
    JOIN notification n ON n.tenant = i.tenant AND n.id = i.notification_id
    WHERE w.tenant = %(tenant)s AND w.state IN (1, 2) AND n.type = %(type)s LIMIT 1"""


# Notification types


async def put_type(tx: Transaction, tenant: str, one: NotificationType) -> None:
    """Store a type; FailedPrecondition when its default cadence does not exist."""
    await require(tx, tables.cadence, tenant, {one.default_cadence} - {IMMEDIATE, OFF}, "cadence")
    await put_rows(
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
                "formatting_service": one.formatting_service,
            }
        ],
    )


async def get_type(tx: Transaction, tenant: str, type_id: str) -> NotificationType:
    """One type; raises NotFound."""
    return _type(await get_row(tx, tables.notification_type, tenant, type_id, "notification type"))


async def list_types(tx: Transaction, tenant: str, *, after: str, limit: int) -> list[NotificationType]:
    """A page of types."""
    return [_type(row) for row in await list_rows(tx, tables.notification_type, tenant, after, limit)]


async def delete_type(tx: Transaction, tenant: str, type_id: str) -> None:
    """Delete a type; FailedPrecondition while items of it wait in open windows."""
    await delete_row(tx, tables.notification_type, tenant, type_id)
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
        formatting_service=row.formatting_service,
    )


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
    await put_rows(tx, tables.cadence, [row])


async def get_cadence(tx: Transaction, tenant: str, cadence_id: str) -> Cadence:
    """One cadence; raises NotFound."""
    return _cadence(await get_row(tx, tables.cadence, tenant, cadence_id, "cadence"))


async def list_cadences(tx: Transaction, tenant: str, *, after: str, limit: int) -> list[Cadence]:
    """A page of cadences."""
    return [_cadence(row) for row in await list_rows(tx, tables.cadence, tenant, after, limit)]


async def delete_cadence(tx: Transaction, tenant: str, cadence_id: str) -> None:
    """Delete a cadence; FailedPrecondition while a type or subscription uses it."""
    await delete_row(tx, tables.cadence, tenant, cadence_id)
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
    await put_rows(tx, tables.template, [{"tenant": tenant, **row, "subject": one.subject, "body": one.body}])


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
