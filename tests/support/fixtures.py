"""Fixtures for tests against real Postgres and NATS. The servers start when a test first asks for them.

| fixture            | what a test gets                                                                             |
|--------------------|----------------------------------------------------------------------------------------------|
| `postgres_url`     | the address of a database of its own, empty                                                  |
| `open_database`    | `await open_database("intake")`: a Database on a schema (made if missing) of that database    |
| `nats_url`         | the address of NATS; the streams a test makes are deleted after it                           |
| `open_bus`         | `await open_bus("name")`: a connected Bus                                                    |
| `bus`              | one of these                                                                                 |
| `private_postgres` | a PostgresServer of its own, to be stopped, killed and restarted                             |
| `private_nats`     | a NatsServer of its own, to be stopped, killed, restarted and wiped                          |
"""

from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import Protocol
from urllib.parse import urlsplit

import psycopg
import pytest
from nats.aio.client import Client
from nats.js.errors import NotFoundError
from psycopg import sql
from pydantic import SecretStr

from libs.ids import new_id
from libs.jetstream import Bus
from libs.postgres import Database
from libs.settings import NatsSettings, PostgresSettings
from local.servers import NatsServer, PostgresServer, create_database, drop_database
from tests.support.servers import NATS_PLACES, POSTGRES_PLACES, first_place, scratch_directory

__all__ = [
    "OpenBus",
    "OpenDatabase",
    "bus",
    "foreign_streams",
    "nats_server_url",
    "nats_url",
    "open_bus",
    "open_database",
    "postgres_server_url",
    "postgres_url",
    "private_nats",
    "private_postgres",
]


class OpenDatabase(Protocol):
    """Type of the fixture `open_database`: `url` None is the test's own database, `overrides` are settings."""

    async def __call__(self, schema: str, url: str | None = None, **overrides: object) -> Database: ...


class OpenBus(Protocol):
    """Type of the fixture `open_bus`: `url` None is the shared server, `overrides` are settings."""

    async def __call__(self, name: str = "test", url: str | None = None, **overrides: object) -> Bus: ...


@pytest.fixture(scope="session")
def postgres_server_url() -> Iterator[str]:
    """The address of the run's Postgres server; tests want `postgres_url`."""
    with first_place(POSTGRES_PLACES) as url:
        yield url


@pytest.fixture(scope="session")
def nats_server_url() -> Iterator[str]:
    """The address of the run's NATS server; tests want `nats_url`."""
    with first_place(NATS_PLACES) as url:
        yield url


@contextmanager
def fresh_database(server_url: str) -> Iterator[str]:
    """A new database, dropped at the end."""
    url = urlsplit(server_url)._replace(path=f"/test_{new_id().hex}").geturl()
    create_database(url, strategy="file_copy")
    try:
        yield url
    finally:
        drop_database(url)


@pytest.fixture
def postgres_url(postgres_server_url: str) -> Iterator[str]:
    """A database of this test's own."""
    with fresh_database(postgres_server_url) as url:
        yield url


@pytest.fixture
async def open_database(postgres_url: str) -> AsyncIterator[OpenDatabase]:
    """Opens databases and closes them after the test."""
    async with AsyncExitStack() as opened:

        async def open_it(schema: str, url: str | None = None, **overrides: object) -> Database:
            address = url or postgres_url
            async with await psycopg.AsyncConnection.connect(address) as connection:
                await connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(schema)))
            settings = PostgresSettings(url=SecretStr(address)).model_copy(update=overrides)
            database = await Database.connect(settings, schema)
            opened.push_async_callback(database.close)
            return database

        yield open_it


@pytest.fixture(scope="session")
def foreign_streams() -> dict[str, frozenset[str]]:
    """The streams that were there before the run, by the address of their server; filled by who first looks."""
    return {}


@pytest.fixture
async def nats_url(nats_server_url: str, foreign_streams: dict[str, frozenset[str]]) -> AsyncIterator[str]:
    """The run's NATS; streams made by the test are deleted after it."""
    if nats_server_url not in foreign_streams:
        foreign_streams[nats_server_url] = await streams_of(nats_server_url)
    async with without_streams(nats_server_url, but=foreign_streams[nats_server_url]):
        yield nats_server_url


@asynccontextmanager
async def without_streams(url: str, *, but: Collection[str] = ()) -> AsyncIterator[None]:
    """No streams but these, at the beginning and at the end.

    At the beginning too: a request that was under way when a test ended may have made a stream after its end, and the
    frames in it would come to the next test, whose database knows nothing of them.
    """
    await streams_of(url, delete_except=but)
    yield
    await streams_of(url, delete_except=but)


async def streams_of(url: str, *, delete_except: Collection[str] | None = None) -> frozenset[str]:
    """The names of all streams of a server; deletes them, but those excepted, where any exception is given."""
    client = Client()
    await client.connect(url)
    try:
        jetstream = client.jetstream()
        names = frozenset(info.config.name or "" for info in await jetstream.streams_info())
        for name in names.difference(names if delete_except is None else delete_except):
            with suppress(NotFoundError):  # Somebody else was faster.
                await jetstream.delete_stream(name)
        return names
    finally:
        await client.close()


@pytest.fixture
async def open_bus(nats_url: str) -> AsyncIterator[OpenBus]:
    """Opens connections to NATS and closes them after the test."""
    async with AsyncExitStack() as opened:

        async def open_it(name: str = "test", url: str | None = None, **overrides: object) -> Bus:
            settings = NatsSettings(url=(url or nats_url,)).model_copy(update=overrides)
            bus = await Bus.connect(settings, name)
            opened.push_async_callback(bus.close)
            return bus

        yield open_it


@pytest.fixture
async def bus(open_bus: OpenBus) -> Bus:
    """A connection to the run's NATS."""
    return await open_bus()


@pytest.fixture
def private_postgres() -> Iterator[PostgresServer]:
    """A Postgres server of this test's own."""
    with scratch_directory() as directory, PostgresServer(directory) as server:
        yield server


@pytest.fixture
def private_nats() -> Iterator[NatsServer]:
    """A NATS server of this test's own."""
    with scratch_directory() as directory, NatsServer(directory) as server:
        yield server
