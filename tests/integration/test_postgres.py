"""libs.postgres against a real Postgres."""

import asyncio
import os
import signal
from datetime import UTC, datetime, timedelta
from uuid import UUID

import psycopg
import pytest
import uvloop
from pydantic import SecretStr
from sqlalchemy import Column, Integer, MetaData, Table, Text, insert, select, text
from sqlalchemy.exc import IntegrityError

from libs.errors import Unavailable
from libs.links.sequence import RAISE_SEQUENCE
from libs.postgres import Database, copy_rows, is_transient
from libs.settings import PostgresSettings
from local.servers import PostgresServer
from tests.support.fixtures import OpenDatabase

bells = Table("bell", MetaData(), Column("id", Integer, primary_key=True), Column("tone", Text, nullable=False))


@pytest.fixture
async def db(open_database: OpenDatabase) -> Database:
    """A database with one table."""
    database = await open_database("intake")
    async with database.transaction() as tx:
        await tx.raw.execute("CREATE TABLE bell (id int PRIMARY KEY, tone text NOT NULL)")
    return database


async def _tones(db: Database) -> list[str]:
    async with db.read() as tx:
        return list(await tx.conn.scalars(select(bells.c.tone).order_by(bells.c.id)))


async def test_both_views_of_a_transaction_are_one_transaction(db: Database) -> None:
    """What SQLAlchemy and psycopg write in one block is committed together."""
    async with db.transaction() as tx:
        await tx.conn.execute(insert(bells).values(id=1, tone="c"))
        await tx.raw.execute("INSERT INTO bell VALUES (2, 'd')")
    assert await _tones(db) == ["c", "d"]


async def test_a_block_that_raises_leaves_nothing(db: Database) -> None:
    """Rollback covers what both views wrote."""

    async def write_twice() -> None:
        async with db.transaction() as tx:
            await tx.raw.execute("INSERT INTO bell VALUES (1, 'c')")
            await tx.conn.execute(insert(bells).values(id=1, tone="d"))

    with pytest.raises(IntegrityError):
        await write_twice()
    assert await _tones(db) == []


async def test_a_read_cannot_write(db: Database) -> None:
    """Postgres itself refuses it."""
    with pytest.raises(Unavailable, match="read-only"):
        async with db.read() as tx:
            await tx.conn.execute(insert(bells).values(id=1, tone="c"))
    async with db.transaction() as tx:
        await tx.conn.execute(insert(bells).values(id=1, tone="c"))


async def test_every_session_has_schema_zone_limits_and_name(open_database: OpenDatabase) -> None:
    """The settings of a session come from ours, not from the server's."""
    db = await open_database("digest", statement_timeout=timedelta(seconds=7), lock_timeout=timedelta(milliseconds=250))
    names = ["search_path", "timezone", "statement_timeout", "lock_timeout", "application_name"]
    async with db.read() as tx:
        found = [(await tx.conn.scalar(text(f"SHOW {name}"))) for name in names]
    assert found == ["digest", "UTC", "7s", "250ms", "carillon-digest"]


@pytest.mark.parametrize("types", [None, ["uuid", "int8", "text", "timestamptz", "bytea"]], ids=["text", "binary"])
async def test_copy_stores_what_it_was_given(open_database: OpenDatabase, types: list[str] | None) -> None:
    """Every type we use, NULLs and awkward characters, in both formats."""
    db = await open_database("scheduler")
    rows = [
        (UUID(int=1), 2**40, "tab\there \\ new\nline", datetime(2013, 7, 1, 8, tzinfo=UTC), b"\x00\xff"),
        (UUID(int=2), None, None, None, None),
    ]
    async with db.transaction() as tx:
        await tx.raw.execute("CREATE TABLE t (id uuid, n int8, s text, at timestamptz, b bytea)")
        assert await copy_rows(tx, "t", ["id", "n", "s", "at", "b"], rows, types) == 2
        cursor = await tx.raw.execute("SELECT * FROM t ORDER BY id")
        assert await cursor.fetchall() == rows


