"""The `carillon` command against real services: what its READMEs show, and one story from end to end."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from local.stack import PROJECT, SERVICES, Stack
from tests.support.servers import scratch_directory

pytestmark = pytest.mark.timeout(120)
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """One replica of each service, open to everybody."""
    with scratch_directory() as directory, Stack(directory / "stack") as found:
        yield found


@pytest.fixture
def environment(stack: Stack) -> dict[str, str]:
    """Where everything is."""
    endpoints = {f"CARILLON_{name.upper()}_ENDPOINT": stack.grpc(name) for name in SERVICES}
    return {**endpoints, "CARILLON_NATS_URL": stack.nats_url, "CARILLON_CONFIG": ""}


@pytest.fixture
def run_line(environment: dict[str, str]) -> Callable[[str], None]:
    """Runs a line as a shell would."""

    def run_it(line: str) -> None:
        result = CliRunner().invoke(app, shlex.split(line, comments=True)[1:], env=environment)
        assert result.exit_code == 0, f"{line}\n{result.output}"

    return run_it


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    """Runs a command with --json; what it wrote: one document, or a list of those that have a line each."""

    def run_it(*arguments: str, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [*arguments, "--json"], env=environment)
        assert result.exit_code == code, result.output
        return _read(result.stdout)

    return run_it


@pytest.fixture
def following(environment: dict[str, str]) -> Callable[..., Any]:
    """Follows in a process of its own until one thing has been told, while something is done again and again."""

    def follow(only: str, again: Callable[[], object]) -> Any:
        arguments = [
            sys.executable,
            "-m",
            "cli",
            "tail",
            "--only",
            only,
            "--interval",
            "50ms",
            "--count",
            "1",
            "--json",
        ]
        with subprocess.Popen(
            arguments, cwd=PROJECT, env={**os.environ, **environment}, stdout=subprocess.PIPE
        ) as tail:
            try:
                for _ in range(60):
                    again()
                    with suppress(subprocess.TimeoutExpired):
                        return json.loads(tail.communicate(timeout=0.5)[0])
            finally:
                tail.kill()
        raise AssertionError("Nothing was told.")

    return follow


@pytest.mark.parametrize("readme", ["README.md", "cli/README.md"])
def test_what_a_readme_shows_can_be_typed(
    run_line: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readme: str
) -> None:
    """Every command of its shell blocks succeeds, one after the other, in an empty directory; those of Docker aside."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```sh\n(.*?)```", (PROJECT / readme).read_text(), re.DOTALL)
    shown = "".join(one for one in blocks if "carillon " in one and "docker " not in one)
    assert shown.count("carillon ") > 5
    for script in re.split(r"^(carillon .*)\n", shown, flags=re.MULTILINE):
        if script.startswith("carillon "):
            run_line(script)
        else:
            subprocess.run(["bash", "-eu", "-c", script], check=True, timeout=10)


@pytest.mark.parametrize("name", SERVICES)
def test_the_readme_names_the_ports_that_make_up_gives_out(name: str) -> None:
    """Two for each service, in their order, after the four of mailbox, Postgres and NATS."""
    port = 7404 + 2 * SERVICES.index(name)
    assert f"CARILLON_{name.upper()}_ENDPOINT=127.0.0.1:{port}" in (PROJECT / "README.md").read_text()


CATALOG = (
    "notification_types: [{id: story/told, name: Told}, {id: story/kept, name: Kept, default_cadence: four-hourly}]"
)
CADENCE = "{id: four-hourly, external: {batch: story}}"
SUBSCRIBER = "{id: eve, email: eve@example.org, zone: Europe/Berlin}"
TIMELINE = """
name: story
steps:
  - {name: remind, offset: 3600s, target: {notification: {type: story/told, subscribers: [eve], payload: {day: 1}}}}
"""


