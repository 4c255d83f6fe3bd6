"""The whole of Carillon on one machine: Postgres, NATS, a mailbox, migrations, and each service as real processes.

    with Stack(Path("var/local"), replicas=2) as stack:
        channel = grpc.aio.insecure_channel(stack.grpc("intake"))
        stack.kill("scheduler", 1)          # SIGKILL; also pause, resume, restart
        stack.nats.wipe()

Everything is below one directory: data, `logs/<name>.log`, mail, `addresses.json`. One stack at a time may use it. What
was started is stopped in reverse order, also when starting fails or this process dies. CARILLON_POSTGRES_URL and
CARILLON_NATS_URL in the environment are used instead of embedded servers; then nothing is started or stopped for them.

All methods block; from asyncio use `asyncio.to_thread`.
"""

import asyncio
import fcntl
import http.client
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from pydantic import SecretStr
from sqlalchemy.exc import SQLAlchemyError

from libs.errors import CarillonError
from libs.migrations import upgrade
from libs.settings import PostgresSettings
from libs.test_clock import set_test_clock
from local.processes import Process, ProcessError, accepts_connections, free_port
from local.servers import HOST, NatsServer, PostgresServer

SERVICES = ("intake", "scheduler", "digest", "dispatcher")
PROJECT = Path(__file__).resolve().parents[1]

