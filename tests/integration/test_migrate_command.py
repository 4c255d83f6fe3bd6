"""`python -m services.<name> migrate`, as the chart's Job and the compose stack run it."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest
from pydantic import SecretStr

from libs.migrations import pending_revisions
from libs.settings import PostgresSettings
from local.stack import PROJECT, SERVICES


@pytest.mark.timeout(240)
def test_every_service_brings_its_own_schema_up_to_date(postgres_url: str) -> None:
    """All at once on an empty database: each ends well, and no schema lacks a revision."""
    environment = {**os.environ, "CARILLON_POSTGRES_URL": postgres_url}
    with ExitStack() as running:
        commands = [
            running.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", f"services.{name}", "migrate"],
                    cwd=PROJECT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            for name in SERVICES
        ]
        said = {name: command.communicate()[0] for name, command in zip(SERVICES, commands, strict=True)}
    settings = PostgresSettings(url=SecretStr(postgres_url))
    for name, command in zip(SERVICES, commands, strict=True):
        assert command.returncode == 0, said[name]
        assert pending_revisions(settings, name, PROJECT / "services" / name / "migrations") == ()


@pytest.mark.parametrize("command", ["serve", "migrate"])
def test_postgres_away_at_the_start_is_told_in_a_line(command: str) -> None:
    """In the log, as JSON and without a traceback; the status makes Kubernetes try again."""
    environment = {
        **os.environ,
        "CARILLON_POSTGRES_URL": "postgresql://postgres@127.0.0.1:1/x",
        "CARILLON_TELEMETRY_LOG_FORMAT": "json",
    }
    ended = subprocess.run(
        [sys.executable, "-m", "services.intake", command],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 1
    said = [json.loads(line) for line in (ended.stdout + ended.stderr).splitlines()]
    assert [(one["message"], one["reason"]) for one in said] == [("Could not run.", "POSTGRES_UNAVAILABLE")]
