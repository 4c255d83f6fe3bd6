"""Postgres for one service: a pool of connections into its schema, transactions, COPY, and which errors are passing.

SQLAlchemy Core runs queries made from metadata; plain psycopg 3 on the *same* connection (`tx.raw`) runs COPY and hot
array statements. Both are in one transaction, which commits when the `async with` block ends and rolls back when it
raises.

A pooled connection whose server went away is noticed at checkout by looking at its socket, not by a ping: a server
that stopped, crashed or failed over has closed its end, so the socket is readable although nothing was asked. That
costs 0.01 ms where SQLAlchemy's `pool_pre_ping` costs 0.2 ms of a 0.6 ms transaction, and work goes on right after a
restart. A connection lost within a transaction raises Unavailable; the caller repeats the whole transaction, since only
it knows whether that is safe.

psycopg needs an event loop with `add_reader`: the selector loop and uvloop have it.
"""

import asyncio
import select
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import chain, islice
from typing import Any, Self, cast

import psycopg
from psycopg import sql
from sqlalchemy import Table, event, exc, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from libs.errors import Unavailable
from libs.postgres_pool import TRANSIENT_ERRORS, CountingPool, has_room, note_opened, show_pool
from libs.settings import PostgresSettings

RawConnection = psycopg.AsyncConnection[tuple[Any, ...]]
Errors = (exc.SQLAlchemyError, psycopg.Error, OSError)

# SQLSTATE classes and codes after which the same transaction may succeed, from appendix A of the manual.
# 25006 also comes of writing in a `read`, which is a mistake of ours: but one that the first run of a test shows.
_TRANSIENT_CLASSES = ("08", "53")  # connection exception; insufficient resources (connections, memory, disk)
_TRANSIENT_STATES = frozenset(
    {
        "25006",  # read_only_sql_transaction: a standby before its promotion, a server whose disk is nearly full
        "25P03",  # idle_in_transaction_session_timeout
        "40001",  # serialization_failure
        "40P01",  # deadlock_detected
        "55P03",  # lock_not_available, after lock_timeout
        "57P01",  # admin_shutdown
        "57P02",  # crash_shutdown
        "57P03",  # cannot_connect_now
        "57P04",  # database_dropped, as a restore does it
        "57P05",  # idle_session_timeout
        "58030",  # io_error: the storage's fault, not the transaction's
    }
)

_FRESH_S = 2.0  # So long a commit is a sign of life: less than goes by between two questions for readiness (5 s).