_READY_TIMEOUT_S = 60
_STOP_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One process of a service, with ports that stay the same over restarts."""

    service: str
    number: int
    grpc_port: int
    http_port: int
    process: Process

    @property
    def grpc(self) -> str:
        """Where it answers gRPC, as host:port."""
        return f"{HOST}:{self.grpc_port}"

    @property
    def http(self) -> str:
        """Where /metrics, /livez and /readyz are."""
        return f"http://{HOST}:{self.http_port}"

    def is_ready(self) -> bool:
        """Whether /readyz says yes."""
        with suppress(OSError, http.client.HTTPException), closing(_http(self.http_port)) as connection:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        return False


class Stack:
    """Starts and stops it all; use as a context manager.

    `replicas` is the number of processes of each service, or of each by name. `env` is added to what services see.
    `test_clock` makes business time stand there until somebody lets it run (libs.test_clock). `on_progress` gets a
    short sentence at each step. `first_port` asks for ports from there on, in a fixed order, where they are free;
    otherwise any free ports are taken. `package` is where the services are, with their migrations, for tests.
    """

    def __init__(
        self,
        directory: Path,
        *,
        replicas: int | Mapping[str, int] = 1,
        test_clock: datetime | None = None,
        env: Mapping[str, str] | None = None,
        services: Sequence[str] = SERVICES,
        package: str = "services",
        first_port: int | None = None,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.directory = directory.absolute()
        self.postgres: PostgresServer | None = None
        self.nats: NatsServer | None = None
        self.replicas: dict[tuple[str, int], Replica] = {}
        self._counts = {name: replicas if isinstance(replicas, int) else replicas.get(name, 1) for name in services}
        self._test_clock = test_clock
        self._env = dict(env or {})
        self._package = package
        self._next_port = first_port
        self._on_progress = on_progress
        self._exits = ExitStack()
        self._mailbox_smtp_port = self._mailbox_http_port = 0
        self._mailbox: Process | None = None
        self._killed: set[tuple[str, int]] = set()
        self._started_at = 0.0

    # What is where

    @property
    def postgres_url(self) -> str:
        """The database all services use."""
        return self.postgres.url if self.postgres is not None else os.environ["CARILLON_POSTGRES_URL"]

    @property
    def nats_url(self) -> str:
        """The NATS all services use."""
        return self.nats.url if self.nats is not None else os.environ["CARILLON_NATS_URL"]

    @property
    def mailbox_url(self) -> str:
        """The mailbox's page; webhooks go to `/hooks/<name>` below it."""
        return f"http://{HOST}:{self._mailbox_http_port}"

    @property
    def mailbox_smtp(self) -> str:
        """Where the mailbox takes mail, as host:port."""
        return f"{HOST}:{self._mailbox_smtp_port}"

    def grpc(self, service: str, number: int = 0) -> str:
        """Where a service answers gRPC, as host:port."""
        return self.replicas[service, number].grpc

    def http(self, service: str, number: int = 0) -> str:
        """Where a service's /metrics, /livez and /readyz are."""
        return self.replicas[service, number].http

    def addresses(self) -> dict[str, object]:
        """All of these, as written to addresses.json."""
        services = {
            name: [{"grpc": self.grpc(name, n), "http": self.http(name, n)} for n in range(count)]
            for name, count in self._counts.items()
        }
        mailbox = {"page": self.mailbox_url, "smtp": self.mailbox_smtp}
        return {"postgres": self.postgres_url, "nats": self.nats_url, "mailbox": mailbox, "services": services}

    # Starting and stopping

    def start(self) -> None:
        """Bring everything up; returns when all services are ready. Raises ProcessError, having stopped everything."""
        self._started_at = time.monotonic()
        try:
            self._lock_directory()
            self._start_mailbox()
            self._start_servers()
            self._migrate()
            self._set_clock()
            self._start_services()
            (self.directory / "addresses.json").write_text(json.dumps(self.addresses(), indent=2) + "\n")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Take everything down, the last started first; services are asked all at once, since they need each other."""
        for replica in self.replicas.values():
            replica.process.signal(signal.SIGCONT)
            replica.process.signal(signal.SIGTERM)
        self._exits.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Accidents

    def kill(self, service: str, number: int = 0) -> None:
        """SIGKILL one process, and return when it is gone."""
        self._killed.add((service, number))
        self.replicas[service, number].process.kill()

    def terminate(self, service: str, number: int = 0) -> int | None:
        """SIGTERM one process, wait until it has drained, and return its exit status."""
        self._killed.add((service, number))
        return self.replicas[service, number].process.stop(timeout_s=_STOP_TIMEOUT_S)

    def pause(self, service: str, number: int = 0) -> None:
        """SIGSTOP one process: it holds its connections and its leases, and does nothing."""
        self.replicas[service, number].process.signal(signal.SIGSTOP)

    def resume(self, service: str, number: int = 0) -> None:
        """SIGCONT one process."""
        self.replicas[service, number].process.signal(signal.SIGCONT)

    def restart(self, service: str, number: int = 0) -> None:
        """Start one process again on its ports, ending it first where it runs, and return when it is ready."""
        replica = self.replicas[service, number]
        replica.process.stop(timeout_s=_STOP_TIMEOUT_S)
        replica.process.start()
        self._killed.discard((service, number))
        replica.process.wait_until(replica.is_ready, timeout_s=_READY_TIMEOUT_S)

    def raise_if_failed(self) -> None:
        """Raise ProcessError, with the end of its log, for a process that ended and was not meant to."""
        for key, replica in self.replicas.items():
            process = replica.process
            if key not in self._killed and not process.is_running:
                raise ProcessError(f"{process.name} ended with status {process.exit_status}.\n{process.log_tail()}")

    # Steps

    def _lock_directory(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = self._exits.enter_context((self.directory / "lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ProcessError(f"Another stack is using {self.directory}.") from None

    def _start_mailbox(self) -> None:
        self._mailbox_http_port, self._mailbox_smtp_port = self._port(), self._port()
        ports = ["--smtp-port", str(self._mailbox_smtp_port), "--http-port", str(self._mailbox_http_port)]
        arguments = ["-m", "local.mailbox", "--directory", str(self.directory / "mailbox"), *ports]
        self._mailbox = self._process("mailbox", arguments)
        self._exits.callback(self._mailbox.stop)
        self._mailbox.start()

    def _start_servers(self) -> None:
        if not os.environ.get("CARILLON_POSTGRES_URL"):
            self.postgres = self._exits.enter_context(PostgresServer(self.directory, port=self._port()))
            self._report("Postgres is up")
        if not os.environ.get("CARILLON_NATS_URL"):
            self.nats = self._exits.enter_context(NatsServer(self.directory, port=self._port()))
            self._report("NATS is up")

    def _migrate(self) -> None:
        # What `python -m services.<name> migrate` does, without four processes that import the services only for it.
        settings = PostgresSettings(url=SecretStr(self.postgres_url))
        for name in self._counts:
            try:
                upgrade(settings, name, PROJECT.joinpath(*self._package.split("."), name, "migrations"))
            except (CarillonError, SQLAlchemyError) as error:
                raise ProcessError(f"The schema of {name} could not be brought up to date: {error}") from error
            self._report(f"The schema of {name} is up to date")

    def _set_clock(self) -> None:
        if (start := self._test_clock) is not None:
            asyncio.run(set_test_clock(self.postgres_url, origin=start, rate=0, until=start))

    def _start_services(self) -> None:
        for service, count in self._counts.items():
            for number in range(count):
                replica = self._replica(service, number)
                self.replicas[service, number] = replica
                self._exits.callback(replica.process.stop, timeout_s=_STOP_TIMEOUT_S)
                replica.process.start()
        for replica in self.replicas.values():
            replica.process.wait_until(replica.is_ready, timeout_s=_READY_TIMEOUT_S)
            self._report(f"{replica.process.name} is ready")
        mailbox = self._mailbox
        if mailbox is not None:
            mailbox.wait_until(lambda: accepts_connections(HOST, self._mailbox_http_port), timeout_s=_READY_TIMEOUT_S)

    def _replica(self, service: str, number: int) -> Replica:
        grpc_port, http_port = self._port(), self._port()
        name = service if self._counts[service] == 1 else f"{service}-{number}"
        process = self._process(
            name,
            ["-m", f"{self._package}.{service}"],
            {
                "CARILLON_GRPC_HOST": HOST,
                "CARILLON_GRPC_PORT": str(grpc_port),
                "CARILLON_HTTP_HOST": HOST,
                "CARILLON_HTTP_PORT": str(http_port),
            },
        )
        return Replica(service=service, number=number, grpc_port=grpc_port, http_port=http_port, process=process)

    def _process(self, name: str, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> Process:
        return Process(
            name,
            [sys.executable, *arguments],
            log=self.directory / "logs" / f"{name}.log",
            env=self._environment() | self._env | dict(env or {}),
            cwd=PROJECT,
        )

    def _environment(self) -> dict[str, str]:
        """What every process gets; the shell's own settings stay, such as log levels."""
        ours = {
            "CARILLON_AUTH_MODE": "none",
            "CARILLON_TEST_CLOCK": "off" if self._test_clock is None else "on",
            "CARILLON_DISPATCHER_SMTP_HOST": HOST,
            "CARILLON_DISPATCHER_SMTP_PORT": str(self._mailbox_smtp_port),
            "CARILLON_DISPATCHER_SMTP_TLS": "none",
            "CARILLON_DISPATCHER_WEBHOOK_ALLOW_PRIVATE": "on",  # The mailbox is on loopback.
            "PYTHONUNBUFFERED": "1",
        }
        if self.postgres is not None:
            ours["CARILLON_POSTGRES_URL"] = self.postgres.url
        if self.nats is not None:
            ours["CARILLON_NATS_URL"] = self.nats.url
        return {**os.environ, **ours}

    def _port(self) -> int:
        if self._next_port is None:
            return free_port(HOST)
        self._next_port += 1
        wanted = self._next_port - 1
        return wanted if not accepts_connections(HOST, wanted) else free_port(HOST)

    def _report(self, sentence: str) -> None:
        self._on_progress(f"{sentence} ({time.monotonic() - self._started_at:.1f} s).")


def _http(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(HOST, port, timeout=2)
