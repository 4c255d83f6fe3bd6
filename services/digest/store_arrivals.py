"""What has just come: stored once, and its payloads checked against the schemas of their types.

What has no schema is not looked at. A type names its schema by the content's id, so that a schema's text is read, and
compiled, only when it is new here.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from uuid import UUID

from libs.postgres import Transaction, copy_rows
from services.digest.commands import Notification
from services.digest.payload_schemas import PayloadSchema, PayloadSchemas

TypeKey = tuple[str, str]
"""A tenant and a type's id."""

_COLUMNS = (
    *("tenant", "id", "type", "entity", "group_key", "payload", "subscribers", "topics", "occurred_at", "expires_at"),
    *("timer_id", "schedule_id", "timer_type", "timeline", "sequence", "received_at", "priority"),
)
_TYPES = (
    *("text", "uuid", "text", "text", "text", "text", "text[]", "text[]", "timestamptz", "timestamptz"),
    *("uuid", "uuid", "text", "text", "int8", "timestamptz", "int2"),
)

# Which notifications have come before, and which of the types have schemas.
_BEFORE = """
    SELECT tenant, id, NULL, NULL FROM notification
    WHERE (tenant, id) IN (SELECT * FROM unnest(%s::text[], %s::uuid[]))
    UNION ALL
    SELECT tenant, NULL, id, schema_id FROM notification_type
    WHERE (tenant, id) IN (SELECT * FROM unnest(%s::text[], %s::text[])) AND schema_id IS NOT NULL"""


async def take_over(
    tx: Transaction, notifications: Sequence[Notification], *, now: datetime, schemas: PayloadSchemas
) -> tuple[list[Notification], dict[tuple[str, UUID], str]]:
    """Store the notifications that are new, and return them; the same id is the same one, whatever carried it.

    The other result is what is wrong with payloads that the schemas of their types do not allow, by tenant and id; of
    notifications that have come before, too.
    """
    unique = {(one.tenant, one.id): one for one in reversed(notifications)}
    types = {(one.tenant, one.type) for one in notifications}
    cursor = await tx.raw.execute(
        _BEFORE,
        (
            *([tenant for tenant, _ in unique], [one_id for _, one_id in unique]),
            *([tenant for tenant, _ in types], [one_id for _, one_id in types]),
        ),
    )
    schema_ids: dict[TypeKey, UUID] = {}
    for tenant, one_id, type_id, schema_id in await cursor.fetchall():
        if one_id is None:
            schema_ids[tenant, type_id] = schema_id
        else:
            del unique[tenant, one_id]
    # In the order of the primary key, so that two frames with the same notification in them cannot deadlock.
    fresh = sorted(unique.values(), key=lambda one: (one.tenant, one.id))
    if fresh:
        await copy_rows(tx, "notification", _COLUMNS, (_row(one, now) for one in fresh), types=_TYPES)
    return fresh, await _refused(tx, notifications, schema_ids, schemas) if schema_ids else {}


def _row(one: Notification, now: datetime) -> tuple[object, ...]:
    return (
        *(
            one.tenant,
            one.id,
            one.type,
            one.entity,
            one.group_key,
            one.payload,
            list(one.subscribers),
            list(one.topics),
        ),
        *(one.occurred_at, one.expires_at, one.timer_id, one.schedule_id, one.timer_type, one.timeline),
        *(one.sequence, now, one.priority),
    )


async def _refused(
    tx: Transaction,
    notifications: Sequence[Notification],
    schema_ids: Mapping[TypeKey, UUID],
    schemas: PayloadSchemas,
) -> dict[tuple[str, UUID], str]:
    compiled = await _compiled(tx, schema_ids, schemas)
    found: dict[tuple[str, UUID], str] = {}
    for one in notifications:
        schema = compiled.get((one.tenant, one.type))
        if schema is not None and (problem := schema.problem(one.payload)):
            found[one.tenant, one.id] = problem
    return found


async def _compiled(
    tx: Transaction, schema_ids: Mapping[TypeKey, UUID], schemas: PayloadSchemas
) -> dict[TypeKey, PayloadSchema]:
    known = {key: schema for key, one_id in schema_ids.items() if (schema := schemas.get(one_id))}
    if missing := sorted(schema_ids.keys() - known.keys()):
        cursor = await tx.raw.execute(
            "SELECT tenant, id, schema_id, payload_schema FROM notification_type"
            " WHERE (tenant, id) IN (SELECT * FROM unnest(%s::text[], %s::text[])) AND schema_id IS NOT NULL",
            ([tenant for tenant, _ in missing], [one_id for _, one_id in missing]),
        )
        for tenant, one_id, schema_id, text in await cursor.fetchall():
            known[tenant, one_id] = schemas.get(schema_id) or schemas.add(schema_id, text)
    return known
