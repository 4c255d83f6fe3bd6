"""Suppressions, and the keys of calls that may be repeated. SQL only; every function runs in the caller's tx."""

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from libs.errors import AlreadyExists
from libs.postgres import Transaction
from services.dispatcher.records import Suppression

_PUT = """
    INSERT INTO suppression (tenant, channel, address, reason, created_at)
    VALUES (%(tenant)s, %(channel)s, CASE WHEN %(channel)s = 'email' THEN lower(%(address)s) ELSE %(address)s END,
        %(reason)s, %(now)s)
    ON CONFLICT (tenant, channel, address) DO UPDATE SET reason = EXCLUDED.reason
    RETURNING channel, address, reason, created_at"""

_DELETE = """
    DELETE FROM suppression WHERE tenant = %(tenant)s AND channel = %(channel)s
        AND address = CASE WHEN %(channel)s = 'email' THEN lower(%(address)s) ELSE %(address)s END"""

_LIST = """
    SELECT channel, address, reason, created_at FROM suppression
    WHERE tenant = %s AND (channel, address) > (%s, %s) ORDER BY channel, address LIMIT %s"""


class SuppressionStore:
    """Suppressions in Postgres; e-mail addresses without regard to case."""

    async def put(
        self, tx: Transaction, tenant: str, *, channel: str, address: str, reason: str, now: datetime
    ) -> Suppression:
        """Suppress an address; one that is already keeps its date and gets the new reason."""
        given = {"tenant": tenant, "channel": channel, "address": address, "reason": reason, "now": now}
        row = await (await tx.raw.execute(_PUT, given)).fetchone()
        assert row is not None
        return Suppression(channel=row[0], address=row[1], reason=row[2], created_at=row[3])

    async def delete(self, tx: Transaction, tenant: str, *, channel: str, address: str) -> None:
        """Lift a suppression, if there is one."""
        await tx.raw.execute(_DELETE, {"tenant": tenant, "channel": channel, "address": address})

    async def page(self, tx: Transaction, tenant: str, *, after: tuple[str, str], limit: int) -> list[Suppression]:
        """In order of channel and address; `after` two empty texts: from the start."""
        cursor = await tx.raw.execute(_LIST, (tenant, *after, limit))
        return [
            Suppression(channel=channel, address=address, reason=reason, created_at=created_at)
            for channel, address, reason, created_at in await cursor.fetchall()
        ]


class KeyStore:
    """Idempotency keys: a call that is repeated gets its first answer, and has no second effect."""

    async def once(
        self,
        tx: Transaction,
        tenant: str,
        *,
        method: str,
        key: str,
        fingerprint: bytes,
        work: Callable[[], Awaitable[bytes]],
    ) -> bytes:
        """The answer to this call: kept from the first time, or made now by `work` in the same transaction.

        A call that is going on with the same key is waited for. Raises AlreadyExists when the key came with other
        content before.
        """
        cursor = await tx.raw.execute(
            "INSERT INTO idempotency_key (tenant, method, key, fingerprint, response) VALUES (%s, %s, %s, %s, '')"
            " ON CONFLICT DO NOTHING RETURNING 1",
            (tenant, method, key, fingerprint),
        )
        where = (tenant, method, key)
        if await cursor.fetchone() is None:
            cursor = await tx.raw.execute(
                "SELECT fingerprint, response FROM idempotency_key WHERE tenant = %s AND method = %s AND key = %s",
                where,
            )
            row = await cursor.fetchone()
            assert row is not None
            if row[0] != fingerprint:
                raise AlreadyExists(
                    f"The idempotency key {key!r} was used before with other content.", reason="IDEMPOTENCY_KEY_REUSED"
                )
            return bytes(row[1])
        response = await work()
        await tx.raw.execute(
            "UPDATE idempotency_key SET response = %s WHERE tenant = %s AND method = %s AND key = %s",
            (response, *where),
        )
        return response

    async def forget(self, tx: Transaction, *, older_than: timedelta, limit: int) -> int:
        """Delete at most `limit` keys that are older, on the database's clock; returns how many."""
        cursor = await tx.raw.execute(
            "DELETE FROM idempotency_key WHERE (tenant, method, key) IN"
            " (SELECT tenant, method, key FROM idempotency_key WHERE stored_at < clock_timestamp() - %s"
            " ORDER BY stored_at LIMIT %s)",
            (older_than, limit),
        )
        return cursor.rowcount
