"""The demo as people run it: real flights, all four services, checked against the CSV."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from local.stack import PROJECT

_DAYS = 4  # With what drains after them more than seven days: reminders and checks of trials are due.


def _demo(directory: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "local.demo", "--days", str(_DAYS), "--directory", str(directory), *options]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.timeout(180)
def test_agrees_with_the_csv(tmp_path: Path) -> None:
    """Exit status 0, nothing unaccounted for, every message as computed, mails kept where the report says."""
    demo = _demo(tmp_path / "demo")
    output, _ = demo.communicate(timeout=170)
    assert demo.returncode == 0, output
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["differences"] == []
    assert report["unaccounted"] == 0
    assert report["resent"] == 0
    assert min(report["timers"][f"timers_{state}"] for state in ("fired", "skipped", "cancelled", "scheduled")) > 0
    assert {job["job"] for job in report["jobs"]} == {"Digest", "Batch", "Timeline", "Schedule"}
    mails = len(list((tmp_path / "demo" / "mailbox").rglob("*.eml")))
    hooks = len(report["subscribers"]["feed"])
    assert mails + hooks == report["parts"]
    assert hooks == report["accepted"]["delays"]


@pytest.mark.timeout(120)
def test_ctrl_c_takes_everything_down(tmp_path: Path) -> None:
    """Interrupted in the middle: exit status 130, and no process of the stack is left."""
    demo = _demo(tmp_path / "demo")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "demo" / "mailbox").rglob("*.eml")):
        assert time.monotonic() < deadline
        assert demo.poll() is None, demo.communicate()[0]
        time.sleep(0.05)
    demo.send_signal(signal.SIGINT)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, output
    assert _processes_in(tmp_path) == []


def _processes_in(directory: Path) -> list[str]:
    """Command lines of processes that name the directory: Postgres, NATS and the mailbox do."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # It ended while we looked.
            continue
        if str(directory) in command:
            found.append(command)
    return found
