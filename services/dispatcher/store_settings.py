"""The keys of calls that may be repeated. SQL only; every function runs in the caller's tx."""

from collections.abc import Awaitable, Callable
from datetime import timedelta

from libs.errors import AlreadyExists
from libs.postgres import Transaction


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
