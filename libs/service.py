"""The bootstrap that all four services share: settings in, a running process out.

Each service says in its `app.build` what it is made of; everything around that is the same and lives here: logs,
traces, Postgres, NATS, the clock, the links, the gRPC server, the HTTP port. Things start in the order in which they
need each other and close in reverse: first no new calls, then no new frames, then the rest.
"""

import gc
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

from prometheus_client import REGISTRY, disable_created_metrics

from libs import migrations
from libs.clock import Clock, DatabaseClock
from libs.errors import FailedPrecondition
from libs.ids import new_id
from libs.jetstream import Bus
from libs.lifecycle import Lifecycle, exiting_on_errors, run
from libs.links import metrics as link_metrics
from libs.links.backlog_rpc import backlog_servicer
from libs.links.dead_rpc import dead_frame_servicer
from libs.links.receiver import Apply, Receiver
from libs.links.sender import Sender
from libs.links.sequence import RAISE_SEQUENCE
from libs.links.status_rpc import status_servicer
from libs.postgres import Database
from libs.rpc import Servicer, build_server
from libs.settings import (
    AuthSettings,
    ClockSettings,
    GrpcSettings,
    HttpSettings,
    LinkSettings,
    NatsSettings,
    PostgresSettings,
    ShardSettings,
    TelemetrySettings,
    load_or_exit,
)
from libs.telemetry.http import TelemetryHttp, add_build_info
from libs.telemetry.logs import configure_logs
from libs.telemetry.traces_export import Traces
from libs.test_clock import TestClock

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseSettings:
    """The settings every service has; a service's own dataclass adds its group as a further field."""

    postgres: PostgresSettings
    nats: NatsSettings
    grpc: GrpcSettings
    http: HttpSettings
    auth: AuthSettings
    telemetry: TelemetrySettings
    clock: ClockSettings
    links: LinkSettings
    shards: ShardSettings


