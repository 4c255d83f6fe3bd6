"""`carillon catalog`: notification types, as they are declared and as they are stored."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import grpc
import typer
from carillon.digest.v1 import digest_pb2 as pb
from carillon.digest.v1 import digest_pb2_grpc
from google.protobuf.duration_pb2 import Duration
from rich.markup import escape
from rich.table import Table

from cli.catalog_changes import Change, Kind, changes
from cli.catalog_sources import SourceError, declarations_in
from cli.connection import refusal_text
from cli.notification_types import Declaration, schema_text
from cli.output import new_console
from cli.session import Exit, Session, command, stop

_PAGE = 20

catalog = typer.Typer(help="Notification types: what there is to tell.", no_args_is_help=True)


@catalog.callback()
def _root() -> None:
    """Keeps sub-commands sub-commands, even while there is only one."""


@command(catalog, "sync", services=("digest",))
async def sync(
    session: Session,
    target: Annotated[
        str, typer.Argument(metavar="MODULE|DIRECTORY|FILE", help="Where the types are declared: Python or YAML.")
    ],
    is_dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the difference, change nothing.")] = False,
    is_agreed: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> int:
    """Store the notification types that MODULE|DIRECTORY|FILE declares.

    Shows how what is declared differs from what is stored, asks, and stores it. Types that are stored and not declared
    there are left alone. Python is imported; of a directory only the files that mention notification_type. --json takes
    --yes or --dry-run.

    Exit codes: 0 all is stored as declared; 1 digest refused or could not be reached; 2 the command line or the
    declarations cannot be used; 3 there is a difference that was left (--dry-run, or you said no).
    """
    if session.is_json and not (is_dry_run or is_agreed):
        stop("--json cannot ask: give --yes or --dry-run as well.")
    try:
        declared = declarations_in(target)
    except SourceError as error:
        stop(str(error))
    found = changes(declared, await _stored(session, {one.id for one in declared}))
    wanted = [one for one in found if one.kind is not Kind.SAME]
    if not session.is_json:
        _show(found)
    result = Result()
    if wanted and not is_dry_run and (is_agreed or _agrees(f"Store {_types(len(wanted))}?")):
        result = await _store(session, [one.declaration for one in wanted])
    _report(found, result, is_json=session.is_json)
    return _code(wanted, result)


@dataclass(frozen=True, slots=True)
class Result:
    """What came of storing: the ids of those that are, and why others are not."""

    stored: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def _code(wanted: Sequence[Change], result: Result) -> int:
    if result.refused:
        return Exit.REFUSED
    return Exit.NOT_ALL if len(result.stored) < len(wanted) else Exit.DONE


# Digest


async def _stored(session: Session, wanted: set[str]) -> dict[str, Declaration]:
    """The stored ones among the wanted types; reads the whole list, in which nothing can be missing."""
    stub = session.stub("digest", digest_pb2_grpc.DigestServiceStub)
    request = pb.ListNotificationTypesRequest(page_size=_PAGE)
    pages = session.all_pages(stub.ListNotificationTypes, request, "notification_types")
    return {one.id: _declared(one) async for one in pages if one.id in wanted}


async def _store(session: Session, wanted: Sequence[Declaration]) -> Result:
    """Put one after the other; what is refused does not stop the rest."""
    stub, result = session.stub("digest", digest_pb2_grpc.DigestServiceStub), Result()
    for one in wanted:
        request = pb.PutNotificationTypeRequest(notification_type=_message(one))
        try:
            await stub.PutNotificationType(request, timeout=session.timeout_s)
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
    console = new_console()
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
