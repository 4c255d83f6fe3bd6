"""The compose stack (deploy/compose.yaml) as a stage for the demo: a project of its own, gone with its data at the end.

    with ComposeStack(Path("var/demo"), replicas={"dispatcher": 3}) as stack:
        channel = connect(stack.grpc("intake"), token=stack.token)
        stack.kill("dispatcher")

It needs Docker with Compose, the images of `make image`, and the ports of the compose file. All methods block.
"""

import asyncio
import fcntl
import json
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Self
from urllib.parse import quote

from libs.test_clock import set_test_clock
from local.processes import ProcessError
from local.stack import PROJECT, SERVICES

FILE = PROJECT / "deploy" / "compose.yaml"

_MAILBOX_PORT, _POSTGRES_PORT = 8025, 5432  # Inside; the file says which they are outside.
DOORS = {"intake": 7404, "scheduler": 7406, "digest": 7408, "dispatcher": 7410}
_LOG_LINES = 20
_READY_TIMEOUT_S, _POLL_S = 120, 0.1


class ComposeStack:
    """See the module. `replicas` by service, one where nothing is said; `env` is added to what services see.

    `test_clock` makes business time stand there until somebody lets it run (libs.test_clock).
    """

    def __init__(
        self,
        directory: Path,
        *,
        replicas: Mapping[str, int] | None = None,
        test_clock: datetime | None = None,
        env: Mapping[str, str] | None = None,
        project: str = "carillon-demo",
    ) -> None:
        self.directory = directory.absolute()
        self._replicas = dict(replicas or {})
        self._test_clock = test_clock
        self._env = {**(env or {}), "CARILLON_TEST_CLOCK": "off" if test_clock is None else "on"}
        self._project = project
        self._killed: dict[str, str] = {}
        self._lock: IO[str] | None = None
        self.postgres_url = self.mailbox_url = self.token = ""
        self.hooks_url = f"http://mailbox:{_MAILBOX_PORT}/hooks"

    def grpc(self, service: str) -> str:
        """Where a service answers gRPC, as host:port: in front of its replicas."""
        return self._address("door", DOORS[service])

    def start(self) -> None:
        """Bring everything up; returns when all services are ready. Raises ProcessError, having stopped everything."""
        self._lock_directory()
        override = {"services": {name: {"environment": self._env} for name in SERVICES}}
        self._override.write_text(json.dumps(override))
        try:
            self._compose("down", "--volumes")  # What is left of one that was killed.
            self._compose("up", "--detach", "--wait", "postgres")
            password = quote(self._compose("exec", "-T", "postgres", "cat", "/run/carillon/postgres-password").strip())
            address = self._address("postgres", _POSTGRES_PORT)
            self.postgres_url = f"postgresql://carillon:{password}@{address}/carillon"
            self._compose("run", "--rm", "-T", "migrate")
            if (start := self._test_clock) is not None:
                asyncio.run(set_test_clock(self.postgres_url, origin=start, rate=0, until=start))
            scales = [part for name, count in self._replicas.items() for part in ("--scale", f"{name}={count}")]
            self._compose("up", "--detach", "--wait", *scales, *SERVICES, "door", "mailbox")
            self.token = self._compose("exec", "-T", "intake", "cat", "/run/carillon/token").strip()
            self.mailbox_url = f"http://{self._address('mailbox', _MAILBOX_PORT)}"
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Take everything down and delete its data; logs and mails stay in the directory."""
        logs = self.directory / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        (logs / "compose.log").write_text(self._compose("logs", "--no-color", "--timestamps", check=False))
        self._compose("stop", "mailbox", check=False)
        self._compose("cp", "mailbox:/mailbox", str(self.directory / "mailbox"), check=False)
        self._compose("down", "--volumes")
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def kill(self, service: str) -> None:
        """SIGKILL one replica, and return when it is gone."""
        container = self._compose("ps", "--quiet", service).split()[0]
        self._killed[service] = container
        _docker("kill", container)
        _docker("wait", container)

    def restart(self, service: str) -> None:
        """Start the replica that was killed again, and return when it is ready."""
        container = self._killed[service]
        _docker("start", container)
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while _docker("inspect", "--format", "{{.State.Health.Status}}", container).strip() != "healthy":
            if time.monotonic() > deadline:
                raise ProcessError(f"A {service} was not ready after {_READY_TIMEOUT_S} s.\n{_log_tail(container)}")
            time.sleep(_POLL_S)
        del self._killed[service]

    def raise_if_failed(self) -> None:
        """Raise ProcessError, with the end of its log, for a replica that ended and was not killed."""
        ended = ("--status", "exited", "--status", "restarting")
        for container in self._compose("ps", "--all", "--quiet", *ended, *SERVICES).split():
            if container not in self._killed.values():
                raise ProcessError(f"A service ended.\n{_log_tail(container)}")

    @property
    def _override(self) -> Path:
        return self.directory / "compose.json"

    def _address(self, service: str, port: int) -> str:
        return self._compose("port", service, str(port)).strip()

    def _lock_directory(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = (self.directory / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ProcessError(f"Another stack is using {self.directory}.") from None

    def _compose(self, *arguments: str, check: bool = True) -> str:
        files = ["--file", str(FILE), "--file", str(self._override)]
        return _docker("compose", "--project-name", self._project, *files, *arguments, check=check)


def _log_tail(container: str) -> str:
    return _docker("logs", "--tail", str(_LOG_LINES), container)


def _docker(*arguments: str, check: bool = True) -> str:
    """What it prints; raises ProcessError, with what it says about it, when it fails."""
    try:
        done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ProcessError("There is no docker command.") from None
    if check and done.returncode:
        raise ProcessError(f"docker {' '.join(arguments)} ended with status {done.returncode}.\n{done.stderr}")
    return done.stdout
