"""Tables fit the terminal, and what reads them without one gets them whole."""

import sys

import pytest

from cli.output import show_table

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
