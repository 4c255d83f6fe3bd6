"""How settings are read: durations, the base class of a group, and `load`, which reports every error at once.

The groups themselves, and the rules for whoever sets them, are in `libs.settings`.
"""

import dataclasses
import difflib
import os
import re
import sys
import typing
from datetime import timedelta
from typing import Annotated, TypeVar

import pydantic
from pydantic import BeforeValidator, TypeAdapter
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from pydantic_settings import SettingsError as SettingsSourceError

from libs.errors import SettingsError

_UNITS = {"d": 86_400_000_000, "h": 3_600_000_000, "m": 60_000_000, "s": 1_000_000, "ms": 1_000, "us": 1}
_SHORT_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:d|h|ms|us|m|s))+")
_ISO_DURATION: TypeAdapter[timedelta] = TypeAdapter(timedelta)


def parse_duration(value: object) -> timedelta:
    """A timedelta from `1h30m`, `PT1H30M` or a timedelta; ValueError for anything else, bare numbers included."""
    if isinstance(value, timedelta):
        return value
    text = value.strip() if isinstance(value, str) else ""
    if _SHORT_DURATION.fullmatch(text):
        parts = re.findall(r"(\d+(?:\.\d+)?)(d|h|ms|us|m|s)", text)
        return timedelta(microseconds=round(sum(float(number) * _UNITS[unit] for number, unit in parts)))
    if text[:1] == "P":
        return _ISO_DURATION.validate_python(text)
    raise ValueError("a duration is written like 30s, 1h30m, 250ms, 7d or PT30S")


def format_duration(value: timedelta) -> str:
    """The short form that `parse_duration` reads: `1h30m`, `250ms`, `0s`."""
    rest = value // timedelta(microseconds=1)
    parts = []
    for unit, size in _UNITS.items():
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def _split_commas(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


T = TypeVar("T")

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)
MILLISECOND = timedelta(milliseconds=1)

Duration = Annotated[timedelta, BeforeValidator(parse_duration)]
CommaSeparated = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_commas)]


class Settings(BaseSettings):
    """A group of settings; subclasses give `env_prefix` and fields with descriptions."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_ignore_empty=True, populate_by_name=True, hide_input_in_errors=True
    )

    @classmethod
    def variable_of(cls, field: str) -> str:
        """The environment variable that sets `field`."""
        alias = cls.model_fields[field].validation_alias
        return alias if isinstance(alias, str) else f"{cls.model_config.get('env_prefix', '')}{field}".upper()


def load(cls: type[T]) -> T:
    """Read a group, or a dataclass whose fields are groups, from the environment.

    Raises SettingsError whose message lists everything that is wrong in all groups, one line per problem; values of
    secrets are not shown.
    """
    problems: list[str] = []
    loaded = _load_into(cls, problems)
    if problems:
        raise SettingsError("The settings are not valid:\n" + "\n".join(f"  {line}" for line in problems))
    return typing.cast(T, loaded)


def load_or_exit(cls: type[T]) -> T:
    """As `load`, for `__main__`: prints the problems to stderr and exits with status 2."""
    try:
        return load(cls)
    except SettingsError as error:
        print(error.message, file=sys.stderr)
        raise SystemExit(2) from None


def groups_of(cls: type) -> tuple[type[Settings], ...]:
    """The groups in a dataclass of groups, in its order; a group is its own only group."""
    if issubclass(cls, Settings):
        return (cls,)
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is neither a Settings group nor a dataclass of groups.")
    hints = typing.get_type_hints(cls)
    return tuple(group for field in dataclasses.fields(cls) for group in groups_of(hints[field.name]))


def _load_into(cls: type, problems: list[str]) -> object:
    if issubclass(cls, Settings):
        try:
            return cls()
        except pydantic.ValidationError as error:
            problems += [_problem(cls, details) for details in error.errors()]
        except SettingsSourceError as error:  # A value that should have been JSON, before validation.
            problems.append(f"{cls.model_config.get('env_prefix', '')}*: {error}")
        return None
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is neither a Settings group nor a dataclass of groups.")
    hints = typing.get_type_hints(cls)
    loaded = {field.name: _load_into(hints[field.name], problems) for field in dataclasses.fields(cls)}
    return None if problems else cls(**loaded)


def _problem(group: type[Settings], details: ErrorDetails) -> str:
    text = details["msg"].removeprefix("Value error, ")
    if not details["loc"]:
        return f"{group.model_config.get('env_prefix', '')}*: {text}"
    field = _field_named(group, str(details["loc"][0]))
    variable = group.variable_of(field)
    if details["type"] == "missing":
        return f"{variable}: required, and not set{_misspelling(variable)}"
    return f"{variable}: {text}{_shown(group, field, os.environ.get(variable, ''))}"


def _shown(group: type[Settings], field: str, value: str) -> str:
    """Secrets are not shown, nor is anything that could be an address with a password in it."""
    is_secret = "SecretStr" in str(group.model_fields[field].annotation) or "@" in value
    return "" if is_secret else f", got {value!r}"


def _field_named(group: type[Settings], name: str) -> str:
    """pydantic names a field by its alias where it has one."""
    return next((field for field, info in group.model_fields.items() if info.validation_alias == name), name)


def _misspelling(variable: str) -> str:
    near = difflib.get_close_matches(variable, [name for name in os.environ if name.startswith("CARILLON_")], n=1)
    return f" (there is {near[0]})" if near else ""
