"""As much of Postgres as the scheduler relies on: transactions, row locks, unique keys, a clock, and going away.

- A table is a dict of immutable rows by key; a transaction's writes are an overlay that its commit applies at once.
  Every statement sees what is committed at its time, and its own writes (READ COMMITTED).
- A written row is locked until the transaction ends. Who wants it waits in line, at most `LOCK_TIMEOUT_S`, or skips it.
- A statement is a generator that yields the rows it must lock, so that it may stop there and go on when it has them.
- A session that does nothing for its idle timeout within a transaction is ended, its locks with it.
- When the server goes away, open transactions are undone, and nobody hears what became of a commit under way.

Every commit is handed to `on_commit`, with who made it: the history that `checker` judges.
"""

from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from random import Random
from typing import Any

from libs.errors import Unavailable
from tests.simulation.loop import VirtualLoop
from tests.simulation.network import Answer, Line

LOCK_TIMEOUT_S = 5.0
IDLE_TIMEOUT = timedelta(seconds=10)

Key = tuple[str, Any]
"""(table, primary key)"""

Statement = Callable[["Session"], Generator[Key, None, Any]]


class UniqueViolation(Exception):
    """A second row with the same key: nothing that passes."""


@dataclass(frozen=True, slots=True)
class Commit:
    """What one transaction made true. `rows`: each row it changed, before (None: there was none) and after."""

    number: int
    at_s: float
    author: str
    rows: dict[Key, tuple[Any, Any]]


@dataclass(eq=False, slots=True)
class Session:
    """A transaction, as the server sees it."""

    server: "Postgres"
    line: Line
    idle_timeout: timedelta = IDLE_TIMEOUT
    writes: dict[Key, Any] = field(default_factory=dict)
    locked: list[Key] = field(default_factory=list)
    is_open: bool = True
    is_failed: bool = False
    idle_since_s: float = 0.0
    is_idle: bool = True
    watched_for: timedelta | None = None

    @property
    def now(self) -> datetime:
        """clock_timestamp()"""
        return self.server.now()

    def get(self, table: str, key: Any) -> Any:
        """A row, or None."""
        own = self.writes.get((table, key), _ABSENT)
        return self.server.rows(table).get(key) if own is _ABSENT else own

    def scan(self, table: str) -> Iterator[tuple[Any, Any]]:
        """All rows of a table, with their keys."""
        own = {key: row for (of, key), row in self.writes.items() if of == table}
        for key, row in self.server.rows(table).items():
            if key not in own:
                yield key, row
        yield from ((key, row) for key, row in own.items() if row is not None)

    def put(self, table: str, key: Any, row: Any) -> Generator[Key, None, None]:
        """Insert or update a row, None: delete it. Locks it."""
        yield (table, key)
        self.writes[table, key] = row

    def insert(self, table: str, key: Any, row: Any) -> Generator[Key, None, bool]:
        """Insert a row; whether there was none. Waits for whoever is inserting the same key."""
        had_lock = (table, key) in self.locked
        yield (table, key)
        if self.get(table, key) is not None:
            if not had_lock:
                self.server.release(self, (table, key))
            return False
        self.writes[table, key] = row
        return True

    def try_lock(self, table: str, key: Any) -> bool:
        """FOR UPDATE SKIP LOCKED, of one row."""
        return self.server.lock(self, (table, key))


_ABSENT: Any = object()