FEW_ROWS = 8
"""Up to here an INSERT is cheaper than a COPY."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transaction:
    """An open transaction: the same Postgres connection as SQLAlchemy sees it and as psycopg sees it."""

    conn: AsyncConnection
    raw: RawConnection


class Database:
    """A pool of connections to one schema."""

    def __init__(self, engine: AsyncEngine, session: dict[str, Any]) -> None:
        self._engine = engine
        self._session = session
        self._committed_at = float("-inf")
        self._probes: set[asyncio.Task[bool]] = set()

    @classmethod
    async def connect(cls, settings: PostgresSettings, schema: str, *, on_connect: Sequence[str] = ()) -> Self:
        """Open the pool and prove that it works. Raises Unavailable when Postgres cannot be reached.

        `on_connect` are statements that run on every new connection before anything else, in a transaction.
        """
        session = connect_args(settings, schema)
        engine = create_async_engine(
            engine_url(settings),
            connect_args=session,
            poolclass=CountingPool,
            pool_size=settings.pool_size,
            max_overflow=0,
            pool_timeout=settings.pool_timeout.total_seconds(),
            pool_use_lifo=True,  # Keeps few connections warm, and their prepared statements.
        )
        event.listen(engine.sync_engine, "checkout", _refuse_if_server_is_gone)
        if on_connect:
            event.listen(engine.sync_engine, "connect", partial(_prepare, on_connect))
        event.listen(engine.sync_engine, "connect", note_opened)
        show_pool(engine, size=settings.pool_size)
        database = cls(engine, session)
        try:
            async with database.read() as tx:
                await tx.raw.execute("SELECT 1")
        except BaseException:
            await engine.dispose()
            raise
        return database

    @property
    def engine(self) -> AsyncEngine:
        """The engine, for what needs one (Alembic's comparison, instrumentation)."""
        return self._engine

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """One READ COMMITTED transaction: commits at the end of the block, rolls back when it raises.

        Raises Unavailable for passing errors (`is_transient`), also from the commit itself: then it is unknown whether
        it committed, so what is repeated must be idempotent. Waits `pool_timeout` for a connection at most.
        """
        with _passing_errors_as_unavailable():
            async with self._engine.begin() as conn:
                yield Transaction(conn=conn, raw=await _raw(conn))
        self._committed_at = time.monotonic()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Transaction]:
        """As `transaction`, but READ ONLY: Postgres refuses any write."""
        async with self.transaction() as tx:
            # Not SQLAlchemy's `postgresql_readonly`: cancelled while it sets that, it loses the connection.
            await tx.raw.execute("SET TRANSACTION READ ONLY")
            yield tx

    async def is_alive(self, timeout: timedelta = timedelta(seconds=1)) -> bool:
        """Whether Postgres does its work; for readiness checks, never raises.

        True after any commit in the last two seconds. Where there was none, it must answer within `timeout`. That the
        pool is full, with transactions that wait for locks say, is no reason to take every replica away: then it is
        asked on a connection made for that.
        """
        if time.monotonic() - self._committed_at < _FRESH_S:
            return True
        probe = asyncio.create_task(self._probe())
        self._probes.add(probe)
        probe.add_done_callback(self._probes.discard)
        # Not `asyncio.timeout`: psycopg answers a cancellation only after it tried for 5 s to cancel the statement.
        done, _ = await asyncio.wait({probe}, timeout=timeout.total_seconds())
        if not done:
            probe.cancel()
        return bool(done) and probe.result()

    async def _probe(self) -> bool:
        try:
            if has_room(self._engine):
                async with self.read() as tx:
                    await tx.raw.execute("SELECT 1")
            else:
                address: dict[str, Any] = dict(self._engine.dialect.create_connect_args(self._engine.url)[1])
                async with await psycopg.AsyncConnection.connect(**(address | self._session)) as connection:
                    await connection.execute("SELECT 1")
        except (Unavailable, *Errors):
            return False
        return True

    async def close(self) -> None:
        """Close all connections; transactions still open lose theirs."""
        if self._probes:
            await asyncio.wait(self._probes)
        await self._engine.dispose()


async def copy_rows(
    tx: Transaction,
    table: str | Table,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    types: Sequence[str] | None = None,
) -> int:
    """COPY `rows` (values in the order of `columns`) into `table` and return how many there were.

    A handful with types goes by INSERT: one round trip, where COPY takes four.

    `types` are the columns' Postgres type names (`uuid`, `timestamptz`, `int8`, `text`…). With them the binary format
    is used: 600k rows/s of five columns, against 240k/s in text. It is strict: the types must be exactly the columns'.
    Without, Postgres converts from text by itself. `table` is in the session's schema unless it says otherwise.
    """
    path = [part for part in (table.schema, table.name) if part] if isinstance(table, Table) else [table]
    into = sql.SQL("{} ({})").format(sql.Identifier(*path), sql.SQL(", ").join(map(sql.Identifier, columns)))
    rows = iter(rows)
    few = list(islice(rows, FEW_ROWS + 1)) if types else []
    if types and len(few) <= FEW_ROWS:
        if few:
            await tx.raw.execute(_insert(into, types, len(few)), [value for row in few for value in row])
        return len(few)
    statement = sql.SQL("COPY {} FROM STDIN {}").format(into, sql.SQL("(FORMAT binary)" if types else ""))
    count = 0
    async with tx.raw.cursor() as cursor, cursor.copy(statement) as copy:
        if types:
            copy.set_types(types)
        for row in chain(few, rows):
            await copy.write_row(row)
            count += 1
    return count


