"""Profiles: addresses and credentials of installations by name, so that nobody types them.

    # ~/.config/carillon/config.toml
    [default]
    intake_endpoint = "127.0.0.1:7404"

    [production]
    intake_endpoint = "intake.example.org:443"
    token_file = "~/.config/carillon/production.token"
    tenant = "shop"
    tls = true

A key is the name of an environment variable without CARILLON_, in lower case. The command line wins over the
environment, and the environment over the profile. The table `default` counts when no other is named.
"""

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import typer

DEFAULT: Final = "default"
_PREFIX: Final = "CARILLON_"
_NOT_HERE: Final = frozenset({"profile", "config", "scheduled_time", "job_name"})
_OTHERS: Final = 0o077


class ProfileError(Exception):
    """A profile that cannot be used; the message says why."""


def config_path() -> Path:
    """Where the profiles are unless somebody says otherwise."""
    return Path(typer.get_app_dir("carillon")) / "config.toml"


def read_profile(name: str, path: Path | None) -> Mapping[str, Any]:
    """One profile; empty when none is named and none is there. `path` None: the usual place. Raises ProfileError."""
    where = path or config_path()
    if not where.exists() and path is None and name in ("", DEFAULT):
        return {}
    try:
        profiles = tomllib.loads(where.read_text())
    except OSError as error:
        raise ProfileError(f"{where} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"{where} is not TOML: {error}.") from error
    has_token = any("token" in table for table in profiles.values() if isinstance(table, dict))
    if has_token and where.stat().st_mode & _OTHERS and os.name == "posix":
        raise ProfileError(f"{where} holds a token, and others may read it: chmod 600 {where}")
    if not name and DEFAULT not in profiles:
        return {}
    profile = profiles.get(name or DEFAULT)
    if not isinstance(profile, dict):
        known = ", ".join(sorted(key for key, value in profiles.items() if isinstance(value, dict))) or "none"
        raise ProfileError(f"{where} has no profile {name}; there is {known}.")
    return {key: _value(key, value) for key, value in profile.items()}


def defaults_of(command: Any, profile: Mapping[str, Any]) -> dict[str, Any]:
    """What a profile says for a command and everything below it, as click's default_map. Raises ProfileError."""
    unknown = sorted(profile.keys() - set(_keys(command)))
    if unknown:
        raise ProfileError(f"The profile says {', '.join(unknown)}, which nothing knows.")
    return _defaults(command, profile)


def _value(key: str, value: object) -> object:
    if not isinstance(value, str | bool | int | float):
        raise ProfileError(f"The profile's {key} must be text, a number, or true or false.")
    if isinstance(value, str) and key.endswith("_file"):
        return str(Path(value).expanduser())
    return value


def _defaults(command: Any, profile: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        parameter.name: profile[key] for parameter in command.params if (key := _key(parameter)) in profile
    }
    for name, below in getattr(command, "commands", {}).items():
        found[name] = _defaults(below, profile)
    return found


def _keys(command: Any) -> Iterator[str]:
    yield from filter(None, map(_key, command.params))
    for below in getattr(command, "commands", {}).values():
        yield from _keys(below)


def _key(parameter: Any) -> str:
    """As the parameter is called in a profile; empty when it has no place there."""
    variable = parameter.envvar if isinstance(parameter.envvar, str) else ""
    key = variable.removeprefix(_PREFIX).lower()
    return "" if key in _NOT_HERE else key
