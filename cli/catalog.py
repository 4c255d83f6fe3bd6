"""`carillon catalog`: notification types, as they are declared and as they are stored."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NoReturn

import grpc
import typer
from carillon.digest.v1 import digest_pb2 as pb
from carillon.digest.v1 import digest_pb2_grpc
from google.protobuf.duration_pb2 import Duration
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli.catalog_changes import Change, Kind, changes
from cli.catalog_sources import SourceError, declarations_in
from cli.connection import (
    CaFile,
    CertFile,
    Connection,
    Endpoint,
    KeyFile,
    Tenant,
    TokenFile,
    TokenText,
    UsesTls,
    refusal_text,
)
from cli.notification_types import Declaration, schema_text

REFUSED, UNUSABLE, NOT_DONE = 1, 2, 3
_CALL_TIMEOUT_S = 10.0
_PAGE = 20
_SERVICE = "carillon.digest.v1.DigestService"

catalog = typer.Typer(help="Notification types: what there is to tell.", no_args_is_help=True)


@catalog.callback()
def _root() -> None:
    """Keeps sub-commands sub-commands, even while there is only one."""


@catalog.command()
def sync(
    target: Annotated[
        str, typer.Argument(metavar="MODULE|DIRECTORY|FILE", help="Where the types are declared: Python or YAML.")
    ],
    endpoint: Endpoint,
    token: TokenText = "",
    token_file: TokenFile = None,
    tenant: Tenant = "",
    uses_tls: UsesTls = False,
    ca_file: CaFile = None,
    cert_file: CertFile = None,
    key_file: KeyFile = None,
    is_dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the difference, change nothing.")] = False,
    is_agreed: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    is_json: Annotated[bool, typer.Option("--json", help="Answer in JSON; takes --yes or --dry-run.")] = False,
) -> None:
    """Store the notification types that MODULE|DIRECTORY|FILE declares.

    Shows how what is declared differs from what is stored, asks, and stores it. Types that are stored and not declared
    there are left alone. Python is imported; of a directory only the files that mention notification_type.

    Exit codes: 0 all is stored as declared; 1 digest refused or could not be reached; 2 the command line or the
    declarations cannot be used; 3 there is a difference that was left (--dry-run, or you said no).
    """
    if is_json and not (is_dry_run or is_agreed):
        _stop("--json cannot ask: give --yes or --dry-run as well.", UNUSABLE)
    connection = Connection(
        endpoint=endpoint,
        token=token,
        token_file=token_file,
        tenant=tenant,
        uses_tls=uses_tls,
        ca_file=ca_file,
        cert_file=cert_file,
        key_file=key_file,
    )
    try:
        declared = declarations_in(target)
        found = changes(declared, asyncio.run(_stored(connection, {one.id for one in declared})))
    except SourceError as error:
        _stop(str(error), UNUSABLE)
    except OSError as error:
        _stop(f"A file cannot be read: {error}", UNUSABLE)
    except grpc.aio.AioRpcError as error:
        _stop(f"{endpoint}: {refusal_text(error)}", REFUSED)
    wanted = [one for one in found if one.kind is not Kind.SAME]
    if not is_json:
        _show(found)
    result = Result()
    if wanted and not is_dry_run and (is_agreed or _agrees(f"Store {_types(len(wanted))}?")):
        result = asyncio.run(_store(connection, [one.declaration for one in wanted]))
    _report(found, result, is_json=is_json)
    raise typer.Exit(_code(wanted, result))


@dataclass(frozen=True, slots=True)
class Result:
    """What came of storing: the ids of those that are, and why others are not."""

    stored: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def _code(wanted: Sequence[Change], result: Result) -> int:
    if result.refused:
        return REFUSED
    return NOT_DONE if len(result.stored) < len(wanted) else 0


# Digest


async def _stored(connection: Connection, wanted: set[str]) -> dict[str, Declaration]:
    """The stored ones among the wanted types; reads the whole list, in which nothing can be missing."""
    found: dict[str, Declaration] = {}
    async with connection.open(_SERVICE) as channel:
        stub = digest_pb2_grpc.DigestServiceStub(channel)
        request = pb.ListNotificationTypesRequest(page_size=_PAGE)
        while True:
            answer = await stub.ListNotificationTypes(request, timeout=_CALL_TIMEOUT_S)
            found |= {one.id: _declared(one) for one in answer.notification_types if one.id in wanted}
            if not answer.next_page_token:
                return found
            request.page_token = answer.next_page_token


async def _store(connection: Connection, wanted: Sequence[Declaration]) -> Result:
    """Put one after the other; what is refused does not stop the rest."""
    result = Result()
    async with connection.open(_SERVICE) as channel:
        stub = digest_pb2_grpc.DigestServiceStub(channel)
        for one in wanted:
            request = pb.PutNotificationTypeRequest(notification_type=_message(one))
            try:
                await stub.PutNotificationType(request, timeout=_CALL_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                result.refused[one.id] = refusal_text(error)
            else:
                result.stored.append(one.id)
    return result


def _message(one: Declaration) -> pb.NotificationType:
    retention = Duration()
    retention.FromTimedelta(one.retention)
    return pb.NotificationType(
        id=one.id,
        name=one.name,
        description=one.description,
        default_cadence=one.default_cadence,
        default_channel=pb.Channel.Value(f"CHANNEL_{one.default_channel.upper()}"),
        is_mandatory=one.is_mandatory,
        payload_schema=schema_text(one.payload_schema),
        retention=retention,
        formatting_service=one.formatting_service,
    )


def _declared(one: pb.NotificationType) -> Declaration:
    return Declaration.model_validate(
        {
            "id": one.id,
            "name": one.name,
            "description": one.description,
            "default_cadence": one.default_cadence,
            "default_channel": pb.Channel.Name(one.default_channel).removeprefix("CHANNEL_").lower(),
            "is_mandatory": one.is_mandatory,
            "retention": one.retention.ToTimedelta(),
            "formatting_service": one.formatting_service,
            "payload_schema": json.loads(one.payload_schema or "{}"),
        }
    )


# The person, or the program


def _show(found: Sequence[Change]) -> None:
    table = Table("type", "", "field", "stored", "declared", title="Notification types", title_justify="left")
    for change in found:
        if change.kind is Kind.SAME:
            continue
        rows = [(one.field, one.stored, one.declared) for one in change.differences] or [
            ("", None, change.declaration.name)
        ]
        for number, (name, stored, declared) in enumerate(rows):
            heading = (change.declaration.id, change.kind.value) if number == 0 else ("", "")
            table.add_row(*heading, escape(name), escape(stored or "–"), escape(declared or "–"))
    console = Console()
    if table.row_count:
        console.print(table)
    same = sum(change.kind is Kind.SAME for change in found)
    if same:
        console.print(f"{_types(same).capitalize()} already stored as declared.", highlight=False)


def _report(found: Sequence[Change], result: Result, *, is_json: bool) -> None:
    if is_json:
        typer.echo(json.dumps(_as_json(found, result), ensure_ascii=False, indent=2))
        return
    if result.stored:
        typer.echo(f"Stored {_types(len(result.stored))}.")
    for one_id, why in result.refused.items():
        typer.echo(f"{one_id} was refused: {why}", err=True)


def _as_json(found: Sequence[Change], result: Result) -> Mapping[str, Any]:
    return {
        "types": [
            {
                "id": change.declaration.id,
                "change": change.kind.value,
                "differences": [
                    {"field": one.field, "stored": one.stored, "declared": one.declared} for one in change.differences
                ],
            }
            for change in found
        ],
        "stored": result.stored,
        "refused": result.refused,
    }


def _agrees(question: str) -> bool:
    """No answer, as from a pipeline, is no."""
    try:
        return typer.confirm(question)
    except typer.Abort:
        return False


def _types(count: int) -> str:
    return "1 type" if count == 1 else f"{count:,} types"


def _stop(message: str, code: int) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code)
