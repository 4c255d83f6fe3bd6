"""A child process with a log file, a readiness check, and no way to outlive its parent.

Everything here is blocking; from asyncio use `asyncio.to_thread`.
"""

import functools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

_POLL = 0.02
_LEASH = Path(__file__).with_name("leash.py")


class ProcessError(Exception):
    """A process ended or did not become ready; the message has the end of its log."""


class Process:
    """One command, started and stopped any number of times; its output is appended to `log`.

    `stop_signal` asks it to end, also when the parent dies. `uid` runs it as another user, for root only.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        uid: int = -1,
    ) -> None:
        self.name = name
        self.log = log
        self._command = list(command)
        self._env = dict(env) if env is not None else None
        self._cwd = cwd
        self._stop_signal = stop_signal
        self._uid = uid
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._popen.pid if self._popen is not None and self._popen.poll() is None else None

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self.pid is not None

    @property
    def exit_status(self) -> int | None:
        """How it ended (negative: the signal), None while it runs or before it was ever started."""
        return None if self._popen is None else self._popen.poll()

    def start(self) -> None:
        """Start it; does nothing while it runs."""
        if self.is_running:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            # PR_SET_PDEATHSIG follows the *thread* that forked, so all forks are made by one that lasts.
            self._popen = (
                _forker()
                .submit(
                    subprocess.Popen,
                    [
                        sys.executable,
                        "-I",
                        "-S",
                        str(_LEASH),
                        str(int(self._stop_signal)),
                        str(self._uid),
                        *self._command,
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._env,
                    cwd=self._cwd,
                    start_new_session=True,  # Ctrl-C reaches only the parent, which stops the rest in order.
                )
                .result()
            )

    def wait_until(self, is_ready: Callable[[], bool], *, timeout_s: float) -> None:
        """Wait until `is_ready()` is true; raises ProcessError when the process ends first or time runs out."""
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            if not self.is_running:
                raise ProcessError(f"{self.name} ended with status {self.exit_status}.\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ProcessError(f"{self.name} was not ready after {timeout_s:.0f} s.\n{self.log_tail()}")
            time.sleep(_POLL)

    def wait(self, *, timeout_s: float) -> None:
        """Wait until it has ended well; raises ProcessError when it ended badly or time ran out."""
        if self._popen is None:
            raise ProcessError(f"{self.name} was never started.")
        try:
            status = self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ProcessError(f"{self.name} was not done after {timeout_s:.0f} s.\n{self.log_tail()}") from None
        if status:
            raise ProcessError(f"{self.name} ended with status {status}.\n{self.log_tail()}")

    def signal(self, signal_number: signal.Signals) -> None:
        """Send a signal; does nothing when it has ended."""
        if self._popen is not None:
            with suppress(ProcessLookupError):
                self._popen.send_signal(signal_number)

    def stop(self, *, timeout_s: float = 30) -> int | None:
        """Ask it to end, insist with SIGKILL after `timeout_s`, and return the exit status."""
        if self._popen is None:
            return None
        self.signal(self._stop_signal)
        self.signal(signal.SIGCONT)  # A paused process would not hear it.
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int | None:
        """End it at once with SIGKILL and return when it is gone."""
        if self._popen is None:
            return None
        self.signal(signal.SIGKILL)
        return self._popen.wait()

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of its log, indented, with the log's path in front."""
        with suppress(OSError):
            tail = self.log.read_text(errors="replace").splitlines()[-lines:]
            return "\n".join([f"The end of {self.log}:", *(f"  {line}" for line in tail)])
        return f"There is no log at {self.log}."


_claims: deque[int] = deque()
_MAX_CLAIMS = 128
"""Older ones are let go: their servers have long been listening."""


@functools.cache
def _forker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="forker")


def free_port(host: str = "127.0.0.1") -> int:
    """A port nobody listens on and nobody else was given a moment ago, outside the range of outgoing connections.

    Inside that range, which is the kernel's, a stopped server's port could be gone before it starts again.
    """
    for _ in range(1000):
        port = random.randint(10_000, 32_000)
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            if _claim(port):
                return port
    raise OSError(f"Found no free port on {host}.")


def _claim(port: int) -> bool:
    """Keep a port from all who ask, in any process, until its server listens: by a name that ends with this process."""
    with socket.socket(socket.AF_UNIX) as claim:
        try:
            claim.bind(f"\0carillon-port-{port}")
        except OSError:
            return False
        _claims.append(claim.detach())
    if len(_claims) > _MAX_CLAIMS:
        os.close(_claims.popleft())
    return True


def accepts_connections(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    with suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def is_root() -> bool:
    """Whether this process runs as root."""
    return os.geteuid() == 0
