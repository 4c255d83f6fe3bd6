"""Old and new pods side by side on the new schema, as during every upgrade: all numbers are as they must be.

The old code is that of the newest revision before the newest migration. It starts on its own schema; under load the
schema is migrated by today's code, and one of two replicas of each service is replaced by today's. The other one goes
on as it is until the end.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from local.demo import __main__ as demo
from local.demo import stage
from local.demo.flights import CSV
from local.demo.oracle import expect
from local.processes import Process
from local.stack import PROJECT, SERVICES
from tests.support.older_code import NoHistory, extract, newest_before_a_migration


@pytest.fixture
def old_code(tmp_path: Path) -> Path:
    """A directory with it."""
    directory = tmp_path / "old"
    try:
        extract(newest_before_a_migration(), directory)
    except NoHistory as why:
        pytest.skip(f"a git checkout with its history is needed: {why}")
    return directory


class Rollout(stage.ProcessStage):
    """Starts with the old code. What is killed is asked to end, and comes back with today's, on today's schema."""

    old: Path
    migrated: list[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._code = self.old

    def kill(self, service: str, number: int = 0) -> None:
        """As Kubernetes does: asked, and given time."""
        assert self.terminate(service, number) == 0
        if not self.migrated:
            self._code = PROJECT
            self._migrate()
            self.migrated.extend(SERVICES)
        replica = self.replicas[service, number]
        process = self._process(
            f"new-{service}",
            ["-m", f"services.{service}"],
            {"CARILLON_GRPC_PORT": str(replica.grpc_port), "CARILLON_HTTP_PORT": str(replica.http_port)},
        )
        self.replicas[service, number] = replace(replica, process=process)
        self._exits.callback(process.stop, timeout_s=30)

    def _migrate(self) -> None:
        # By the command, since it is another code's turn first.
        for name in SERVICES:
            migration = self._process(f"migrate-{name}", ["-m", f"services.{name}", "migrate"])
            migration.start()
            migration.wait(timeout_s=120)

    def _process(self, name: str, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> Process:
        if not arguments[1].startswith("services."):
            return super()._process(name, arguments, env)
        path = {"PYTHONPATH": f"{self._code}:{self._code / 'gen'}"}
        return Process(
            name,
            [sys.executable, *arguments],
            log=self.directory / "logs" / f"{name}.log",
            env=self._environment() | self._env | dict(env or {}) | path,
            cwd=self._code,
        )


@pytest.mark.timeout(240)
def test_old_and_new_replicas_share_the_work_on_the_new_schema(
    old_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-1, INV-2 and INV-6 while a rollout stands still half-way: nothing lost, doubled or put aside."""
    monkeypatch.setattr(Rollout, "old", old_code, raising=False)
    monkeypatch.setattr(Rollout, "migrated", [], raising=False)
    monkeypatch.setattr(demo, "ProcessStage", Rollout)
    replaced = [f"--kill={service}@{0.1 + number / 50}" for number, service in enumerate(SERVICES)]
    options = ["--days", "1", "--replicas", "2", "--directory", str(tmp_path / "demo"), *replaced]
    monkeypatch.setattr(sys, "argv", ["demo", *options])
    assert demo.main() == 0
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert sorted(report["killed"]) == sorted(SERVICES)
    assert (report["differences"], report["unaccounted"]) == ([], 0)
    assert report["messages"] == len(expect(CSV, 1).messages)
    for service in SERVICES:
        log = (tmp_path / "demo" / "logs" / f"new-{service}.log").read_text()
        assert "Ready." in log
        assert log.count("Traceback") == 0, log[log.find("Traceback") - 500 :][:2500]


def test_a_migration_that_was_published_is_never_edited(old_code: Path) -> None:
    """It ran elsewhere already: what it would do otherwise now would be missing there."""
    for then in old_code.glob("services/*/migrations/[0-9]*.py"):
        now = PROJECT / then.relative_to(old_code)
        assert now.read_text() == then.read_text(), now