class Postgres:
    """The server."""

    def __init__(self, loop: VirtualLoop, rng: Random, begin_at: datetime) -> None:
        self.on_commit: Callable[[Commit], None] = lambda _: None
        self.is_up = True
        self._loop = loop
        self._rng = rng
        self._begin_at = begin_at
        self._tables: dict[str, dict[Any, Any]] = {}
        self._locks: dict[Key, Session] = {}
        self._queues: dict[Key, deque[tuple[Session, Generator[Key, None, Any], Answer]]] = {}
        self._sessions: dict[int, Session] = {}
        self._commits = 0

    def now(self) -> datetime:
        """The server's clock."""
        return self._begin_at + timedelta(seconds=self._loop.time())

    def rows(self, table: str) -> dict[Any, Any]:
        """What is committed."""
        return self._tables.setdefault(table, {})

    # Sessions

    def run(self, session: Session, statement: Statement, answer: Answer) -> None:
        """Execute a statement; a session's first one opens it."""
        if not self._is_usable(session, answer):
            return
        if id(session) not in self._sessions:
            self._sessions[id(session)] = session
        session.is_idle = False
        self._go_on(session, statement(session), answer)

    def commit(self, session: Session, answer: Answer) -> None:
        """COMMIT: durable after the disk's time, then true for everybody at once."""
        if not self._is_usable(session, answer):
            return
        session.is_idle = False
        self._loop.outside(0.0005 + 0.003 * self._rng.random(), self._commit_now, session, answer)

    def _commit_now(self, session: Session, answer: Answer) -> None:
        if not self._is_usable(session, answer):
            return
        if session.writes:
            rows = {}
            for (table, key), row in session.writes.items():
                there = self.rows(table)
                rows[table, key] = (there.get(key), row)
                if row is None:
                    there.pop(key, None)
                else:
                    there[key] = row
            self._commits += 1
            author = session.line.process.name
            self.on_commit(Commit(number=self._commits, at_s=self._loop.time(), author=author, rows=rows))
        self.end(session)
        self._answer(answer, None)

    def end(self, session: Session) -> None:
        """The transaction is over; what is not committed is undone. Ending it twice is no error."""
        session.is_open = False
        self._sessions.pop(id(session), None)
        for key in list(session.locked):
            self.release(session, key)

    def go_away(self) -> None:
        """The server stops: every session ends."""
        self.is_up = False
        for session in list(self._sessions.values()):
            self.end(session)
        for waiting in self._queues.values():
            for _, _, answer in waiting:
                answer(_gone())
        self._queues.clear()

    def end_sessions_of(self, process: object) -> None:
        """A process is gone and its sockets are closed."""
        for session in [one for one in self._sessions.values() if one.line.process is process]:
            self.end(session)

    def _is_usable(self, session: Session, answer: Answer) -> bool:
        if self.is_up and session.is_open and not session.is_failed:
            return True
        answer(_gone())
        return False

    def _answer(self, answer: Answer, result: Any) -> None:
        """An answer that the server's end overtakes is lost with the connection."""
        answer(result if self.is_up else _gone())

    def _watch(self, session: Session) -> None:
        if not session.is_open:
            return
        left_s = session.idle_since_s + session.idle_timeout.total_seconds() - self._loop.time()
        if session.is_idle and left_s <= 0:
            self.end(session)
        else:
            self._loop.outside(max(left_s, 0.05), self._watch, session)

    # Statements and locks

    def _go_on(self, session: Session, statement: Generator[Key, None, Any], answer: Answer) -> None:
        if not self._is_usable(session, answer):
            return
        result: Any
        try:
            while self.lock(session, key := next(statement)):
                pass
        except StopIteration as done:
            result = done.value
        except Exception as err:  # noqa: BLE001 - Whatever a statement raises goes to who sent it.
            session.is_failed, result = True, err
        else:
            self._queues.setdefault(key, deque()).append((session, statement, answer))
            self._loop.outside(LOCK_TIMEOUT_S, self._give_up, session, key)
            return
        session.is_idle, session.idle_since_s = True, self._loop.time()
        if session.watched_for != session.idle_timeout:
            session.watched_for = session.idle_timeout
            self._loop.outside(session.idle_timeout.total_seconds(), self._watch, session)
        self._answer(answer, result)

    def lock(self, session: Session, key: Key) -> bool:
        """Lock a row; False when another session has it."""
        holder = self._locks.setdefault(key, session)
        if holder is session and key not in session.locked:
            session.locked.append(key)
        return holder is session

    def release(self, session: Session, key: Key) -> None:
        """Unlock a row; the next in line goes on."""
        session.locked.remove(key)
        del self._locks[key]
        queue = self._queues.get(key)
        while queue:
            waiting, statement, answer = queue.popleft()
            if waiting.is_open:
                self.lock(waiting, key)
                self._loop.outside(0, self._go_on, waiting, statement, answer)
                return
            answer(_gone())

    def _give_up(self, session: Session, key: Key) -> None:
        queue = self._queues.get(key, deque())
        for one in [one for one in queue if one[0] is session]:
            queue.remove(one)
            session.is_failed = session.is_idle = True
            session.idle_since_s = self._loop.time()
            one[2](Unavailable("canceling statement due to lock timeout", reason="POSTGRES_UNAVAILABLE"))


def _gone() -> Unavailable:
    return Unavailable("The connection to Postgres is lost.", reason="POSTGRES_UNAVAILABLE")


class Tx:
    """A transaction, as its process sees it: stands for libs.postgres.Transaction. `schema` is where its links are."""

    def __init__(self, server: Postgres, line: Line, schema: str) -> None:
        self.schema = schema
        self.session = Session(server=server, line=line)
        self._server = server
        self._line = line
        self._last = ""

    def another(self) -> "Tx":
        """A second transaction of the same process."""
        return Tx(self._server, self._line, self.schema)

    async def run(self, statement: Statement) -> Any:
        """Execute a statement and return what it gives."""
        self._last = what = statement.__qualname__.split(".<locals>")[0].split(".")[-1]
        return await self._line.ask(
            lambda answer: self._server.run(self.session, statement, answer), self._end, what=what
        )

    async def commit(self) -> None:
        """Raises Unavailable also when it did commit and nobody could say so."""
        what = f"commit after {self._last}"
        await self._line.ask(lambda answer: self._server.commit(self.session, answer), self._end, what=what)

    def give_up(self) -> None:
        """Undo it; nobody waits for that."""
        self._line.tell(self._end)

    def _end(self) -> None:
        self._server.end(self.session)


class Database:
    """One process's access to one schema; stands for libs.postgres.Database."""

    def __init__(self, server: Postgres, line: Line, schema: str) -> None:
        self._server = server
        self._line = line
        self._schema = schema

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Any, None]:
        """See libs.postgres.Database."""
        tx = Tx(self._server, self._line, self._schema)
        try:
            yield tx
            await tx.commit()
        except BaseException:
            tx.give_up()
            raise

    @asynccontextmanager
    async def read(self) -> AsyncGenerator[Any, None]:
        """See libs.postgres.Database."""
        tx = Tx(self._server, self._line, self._schema)
        try:
            yield tx
        finally:
            tx.give_up()