@pytest.fixture
def known(run: Run, tmp_path: Path) -> None:
    """Eve, a cadence, and two types."""
    (tmp_path / "cadence.yaml").write_text(CADENCE)
    (tmp_path / "eve.yaml").write_text(SUBSCRIBER)
    (tmp_path / "types.yaml").write_text(CATALOG)
    run("cadences", "put", str(tmp_path / "cadence.yaml"))
    run("subscribers", "put", str(tmp_path / "eve.yaml"))
    run("catalog", "sync", str(tmp_path / "types.yaml"), "--yes")


@pytest.mark.usefixtures("known")
def test_a_notification_is_followed_and_explained(run: Run, following: Callable[..., Any]) -> None:
    """Tail tells of its delivery; its story goes from digest to the dispatcher; audit finds everything."""
    notify = ("notify", "story/told", "--to", "eve", "--entity", "story:1")
    first, again = run(*notify, "--key", "once"), run(*notify, "--key", "once")
    assert first == again
    told = following("deliveries", lambda: run(*notify))
    assert (told["kind"], told["object"]["subscriber"]) == ("delivery", "eve")
    story = run("explain", first["results"][0]["id"])
    assert {"digest", "dispatcher"} <= {one["service"] for one in story["entries"]}
    times = [one["time"] for one in story["entries"]]
    assert times == sorted(times)
    assert run("audit")["is_accounted"]


@pytest.mark.usefixtures("known")
def test_a_batch_is_triggered_once_for_its_window(run: Run) -> None:
    """The second run of a CronJob finds nothing to do, and the digest has both items."""
    for shop in ("Mitte", "Nord"):
        run("notify", "story/kept", "--to", "eve", "--payload", json.dumps({"shop": shop}))
    waiting = run("digests", "waiting", "eve")
    assert waiting["items"] == "2"
    trigger = ("batch", "trigger", "story", "--window-from-schedule", "--schedule", "* * * * *")
    scheduled = datetime.now(UTC).isoformat()
    first, second = (run(*trigger, "--scheduled-time", scheduled) for _ in range(2))
    assert (first["windows"], first["isRepeated"]) == ("1", False)
    assert (second["windows"], second["isRepeated"]) == ("0", True)


@pytest.mark.usefixtures("known")
def test_timers_and_timelines_do_as_they_are_told(run: Run, tmp_path: Path) -> None:
    """Started, seen, held, let go, cancelled."""
    (tmp_path / "story.yaml").write_text(TIMELINE)
    assert run("timelines", "put", str(tmp_path / "story.yaml"))["version"] == 1
    run("timelines", "start", "story", "account:1")
    run("schedule", "account:1", "--in", "30d", "--event", "trial.over")
    assert len(run("timers", "list", "account:1", "--state", "scheduled")) == 2
    assert run("timers", "pause", "account:1", "--timeline", "story")["timers"] == "1"
    assert run("timers", "resume", "account:1")["timers"] == "1"
    assert run("cancel", "account:1", "--cause", "paid")["timers"] == "2"


@pytest.mark.usefixtures("known")
def test_events_are_followed_on_nats(run: Run, following: Callable[..., Any]) -> None:
    """As they are published."""
    told = following("events", lambda: run("schedule", "account:2", "--in", "0s", "--event", "trial.over"))
    assert (told["object"]["subject"], told["object"]["type"]) == ("account:2", "trial.over")


def test_the_doctor_finds_nothing_and_then_something(run: Run, stack: Stack) -> None:
    """All four answer and agree; one that stops is found, by its name."""
    found = run("doctor")
    assert found["isWell"], found
    assert {one["check"] for one in found["findings"]} >= {
        "connection",
        "credential",
        "clock",
        "NATS",
        "backlog",
        "shards",
    }
    stack.kill("dispatcher")
    try:
        found = run("doctor", code=1)
        assert [one["service"] for one in found["findings"] if one["verdict"] == "bad"] == ["dispatcher"]
    finally:
        stack.restart("dispatcher")


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines()]
