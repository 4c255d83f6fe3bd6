"""Runs a benchmark and shows what it found.

    python -m tests.bench scheduler [--quick] [--only herd] [--shards 8]
    python -m tests.bench digest [--quick] [--only herd]
    python -m tests.bench intake [--quick] [--only unary]
    python -m tests.bench dispatch [--quick] [--only webhooks]
    python -m tests.bench nats [--quick] [--only publish]
    python -m tests.bench rolling [--quick] [--only restart]

Every figure is measured on fresh servers of its own, with real fsync, in a directory below var/bench that is deleted
afterwards. A full run writes var/bench/<name>.json; one with --quick or --only writes <name>-partial.json, so that what
counts always comes from one run. Exit status 0 when everything could be measured, whatever the figures are; else 1.
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import uvloop
from rich.console import Console
from rich.markup import escape

from tests.bench import digest, dispatch, intake, machine, nats, report, rolling, scheduler
from tests.bench.report import Figure
from tests.bench.rig import Rig, scratch

_BENCHMARKS = {
    "scheduler": scheduler,
    "digest": digest,
    "intake": intake,
    "dispatch": dispatch,
    "nats": nats,
    "rolling": rolling,
}
_SHARDS = 8  # As the demo: on two cores fewer shards make larger frames.
_LIMIT_S = 15 * 60
"""What one figure may take."""


def main() -> None:
    """Read the command line, measure, show."""
    options = _options()
    for name in [name for name in os.environ if name.startswith("CARILLON_")]:
        del os.environ[name]  # The default settings are measured, on servers of the benchmark's own.
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    try:
        sys.exit(uvloop.run(_run(options, console)))
    except KeyboardInterrupt:
        sys.exit(130)


async def _run(options: argparse.Namespace, console: Console) -> int:
    benchmark = _BENCHMARKS[options.benchmark]
    chosen = options.only or list(benchmark.FIGURES)
    began_s = time.perf_counter()
    figures: list[Figure] = []
    async with scratch() as directory:
        about = {
            "title": f"{benchmark.TITLE}, {'quick run' if options.quick else 'full run'}",
            "measured at": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            **machine.describe(directory),
            "durability": "Postgres with fsync and synchronous_commit, NATS with sync_interval: always",
            "shards": options.shards,
            "versions": machine.versions(*benchmark.VERSIONS),
        }
        for name in chosen:

            def say(sentence: str, name: str = name) -> None:
                console.print(
                    f"[dim]{time.perf_counter() - began_s:6.1f} s[/dim] {name}: {escape(sentence)}", highlight=False
                )

            rig = Rig(directory=_made(directory / name), shards=options.shards, is_quick=options.quick, say=say)
            figures += await _measured(name, benchmark.FIGURES[name], rig)
        about["took"] = f"{time.perf_counter() - began_s:.0f} s"
    is_partial = options.quick or options.only
    path = report.write(f"{options.benchmark}-partial" if is_partial else options.benchmark, figures, about)
    report.show(figures, about, console)
    console.print(f"\nWritten to {path}.", highlight=False)
    return int(any(one.value is None for one in figures))


async def _measured(name: str, measure: Callable[[Rig], Awaitable[list[Figure]]], rig: Rig) -> list[Figure]:
    try:
        async with asyncio.timeout(_LIMIT_S):
            found = await measure(rig)
    except Exception as error:  # noqa: BLE001 - one figure that fails must not lose the others.
        why = f"not measured: {type(error).__name__}: {error}"
        rig.say(why)
        return [Figure(figure=name, value=None, unit="", how=why)]
    for one in found:
        rig.say(f"{one.figure}: {'not measured' if one.value is None else report.with_unit(one.value, one.unit)}")
    return found


def _made(directory: Path) -> Path:
    directory.mkdir()
    directory.chmod(0o755)
    return directory


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure Carillon on this machine.")
    parser.add_argument("benchmark", choices=_BENCHMARKS)
    parser.add_argument("--quick", action="store_true", help="small sizes, about three minutes; for trying it out")
    names = sorted({name for one in _BENCHMARKS.values() for name in one.FIGURES})
    parser.add_argument("--only", action="append", choices=names, help="measure only this; may be repeated")
    parser.add_argument("--shards", type=int, default=_SHARDS, help="CARILLON_SHARDS (default %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