SettingsT = TypeVar("SettingsT", bound=BaseSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What a service is given to build itself from. `replica` is unique to this process."""

    service: str
    replica: str
    db: Database
    bus: Bus
    clock: Clock
    sender: Sender
    shards: int
    links: LinkSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What a service is made of.

    `apply` takes its frames (None: it takes them itself). `loops` run until cancelled, closing in reverse order; one
    that raises ends the process. `resources` are entered before the loops start and left after they have ended.
    """

    servicers: Sequence[Servicer]
    apply: Apply | None = None
    loops: Mapping[str, Callable[[], Coroutine[Any, Any, None]]] = field(default_factory=dict)
    resources: Sequence[AbstractAsyncContextManager[object]] = ()


class Build(Protocol[SettingsT]):  # type: ignore[misc]
    """A service's `app.build`."""

    def __call__(self, runtime: Runtime, settings: SettingsT) -> Awaitable[Service]: ...


def main(
    *,
    service: str,
    receivers: Sequence[str],
    senders: Sequence[str],
    settings: type[SettingsT],
    build: Build[SettingsT],
    directory: Path,
) -> NoReturn:
    """The `__main__` of a service: `serve` (default) or `migrate`. `directory` is its own, with migrations/.

    `receivers` and `senders` are the services that it sends frames to and gets frames from.
    """
    command = sys.argv[1] if len(sys.argv) > 1 else "serve"
    if command == "migrate":
        _migrate(service, directory / "migrations")
    if command != "serve" or len(sys.argv) > 2:
        sys.stderr.write(f"usage: python -m services.{service} [serve | migrate]\n")
        raise SystemExit(2)
    loaded = load_or_exit(settings)
    configure_logs(loaded.telemetry, service=service)
    # They would be a series more for each counter, and say no more than the process's start does.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    link_metrics.know(receivers=[*receivers, service], senders=senders)
    run(lambda: _serve(service, receivers, loaded, build, directory / "migrations"))


def _migrate(service: str, directory: Path) -> NoReturn:
    @dataclass(frozen=True)
    class Needed:
        postgres: PostgresSettings
        telemetry: TelemetrySettings

    loaded = load_or_exit(Needed)
    configure_logs(loaded.telemetry, service=service)
    with exiting_on_errors():
        applied = migrations.upgrade(loaded.postgres, service, directory)
    log.info("The schema is up to date.", extra={"schema": service, "applied": applied})
    raise SystemExit(0)


async def _serve(
    service: str, receivers: Sequence[str], settings: SettingsT, build: Build[SettingsT], directory: Path
) -> None:
    async with Lifecycle(settings.grpc.drain_timeout) as life:
        _refuse_old_schema(service, settings.postgres, directory)
        replica = f"{socket.gethostname()}-{os.getpid()}-{new_id().hex[-6:]}"
        await life.enter(Traces(settings.telemetry, service=service, version=_version(), instance=replica))
        db = await life.enter(_closing(await _connect_database(service, settings.postgres)))
        bus = await life.enter(_closing(await Bus.connect(settings.nats, f"carillon-{service}-{replica}")))
        clock = await _start_clock(life, db, settings)
        sender = Sender(db=db, bus=bus, service=service, replica=replica, receivers=receivers, settings=settings.links)
        runtime = Runtime(
            service=service,
            replica=replica,
            db=db,
            bus=bus,
            clock=clock,
            sender=sender,
            shards=settings.shards.count,
            links=settings.links,
        )
        parts = await build(runtime, settings)
        _calm_collector()  # Stands still for 0.1 s: before other replicas give this one work, not after.
        life.spawn("sender", sender.run())
        for resource in parts.resources:
            await life.enter(resource)
        for name, loop in parts.loops.items():
            life.spawn(name, loop())
        if parts.apply is not None:
            receiver = Receiver(
                db=db, bus=bus, service=service, apply=parts.apply, publish=sender.publish, settings=settings.links
            )
            life.spawn("receiver", receiver.run())
        servicers = [*parts.servicers, *_operators_servicers(runtime, settings)]
        server = build_server(settings.grpc, auth=settings.auth, servicers=servicers, registry=REGISTRY)
        await life.enter(server)
        add_build_info(REGISTRY, service=service, version=_version())

        async def readiness() -> dict[str, str | None]:
            # NATS is no reason to turn callers away: commands are durable without it, and wait in the outbox (R1).
            return {"postgres": None if await db.is_alive() else "Postgres does not answer"}

        await life.enter(TelemetryHttp(settings.http, registry=REGISTRY, readiness=readiness))
        log.info("Ready.", extra={"replica": replica, "grpc": server.address})
        await life.run_until_signalled()


async def _connect_database(service: str, settings: PostgresSettings) -> Database:
    return await Database.connect(settings, service, on_connect=RAISE_SEQUENCE)


def _calm_collector() -> None:
    """Have the garbage collector leave alone what lives as long as the process, and look less often at the rest.

    Nearly nothing here is cyclic, but thousands of messages are alive at once: with the defaults, looking through them
    again and again took a third of the scheduler's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


async def _start_clock(life: Lifecycle, db: Database, settings: BaseSettings) -> Clock:
    real = await DatabaseClock.connect(db, resync=settings.clock.resync)
    if not settings.clock.test:
        life.spawn("clock", real.run())
        return real
    test_clock = await TestClock.connect(real, settings.postgres.url.get_secret_value())
    life.spawn("clock", test_clock.run())
    log.warning("Business time is the test clock.", extra={"now": test_clock.now().isoformat()})
    return test_clock


def _operators_servicers(runtime: Runtime, settings: BaseSettings) -> list[Servicer]:
    """What every service has for those who operate it."""
    service, db, sender = runtime.service, runtime.db, runtime.sender
    status = status_servicer(
        service=service,
        replica=runtime.replica,
        version=_version(),
        clock=runtime.clock,
        is_test_clock=settings.clock.test,
        bus=runtime.bus,
        db=db,
    )
    dead_frames = dead_frame_servicer(db=db, service=service, publish=sender.publish, settings=settings.links)
    return [dead_frames, backlog_servicer(db=db), status]


def _refuse_old_schema(service: str, settings: PostgresSettings, directory: Path) -> None:
    if pending := migrations.pending_revisions(settings, service, directory):
        raise FailedPrecondition(
            f"The schema {service!r} lacks the revisions {', '.join(pending)}:"
            f" run `python -m services.{service} migrate` first.",
            reason="SCHEMA_TOO_OLD",
        )


class _Closable(Protocol):
    async def close(self) -> None: ...


ClosableT = TypeVar("ClosableT", bound=_Closable)


@asynccontextmanager
async def _closing(resource: ClosableT) -> AsyncIterator[ClosableT]:
    try:
        yield resource
    finally:
        await resource.close()


def _version() -> str:
    try:
        return version("carillon")
    except PackageNotFoundError:
        return "0"
