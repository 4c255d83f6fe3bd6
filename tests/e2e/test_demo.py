"""The demo as people run it: real flights, all four services, checked against the CSV."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from local.stack import PROJECT
from tests.support.servers import scratch_directory

_DAYS = 4  # With what drains after them more than seven days: reminders and checks of trials are due.


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Where a demo lives."""
    with scratch_directory() as directory:
        yield directory


def _demo(directory: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "local.demo", "--days", str(_DAYS), "--directory", str(directory), *options]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.timeout(180)
def test_agrees_with_the_csv(scratch: Path) -> None:
    """Exit status 0, nothing unaccounted for, every message as computed, mails kept where the report says."""
    demo = _demo(scratch / "demo")
    output, _ = demo.communicate(timeout=170)
    assert demo.returncode == 0, output
    report = json.loads((scratch / "demo" / "report.json").read_text())
    assert report["differences"] == []
    assert report["unaccounted"] == 0
    assert report["resent"] == 0
    assert min(report["timers"][f"timers_{state}"] for state in ("fired", "skipped", "cancelled", "scheduled")) > 0
    assert {job["job"] for job in report["jobs"]} == {"Digest", "Batch", "Timeline", "Schedule"}
    mails = len(list((scratch / "demo" / "mailbox").rglob("*.eml")))
    hooks = len(report["subscribers"]["feed"])
    assert mails + hooks == report["parts"]
    assert hooks == report["accepted"]["delays"]


@pytest.mark.timeout(120)
def test_ctrl_c_takes_everything_down(scratch: Path) -> None:
    """Interrupted in the middle: exit status 130, and no process of the stack is left."""
    demo = _demo(scratch / "demo")
    deadline = time.monotonic() + 60
    while not list((scratch / "demo" / "mailbox").rglob("*.eml")):
        assert time.monotonic() < deadline
        assert demo.poll() is None, demo.communicate()[0]
        time.sleep(0.05)
    demo.send_signal(signal.SIGINT)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, output
    assert _processes_in(scratch) == []


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
