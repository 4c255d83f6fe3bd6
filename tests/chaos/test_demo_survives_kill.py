"""INV-1 and INV-2 on the main job: kill -9 any service in the middle, start it again, get the same final numbers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from local.demo.flights import CSV
from local.demo.oracle import expect
from local.stack import PROJECT, SERVICES

# Days to replay, and the fractions of that after which to kill. With two days, and what drains after them, the first
# timers of the trials fire in the last shift.
_EARLY, _LATE_TOO = (1, ("0.1", "0.17")), (2, ("0.15", "0.97"))


def _demo(tmp_path: Path, days: int, *options: str) -> dict[str, Any]:
    """The report of a run that ended well."""
    command = [sys.executable, "-m", "local.demo", "--days", str(days), "--directory", str(tmp_path / "demo"), *options]
    demo = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=170, check=False)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    report: dict[str, Any] = json.loads((tmp_path / "demo" / "report.json").read_text())
    return report


@pytest.mark.timeout(180)
@pytest.mark.parametrize("service", SERVICES)
def test_final_numbers_are_the_same(tmp_path: Path, service: str) -> None:
    """Killed twice, while calls, frames and mails are under way: nothing lost, nothing doubled, all as computed."""
    days, fractions = _LATE_TOO if service == "scheduler" else _EARLY
    report = _demo(tmp_path, days, *(f"--kill={service}@{fraction}" for fraction in fractions))
    assert report["killed"] == [service, service]
    assert report["differences"] == []
    assert report["unaccounted"] == 0
    assert report["messages"] == len(expect(CSV, days).messages)
    if service != "dispatcher":
        assert report["resent"] == 0


@pytest.mark.timeout(180)
def test_two_replicas_of_every_service_one_of_each_killed_give_the_same_numbers(tmp_path: Path) -> None:
    """Shards divided, frames and deliveries shared, while one replica after the other dies under calls and mails."""
    kills = [f"--kill={service}@{0.1 + number / 25}" for number, service in enumerate(SERVICES)]
    report = _demo(tmp_path, 1, "--replicas", "2", *kills)
    assert sorted(report["killed"]) == sorted(SERVICES)
    assert (report["differences"], report["unaccounted"]) == ([], 0)
