"""Idempotency keys and the sequence of commands, in Postgres.

A key's row is written first in the transaction of its command, under an advisory lock of the key. A second call with
the same key waits for that lock until the first has ended: then it finds the first one's answer, or takes its place
when that was rolled back. So ten calls at once make one command.

A group of calls waits for no key: one whose lock is taken goes alone. At the primary key, where locks cannot be tried,
a process that stopped within its transaction would hold up every group in which one of its calls is repeated.
"""

from collections.abc import Sequence
from datetime import timedelta

from libs.errors import AlreadyExists, Unavailable
from libs.postgres import Database, Transaction
from services.intake.commands import Command

_LOCK = "hashtextextended(concat_ws(' ', 'carillon key', %(tenant)s::text, %(key)s::text), 0)"

_CLAIM = f"""
    INSERT INTO idempotency (tenant, key, method, fingerprint)
    SELECT %(tenant)s, %(key)s, %(method)s, %(fingerprint)s FROM pg_advisory_xact_lock({_LOCK})
    ON CONFLICT DO NOTHING"""  # noqa: S608 - put together from constants.

_CLAIM_ALL = """
    INSERT INTO idempotency (tenant, key, method, fingerprint, response)
    SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::bytea[], %s::bytea[]) AS new (tenant, key)
    WHERE pg_try_advisory_xact_lock(hashtextextended(concat_ws(' ', 'carillon key', new.tenant, new.key), 0))
    ORDER BY 1, 2 ON CONFLICT DO NOTHING RETURNING tenant, key"""

# Whoever repeats the call meanwhile waits for the better answer, at the lock. A lock that is taken changes nothing.
_IMPROVE = f"SELECT set_config('synchronous_commit', 'off', true), pg_try_advisory_xact_lock({_LOCK})"

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
        claim = {"method": command.method, "fingerprint": command.fingerprint}
        cursor = await tx.raw.execute(_CLAIM, {"tenant": command.tenant, "key": command.key} | claim)
        return None if cursor.rowcount else await self._kept_answer(tx, command)

    async def claim_all(self, tx: Transaction, commands: Sequence[tuple[Command, bytes]]) -> list[int | None]:
        """Take a sequence for each command, ascending, and its key with its answer; None for one whose key is taken.

        Taken, or about to be by a call under way: waits for none, but for processes of an earlier release; so in order
        of the keys.
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
            await tx.raw.execute(_IMPROVE, {"tenant": command.tenant, "key": command.key})
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
