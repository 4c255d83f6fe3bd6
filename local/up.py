"""`make up`: the local stack in the foreground, its addresses in a table, everything stopped with Ctrl-C."""

import argparse
import signal
import threading
from pathlib import Path

from rich.console import Console
from rich.table import Table

from local.processes import ProcessError
from local.stack import SERVICES, Stack

_LOOK_S = 0.5
_FIRST_PORT = 7400


def main() -> int:
    """Run until Ctrl-C, SIGTERM, or the end of a process that should have gone on; the exit status."""
    options = _options()
    console = Console()
    stop = threading.Event()
    with console.status("Starting Postgres, NATS and a mailbox …") as status:
        stack = Stack(
            options.directory,
            replicas=options.replicas,
            first_port=_FIRST_PORT,
            on_progress=status.update,
        )
        try:
            stack.start()
        except ProcessError as error:
            console.print(f"[red]The stack did not start.[/red] {error}", highlight=False)
            return 1
        except KeyboardInterrupt:
            return 130
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        console.print(_table(stack))
        console.print(f"Logs and data are in {stack.directory}. Stop with Ctrl-C.", highlight=False)
        while not stop.wait(_LOOK_S):
            stack.raise_if_failed()
    except ProcessError as error:
        console.print(f"[red]Stopping.[/red] {error}", highlight=False)
        return 1
    finally:
        with console.status("Stopping …"):
            stack.stop()
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make up", description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("var/local"), help="data, logs and mail (var/local)")
    parser.add_argument("--replicas", type=int, default=1, help="processes of each service (1)")
    return parser.parse_args()


def _table(stack: Stack) -> Table:
    table = Table(title="Carillon is up", title_justify="left", title_style="bold")
    for column in ("what", "address", "health and metrics"):
        table.add_column(column, overflow="fold")
    for service in SERVICES:
        for (name, number), replica in stack.replicas.items():
            if name == service:
                table.add_row(replica.process.name, replica.grpc, f"{stack.http(name, number)}/metrics")
    table.add_section()
    table.add_row("mailbox", stack.mailbox_url, f"SMTP {stack.mailbox_smtp}")
    table.add_row("Postgres", stack.postgres_url)
    table.add_row("NATS", stack.nats_url)
    return table


if __name__ == "__main__":
    raise SystemExit(main())
