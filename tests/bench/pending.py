"""Millions of waiting timers without waiting for them: copies of one timer that was really scheduled, made in Postgres.

The copies differ in id, entity, shard and due time, and are what the scheduler itself would have stored. They are added
while no scheduler runs, because one that does would not look for rows it did not write. The secondary indexes are built
afterwards, 70 % full as they would have grown; then the table is vacuumed and a checkpoint made, as if the timers had
been there for long.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import psycopg
from psycopg import sql

from libs.sharding import shard_of
from local.stack import Stack
from tests.bench.link_peer import ENTITIES, TENANT, LinkPeer, entity_name

_CHUNK = 250_000
_OWN = {
    "id": "made.id",
    "schedule_id": "made.id",
    "entity": "bench_entity.name",
    "shard": "bench_entity.shard",
    "due_at": "made.due_at",
    "fire_at": "made.due_at",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """`count` timers due at random times from `first_at` on, within `spread`."""

    count: int
    first_at: datetime
    spread: timedelta = timedelta(0)


def far_ahead(count: int) -> Block:
    """Timers that are not due before next month."""
    return Block(count=count, first_at=datetime.now(UTC) + timedelta(days=30), spread=timedelta(days=300))


async def preload(
    stack: Stack, peer: LinkPeer, blocks: Iterable[Block], *, shards: int, say: Callable[[str], None]
) -> None:
    """Add timers to the table of a stack with one scheduler, which is stopped meanwhile and runs again afterwards."""
    await peer.send(peer.frames(1, lambda _: datetime.now(UTC) + timedelta(days=30)), timeout=timedelta(seconds=30))
    await asyncio.to_thread(stack.terminate, "scheduler")
    options = "-c search_path=scheduler"
    async with await psycopg.AsyncConnection.connect(
        stack.postgres_url, autocommit=True, options=options
    ) as connection:
        await _make_entities(connection, shards)
        statement = await _insert_statement(connection)
        indexes = await _drop_indexes(connection)
        for block in blocks:
            say(f"adding {block.count:,} waiting timers")
            for done in range(0, block.count, _CHUNK):
                rows = min(_CHUNK, block.count - done)
                await connection.execute(statement, (block.first_at, block.spread, rows))
                if done + rows < block.count and (done + rows) % (4 * _CHUNK) == 0:
                    say(f"{done + rows:,} of {block.count:,} are there")
        say("building the indexes")
        await connection.execute("SET maintenance_work_mem = '256MB'")
        for index in indexes:  # As Postgres itself told them.
            await connection.execute(index)
        await connection.execute("DROP TABLE bench_entity")
        await connection.execute("VACUUM (ANALYZE) timer")
        await connection.execute("CHECKPOINT")
    await asyncio.to_thread(stack.restart, "scheduler")


async def _make_entities(connection: psycopg.AsyncConnection[tuple[object, ...]], shards: int) -> None:
    await connection.execute("CREATE UNLOGGED TABLE bench_entity (number int PRIMARY KEY, name text, shard int)")
    async with connection.cursor() as cursor, cursor.copy("COPY bench_entity FROM STDIN") as copy:
        for number in range(ENTITIES):
            name = entity_name(number)
            await copy.write_row((number, name, shard_of(TENANT, name, shards)))


async def _insert_statement(connection: psycopg.AsyncConnection[tuple[object, ...]]) -> sql.Composed:
    cursor = await connection.execute(
        "SELECT column_name FROM information_schema.columns"
        " WHERE table_schema = 'scheduler' AND table_name = 'timer' AND is_generated = 'NEVER'"
    )
    columns = [str(row[0]) for row in await cursor.fetchall()]
    values = [sql.SQL(_OWN[one]) if one in _OWN else sql.SQL("model.{}").format(sql.Identifier(one)) for one in columns]
    return sql.SQL(
        "WITH model AS (SELECT * FROM timer LIMIT 1), made AS MATERIALIZED ("
        " SELECT uuidv7() AS id, %s + random() * %s AS due_at, (random() * {last})::int AS entity"
        " FROM generate_series(1, %s)"
        ") INSERT INTO timer ({columns}) SELECT {values}"
        " FROM made JOIN bench_entity ON bench_entity.number = made.entity, model"
    ).format(
        last=sql.Literal(ENTITIES - 1),
        columns=sql.SQL(", ").join(map(sql.Identifier, columns)),
        values=sql.SQL(", ").join(values),
    )


async def _drop_indexes(connection: psycopg.AsyncConnection[tuple[object, ...]]) -> list[sql.SQL]:
    """Drop all but the primary key; returns the statements that make them again."""
    cursor = await connection.execute(
        "SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index"
        " WHERE indrelid = 'timer'::regclass AND NOT indisprimary"
    )
    statements = []
    for name, definition in await cursor.fetchall():
        await connection.execute(sql.SQL("DROP INDEX {}").format(sql.Identifier(str(name))))
        columns, where, condition = str(definition).partition(" WHERE ")
        with_fillfactor = columns if " WITH (" in columns else f"{columns} WITH (fillfactor = 70)"
        statements.append(sql.SQL(f"{with_fillfactor}{where}{condition}"))
    return statements
