"""How the command reaches a service: options that all sub-commands share, from the command line or the environment."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import grpc
import typer

from libs.rpc_client import ClientTls, connect, refusal_of

TokenText = Annotated[
    str,
    typer.Option(
        "--token",
        envvar="CARILLON_TOKEN",
        help="Bearer token; better given by the environment or a file.",
        show_default=False,  # A profile may hold one, and defaults are shown in --help.
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", envvar="CARILLON_TOKEN_FILE", help="File with the token, read anew for each call."),
]
Tenant = Annotated[
    str, typer.Option("--tenant", envvar="CARILLON_TENANT", help="Tenant, where the token does not say it.")
]
UsesTls = Annotated[bool, typer.Option("--tls", envvar="CARILLON_TLS", help="Encrypt, and check the server.")]
CaFile = Annotated[
    Path | None,
    typer.Option("--ca-file", envvar="CARILLON_CA_FILE", help="PEM with the server's CAs, instead of the system's."),
]

CertFile = Annotated[
    Path | None,
    typer.Option("--cert-file", envvar="CARILLON_CERT_FILE", help="PEM with our certificate, where one is asked for."),
]
KeyFile = Annotated[
    Path | None, typer.Option("--key-file", envvar="CARILLON_KEY_FILE", help="PEM with the key of --cert-file.")
]

# By click's name for it, the loudest first.
_PLACES: Final = {"COMMANDLINE": "the command line", "ENVIRONMENT": "the environment", "DEFAULT_MAP": "the profile"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Where to, and as whom: `token` or `token_file`."""

    endpoint: str
    token: str = ""
    token_file: Path | None = None
    tenant: str = ""
    uses_tls: bool = False
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    def open(self, *retried: str) -> grpc.aio.Channel:
        """A channel; OSError when a file that it needs cannot be read."""
        return connect(
            self.endpoint,
            token=self._token(),
            tenant=self.tenant or None,
            tls=self._tls(),
            retried=retried,
        )

    def _tls(self) -> ClientTls | None:
        if (self.cert_file is None) != (self.key_file is None):
            raise typer.BadParameter("--cert-file and --key-file go together.")
        if not (self.uses_tls or self.ca_file or self.cert_file):
            return None
        return ClientTls(ca=self.ca_file, cert=self.cert_file, key=self.key_file)

    def _token(self) -> str | Callable[[], str] | None:
        if (path := self.token_file) is not None:
            path.read_bytes()  # Now, where the error can be told.
            return lambda: path.read_text().strip()
        return self.token or None


def one_credential(context: typer.Context, token: str, token_file: Path | None) -> tuple[str, Path | None]:
    """The token or the file with it, whichever was given on the command line, else by the environment, else by the
    profile; the other one is empty.

    BadParameter where one place gives both: it decides whose things are touched, and nobody knows which is meant.
    """
    for source, place in _PLACES.items():
        given = [name for name in ("token", "token_file") if _source(context, name) == source]
        if len(given) == 2:
            raise typer.BadParameter(f"{place} gives both a token and a token file.", param_hint="--token")
        if given:
            return (token, None) if given == ["token"] else ("", token_file)
    return "", None


def _source(context: typer.Context, name: str) -> str:
    source = context.get_parameter_source(name)
    return source.name if source is not None else ""


def refusal_text(error: grpc.aio.AioRpcError) -> str:
    """What a service said, in one line for a person."""
    refusal = refusal_of(error)
    violations = "".join(f"; {one.field} {one.description}" for one in refusal.violations)
    reason = f", {refusal.reason}" if refusal.reason else ""
    return f"{error.details()} ({error.code().name}{reason}){violations}"
