"""Profiles say what nobody wants to type; the environment and the command line say it louder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from carillon.intake.v1 import intake_pb2 as intake

from cli.main import app
from cli.session import SERVICES
from tests.support.fake_services import FakeServices, Ran, fake_services


@pytest.fixture
def services() -> Iterator[FakeServices]:
    """Cancel everything."""
    with fake_services() as found:
        found.answers["Cancel"] = intake.CancelResponse(is_applied=True)
        yield found


def run(services: FakeServices, path: Path, text: str, *arguments: str, **environment: str) -> Ran:
    """Cancel, with a file of profiles and nothing known otherwise."""
    path.write_text(text.replace("ADDRESS", services.address))
    path.chmod(0o600)
    known = {"CARILLON_INTAKE_ENDPOINT": "", "CARILLON_CONFIG": str(path), **environment}
    return services.run(*arguments, "cancel", "e", **known)


PROFILES = """
[default]
intake_endpoint = "ADDRESS"
tenant = "shop"
token = "of-the-shop"

[bank]
intake_endpoint = "ADDRESS"
tenant = "bank"
"""


def test_a_profile_says_where_and_as_whom(services: FakeServices, tmp_path: Path) -> None:
    """`default` without a name; another by --profile or the environment."""
    path = tmp_path / "config.toml"
    assert run(services, path, PROFILES).code == 0
    assert run(services, path, PROFILES, "--profile", "bank").code == 0
    assert run(services, path, PROFILES, CARILLON_PROFILE="bank").code == 0
    told = [(one.get("carillon-tenant"), one.get("authorization")) for _, _, one in services.calls]
    assert told == [("shop", "Bearer of-the-shop"), ("bank", None), ("bank", None)]


def test_the_environment_wins_over_a_profile(services: FakeServices, tmp_path: Path) -> None:
    """And the command line over both."""
    run(services, tmp_path / "c.toml", PROFILES, CARILLON_TENANT="env")
    path = {"CARILLON_CONFIG": str(tmp_path / "c.toml"), "CARILLON_INTAKE_ENDPOINT": ""}
    services.run("cancel", "e", "--tenant", "line", CARILLON_TENANT="env", **path)
    assert [one["carillon-tenant"] for _, _, one in services.calls] == ["env", "line"]


@pytest.mark.parametrize(
    ("profile", "environment", "line", "sent"),
    [
        ("token_file", {}, ["--token", "line"], "line"),
        ("token", {}, ["--token-file", "LINE"], "from-LINE"),
        ("", {"CARILLON_TOKEN_FILE": "ENV"}, ["--token", "line"], "line"),
        ("", {"CARILLON_TOKEN": "env"}, ["--token-file", "LINE"], "from-LINE"),
        ("token_file", {"CARILLON_TOKEN": "env"}, [], "env"),
        ("token", {"CARILLON_TOKEN_FILE": "ENV"}, [], "from-ENV"),
        ("token_file", {"CARILLON_TOKEN_FILE": "ENV"}, ["--token", "line"], "line"),
        ("token_file", {}, [], "from-PROFILE"),
        ("token_file", {}, ["--token", ""], None),
    ],
)
def test_the_token_that_was_said_louder_counts(
    services: FakeServices,
    tmp_path: Path,
    profile: str,
    environment: dict[str, str],
    line: list[str],
    sent: str | None,
) -> None:
    """As itself or in a file: it decides whose things are cancelled. What is said and empty is none."""
    files = {name: tmp_path / name for name in ("PROFILE", "ENV", "LINE")}
    for name, file in files.items():
        file.write_text(f"from-{name}\n")
    says = {"token": "profile", "token_file": str(files["PROFILE"])}
    text = '[default]\nintake_endpoint = "ADDRESS"\n' + (f'{profile} = "{says[profile]}"\n' if profile else "")
    known = {name: str(files.get(value, value)) for name, value in environment.items()}
    (tmp_path / "c.toml").write_text(text.replace("ADDRESS", services.address))
    (tmp_path / "c.toml").chmod(0o600)
    typed = [str(files.get(word, word)) for word in line]
    where = {"CARILLON_INTAKE_ENDPOINT": "", "CARILLON_CONFIG": str(tmp_path / "c.toml")}
    ran = services.run("cancel", "account:17", *typed, **where, **known)
    assert ran.code == 0, ran.err
    ((_, _, metadata),) = services.calls
    assert metadata.get("authorization") == (f"Bearer {sent}" if sent else None)


@pytest.mark.parametrize(
    ("profile", "environment", "line", "place"),
    [
        ("", {}, ["--token", "a", "--token-file", "b"], "the command line"),
        ("", {"CARILLON_TOKEN": "a", "CARILLON_TOKEN_FILE": "b"}, [], "the environment"),
        ('token = "a"\ntoken_file = "b"', {}, [], "the profile"),
    ],
)
def test_two_tokens_said_equally_loud_are_refused(
    services: FakeServices, tmp_path: Path, profile: str, environment: dict[str, str], line: list[str], place: str
) -> None:
    """Exit code 2, and where they are said: nobody knows who is meant."""
    (tmp_path / "c.toml").write_text(f"[default]\n{profile}\n")
    (tmp_path / "c.toml").chmod(0o600)
    ran = services.run("cancel", "e", *line, CARILLON_CONFIG=str(tmp_path / "c.toml"), **environment)
    assert (ran.code, services.calls) == (2, [])
    assert f"{place} gives both a token and a token file" in " ".join(ran.err.replace("│", " ").split())


def test_help_does_not_show_a_profiles_token(services: FakeServices, tmp_path: Path) -> None:
    """Although it shows defaults."""
    path = tmp_path / "c.toml"
    run(services, path, PROFILES)
    for arguments in (["cancel"], ["audit"], ["catalog", "sync"]):
        ran = services.run(*arguments, "--help", CARILLON_CONFIG=str(path))
        assert ran.code == 0
        assert "of-the-shop" not in ran.out


@pytest.mark.parametrize(
    ("text", "arguments", "says"),
    [
        ("nonsense", [], "is not TOML"),
        ("[default]\ncolour = 'red'", [], "The profile says colour, which nothing knows."),
        ("[default]\ntenant = ['a']", [], "The profile's tenant must be text"),
        ("[default]\n[bank]", ["--profile", "shop"], "has no profile shop; there is bank, default."),
    ],
)
def test_a_profile_that_cannot_be_used_is_refused(
    services: FakeServices, tmp_path: Path, text: str, arguments: list[str], says: str
) -> None:
    """Exit code 2, and why."""
    ran = run(services, tmp_path / "c.toml", text, *arguments)
    assert ran.code == 2
    assert says in ran.err


def test_a_token_that_others_may_read_is_refused(services: FakeServices, tmp_path: Path) -> None:
    """With the command that mends it; a path to a token is no secret."""
    path = tmp_path / "c.toml"
    run(services, path, PROFILES)
    path.chmod(0o644)
    ran = services.run("cancel", "e", CARILLON_CONFIG=str(path))
    assert (ran.code, "chmod 600" in ran.err) == (2, True)
    assert "of-the-shop" not in ran.err


def test_a_token_of_another_profile_counts_too(services: FakeServices, tmp_path: Path) -> None:
    """Others can read it, whichever profile is chosen, or none."""
    path = tmp_path / "c.toml"
    run(services, path, '[bank]\ntenant = "bank"\n[shop]\ntoken = "of-the-shop"\n')
    path.chmod(0o640)
    for arguments in (["--profile", "bank"], []):
        ran = services.run(*arguments, "cancel", "e", CARILLON_CONFIG=str(path))
        assert (ran.code, "chmod 600" in ran.err) == (2, True)


def test_a_profile_may_have_fractions(services: FakeServices, tmp_path: Path) -> None:
    """Of a second, as the command line may; bounds are the same."""
    text = '[default]\nintake_endpoint = "ADDRESS"\ntimeout = 2.5\n'
    assert run(services, tmp_path / "c.toml", text).code == 0
    assert run(services, tmp_path / "c.toml", text.replace("2.5", "0.01")).code == 2


def test_profiles_know_the_options_of_all_commands(services: FakeServices, tmp_path: Path) -> None:
    """Also of those that do not share theirs: audit takes its address from one."""
    path = tmp_path / "c.toml"
    path.write_text('[default]\ndigest_endpoint = "127.0.0.1:1"\n')
    known = {f"CARILLON_{name}_ENDPOINT": "" for name in ("INTAKE", "SCHEDULER", "DIGEST", "DISPATCHER")}
    ran = services.run("audit", CARILLON_CONFIG=str(path), **known)
    assert ran.code == 1
    assert "digest has not answered" in ran.out


def commands_of(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The commands that do something, by what is typed."""
    below = getattr(command, "commands", {})
    if not below:
        yield name, command
    for word, one in below.items():
        yield from commands_of(one, f"{name} {word}".strip())


def test_every_command_says_where_and_as_whom_in_the_same_words() -> None:
    """Who can type one of them can type all: an address for each service asked, and all options of the connection."""
    shared = {"--token", "--token-file", "--tenant", "--tls", "--ca-file", "--cert-file", "--key-file", "--timeout"}
    found = dict(commands_of(typer.main.get_command(app)))
    assert {"audit", "catalog sync", "doctor", "timers list"} <= found.keys()
    for name, command in found.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert options & {f"--{service}-endpoint" for service in SERVICES}, name
        assert shared - options == set(), name
        assert "--endpoint" not in options, name