def _insert(into: sql.Composed, types: Sequence[str], rows: int) -> sql.Composed:
    values = [sql.SQL("%s::{}").format(sql.SQL(one)) for one in types]
    row = sql.SQL("({})").format(sql.SQL(", ").join(values))
    return sql.SQL("INSERT INTO {} VALUES {}").format(into, sql.SQL(", ").join([row] * rows))


def is_transient(error: BaseException) -> bool:
    """Whether the same transaction may succeed when it is tried again.

    True for: connection lost or refused, no free connection, serialization failure, deadlock, lock timeout, shutdown,
    too many connections, no memory or disk, a read-only server; and for Unavailable, which `Database.transaction` makes
    of all of them.
    False for a statement timeout: what takes too long takes too long again.
    """
    if isinstance(error, exc.DBAPIError):
        return error.connection_invalidated or (error.orig is not None and is_transient(error.orig))
    if isinstance(error, psycopg.Error):
        if error.sqlstate is None:  # Not from the server: the connection failed, or psycopg was misused.
            return isinstance(error, psycopg.OperationalError)
        return error.sqlstate in _TRANSIENT_STATES or error.sqlstate.startswith(_TRANSIENT_CLASSES)
    return isinstance(error, (Unavailable, exc.TimeoutError, exc.DisconnectionError, ConnectionError))


def unavailable(error: BaseException) -> Unavailable:
    """What is raised for a passing error."""
    cause = error.orig if isinstance(error, exc.DBAPIError) else error  # Without SQLAlchemy's link to its docs.
    return Unavailable(f"Postgres cannot do this now: {cause}", reason="POSTGRES_UNAVAILABLE")


def engine_url(settings: PostgresSettings) -> str:
    """The configured address with SQLAlchemy's name of the driver, password included."""
    url = make_url(settings.url.get_secret_value()).set(drivername="postgresql+psycopg")
    return url.render_as_string(hide_password=False)


def connect_args(settings: PostgresSettings, schema: str) -> dict[str, Any]:
    """What every session has: its schema, UTC, time limits, a name in pg_stat_activity, and keepalives.

    Sent with the connection request, so that a session never exists without it and it costs no round trip.
    """
    session = {
        "search_path": schema,
        "timezone": "UTC",
        "statement_timeout": _milliseconds(settings.statement_timeout),
        "lock_timeout": _milliseconds(settings.lock_timeout),
        "idle_in_transaction_session_timeout": _milliseconds(settings.idle_in_transaction_timeout),
    }
    return {
        "options": " ".join(f"-c {name}={value}" for name, value in session.items()),
        "application_name": f"carillon-{schema}",
        "connect_timeout": max(2, round(settings.connect_timeout.total_seconds())),  # libpq takes 1 for 2.
        # A silent network partition ends within 30 s, not after the kernel's 15 minutes.
        "keepalives_idle": 15,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,
    }


async def _raw(conn: AsyncConnection) -> RawConnection:
    return cast(RawConnection, (await conn.get_raw_connection()).driver_connection)


def _prepare(statements: Sequence[str], connection: DBAPIConnection, _record: object) -> None:
    cursor = connection.cursor()
    try:
        for statement in statements:
            cursor.execute(statement)
    finally:
        cursor.close()
    connection.commit()


def _refuse_if_server_is_gone(connection: DBAPIConnection, record: ConnectionPoolEntry, _proxy: object) -> None:
    raw = record.driver_connection
    if not isinstance(raw, psycopg.AsyncConnection):
        return
    poll = select.poll()
    if not raw.closed:
        poll.register(raw.fileno(), select.POLLIN)
        if not poll.poll(0):
            return
    # The pool now replaces this connection and every other one made before this moment, then goes on.
    raise exc.InvalidatePoolError


@contextmanager
def _passing_errors_as_unavailable() -> Iterator[None]:
    try:
        yield
    except Errors as error:
        # A cancelled query can come back as a lost connection; taken for one, the cancellation would be lost.
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise asyncio.CancelledError from error
        if is_transient(error):
            TRANSIENT_ERRORS.inc()
            raise unavailable(error) from error
        raise


def _milliseconds(duration: timedelta) -> int:
    return duration // timedelta(milliseconds=1)
