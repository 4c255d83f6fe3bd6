"""Tables fit the terminal, and what reads them without one gets them whole."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from carillon.scheduler.v1 import scheduler_pb2 as scheduler
from carillon.scheduler.v1 import timer_pb2 as timer

from cli.output import show_table
from local.stack import PROJECT
from tests.support.fake_services import FakeServices, fake_services

FINDING = "https://carillon.example.org/a/finding " * 8


@pytest.mark.parametrize(
    ("is_terminal", "columns", "is_whole"),
    [(False, None, True), (False, "100", False), (False, "", True), (True, None, False), (True, "500", True)],
)
def test_a_table_is_cut_only_where_somebody_says_how_wide_it_may_be(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_terminal: bool,
    columns: str | None,
    is_whole: bool,
) -> None:
    """The terminal or COLUMNS does; a pipe, a pod's log and a cron mail do not."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    show_table(("service", "finding"), [("scheduler", FINDING.strip())])
    told = capsys.readouterr().out
    assert (FINDING.strip() in told) == is_whole
    assert max(map(len, told.splitlines())) < 600


@pytest.fixture
def services() -> Iterator[FakeServices]:
    """More timers than a pipe holds."""
    with fake_services() as found:
        timers = [timer.Timer(id=f"t{number}", entity="e" * 200) for number in range(1000)]
        found.answers["ListTimers"] = scheduler.ListTimersResponse(timers=timers)
        yield found


@pytest.mark.parametrize("options", [["--json"], []])
def test_a_reader_that_has_enough_is_no_error(services: FakeServices, options: list[str]) -> None:
    """As `| head -1`: exit code 1, as Python's own, and not a word."""
    command = [sys.executable, "-m", "cli", "timers", "list", "--limit", "0", *options]
    environment = {**os.environ, "CARILLON_SCHEDULER_ENDPOINT": services.address}
    with subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as listing:
        assert listing.stdout is not None
        assert listing.stdout.readline()
        listing.stdout.close()
        listing.stdout = None
        _, said = listing.communicate(timeout=30)
    assert (listing.returncode, said) == (1, b"")


def test_an_error_of_no_file_is_not_called_a_files(services: FakeServices, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full is told as such: exit code 1, because it may be otherwise the next time."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cli.output.show_json", fail)
    ran = services.run("timers", "list", "e", "--json")
    assert (ran.code, ran.err) == (1, "It could not go on: [Errno 28] No space left on device\n")
