"""What has just come: stored once, and its payloads checked against the schemas of their types.

What has no schema is not looked at. A type names its schema by the content's id, so that a schema's text is read, and
compiled, only when it is new here.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from struct import pack
from uuid import UUID

from psycopg.errors import UniqueViolation

from libs.postgres import FEW_ROWS, Transaction, copy_rows
from services.digest.commands import Notification
from services.digest.payload_schemas import PayloadSchema, PayloadSchemas

TypeKey = tuple[str, str]
"""A tenant and a type's id."""

_COLUMNS = (
    *("tenant", "id", "type", "entity", "group_key", "payload", "subscribers", "topics", "occurred_at", "expires_at"),
    *("timer_id", "schedule_id", "timer_type", "timeline", "sequence", "received_at", "priority"),
    *("items", "trace"),
)
_TYPES = (
    *("text", "uuid", "text", "text", "text", "text", "text[]", "text[]", "timestamptz", "timestamptz"),
    *("uuid", "uuid", "text", "text", "int8", "timestamptz", "int2"),
    *("int4", "bytea"),
)

# The same columns as they are copied: what psycopg would turn into Postgres's form slowly is in that form already, and
# goes through as bytes or a number.
_PACKED_TYPES = (
    *("text", "bytea", "text", "text", "text", "text", "bytea", "bytea", "int8", "timestamptz"),
    *("uuid", "uuid", "text", "text", "int8", "int8", "int2"),
    *("int4", "bytea"),
)
_POSTGRES_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_TEXT_OID = 25
_NO_TEXTS = pack(">iii", 0, 0, _TEXT_OID)

# Which notifications have come before.
_BEFORE = """
    SELECT tenant, id FROM notification WHERE (tenant, id) IN (SELECT * FROM unnest(%s::text[], %s::uuid[]))"""

_SCHEMAS = """
    SELECT tenant, id, schema_id FROM notification_type
    WHERE (tenant, id) IN (SELECT * FROM unnest(%s::text[], %s::text[])) AND schema_id IS NOT NULL"""


_COUNT_ITEMS = """
    UPDATE notification n SET items = made.items
    FROM (SELECT tenant, notification_id, count(*) AS items FROM expansion GROUP BY 1, 2) AS made
    WHERE n.tenant = made.tenant AND n.id = made.notification_id AND n.items <> made.items"""


async def take_over(
    tx: Transaction, notifications: Sequence[Notification], *, now: datetime, schemas: PayloadSchemas
) -> tuple[list[Notification], dict[tuple[str, UUID], str]]:
    """Store the notifications that are new, and return them; the same id is the same one, whatever carried it.

    The other result is what is wrong with payloads that the schemas of their types do not allow, by tenant and id; of
    notifications that have come before, too.
    """
    types = {(one.tenant, one.type) for one in notifications}
    cursor = await tx.raw.execute(_SCHEMAS, ([tenant for tenant, _ in types], [one_id for _, one_id in types]))
    schema_ids = {(tenant, type_id): schema_id for tenant, type_id, schema_id in await cursor.fetchall()}
    fresh = await _store(tx, {(one.tenant, one.id): one for one in reversed(notifications)}, now)
    return fresh, await _refused(tx, notifications, schema_ids, schemas) if schema_ids else {}


async def _store(tx: Transaction, unique: dict[tuple[str, UUID], Notification], now: datetime) -> list[Notification]:
    """Copy in what is new. Hardly ever has any come before, so that is asked only when the primary key says so."""
    await tx.raw.execute("SAVEPOINT arriving")
    try:
        return await _copy(tx, unique, now)
    except UniqueViolation:
        await tx.raw.execute("ROLLBACK TO SAVEPOINT arriving")
    before = await (
        await tx.raw.execute(_BEFORE, ([tenant for tenant, _ in unique], [one_id for _, one_id in unique]))
    ).fetchall()
    for tenant, one_id in before:
        del unique[tenant, one_id]
    return await _copy(tx, unique, now)


async def _copy(tx: Transaction, unique: Mapping[tuple[str, UUID], Notification], now: datetime) -> list[Notification]:
    # In the order of the primary key, so that two frames with the same notification in them cannot deadlock.
    fresh = sorted(unique.values(), key=lambda one: (one.tenant, one.id.int))
    if len(fresh) <= FEW_ROWS:
        await copy_rows(tx, "notification", _COLUMNS, (_row(one, now) for one in fresh), types=_TYPES)
    else:
        received = _microseconds(now)
        rows = (_packed(one, received) for one in fresh)
        await copy_rows(tx, "notification", _COLUMNS, rows, types=_PACKED_TYPES)
    return fresh


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
        *(one.sequence, now, one.priority, _least_items(one), one.trace or None),
    )


def _packed(one: Notification, received: int) -> tuple[object, ...]:
    return (
        one.tenant,
        one.id.bytes,
        one.type,
        one.entity,
        one.group_key,
        one.payload,
        _texts(one.subscribers),
        _texts(one.topics),
        _microseconds(one.occurred_at),
        one.expires_at,
        one.timer_id,
        one.schedule_id,
        one.timer_type,
        one.timeline,
        one.sequence,
        received,
        one.priority,
        _least_items(one),
        one.trace or None,
    )


def _microseconds(at: datetime) -> int:
    """A timestamptz as Postgres sends and takes it (its protocol's binary format)."""
    since = at - _POSTGRES_EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _texts(texts: Sequence[str]) -> bytes:
    """A text[] likewise: dimensions, nulls, the elements' type, how many from which index; each with its length."""
    if not texts:
        return _NO_TEXTS
    pieces = [pack(">iiiii", 1, 0, _TEXT_OID, len(texts), 1)]
    for text in texts:
        encoded = text.encode()
        pieces += (len(encoded).to_bytes(4), encoded)
    return b"".join(pieces)


def _least_items(one: Notification) -> int:
    """At least so many items come of it, and exactly so many where each subscriber has one choice, as most have."""
    if one.topics:
        return 0
    return 1 if len(one.subscribers) == 1 else len(set(one.subscribers))


async def count_items(tx: Transaction, notifications: Sequence[Notification], items: int) -> None:
    """Have each notification know how many items it has; `items` are all that lie in the scratch table.

    For the ledger (store_ledger). Costs nothing where what was copied in is right, as the sums then show: it is never
    too high.
    """
    if items != sum(map(_least_items, notifications)):
        await tx.raw.execute(_COUNT_ITEMS)


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
