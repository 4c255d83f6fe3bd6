"""What all sub-commands share: options of the connection, calls, errors in words, exit codes.

    @command(app, "timers", services=("scheduler",))
    async def show(session: Session, timer_id: ...) -> None: ...

`command` gives the function's command the options that say where the services are and as whom to call, and runs it.
"""

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Annotated, Any, Final, NoReturn

import grpc
import typer

from cli.connection import (
    CaFile,
    CertFile,
    Connection,
    KeyFile,
    Tenant,
    TokenFile,
    TokenText,
    UsesTls,
    one_credential,
    refusal_text,
)

SERVICES: Final = ("intake", "scheduler", "digest", "dispatcher")
_PANEL: Final = "Connection"
# Reading is harmless to repeat, and what changes something carries a key or is idempotent by nature.
_RETRIED: Final = (
    *(f"carillon.{name}.v1.{name.title()}Service" for name in SERVICES),
    *(f"carillon.link.v1.{name}Service" for name in ("Backlog", "DeadFrame", "Status")),
)

Work = Callable[..., Awaitable[int | None]]
IsJson = Annotated[bool, typer.Option("--json", help="Answer in JSON, for programs.")]
TimeoutS = Annotated[
    float, typer.Option("--timeout", envvar="CARILLON_TIMEOUT", min=0.1, max=3600, help="Seconds per call.")
]


class Exit(IntEnum):
    """Exit codes."""

    DONE = 0
    REFUSED = 1
    UNUSABLE = 2
    NOT_ALL = 3


@dataclass(kw_only=True)
class Session:
    """One run of the command; `connections` has those services whose address is known."""

    connections: Mapping[str, Connection]
    tenant: str = ""
    is_json: bool = False
    timeout_s: float = 10.0
    _channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)
    _exits: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def __aenter__(self) -> "Session":
        for name, connection in self.connections.items():
            self._channels[name] = await self._exits.enter_async_context(connection.open(*_RETRIED))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exits.aclose()

    def stub(self, service: str, kind: Callable[[Any], object]) -> Any:
        """A stub to call the service with; KeyError when its address is not known.

        Any, because mypy takes the generated stubs for those of blocking channels where it does not know the channel.
        """
        return kind(self._channels[service])

    async def all_pages(
        self, method: Callable[..., Awaitable[Any]], request: Any, name: str, *, limit: int = 0
    ) -> AsyncIterator[Any]:
        """The items of all pages of a list, at most `limit` (0: all); `name` is the list's field."""
        sent = 0
        while True:
            answer = await method(request, timeout=self.timeout_s)
            for item in getattr(answer, name):
                yield item
                sent += 1
                if limit and sent >= limit:
                    return
            if not answer.next_page_token:
                return
            request.page_token = answer.next_page_token


def command(
    app: typer.Typer, name: str, *, services: Sequence[str], at_least: int | None = None, is_always_json: bool = False
) -> Callable[[Work], Work]:
    """Register an async function, whose first argument is the Session, as a sub-command; it may return an exit code.

    `at_least` so many addresses of `services` must be known, without it all. With `is_always_json` there is no
    option --json.
    """

    def register(work: Work) -> Work:
        @functools.wraps(work)
        def run(context: typer.Context, **given: Any) -> None:
            session = _session(context, given, services, len(services) if at_least is None else at_least)
            raise typer.Exit(_run(work, session, given, services))

        own = list(inspect.signature(work).parameters.values())[1:]
        shared = [*_shared(services), *([] if is_always_json else [("is_json", IsJson, False)])]
        options = [
            inspect.Parameter(one, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for one, kind, default in shared
        ]
        keyword_only = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
        context_too = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        all_of_them = [context_too, *keyword_only, *options]
        run.__signature__ = inspect.Signature(all_of_them)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in all_of_them}
        del run.__wrapped__  # Its signature is not the command's.
        app.command(name)(run)
        return work

    return register


def stop(message: str, code: int = Exit.UNUSABLE) -> NoReturn:
    """End with a sentence on standard error."""
    typer.echo(message, err=True)
    raise typer.Exit(int(code))


def stop_for_want_of(services: Sequence[str]) -> NoReturn:
    """End, because it is not known where these are."""
    ways = ", ".join(f"CARILLON_{name.upper()}_ENDPOINT or --{name}-endpoint" for name in services)
    stop(f"It is not known where {' and '.join(services)} can be reached: {ways}, or a profile, must say host:port.")


def _shared(services: Sequence[str]) -> list[tuple[str, Any, Any]]:
    endpoints = [(f"{name}_endpoint", Annotated[str, _endpoint(name)], "") for name in services]
    return [
        *endpoints,
        ("token", TokenText, ""),
        ("token_file", TokenFile, None),
        ("tenant", Tenant, ""),
        ("uses_tls", UsesTls, False),
        ("ca_file", CaFile, None),
        ("cert_file", CertFile, None),
        ("key_file", KeyFile, None),
        ("timeout_s", TimeoutS, 10.0),
    ]


def _endpoint(service: str) -> Any:
    return typer.Option(
        f"--{service}-endpoint",
        envvar=f"CARILLON_{service.upper()}_ENDPOINT",
        help=f"host:port of {service}'s gRPC API.",
        show_default=False,
        rich_help_panel=_PANEL,
    )


def _session(context: typer.Context, given: dict[str, Any], services: Sequence[str], at_least: int) -> Session:
    """From the options, which it takes out of what was given."""
    endpoints = {name: str(given.pop(f"{name}_endpoint")) for name in services}
    missing = [name for name, endpoint in endpoints.items() if not endpoint]
    if len(endpoints) - len(missing) < at_least:
        stop_for_want_of(missing)
    token, token_file = one_credential(context, given.pop("token"), given.pop("token_file"))
    tenant = given.pop("tenant")
    tls = {one: given.pop(one) for one in ("uses_tls", "ca_file", "cert_file", "key_file")}
    connections = {
        name: Connection(endpoint=endpoint, token=token, token_file=token_file, tenant=tenant, **tls)
        for name, endpoint in endpoints.items()
        if endpoint
    }
    return Session(
        connections=connections,
        tenant=tenant,
        is_json=given.pop("is_json", True),
        timeout_s=float(given.pop("timeout_s")),
    )


def _run(work: Work, session: Session, given: Mapping[str, Any], services: Sequence[str]) -> int:
    async def whole() -> int | None:
        async with session:
            return await work(session, **given)

    try:
        return int(asyncio.run(whole()) or Exit.DONE)
    except grpc.aio.AioRpcError as error:
        prefix = f"{services[0]} at {session.connections[services[0]].endpoint}: " if len(services) == 1 else ""
        stop(prefix + refusal_text(error), Exit.REFUSED)
    except BrokenPipeError:
        raise  # Nobody reads on (`| head -1`): Typer ends it quietly, with exit code 1.
    except OSError as error:
        if error.filename is None:
            stop(f"It could not go on: {error}", Exit.REFUSED)
        stop(f"A file cannot be read: {error}")
    except KeyboardInterrupt:
        return 130