async def test_copy_of_nothing_is_nothing(db: Database) -> None:
    """An empty run of rows is allowed."""
    async with db.transaction() as tx:
        assert await copy_rows(tx, bells, ["id", "tone"], []) == 0


async def test_work_goes_on_right_after_a_restart(
    open_database: OpenDatabase, private_postgres: PostgresServer
) -> None:
    """Pooled connections of a server that stopped or crashed are replaced before anybody uses them."""
    db = await open_database("intake", private_postgres.url)
    private_postgres.restart()
    assert await db.is_alive()
    private_postgres.kill()
    private_postgres.start()
    async with db.transaction() as tx:
        await tx.raw.execute("SELECT 1")


async def test_a_crash_within_a_transaction_is_a_passing_error(
    open_database: OpenDatabase, private_postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller gets Unavailable and may repeat the whole transaction."""
    monkeypatch.setattr("libs.postgres._FRESH_S", 0.0)
    db = await open_database("intake", private_postgres.url)

    async def crash_within() -> None:
        async with db.transaction() as tx:
            await tx.raw.execute("CREATE TABLE lost (id int)")
            private_postgres.kill()
            await tx.raw.execute("SELECT 1")

    with pytest.raises(Unavailable) as caught:
        await crash_within()
    assert is_transient(caught.value)
    assert not await db.is_alive()
    private_postgres.start()
    async with db.read() as tx:
        assert await tx.conn.scalar(text("SELECT to_regclass('lost')")) is None


async def test_a_committed_transaction_survives_a_crash(
    open_database: OpenDatabase, private_postgres: PostgresServer
) -> None:
    """INV-1: what was committed is there after SIGKILL."""
    db = await open_database("intake", private_postgres.url)
    async with db.transaction() as tx:
        await tx.raw.execute("CREATE TABLE kept AS SELECT 1 AS id")
    private_postgres.kill()
    private_postgres.start()
    async with db.read() as tx:
        assert await tx.conn.scalar(text("SELECT count(*) FROM kept")) == 1


async def test_an_unreachable_server_is_a_passing_error() -> None:
    """Connecting to nobody raises Unavailable."""
    with pytest.raises(Unavailable, match="refused"):
        await Database.connect(PostgresSettings(url=SecretStr("postgresql://postgres@127.0.0.1:1/x")), "intake")


async def test_a_full_pool_is_a_passing_error(open_database: OpenDatabase) -> None:
    """INV-9: whoever gets no connection in time is told to come back."""
    db = await open_database("intake", pool_size=1, pool_timeout=timedelta(milliseconds=50))
    async with db.transaction():
        with pytest.raises(Unavailable):
            async with db.transaction():
                pass


async def test_a_full_pool_is_not_taken_for_a_dead_server(
    open_database: OpenDatabase, private_postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that all wait for meets every replica at once; a server that is away shows all the same."""
    monkeypatch.setattr("libs.postgres._FRESH_S", 0.0)
    db = await open_database("intake", private_postgres.url, pool_size=1)

    async def look_while_full() -> None:
        async with db.transaction() as tx:
            assert await db.is_alive()
            private_postgres.kill()
            assert not await db.is_alive()
            await tx.raw.execute("SELECT 1")

    with pytest.raises(Unavailable):
        await look_while_full()


async def test_what_commits_is_alive_however_long_a_question_takes(
    open_database: OpenDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under load a place in the pool, or a new connection, may take longer than readiness waits."""
    db = await open_database("intake", pool_size=1)
    monkeypatch.setattr("libs.postgres._FRESH_S", 1_000.0)
    async with db.transaction() as tx:
        await tx.raw.execute("SELECT 1")
        assert await db.is_alive(timedelta(0))
    monkeypatch.setattr("libs.postgres._FRESH_S", 0.0)
    assert not await db.is_alive(timedelta(0))


async def test_a_server_that_takes_no_writes_is_a_passing_error(
    open_database: OpenDatabase, private_postgres: PostgresServer
) -> None:
    """A standby before its promotion, a disk that is nearly full: for old connections and for those made now."""
    settings = PostgresSettings(url=SecretStr(private_postgres.url))
    old = await open_database("intake", private_postgres.url)
    async with old.transaction() as tx:
        await tx.raw.execute("CREATE SEQUENCE command_seq")
    new = await Database.connect(settings, "intake", on_connect=RAISE_SEQUENCE)
    await new.engine.dispose()  # Its connections; it makes others.
    with psycopg.connect(private_postgres.url, autocommit=True) as server:
        server.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        server.execute("SELECT pg_reload_conf()")

    async def write(db: Database) -> None:
        async with db.transaction() as tx:
            await tx.raw.execute("SELECT nextval('command_seq')")

    async def write_until_refused() -> None:
        async with asyncio.timeout(10):
            while True:  # Until the connection has heard of it.
                await write(old)

    with pytest.raises(Unavailable, match="read-only"):
        await write_until_refused()
    with pytest.raises(Unavailable, match="read-only"):
        await write(new)
    await new.close()


@pytest.mark.parametrize("kind", ["read", "transaction"])
async def test_a_cancelled_block_gives_its_connection_back(
    open_database: OpenDatabase, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Wherever the cancellation strikes, the pool's one connection is there for the next block, and may write."""
    monkeypatch.setattr("psycopg.waiting.MAX_BUSY_TIME", 0.0)  # As on a busy loop, where every wait gives way.
    db = await open_database("intake", pool_size=1, pool_timeout=timedelta(seconds=1))

    async def use() -> None:
        async with getattr(db, kind)() as tx:
            await tx.raw.execute("SELECT 1")

    async with db.transaction() as tx:
        await tx.raw.execute("CREATE TABLE bell (id int)")
    for turns in range(40):
        task = asyncio.create_task(use())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with db.transaction() as tx:
            await tx.raw.execute("INSERT INTO bell VALUES (%s)", (turns,))


async def test_a_deadlock_and_a_lock_timeout_are_passing_errors(db: Database) -> None:
    """The same transaction can succeed next time; a statement that took too long cannot."""
    async with db.transaction() as tx:
        await tx.raw.execute("INSERT INTO bell VALUES (1, 'c')")

    async def wait_for_lock() -> None:
        async with db.transaction() as tx:
            await tx.raw.execute("SET LOCAL lock_timeout = '20ms'")
            await tx.raw.execute("UPDATE bell SET tone = 'e'")

    async with db.transaction() as holder:
        await holder.raw.execute("UPDATE bell SET tone = 'd'")
        with pytest.raises(Unavailable, match="lock timeout"):
            await wait_for_lock()
    assert is_transient(psycopg.errors.DeadlockDetected())
    assert is_transient(psycopg.errors.SerializationFailure())
    assert is_transient(psycopg.errors.TooManyConnections())
    assert is_transient(psycopg.errors.DatabaseDropped())
    assert is_transient(psycopg.errors.IoError())
    assert not is_transient(psycopg.errors.QueryCanceled())
    assert not is_transient(psycopg.errors.UniqueViolation())
    assert not is_transient(ValueError())


def test_it_works_on_uvloop(postgres_url: str) -> None:
    """The services run on uvloop."""

    async def main() -> int:
        db = await Database.connect(PostgresSettings(url=SecretStr(postgres_url)), "public")
        try:
            async with db.transaction() as tx:
                await tx.raw.execute("CREATE TABLE n (n int4)")
                return await copy_rows(tx, "n", ["n"], [(n,) for n in range(1000)], ["int4"])
        finally:
            await db.close()

    assert uvloop.run(main()) == 1000


async def test_a_paused_server_is_not_alive(
    open_database: OpenDatabase, private_postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that accepts but does not answer is told from one that works."""
    monkeypatch.setattr("libs.postgres._FRESH_S", 0.0)
    db = await open_database("intake", private_postgres.url)
    async with db.read() as tx:
        backend = tx.raw.info.backend_pid

    os.kill(backend, signal.SIGSTOP)
    try:
        assert not await db.is_alive(timedelta(milliseconds=100))
    finally:
        os.kill(backend, signal.SIGCONT)
    async with asyncio.timeout(10):
        while not await db.is_alive():
            pass
