"""The log of requests and responses, and who provides what, in Postgres. All statements are set-based.

Rows of `request` are locked in the order of (tenant, id) wherever several are, so a response and the answer-by date
never meet halfway: whichever comes second sees what the first did.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Select, and_, func, select

from libs.postgres import Transaction, copy_rows
from services.intake import store_tables as tables
from services.intake.requests import Closing, Request, Response, State

# A call's answer stays below gRPC's 4 MiB: clients refuse larger ones by default.
MAX_ANSWER_BYTES = 3 << 20

FORGOTTEN_AT_ONCE = 100
"""Requests in one transaction: each may have a thousand responses of 64 KiB."""

_WAITING = frozenset({State.OPEN.value, State.ANSWERED.value})
"""The states of requests that are not over; these have no `closed_at`."""

_REQUEST_COLUMNS = (
    *("tenant", "id", "batch", "customer", "item", "providers", "payload"),
    *("submitted_at", "answer_by", "state", "responses"),
)
_REQUEST_TYPES = (
    *("text", "uuid", "text", "text", "text", "text[]", "text"),
    *("timestamptz", "timestamptz", "int2", "int4"),
)
_RESPONSE_COLUMNS = ("tenant", "id", "request_id", "provider", "payload", "received_at")
_RESPONSE_TYPES = ("text", "uuid", "uuid", "text", "text", "timestamptz")

_SELECTED = (
    "r.id, r.batch, r.customer, r.item, r.providers, r.payload, r.submitted_at, r.answer_by, r.state, r.responses,"
    " r.closed_at, r.cause"
)

# The exact id wins, then the longest pattern. Every prefix of the item is looked up in the primary key, so it does not
# matter how many items there are.
_PROVIDERS_OF = """
    SELECT wanted.item, found.providers
    FROM unnest(%(items)s::text[]) AS wanted (item)
    CROSS JOIN LATERAL (
        SELECT providers FROM item_providers
        WHERE tenant = %(tenant)s AND item = ANY (ARRAY(
            SELECT wanted.item
            UNION ALL SELECT left(wanted.item, n) || '*' FROM generate_series(0, length(wanted.item)) AS n))
        ORDER BY item = wanted.item DESC, length(item) DESC LIMIT 1) AS found"""

_PUT_PROVIDERS = """
    INSERT INTO item_providers (tenant, item, providers)
    SELECT %(tenant)s, item, string_to_array(providers, E'\\x01')
    FROM unnest(%(items)s::text[], %(providers)s::text[]) AS new (item, providers) ORDER BY item
    ON CONFLICT (tenant, item) DO UPDATE SET providers = EXCLUDED.providers"""

_COUNT_RESPONSES = """
    UPDATE request SET state = %(answered)s, responses = request.responses + new.responses
    FROM unnest(%(ids)s::uuid[], %(counts)s::int[]) AS new (id, responses)
    WHERE request.tenant = %(tenant)s AND request.id = new.id"""

_LOCK_DUE = f"""
    SELECT r.tenant, {_SELECTED}
    FROM request r JOIN unnest(%(tenants)s::text[], %(ids)s::uuid[]) AS due (tenant, id) USING (tenant, id)
    WHERE r.state = ANY(%(waiting)s) ORDER BY r.tenant, r.id FOR NO KEY UPDATE OF r"""  # noqa: S608

# The smallest payloads first, as long as they fit; the others come without.
_LATEST_ANSWERS = """
    SELECT tenant, request_id, id, provider, CASE WHEN room <= %(room)s THEN payload END, received_at
    FROM (
        SELECT *, sum(octet_length(payload)) OVER (
            PARTITION BY tenant, request_id ORDER BY octet_length(payload), provider) AS room
        FROM (
            SELECT DISTINCT ON (tenant, request_id, provider) response.*
            FROM response JOIN unnest(%(tenants)s::text[], %(ids)s::uuid[]) AS due (tenant, request_id)
                USING (tenant, request_id)
            ORDER BY tenant, request_id, provider, id DESC) AS latest) AS sized
    ORDER BY tenant, request_id, received_at, id"""

_CLOSE = """
    UPDATE request SET state = new.state, closed_at = %(now)s
    FROM unnest(%(tenants)s::text[], %(ids)s::uuid[], %(states)s::smallint[]) AS new (tenant, id, state)
    WHERE request.tenant = new.tenant AND request.id = new.id"""

_WITHDRAW = """
    UPDATE request SET state = %(withdrawn)s, closed_at = %(now)s, cause = %(cause)s
    WHERE tenant = %(tenant)s AND id = ANY(%(ids)s)"""

_FORGET = """
    WITH old AS MATERIALIZED (
        SELECT tenant, id FROM request WHERE answer_by <= %(before)s AND closed_at <= %(before)s
        ORDER BY answer_by LIMIT %(limit)s FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM response USING old WHERE response.tenant = old.tenant AND response.request_id = old.id)
    DELETE FROM request USING old WHERE request.tenant = old.tenant AND request.id = old.id"""

_RESPONSES = """
    SELECT request_id, id, provider, CASE WHEN room <= %(room)s THEN payload END, received_at
    FROM (SELECT *, sum(octet_length(payload)) OVER (ORDER BY id) AS room
          FROM response WHERE tenant = %(tenant)s AND request_id = ANY(%(ids)s)) AS sized
    ORDER BY request_id, id"""


class RequestStore:
    """Stateless; every method runs in the transaction it is given."""

    async def put_providers(self, tx: Transaction, tenant: str, providers: Mapping[str, Sequence[str]]) -> None:
        """Replace the lists of these items and patterns; an empty list removes the entry."""
        gone = sorted(item for item, names in providers.items() if not names)
        if gone:
            await tx.raw.execute(
                "DELETE FROM item_providers WHERE (tenant, item) IN (SELECT tenant, item FROM item_providers"
                " WHERE tenant = %s AND item = ANY(%s) ORDER BY item FOR UPDATE)",
                (tenant, gone),
            )
        kept = {item: names for item, names in providers.items() if names}
        if kept:
            # Lists of different lengths do not make an array of arrays; \x01 is in no subscriber id.
            lists = ["\x01".join(names) for names in kept.values()]
            await tx.raw.execute(_PUT_PROVIDERS, {"tenant": tenant, "items": list(kept), "providers": lists})

    async def providers_of(self, tx: Transaction, tenant: str, items: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The providers of each item of which any are known."""
        cursor = await tx.raw.execute(_PROVIDERS_OF, {"tenant": tenant, "items": sorted(set(items))})
        return {item: tuple(providers) for item, providers in await cursor.fetchall()}

    async def add_requests(self, tx: Transaction, tenant: str, requests: Sequence[Request]) -> None:
        """Log new requests."""
        rows = (
            (
                *(tenant, one.id, one.batch, one.customer, one.item, list(one.providers), one.payload),
                *(one.submitted_at, one.answer_by, one.state.value, one.responses),
            )
            for one in requests
        )
        await copy_rows(tx, "request", _REQUEST_COLUMNS, rows, types=_REQUEST_TYPES)

    async def lock_requests(self, tx: Transaction, tenant: str, ids: Sequence[UUID]) -> dict[UUID, Request]:
        """The requests as they stand, locked until the transaction ends; unknown ids are left out."""
        cursor = await tx.raw.execute(
            f"SELECT {_SELECTED} FROM request r WHERE tenant = %s AND id = ANY(%s) ORDER BY id FOR NO KEY UPDATE",  # noqa: S608
            (tenant, list(ids)),
        )
        return {row[0]: _request(row) for row in await cursor.fetchall()}

    async def add_responses(self, tx: Transaction, tenant: str, responses: Sequence[Response]) -> None:
        """Log responses to requests that are locked, and mark these as answered."""
        counts: dict[UUID, int] = {}
        for one in responses:
            counts[one.request_id] = counts.get(one.request_id, 0) + 1
        rows = ((tenant, one.id, one.request_id, one.provider, one.payload, one.received_at) for one in responses)
        await copy_rows(tx, "response", _RESPONSE_COLUMNS, rows, types=_RESPONSE_TYPES)
        await tx.raw.execute(
            _COUNT_RESPONSES,
            {
                "tenant": tenant,
                "ids": list(counts),
                "counts": list(counts.values()),
                "answered": State.ANSWERED.value,
            },
        )

    async def close_due(
        self, tx: Transaction, due: Sequence[tuple[str, UUID]], now: datetime, *, answers_bytes: int
    ) -> list[Closing]:
        """Close the requests, (tenant, id) each, that are not over yet; returns those with their latest answers.

        The payloads of one request's answers add up to `answers_bytes` at most; the others are None.
        """
        keys = {"tenants": [tenant for tenant, _ in due], "ids": [request_id for _, request_id in due]}
        cursor = await tx.raw.execute(_LOCK_DUE, keys | {"waiting": list(_WAITING)})
        requests = {(row[0], row[1]): _request(row[1:]) for row in await cursor.fetchall()}
        if not requests:
            return []
        keys = {"tenants": [tenant for tenant, _ in requests], "ids": [request_id for _, request_id in requests]}
        cursor = await tx.raw.execute(_LATEST_ANSWERS, keys | {"room": answers_bytes})
        answers: dict[tuple[str, UUID], list[Response]] = {key: [] for key in requests}
        for tenant, *row in await cursor.fetchall():
            answers[tenant, row[0]].append(_response(row))
        closings = [Closing(tenant=key[0], request=request, answers=answers[key]) for key, request in requests.items()]
        await tx.raw.execute(_CLOSE, keys | {"states": [one.state.value for one in closings], "now": now})
        return closings

    async def withdraw(self, tx: Transaction, tenant: str, ids: Sequence[UUID], now: datetime, cause: str) -> None:
        """Mark requests that are locked as withdrawn."""
        values = {"tenant": tenant, "ids": list(ids), "now": now, "cause": cause, "withdrawn": State.WITHDRAWN.value}
        await tx.raw.execute(_WITHDRAW, values)

    async def forget(self, tx: Transaction, *, before: datetime, limit: int) -> int:
        """Delete at most `limit` requests that were over by `before`, with their responses; returns how many.

        Those only whose answer-by date had come by then. Replicas skip each other's.
        """
        await tx.raw.execute("SET LOCAL synchronous_commit = off")  # What is lost with a crash is deleted again.
        return (await tx.raw.execute(_FORGET, {"before": before, "limit": limit})).rowcount

    async def find(self, tx: Transaction, tenant: str, any_id: UUID) -> Request | None:
        """The request with this id, or the one that the response with this id answers."""
        cursor = await tx.raw.execute(
            f"SELECT {_SELECTED} FROM request r WHERE tenant = %(tenant)s AND id IN"  # noqa: S608
            " (SELECT %(id)s UNION ALL SELECT request_id FROM response WHERE tenant = %(tenant)s AND id = %(id)s)",
            {"tenant": tenant, "id": any_id},
        )
        row = await cursor.fetchone()
        return None if row is None else _request(row)

    async def responses_to(
        self, tx: Transaction, tenant: str, request_ids: Sequence[UUID], *, payload_bytes: int = MAX_ANSWER_BYTES
    ) -> dict[UUID, list[Response]]:
        """All answers to these requests, each request's in order of arrival; payloads up to `payload_bytes` in all."""
        keys = {"tenant": tenant, "ids": list(request_ids), "room": payload_bytes}
        found: dict[UUID, list[Response]] = {request_id: [] for request_id in request_ids}
        for row in await (await tx.raw.execute(_RESPONSES, keys)).fetchall():
            found[row[0]].append(_response(row))
        return found

    async def page(
        self,
        tx: Transaction,
        tenant: str,
        *,
        batch: str,
        customer: str,
        item: str,
        states: Sequence[int],
        before: UUID | None,
        limit: int,
    ) -> tuple[list[Request], bool]:
        """Requests, newest first, `limit` at most and not more than fit into an answer; and whether there are more."""
        filters = [tables.request.c.tenant == tenant]
        filters += [
            column == value
            for column, value in (
                (tables.request.c.batch, batch),
                (tables.request.c.customer, customer),
                (tables.request.c.item, item),
            )
            if value
        ]
        if states:
            filters.append(tables.request.c.state.in_(list(states)))
            if _WAITING.issuperset(states):
                filters.append(tables.request.c.closed_at.is_(None))  # Says the same, and has an index.
        if before is not None:
            filters.append(tables.request.c.id < before)
        sizes = (await tx.conn.execute(_sizes(and_(*filters), limit + 1))).all()
        ids = _fitting([(row.id, row.bytes) for row in sizes[:limit]])
        rows = await (
            await tx.raw.execute(
                f"SELECT {_SELECTED} FROM request r WHERE tenant = %s AND id = ANY(%s) ORDER BY id DESC",  # noqa: S608
                (tenant, ids),
            )
        ).fetchall()
        return [_request(row) for row in rows], len(sizes) > len(ids)


