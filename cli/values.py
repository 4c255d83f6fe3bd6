"""What people type, read: times, durations, JSON, words of an enum, files of messages."""

import json
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import typer
import yaml
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from libs.settings_base import parse_duration
from libs.wire import to_duration, to_timestamp

TIME_HELP: Final = "2026-12-01T09:00:00+01:00, +2h, -30m, or now"
MessageT = TypeVar("MessageT", bound=Message)


class _Plain(yaml.SafeLoader):
    """YAML as JSON has it: `off` is a cadence and no boolean, and times are text."""


_Plain.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith((":bool", ":timestamp"))]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Plain.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|false"), ["t", "f"])


def time_of(text: str, option: str) -> Timestamp:
    """An instant; relative ones count from this machine's clock. BadParameter when it is none."""
    now = datetime.now(UTC)
    try:
        if text == "now":
            return to_timestamp(now)
        if text[:1] in ("+", "-") and text[1:2].isdigit():
            distance = parse_duration(text[1:])
            return to_timestamp(now + distance if text[0] == "+" else now - distance)
        found = datetime.fromisoformat(text)
        if found.tzinfo is None:
            raise typer.BadParameter(f"{text} does not say in which zone: end it with Z or +01:00.", param_hint=option)
        return to_timestamp(found.astimezone(UTC))
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(f"{text} is no time: {TIME_HELP}.", param_hint=option) from error


def duration_of(text: str, option: str) -> Duration:
    """A duration such as 90s, 1h30m or 30d; BadParameter when it is none."""
    try:
        return to_duration(parse_duration(text))
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(f"{text} is no duration: 90s, 1h30m, 30d.", param_hint=option) from error


def json_object_of(text: str, option: str) -> str:
    """A JSON object, given as such, as @file, or as @- for standard input; empty stays empty."""
    if text.startswith("@"):
        text = sys.stdin.read() if text == "@-" else Path(text[1:]).read_text()
    if not text.strip():
        return ""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"it is not JSON: {error}.", param_hint=option) from error
    if not isinstance(found, dict):
        raise typer.BadParameter("it is JSON, but no object.", param_hint=option)
    return text


def enum_of(enum: Any, text: str, option: str) -> Any:
    """An enum's value by its short name: fired for TIMER_STATE_FIRED; BadParameter when there is none."""
    values = {name.lower(): number for name, number in enum.items()}
    prefix = _common_prefix(list(values))
    short = {name.removeprefix(prefix): number for name, number in values.items() if number}
    if text.lower() not in short:
        raise typer.BadParameter(f"{text} is none of {', '.join(short)}.", param_hint=option)
    return short[text.lower()]


def enums_of(enum: Any, texts: Sequence[str], option: str) -> list[Any]:
    """Several of them."""
    return [enum_of(enum, text, option) for text in texts]


def messages_in(path: Path, kind: type[MessageT]) -> list[MessageT]:
    """The messages of a YAML or JSON file, one or a list, fields as in proto JSON; BadParameter, OSError."""
    try:
        found = yaml.load(path.read_text(), Loader=_Plain)  # noqa: S506 - a SafeLoader that resolves less.
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} is neither YAML nor JSON: {error}.", param_hint="FILE") from error
    many = found if isinstance(found, list) else [found]
    return [message_of(one, kind, f"{path}, number {number}") for number, one in enumerate(many, 1)]


def message_of(plain: object, kind: type[MessageT], where: str) -> MessageT:
    """A message from proto JSON; BadParameter says where and what is wrong."""
    if not isinstance(plain, dict):
        raise typer.BadParameter(f"{where}: there is no object.", param_hint="FILE")
    try:
        return ParseDict(_with_payloads(plain), kind())
    except ParseError as error:
        raise typer.BadParameter(f"{where}: {error}.", param_hint="FILE") from error


def _with_payloads(plain: Any) -> Any:
    """The same, with payloads that are written out as objects made the text that the contracts want."""
    if isinstance(plain, list):
        return [_with_payloads(one) for one in plain]
    if not isinstance(plain, dict):
        return plain
    return {
        key: _text(value) if key == "payload" and isinstance(value, dict) else _with_payloads(value)
        for key, value in plain.items()
    }


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _common_prefix(names: Sequence[str]) -> str:
    """What comes before `unspecified`, which every enum of the contracts has."""
    return next(name for name in names if name.endswith("unspecified")).removesuffix("unspecified")
