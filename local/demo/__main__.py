"""Replays real flights through the whole stack, checks what came of it, takes the stack down again.

    python -m local.demo [--days 10] [--rate 120000] [--kill scheduler@0.5]

Exit status: 0 when everything agrees with the CSV and nothing is unaccounted for; 1 when not, or when something failed;
130 after Ctrl-C, with everything taken down.
"""

import argparse
import asyncio
import fcntl
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
import psycopg
import stamina
from rich.console import Console
from rich.markup import escape

from local.compose import ComposeStack
from local.demo import story
from local.demo.accident import Accident, Accidents
from local.demo.answers import Answers, ask, open_mailbox
from local.demo.caller import Caller, Refused
from local.demo.catalog import put_catalog, put_schedules, put_timeline
from local.demo.check import differences
from local.demo.connections import Connections
from local.demo.flights import CSV, load
from local.demo.oracle import Expected, expect
from local.demo.pace import Pace
from local.demo.plan import Plan, Shift, make_plan
from local.demo.progress import Bars
from local.demo.replay import Replay
from local.demo.report import Outcome, print_report, write_report
from local.demo.rest import NoRest, Rest
from local.demo.stage import ProcessStage, Stage
from local.processes import ProcessError
from local.stack import SERVICES

_DAYS = 10  # As many as pass in a minute on two cores, the services' start not counted.
_RATE = 120_000.0
_MARKER = "this-is-a-demo"  # A lock is in every stack's directory.
_ENV = {
    "CARILLON_SHARDS": "8",  # Two cores: fewer shards make larger frames. With 64 the same takes half as long again.
    "CARILLON_DISPATCHER_CLAIM_TIME": "2s",  # A killed dispatcher's mails wait for this; real ones can afford more.
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What was typed."""

    days: int
    rate: float
    kill: list[Accident]
    replicas: dict[str, int]
    directory: Path
    compose: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """What the replay leaves."""

    accepted: dict[str, int]
    answers: Answers
    happened: list[str]
    took_s: float
    rested_s: float


def main() -> int:
    """Run the demo; the exit status."""
    options = _options()
    console = Console()
    stamina.instrumentation.set_on_retry_hooks([])  # A retried call is no news here.
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Shells start background jobs with it ignored.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        return _run(options, console)
    except KeyboardInterrupt:
        console.print("Stopped; everything has been taken down.")
        return 130
    except (ProcessError, NoRest, Refused, grpc.aio.AioRpcError) as error:
        console.print(f"[red]The demo failed.[/red] {escape(str(error))}", highlight=False)
        console.print(f"Logs are in {options.directory / 'logs'}.", highlight=False)
        return 1


def _run(options: Options, console: Console) -> int:
    make_room(options.directory)
    plan, expected = make_plan(load(), options.days), expect(CSV, options.days)
    began_s = time.monotonic()
    kind = ComposeStack if options.compose else ProcessStage
    stack: Stage = kind(options.directory, replicas=options.replicas, test_clock=story.START, env=_ENV)
    with console.status("Starting Postgres, NATS, a mailbox and the four services …"):
        stack.start()
    try:
        console.print(f"The stack is up after {time.monotonic() - began_s:.1f} s; mailbox at {stack.mailbox_url}")
        replayed = asyncio.run(_replay(options, stack, plan, expected, console))
    finally:
        with console.status("Taking the stack down …"):
            stack.stop()
    arrivals = open_mailbox(options.directory / "mailbox", story.FEED)
    outcome = Outcome(
        plan=plan,
        expected=expected,
        accepted=replayed.accepted,
        answers=replayed.answers,
        arrivals=arrivals,
        differences=differences(expected, replayed.accepted, replayed.answers, arrivals),
        killed=replayed.happened,
        took_s=replayed.took_s,
        rested_s=replayed.rested_s,
    )
    write_report(outcome, options.directory / "report.json")
    print_report(outcome, options.directory, console)
    return 0 if outcome.is_exact else 1


def make_room(directory: Path) -> None:
    """Make it a demo's own, without what an earlier one left in it.

    Raises ProcessError where it holds anything else, such as another stack's data, or where a demo is still running.
    """
    marker = directory / _MARKER
    if marker.exists():
        with (directory / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ProcessError(f"Another demo is running in {directory}.") from None
            shutil.rmtree(directory)
    elif directory.exists() and any(directory.iterdir()):
        raise ProcessError(
            f"{directory} holds what no demo has marked as its own (with the file {_MARKER}). Name another --directory,"
            " or delete it if an older demo has left it."
        )
    directory.mkdir(parents=True, exist_ok=True)
    marker.touch()


async def _replay(options: Options, stack: Stage, plan: Plan, expected: Expected, console: Console) -> Replayed:
    bars = Bars(console, plan, messages=len(expected.messages))
    async with (
        Connections(stack) as connections,
        await psycopg.AsyncConnection.connect(stack.postgres_url, autocommit=True) as clock_conn,
        await psycopg.AsyncConnection.connect(stack.postgres_url, autocommit=True) as rest_conn,
    ):
        await put_catalog(connections.digest, plan, webhook_url=f"{stack.hooks_url}/{story.FEED}")
        await put_timeline(connections.scheduler)
        schedules = await put_schedules(connections.intake)
        caller, rest = Caller(connections.intake), Rest(rest_conn)
        accidents = Accidents(stack, options.kill)

        def begins(number: int, shift: Shift) -> None:
            stack.raise_if_failed()
            bars.shift(number, shift)
            accidents.shift(number, len(plan.shifts))

        pace = Pace(clock_conn, at=story.START, rate=options.rate)
        began_s = time.monotonic()
        async with bars.shown(stack.mailbox_url), accidents:
            await Replay(caller=caller, pace=pace, rest=rest, on_shift=begins).run(plan)
        took_s = time.monotonic() - began_s
        return Replayed(
            accepted={**caller.counts, "schedules": len(schedules)},
            answers=await ask(connections),
            happened=accidents.happened,
            took_s=took_s,
            rested_s=rest.waited_s,
        )


def _options() -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m local.demo", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--days", type=int, default=_DAYS, help=f"how many days of July 2013 to replay ({_DAYS})")
    parser.add_argument("--rate", type=float, default=_RATE, help=f"business seconds per second ({_RATE:.0f})")
    parser.add_argument(
        "--kill",
        type=Accident.parse,
        action="append",
        default=[],
        metavar="SERVICE@FRACTION",
        help="kill -9 a service after that fraction of the replay, and start it again; may be given several times",
    )
    parser.add_argument(
        "--replicas",
        type=_replicas,
        default={},
        metavar="N|SERVICE=N,…",
        help="processes of each service, or of some (1)",
    )
    parser.add_argument("--directory", type=Path, default=Path("var/demo"), help="logs, mails, report (var/demo)")
    parser.add_argument(
        "--compose", action="store_true", help="play on deploy/compose.yaml, with the images of `make image`"
    )
    parsed = parser.parse_args()
    if not 1 <= parsed.days <= story.LAST_DAY:
        parser.error(f"--days must be 1 to {story.LAST_DAY}, got {parsed.days}")
    return Options(**vars(parsed))


def _replicas(text: str) -> dict[str, int]:
    """From `3` or `dispatcher=3,digest=2`. Raises ValueError."""
    if text.isdecimal():
        text = ",".join(f"{name}={text}" for name in SERVICES)
    counts = {name: int(count) for name, _, count in (part.partition("=") for part in text.split(","))}
    if not set(counts) <= set(SERVICES) or min(counts.values()) < 1:
        raise ValueError(f"expected a number, or numbers for {', '.join(SERVICES)}, got {text!r}")
    return counts


if __name__ == "__main__":
    sys.exit(main())
