"""Idempotency keys and the sequence of commands, in Postgres.

A key's row is written first in the transaction of its command. A second call with the same key waits at the primary key
until the first has ended: then it finds the first one's answer, or takes its place when that was rolled back. So ten
calls at once make one command.
"""

from collections.abc import Sequence
from datetime import timedelta

from libs.errors import AlreadyExists, Unavailable
from libs.postgres import Database, Transaction
from services.intake.commands import Command

_CLAIM = "INSERT INTO idempotency (tenant, key, method, fingerprint) VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING"

_CLAIM_ALL = """
    INSERT INTO idempotency (tenant, key, method, fingerprint, response)
    SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::bytea[], %s::bytea[]) ORDER BY 1, 2
    ON CONFLICT DO NOTHING RETURNING tenant, key"""

_PRUNE = """
    DELETE FROM idempotency WHERE (tenant, key) IN (
        SELECT tenant, key FROM idempotency WHERE created_at < clock_timestamp() - %(retention)s
        ORDER BY created_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED)"""


class CommandStore:
    """Stateless; every method runs in the transaction it is given, except those that say otherwise."""

    async def claim(self, tx: Transaction, command: Command) -> bytes | None:
        """Take the command's idempotency key, if it has one; the answer of the call it repeats, if it repeats one.

        Raises AlreadyExists when the key had other content.
        """
        if not command.key:
            return None
        cursor = await tx.raw.execute(_CLAIM, (command.tenant, command.key, command.method, command.fingerprint))
        return None if cursor.rowcount else await self._kept_answer(tx, command)

    async def claim_all(self, tx: Transaction, commands: Sequence[tuple[Command, bytes]]) -> list[int | None]:
        """Take a sequence for each command, ascending, and its key with its answer; None for one whose key is taken.

        In order of the keys, so that two groups with the same ones do not deadlock.
        """
        cursor = await tx.raw.execute("SELECT nextval('command_seq') FROM generate_series(1, %s)", (len(commands),))
        sequences: list[int | None] = [row[0] for row in await cursor.fetchall()]
        keyed = {(one.tenant, one.key): (one, answer) for one, answer in reversed(commands) if one.key}
        if not keyed:
            return sequences
        rows = [(*key, one.method, one.fingerprint, answer) for key, (one, answer) in sorted(keyed.items())]
        cursor = await tx.raw.execute(_CLAIM_ALL, [list(column) for column in zip(*rows, strict=True)])
        claimed = {(tenant, key): keyed[tenant, key][0] for tenant, key in await cursor.fetchall()}
        return [
            number if not one.key or claimed.get((one.tenant, one.key)) is one else None
            for number, (one, _) in zip(sequences, commands, strict=True)
        ]

    async def _kept_answer(self, tx: Transaction, command: Command) -> bytes:
        row = await (
            await tx.raw.execute(
                "SELECT method, fingerprint, response FROM idempotency WHERE tenant = %s AND key = %s",
                (command.tenant, command.key),
            )
        ).fetchone()
        if row is None:  # Forgotten between the two statements.
            raise Unavailable("The idempotency key was just forgotten; try again.", reason="KEY_FORGOTTEN")
        method, fingerprint, response = row
        if (method, fingerprint) != (command.method, command.fingerprint):
            raise AlreadyExists(
                f"The idempotency key {command.key!r} was used before, by {method}, with other content.",
                reason="IDEMPOTENCY_KEY_REUSED",
                metadata={"method": method},
            )
        return bytes(response)

    async def next_sequence(self, tx: Transaction) -> int:
        """The next command's sequence."""
        row = await (await tx.raw.execute("SELECT nextval('command_seq')")).fetchone()
        assert row is not None
        return int(row[0])

    async def keep_answer(self, tx: Transaction, command: Command, answer: bytes) -> None:
        """Keep the answer under the command's key, in place of the one before."""
        await tx.raw.execute(
            "UPDATE idempotency SET response = %s WHERE tenant = %s AND key = %s", (answer, command.tenant, command.key)
        )

    async def improve_answer(self, db: Database, command: Command, answer: bytes) -> None:
        """Keep a better answer, in a transaction that does not wait for the disk: losing it loses nothing."""
        async with db.transaction() as tx:
            await tx.raw.execute("SET LOCAL synchronous_commit = off")
            await self.keep_answer(tx, command, answer)

    async def frames_by_tenant(self, tx: Transaction, header: str) -> dict[str, int]:
        """Frames without a receipt, by the tenant that `header` in them names; those that name none are left out."""
        cursor = await tx.raw.execute(
            "SELECT headers ->> %(header)s, count(*) FROM outbox WHERE headers ? %(header)s GROUP BY 1",
            {"header": header},
        )
        return dict(await cursor.fetchall())

    async def prune(self, tx: Transaction, retention: timedelta, *, limit: int) -> int:
        """Forget at most `limit` keys older than `retention`; returns how many."""
        cursor = await tx.raw.execute(_PRUNE, {"retention": retention, "limit": limit})
        return cursor.rowcount