def _sizes(condition: Any, limit: int) -> Select[Any]:
    """Ids and, at most, how large each request is in an answer, its responses without payloads included."""
    columns = tables.request.c
    names = func.octet_length(func.array_to_string(columns.providers, ""))
    size = func.octet_length(columns.payload) + names + 1_200 * columns.responses + 4_000
    return select(columns.id, size.label("bytes")).where(condition).order_by(columns.id.desc()).limit(limit)


def _fitting(sizes: Sequence[tuple[UUID, int]]) -> list[UUID]:
    ids: list[UUID] = []
    total = 0
    for request_id, size in sizes:
        total += size
        if ids and total > MAX_ANSWER_BYTES:
            break
        ids.append(request_id)
    return ids


def _request(row: Sequence[Any]) -> Request:
    request_id, batch, customer, item, providers, payload, submitted_at, answer_by, *outcome = row
    state, responses, closed_at, cause = outcome
    return Request(
        id=request_id,
        batch=batch,
        customer=customer,
        item=item,
        providers=tuple(providers),
        payload=payload,
        submitted_at=submitted_at,
        answer_by=answer_by,
        state=State(state),
        responses=responses,
        closed_at=closed_at,
        cause=cause,
    )


def _response(row: Sequence[Any]) -> Response:
    request_id, response_id, provider, payload, received_at = row
    return Response(id=response_id, request_id=request_id, provider=provider, payload=payload, received_at=received_at)
