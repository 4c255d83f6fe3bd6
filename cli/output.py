"""What people and programs see: tables, times and durations in one way; messages as proto JSON."""

import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final

import typer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from libs.settings_base import format_duration
from libs.wire import from_duration, from_timestamp

NONE: Final = "–"
# A table is laid out as a whole; of a longer list people get several, programs a line per item all along.
_ROWS_AT_ONCE: Final = 200
_WIDER_THAN_ALL: Final = 1_000_000


def as_json(message: Message) -> dict[str, Any]:
    """Proto JSON, with fields that have their default value too: names do not come and go."""
    return MessageToDict(message, always_print_fields_with_no_presence=True)


def show_json(value: Message | Any, *, is_line: bool = False) -> None:
    """One document, or with `is_line` one line of JSON Lines."""
    plain = as_json(value) if isinstance(value, Message) else value
    typer.echo(json.dumps(plain, ensure_ascii=False, indent=None if is_line else 2))


async def show_list(
    items: AsyncIterator[Any],
    columns: Sequence[str],
    row: Callable[[Any], Sequence[str]],
    *,
    is_json: bool,
    nothing: str,
) -> None:
    """A list as it comes: JSON Lines, or tables; `nothing` is said to people when it is empty."""
    rows: list[Sequence[str]] = []
    count = 0
    async for item in items:
        count += 1
        if is_json:
            show_json(item, is_line=True)
            continue
        rows.append(row(item))
        if len(rows) == _ROWS_AT_ONCE:
            show_table(columns, rows)
            rows.clear()
    if rows:
        show_table(columns, rows)
    if not count and not is_json:
        typer.echo(nothing)


def new_console() -> Console:
    """Where tables go. They fit the terminal; without one nothing is cut or wrapped, unless COLUMNS says where."""
    is_bounded = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console(width=None if is_bounded else _WIDER_THAN_ALL)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Cells are text, not markup."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        # Ids and times are of no use with a piece missing.
        table.add_column(name, overflow="fold")
    for cells in rows:
        table.add_row(*(escape(cell) for cell in cells))
    new_console().print(table)


def show_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """What is known of one thing, without what is not."""
    known = [(name, value) for name, value in pairs if value not in ("", NONE)]
    width = max((len(name) for name, _ in known), default=0)
    for name, value in known:
        typer.echo(f"{name:<{width}}  {value}")


def when(message: Message, field: str) -> str:
    """A field that is a Timestamp, in the reader's zone with its offset."""
    return moment(getattr(message, field)) if message.HasField(field) else NONE


def moment(timestamp: Timestamp) -> str:
    """To the second: 2026-12-01 09:00:00+01:00."""
    return from_timestamp(timestamp).astimezone().isoformat(sep=" ", timespec="seconds")


def how_long(duration: Duration) -> str:
    """As durations are typed: 1h30m."""
    return format_duration(from_duration(duration))


def word(enum: Any, value: int) -> str:
    """An enum's value without its type's name, in lower case: TIMER_STATE_FIRED is fired."""
    name: str = enum.Name(value)
    prefix = "".join(f"_{letter}" if letter.isupper() else letter.upper() for letter in enum.DESCRIPTOR.name)
    return name.removeprefix(f"{prefix.lstrip('_').upper()}_").lower()


def short(text: str, most: int = 60) -> str:
    """One line of at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
