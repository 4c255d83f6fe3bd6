"""Looks for a history that breaks an invariant: python -m tests.simulation --seeds 10000 [--first 0] [--jobs 2]."""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from multiprocessing import Pool

from tests.simulation.checker import Violation, violations_of
from tests.simulation.shrink import explained
from tests.simulation.world import simulate

_CHUNK = 10
_SHOWN = 3


def judge(seed: int) -> tuple[int, list[Violation]]:
    """What is wrong with the history of a seed."""
    return seed, violations_of(simulate(seed))


def main() -> int:
    """Run the seeds; 1 when one of them breaks an invariant."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1_000, help="how many histories")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    told = parser.parse_args()
    seeds = range(told.first, told.first + told.seeds)
    failures: list[tuple[int, list[Violation]]] = []
    for seed, violations in _all(seeds, told.jobs):
        if violations:
            failures.append((seed, violations))
            print(f"\r\033[K{seed}: {violations[0]}", flush=True)
    for seed, violations in failures[:_SHOWN]:
        print(f"\n{explained(seed, violations)}")
    print(f"{told.seeds:,} histories, {len(failures):,} of them broken.")
    return 1 if failures else 0


def _all(seeds: range, jobs: int) -> Iterator[tuple[int, list[Violation]]]:
    if jobs <= 1 or len(seeds) <= _CHUNK:
        yield from _with_progress(map(judge, seeds), len(seeds))
        return
    with Pool(jobs) as pool:
        yield from _with_progress(pool.imap_unordered(judge, seeds, chunksize=_CHUNK), len(seeds))


def _with_progress(judged: Iterable[tuple[int, list[Violation]]], total: int) -> Iterator[tuple[int, list[Violation]]]:
    began_s = time.perf_counter()
    for done, one in enumerate(judged, start=1):
        if sys.stderr.isatty() or done % 500 == 0 or done == total:
            rate = done / (time.perf_counter() - began_s)
            end = "\r" if sys.stderr.isatty() and done < total else "\n"
            print(f"{done:,} of {total:,} histories, {rate:.0f}/s", end=end, file=sys.stderr, flush=True)
        yield one


if __name__ == "__main__":
    sys.exit(main())
