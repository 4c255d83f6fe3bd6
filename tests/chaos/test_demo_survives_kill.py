"""INV-1 and INV-2 on the main job: kill -9 any service in the middle, start it again, get the same final numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from local.demo.flights import CSV
from local.demo.oracle import expect
from local.stack import PROJECT, SERVICES

# Days to replay, and the fractions of that after which to kill. With two days, and what drains after them, the first
# timers of the trials fire in the last shift.
_EARLY, _LATE_TOO = (1, ("0.1", "0.17")), (2, ("0.15", "0.97"))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("service", SERVICES)
def test_final_numbers_are_the_same(tmp_path: Path, service: str) -> None:
    """Killed twice, while calls, frames and mails are under way: nothing lost, nothing doubled, all as computed."""
    days, fractions = _LATE_TOO if service == "scheduler" else _EARLY
    kills = [option for fraction in fractions for option in ("--kill", f"{service}@{fraction}")]
    command = [sys.executable, "-m", "local.demo", "--days", str(days), "--directory", str(tmp_path / "demo"), *kills]
    demo = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=170, check=False)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["killed"] == [service, service]
    assert report["differences"] == []
    assert report["unaccounted"] == 0
    assert report["messages"] == len(expect(CSV, days).messages)
    if service != "dispatcher":
        assert report["resent"] == 0
