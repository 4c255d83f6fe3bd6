"""Very many open windows without waiting for them: copies of one that was really opened, made in Postgres.

Each copy has a subscriber and a subscription of its own, and one notification that waits. They are what digest itself
would have stored. Secondary indexes are built with the rows; then the tables are vacuumed and a checkpoint made.
"""

from collections.abc import Mapping

import psycopg
from psycopg import sql

from local.stack import Stack
from tests.bench.digest_peer import name

_CHUNK = 100_000
_NAME = "'customer-' || made.number"
_OWN: Mapping[str, Mapping[str, str]] = {
    "subscriber": {"id": _NAME, "email": f"{_NAME} || '@example.com'"},
    "subscription": {"id": f"'of-' || {_NAME}", "subscriber": _NAME},
    "choice": {"subscription": f"'of-' || {_NAME}", "subscriber": _NAME},
    "digest_window": {"id": "made.window_id", "subscriber": _NAME},
    "notification": {"id": "made.notification_id", "subscribers": f"ARRAY[{_NAME}]"},
    "item": {"notification_id": "made.notification_id", "subscriber": _NAME, "window_id": "made.window_id"},
}
"""What differs in the copies; everything else is as in the model's row."""


async def preload(stack: Stack, windows: int) -> None:
    """Have so many windows open where the first subscriber's is the only one. Nothing may be under way."""
    options = "-c search_path=digest"
    async with await psycopg.AsyncConnection.connect(
        stack.postgres_url, autocommit=True, options=options
    ) as connection:
        for table in _OWN:
            name_of_model = sql.Identifier(f"bench_{table}")
            await connection.execute(
                sql.SQL("CREATE TEMPORARY TABLE {} AS SELECT * FROM {}").format(name_of_model, sql.Identifier(table))
            )
            cursor = await connection.execute(sql.SQL("SELECT count(*) FROM {}").format(name_of_model))
            if await cursor.fetchone() != (1,):
                raise RuntimeError(f"{table} is to hold the row of {name(0)} and no other")
        await connection.execute("CREATE TEMPORARY TABLE made (number int, window_id uuid, notification_id uuid)")
        statements = [await _statement(connection, table) for table in _OWN]
        for first in range(1, windows, _CHUNK):
            await connection.execute("TRUNCATE made")
            await connection.execute(
                "INSERT INTO made SELECT n, uuidv7(), uuidv7() FROM generate_series(%s::int, %s::int) AS n",
                (first, min(first + _CHUNK, windows) - 1),
            )
            for statement in statements:
                await connection.execute(statement)
        for table in _OWN:
            await connection.execute(
                sql.SQL("ALTER TABLE {} SET (autovacuum_enabled = false)").format(sql.Identifier(table))
            )
            await connection.execute(sql.SQL("VACUUM (ANALYZE) {}").format(sql.Identifier(table)))
        await connection.execute("CHECKPOINT")


async def _statement(connection: psycopg.AsyncConnection[tuple[object, ...]], table: str) -> sql.Composed:
    cursor = await connection.execute(
        "SELECT column_name FROM information_schema.columns"
        " WHERE table_schema = 'digest' AND table_name = %s AND is_generated = 'NEVER'",
        (table,),
    )
    columns = [str(row[0]) for row in await cursor.fetchall()]
    own = _OWN[table]
    values = [sql.SQL(own[one]) if one in own else sql.SQL("model.{}").format(sql.Identifier(one)) for one in columns]
    return sql.SQL("INSERT INTO {} ({}) SELECT {} FROM {} AS model, made ORDER BY made.number").format(
        sql.Identifier(table),
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.SQL(", ").join(values),
        sql.Identifier(f"bench_{table}"),
    )
