"""Many commands from a file, a JSON object a line, in batches. Run again, what was stored is not stored again.

The idempotency key of a batch follows from what is in it and from where in the file it is: an interrupted run is
finished by running it again, within the seven days that keys are kept.
"""

import hashlib
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, Final, Generic

import grpc
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from cli.connection import refusal_text
from cli.output import as_json, show_json
from cli.session import Exit, Session
from cli.values import MessageT, message_of

BATCH: Final = 500
_ATTEMPTS: Final = 8
_WITHIN: Final = timedelta(minutes=5)
_LONGEST_LINE: Final = 512 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch(Generic[MessageT]):
    """Some lines of a file; `end_byte` is how far it has been read then."""

    key: str
    messages: list[MessageT]
    lines: list[int]
    end_byte: int


@dataclass(kw_only=True, slots=True)
class Tally:
    """What came of the lines so far."""

    accepted: int = 0
    refused: int = 0
    error: str = ""

    @property
    def code(self) -> int:
        """The exit code."""
        if not self.refused and not self.error:
            return Exit.DONE
        return Exit.NOT_ALL if self.accepted else Exit.REFUSED


async def send_file(
    session: Session,
    path: Path,
    kind: type[MessageT],
    send: Callable[[Batch[MessageT]], Awaitable[Any]],
    *,
    key: str = "",
) -> int:
    """Send what the file (`-`: standard input) has, telling of each line or only of those refused; the exit code.

    `send` answers with `results`, one per message. `key` makes another run of the same file a new one. BadParameter
    where a line is none before anything was sent.
    """
    # Retries are imported with what they bring only where somebody sends many.
    from cli.retries import persistently

    tally = Tally()
    with _opened(path) as file, _progress(session, path) as advance:
        try:
            for batch in batches(file, kind, key):
                try:
                    answer = await persistently(lambda batch=batch: send(batch), attempts=_ATTEMPTS, within=_WITHIN)  # type: ignore[misc]
                except grpc.aio.AioRpcError as error:
                    tally.error = f"Stopped at line {batch.lines[0]}: {refusal_text(error)}"
                    break
                _count(session, tally, batch, answer.results)
                advance(batch.end_byte)
        except typer.BadParameter as error:
            if not (tally.accepted or tally.refused):
                raise
            tally.error = f"Stopped: {error.message}"
    _tell(session, tally)
    return tally.code


def batches(file: BinaryIO, kind: type[MessageT], key: str) -> Iterator[Batch[MessageT]]:
    """The file's messages in order; BadParameter where a line is none."""
    messages: list[MessageT] = []
    lines: list[int] = []
    digest, size, end_byte, number = hashlib.sha256(key.encode()), 0, 0, 0
    while line := file.readline(_LONGEST_LINE + 1):
        number, end_byte = number + 1, end_byte + len(line)
        if len(line) > _LONGEST_LINE:
            raise typer.BadParameter(f"line {number} is longer than 512 KiB.", param_hint="--file")
        if not line.strip():
            continue
        # What a call may hold is bounded in bytes too.
        if messages and (len(messages) == BATCH or size + len(line) > 2 << 20):
            yield Batch(key=digest.hexdigest(), messages=messages, lines=lines, end_byte=end_byte - len(line))
            messages, lines, size = [], [], 0
            digest = hashlib.sha256(f"{key}:{number}".encode())
        messages.append(message_of(_plain(line, number), kind, f"line {number}"))
        lines.append(number)
        size += len(line)
        digest.update(line)
    if messages:
        yield Batch(key=digest.hexdigest(), messages=messages, lines=lines, end_byte=end_byte)


def _plain(line: bytes, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise typer.BadParameter(f"line {number} is not JSON: {error}.", param_hint="--file") from error


def _opened(path: Path) -> AbstractContextManager[BinaryIO]:
    return nullcontext(sys.stdin.buffer) if str(path) == "-" else path.open("rb")


class _progress:  # noqa: N801 - used as the context manager that it is.
    """A bar on a terminal, over the bytes of the file."""

    def __init__(self, session: Session, path: Path) -> None:
        console = Console(stderr=True)
        is_shown = console.is_terminal and not session.is_json and path.is_file()
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True) if is_shown else None
        self._size = path.stat().st_size if is_shown else 0

    def __enter__(self) -> Callable[[int], None]:
        if (progress := self._progress) is None:
            return lambda _: None
        progress.start()
        task = progress.add_task("Sending", total=self._size)
        return lambda end_byte: progress.update(task, completed=end_byte)

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()


def _count(session: Session, tally: Tally, batch: Batch[Any], results: Any) -> None:
    for line, result in zip(batch.lines, results, strict=True):
        is_refused = result.HasField("error")
        tally.refused += is_refused
        tally.accepted += not is_refused
        if session.is_json:
            show_json({"line": line, **as_json(result)}, is_line=True)
        elif is_refused:
            typer.echo(f"line {line}: {refused_text(result.error)}", err=True)


def _tell(session: Session, tally: Tally) -> None:
    if not session.is_json:
        typer.echo(f"{tally.accepted:,} accepted, {tally.refused:,} refused.")
    if tally.error:
        typer.echo(f"{tally.error}\nRun it again when that is mended: what is stored is not stored again.", err=True)


def refused_text(error: Any) -> str:
    """Why one item of a call was refused."""
    field = f" ({error.field})" if error.field else ""
    return f"{error.message}{field}, {error.reason}"


def show_results(session: Session, answer: Any, done: str) -> int:
    """Tell what a call with `results` came to; the exit code. `done` is said of each accepted one, before its id."""
    refused = [one for one in answer.results if one.HasField("error")]
    if session.is_json:
        show_json(answer)
    else:
        for one in answer.results:
            if one.HasField("error"):
                typer.echo(f"Refused: {refused_text(one.error)}", err=True)
            else:
                typer.echo(" ".join(filter(None, (done, one.id))))
        say_applied(answer)
    if not refused:
        return Exit.DONE
    return Exit.REFUSED if len(refused) == len(answer.results) else Exit.NOT_ALL


def say_applied(answer: Any) -> None:
    """Say so, where what was accepted has not been applied yet."""
    if not answer.is_applied:
        typer.echo("Accepted and durable, and not yet applied.", err=True)
